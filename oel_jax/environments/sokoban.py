"""Sokoban, 6x6 with one box (spec 3.3-3.5, 4.2)."""

from oel_jax.environments.boards import sokoban_rows
from oel_jax.environments.textarena import TextArenaGame

RULE_TEXT = (
    "You are solving the Sokoban puzzle. "
    "You are the player and you need to push all boxes to targets.\n"
    "        When you are right next to a box, you can push it by moving in the same direction.\n"
    "        You cannot push a box through a wall, and you cannot pull a box.\n"
    "        On the board, objects are represented as: \n"
    "        - The player (you) appears as 'P' \n"
    "        - Walls are represented with '#' \n"
    "        - Boxes are marked as 'X' \n"
    "        - Empty goals are shown with a 'O'\n"
    "        - Boxes on goals are visualized with '√'\n"
    "        You can also use [w] for up, [a] for left, [s] for down, and [d] for right."
)


class Sokoban(TextArenaGame):
    """The wrapped environment: an observation is the whole transcript as one string.

    The released code finds the new piece after the last occurrence of the previous one, cuts it to
    its first `[GAME]`, and joins the pieces with nothing between them: actions and newlines are
    lost. Under the paper layout the history is the transcript itself.
    """

    name = "sokoban"
    env_id = "Sokoban-v0"
    options = {"dim_room": (6, 6), "num_boxes": 1}
    rule_text = RULE_TEXT

    def _listen(self) -> None:
        _, transcript = self._environment.get_observation()
        unread = transcript.rpartition(self.news)[2] if self.news else transcript
        self.news = unread[unread.index("[GAME]") :]
        self.history = transcript if self.layout == "paper" else self.history + self.news

    def _read_board_id(self, text: str) -> str:
        return "/".join(sokoban_rows(text))
