"""The real boards as nano worlds, and an independent reader of transcripts, for the nano tests."""

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from oel_jax import environments
from oel_jax.environments.boards import frozen_lake_rows, sokoban_rows
from oel_jax.nano.lake import World
from oel_jax.nano.players import draw
from oel_jax.nano.room import RoomWorld

REAL = {
    "frozen_lake": {"H": "lose", "G": "win"},
    "sokoban": {"#": "wall", "X": "box", "O": "target"},
}
_INNER = range(1, 5)


@cache
def real_world(name: str, seed: int) -> World | RoomWorld:
    """The board of a real game as a world with the real symbols."""
    rows = environments.make(name, seed).board_id().replace("P", " P"[name == "sokoban"]).split("/")
    if name == "frozen_lake":
        return World(tuple(rows), (0, 0), dict(REAL[name]))
    return room_of(rows)


def room_of(rows: Sequence[str]) -> RoomWorld:
    """A room drawn with the real symbols; an invisible target is under the player."""
    at = {symbol: (r, c) for r, row in enumerate(rows) for c, symbol in enumerate(row)}
    walls = frozenset((r, c) for r in _INNER for c in _INNER if rows[r][c] == "#")
    return RoomWorld(walls, at["P"], at["X"], at.get("O", at["P"]), dict(REAL["sokoban"]))


def heldout_worlds(name: str) -> list[World | RoomWorld]:
    """The worlds of the 128 held-out seeds."""
    return [real_world(name, seed) for seed in environments.heldout_seeds()]


class Shown(NamedTuple):
    """What a history text shows.

    Attributes:
      facts: (symbol, role) pairs that the game's own words and boards give away.
      unreported: the symbol that the last step led to, where the game was cut off right after it.
      result: 'win', 'lose', 'invalid' or 'time'.
      actions: the steps taken.
    """

    facts: set[tuple[str, str]]
    unreported: str
    result: str
    actions: list[str]


def read_history(history: str) -> Shown:
    """Reads an extraction history (spec 6.1, step 3) of either game, knowing only the real rules.

    Beliefs in the players' thoughts are not looked at, nor is any code of `oel_jax.nano`.
    """
    played, outcome = history.rstrip("\n").rsplit("\n\n\n", 1)
    pieces = re.split(r"\n+Round\d_(?:Input|Output): ", played)[1:]
    observations, responses = pieces[::2], pieces[1::2]
    lake = "+-----+" in played
    facts: set[tuple[str, str]] = set()
    board: list[str] = []
    actions: list[str] = []
    ahead = beyond = ""
    for turn, response in enumerate(responses):
        if "Current Board" in observations[turn]:
            board = (frozen_lake_rows if lake else sokoban_rows)(observations[turn])
        direction = environments.parse_action(response)[1:-1]
        actions.append(direction)
        ahead, beyond = _look(board, direction)
        after = observations[turn + 1] if turn + 1 < len(responses) else outcome
        facts |= (_lake_facts if lake else _room_facts)(after, board, ahead, beyond)
    cut = outcome.startswith("Environment terminated")
    result = (
        "time"
        if cut
        else "invalid"
        if "Invalid Move" in outcome
        else "win"
        if "Final Result: Success" in outcome
        else "lose"
    )
    return Shown(facts, ahead if cut else "", result, actions)


def _look(board: Sequence[str], direction: str) -> tuple[str, str]:
    """The two symbols in front of the player; '' is outside the board."""
    cells = {(r, c): symbol for r, row in enumerate(board) for c, symbol in enumerate(row)}
    ((row, column),) = (cell for cell, symbol in cells.items() if symbol == "P")
    down, right = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}[direction]
    near, far = ((row + n * down, column + n * right) for n in (1, 2))
    return cells.get(near, ""), cells.get(far, "")


def _lake_facts(after: str, board: Sequence[str], ahead: str, beyond: str) -> set[tuple[str, str]]:
    if not ahead.strip():
        return set()
    if "reached the goal" in after:
        return {(ahead, "win")}
    if "fell into a hole" in after:
        return {(ahead, "lose")}
    # The game went on, or only its time ran out: the step did no harm.
    return {(ahead, "safe")}


def _room_facts(after: str, board: Sequence[str], ahead: str, beyond: str) -> set[tuple[str, str]]:
    if "You have solved" in after:
        return {(ahead, "box"), (beyond, "target")}
    if "pushed a box" in after:
        return {(ahead, "box")}
    # A stuck box is called a wall as well; the ring around the room tells which symbol is wall.
    if "You cannot move into a wall" in after and ahead == board[0][0]:
        return {(ahead, "wall")}
    return set()


@cache
def drawn(name):
    """Many worlds of a game, as pre-training draws them."""
    rng = random.Random(f"drawn {name}")
    return [draw(rng, name) for _ in range(12_000 if name == "frozen_lake" else 6_000)]
