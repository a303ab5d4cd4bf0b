"""What a text game must offer to be played, and the limits every game shares.

A game is text in, text out. Nothing in `oel_jax.environments` imports JAX. A further
game is one class and one `register` call; this is a complete one:

    from oel_jax import environments

    class GuessTheSide:
        name, max_turns = "side", 2

        def __init__(self, seed, layout="released"):
            self.seed, self.turns, self.passed = seed, 0, False
            self._news = "A coin lies under one of two cups. Answer [left] or [right]."
            self._history = self._news

        @property
        def done(self):
            return self.passed or self.turns == self.max_turns

        def situation(self):
            return self._history.strip() + "\\n"

        def observation(self):
            return self._news

        def step(self, response):
            action = environments.parse_action(response)
            self.turns += 1
            self.passed = action == ("[left]", "[right]")[self.seed % 2]
            self._news = f"{action} is empty."
            self._history += "\\n" + self._news
            return action

        def outcome(self):
            return f"Summary:\\nFinal Result: {'Success' if self.passed else 'Failure'}\\n"

        def board_id(self):
            return str(self.seed % 2)

    environments.register("side", GuessTheSide)

In a file, it is given to a run as `--game_module=FILE.py --config.game.name=side`.

Source: spec sections 3.6, 3.7, 4.2, 4.3 and 6.1; TextArena's own limits (30 and 100 turns) never
bind.
"""

from typing import NamedTuple, Protocol, runtime_checkable

MAX_TURNS = 5
LAYOUTS = ("released", "paper")


class Bounds(NamedTuple):
    """Pass rates that frame a game's results, as fractions (spec 3.3).

    `floor` is a uniformly random policy, `ceiling` perfect play within the turn limit; both over
    the 128 held-out boards.
    """

    floor: float
    ceiling: float


@runtime_checkable
class Game(Protocol):
    """One game from its first board to its end. Make a new object per game; nothing is reset.

    The order of calls is: `situation`/`observation`, `step`, and so on until `done`, then
    `outcome`.
    """

    name: str
    seed: int
    turns: int

    @property
    def done(self) -> bool:
        """True when the game has ended by itself or its turns are used up."""

    @property
    def passed(self) -> bool:
        """True when the game was won. User side only: this never enters a trajectory."""

    def situation(self) -> str:
        """All the player has been told, ending in exactly one newline ({obs} of spec 4.3)."""

    def observation(self) -> str:
        """What the environment has said since the last turn, as the extraction history shows it."""

    def step(self, response: str) -> str:
        """Parse the whole response, act, count the turn, and return the parsed action."""

    def outcome(self) -> str:
        """How the game ended, in words (spec 3.7). Only when `done`."""

    def board_id(self) -> str:
        """The start board as one line: equal ids are one cluster of a confidence interval."""
