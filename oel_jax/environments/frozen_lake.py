"""Frozen Lake, 3x3 with two holes (spec 3.3-3.5, 4.2)."""

from oel_jax.environments.boards import frozen_lake_rows
from oel_jax.environments.textarena import TextArenaGame

GAME_SENDER = -1
RULE_TEXT = (
    "Welcome to Frozen Lake!\n\nYou are represented by 'P' on the grid.\nGrid symbols:\n"
    "  ' ' = Frozen surface (safe to walk on)\n  'H' = Hole (fall in and lose!)\n"
    "  'G' = Goal (reach this to win!)\n  'P' = Your current position\n\n"
    "Available actions: up, down, left, right (or w, a, s, d)\n"
    "Type your action as: [up], [down], [left], [right] or [w], [a], [s], [d]\n\n"
    "Objective: Navigate from the start (top-left) to the goal (bottom-right) without falling into "
    "any holes!\n\n"
)


class FrozenLake(TextArenaGame):
    """The raw environment: observations are lists of messages, our own actions among them.

    The history shows every message, so it holds the parsed actions as `[Player]` lines. The rule
    text includes the newlines up to the board, which glues the generic text to `[GAME] Current
    Board`.
    """

    name = "frozen_lake"
    env_id = "FrozenLake-v0-raw"
    options = {"size": 3, "num_holes": 2, "randomize_start_goal": False}
    rule_text = RULE_TEXT

    def _listen(self) -> None:
        _, messages = self._environment.get_observation()
        self.news = ""
        for sender, text, _ in messages:
            if sender == GAME_SENDER:
                self.news += f"\n[GAME] {text}"
                self.history += f"\n[GAME] {text}"
            else:
                self.history += f"\n[Player] {text}"

    def _read_board_id(self, text: str) -> str:
        return "/".join(frozen_lake_rows(text)).replace("P", " ")
