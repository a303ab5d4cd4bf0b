"""The TextArena adapter: one environment per game, with its randomness kept to itself.

TextArena reseeds Python's global `random` at every reset, draws Frozen Lake boards from it, and
keeps Sokoban's search state in module globals. `_isolated` therefore serialises those calls and
puts the caller's random state back. Steps draw no random numbers and touch only their own
environment, so they run without the lock. NumPy's global generator is never used by these two
games.

TextArena is imported at the first game, not before: it takes about a second (nltk, scipy).
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from oel_jax.base.errors import UserError
from oel_jax.environments.actions import parse_action
from oel_jax.environments.protocol import LAYOUTS, MAX_TURNS

GENERIC_RULES = (
    "You are the player and you are represented by 'P' on the grid. You should select the best "
    "action to reach the goal in the shortest number of steps. Your only way to interact is to "
    "move one step each time. Available actions: up, down, left, right (or w, a, s, d). "
    "Type your action as: [up], [down], [left], [right] or [w], [a], [s], [d]"
)
ROUND_LIMIT = "Environment terminated because the round limit is reached"

_lock = threading.Lock()


@contextmanager
def _isolated() -> Iterator[None]:
    """Run one TextArena call at a time and leave Python's global random state as it was."""
    with _lock:
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)


def _make_environment(env_id: str, options: dict[str, Any], seed: int) -> Any:
    with _isolated():
        try:
            import textarena
        except ImportError as error:
            raise UserError(
                f"the text games need TextArena ({error}); install it with: "
                "pip install textarena==0.7.4"
            ) from error
        environment = textarena.make(env_id, **options)
        environment.reset(num_players=1, seed=seed)
    return environment


class TextArenaGame:
    """What Frozen Lake and Sokoban share: turns, actions, the end and its words (spec 3.5-3.7).

    Subclasses name the environment and its rule text, and say how its messages become history.

    Args:
        seed: reset seed, a non-negative integer; it fixes the board.
        layout: 'released' reproduces the prompt assembly of the released code with its quirks;
            'paper' follows the paper's figures (spec 12, rows 12 and 13): the generic rule text
            ends in a newline, and both games show `[Player]` lines, each message on a line of its
            own.

    Raises:
        ValueError: the seed is not a non-negative integer.
        UserError: unknown layout; TextArena is missing or words its rules differently.
    """

    name: ClassVar[str]
    env_id: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    rule_text: ClassVar[str]

    def __init__(self, seed: int, layout: str = "released") -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"a game seed must be a non-negative integer, got {seed!r}")
        if layout not in LAYOUTS:
            raise UserError(f"game.layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
        self.seed = seed
        self.layout = layout
        self.turns = 0
        self.history = ""  # the environment's text so far, before rule replacement
        self.news = ""  # the part that is new at this turn (GAME messages only)
        self._ended = False
        self._environment = _make_environment(self.env_id, self.options, seed)
        self._listen()
        if self.rule_text not in self.history:
            raise UserError(
                f"{self.env_id} does not show the rules that oel_jax knows, so prompts would "
                "differ from the paper's; install the pinned version: pip install textarena==0.7.4"
            )
        self._board_id = self._read_board_id(self.news)

    def _listen(self) -> None:
        """Fetch what the environment has to say; update `news` and `history`."""
        raise NotImplementedError

    def _read_board_id(self, text: str) -> str:
        raise NotImplementedError

    @property
    def done(self) -> bool:
        return self._ended or self.turns >= MAX_TURNS

    @property
    def passed(self) -> bool:
        """The game ended with a reward of exactly 1 (a hole pays up to 0.75: a failure)."""
        return self._ended and self._environment.state.rewards[0] == 1.0

    def situation(self) -> str:
        """{obs} of spec 4.3; after the game's end, the last one that was shown."""
        generic = GENERIC_RULES + ("\n" if self.layout == "paper" else "")
        return self.history.replace(self.rule_text, generic).strip() + "\n"

    def observation(self) -> str:
        """This turn's new text for the extraction history (6.1, step 3), equal in both layouts."""
        if self.turns == 0:
            return self.news.replace(self.rule_text, "").strip()
        return self.news

    def step(self, response: str) -> str:
        """Play one turn and return the parsed action. Raises ValueError when the game is over."""
        if self.done:
            raise ValueError(f"{self.name} game {self.seed} is over; make a new game")
        action = parse_action(response)
        self._ended, _ = self._environment.step(action)
        self.turns += 1
        if not self.done:  # the board after the last action is never shown
            self._listen()
        return action

    def reason(self) -> str | None:
        """TextArena's words on how the game ended; None while it runs or if it was cut off."""
        return self._environment.state.game_info[0]["reason"] if self._ended else None

    def outcome(self) -> str:
        """The outcome text of spec 3.7. Raises ValueError before the end."""
        if not self.done:
            raise ValueError(f"{self.name} game {self.seed} has no outcome yet")
        if not self._ended:
            return ROUND_LIMIT
        result = "Success" if self.passed else "Failure"
        return f"Summary:\nFinal Result: {result}\nFeedback: {self.reason()}\n"

    def board_id(self) -> str:
        return self._board_id
