"""Boards as text, and small models of both games: what perfect and random play can reach.

The models know the rules of spec 3.4 and 3.5 but nothing of TextArena. They exist to frame results:
`shortest` is a breadth-first search for the fewest moves, `random_play` the exact value of a
uniformly random policy over the turn limit, ended by two consecutive invalid moves. The tests
compare both models with TextArena move by move.

A *rows* value is a list of equally long strings, one character per cell: ` HGP` for Frozen Lake,
`#_O√XP` for Sokoban.
"""

from collections.abc import Hashable
from functools import cache
from typing import NamedTuple, Protocol

from oel_jax.environments.actions import DIRECTIONS
from oel_jax.environments.protocol import MAX_TURNS

Cell = tuple[int, int]
_OFFSETS = dict(zip(DIRECTIONS, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True))


def _last_board(text: str) -> list[str]:
    """The lines of the last board in `text`. Raises ValueError when there is none."""
    _, found, rest = text.rpartition("Current Board:\n\n")
    if not found:
        raise ValueError("no board in this text")
    return rest.partition("\n\n")[0].split("\n")


def frozen_lake_rows(text: str) -> list[str]:
    """Rows of the last Frozen Lake board drawn in `text` (3-wide cells between rules)."""
    lines = [line for line in _last_board(text) if line.startswith("|")]
    return ["".join(cell[2] for cell in line.strip("|").split("|")) for line in lines]


def sokoban_rows(text: str) -> list[str]:
    """Rows of the last Sokoban board drawn in `text` (cells separated by one blank)."""
    return [line.replace(" ", "") for line in _last_board(text)]


class Model(Protocol):
    """The rules of a game on one board; states are opaque and hashable."""

    start: Hashable

    def move(self, state: Hashable, direction: str) -> Hashable | None:
        """The state after a move, or None when the move is invalid."""

    def won(self, state: Hashable) -> bool: ...

    def lost(self, state: Hashable) -> bool: ...


class FrozenLakeModel:
    """States are positions. Walls make a move invalid; holes lose, the goal wins."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = rows
        self.start: Cell = (0, 0)

    def move(self, state: Cell, direction: str) -> Cell | None:
        row, column = state[0] + _OFFSETS[direction][0], state[1] + _OFFSETS[direction][1]
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.rows[0])
        return (row, column) if inside else None

    def won(self, state: Cell) -> bool:
        return self.rows[state[0]][state[1]] == "G"

    def lost(self, state: Cell) -> bool:
        return self.rows[state[0]][state[1]] == "H"


class SokobanModel:
    """States are (player, boxes). Walls and blocked pushes are invalid; boxes on all goals win.

    A goal under the player is not drawn; it is there when fewer goals than boxes are visible.
    """

    def __init__(self, rows: list[str]) -> None:
        cells = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
        (player,) = (cell for cell, symbol in cells.items() if symbol == "P")
        boxes = frozenset(cell for cell, symbol in cells.items() if symbol in "X√")
        goals = {cell for cell, symbol in cells.items() if symbol in "O√"}
        if len(goals) < len(boxes):
            goals.add(player)
        self.floor = {cell for cell, symbol in cells.items() if symbol != "#"}
        self.goals = goals
        self.start = (player, boxes)

    def move(
        self, state: tuple[Cell, frozenset[Cell]], direction: str
    ) -> tuple[Cell, frozenset[Cell]] | None:
        (row, column), boxes = state
        down, right = _OFFSETS[direction]
        target = (row + down, column + right)
        if target not in self.floor:
            return None
        if target in boxes:
            behind = (target[0] + down, target[1] + right)
            if behind not in self.floor or behind in boxes:
                return None
            boxes = boxes - {target} | {behind}
        return target, boxes

    def won(self, state: tuple[Cell, frozenset[Cell]]) -> bool:
        return state[1] <= self.goals

    def lost(self, state: tuple[Cell, frozenset[Cell]]) -> bool:
        return False


def shortest(model: Model) -> list[str] | None:
    """The directions of one shortest win, or None when the board cannot be won.

    Directions are tried in the order up, down, left, right, so the answer is unique.
    """
    paths: dict[Hashable, list[str]] = {model.start: []}
    frontier = [model.start]
    while frontier:
        following = []
        for state in frontier:
            for direction in DIRECTIONS:
                after = model.move(state, direction)
                if after is None or after in paths or model.lost(after):
                    continue
                paths[after] = [*paths[state], direction]
                if model.won(after):
                    return paths[after]
                following.append(after)
        frontier = following
    return None


class RandomPlay(NamedTuple):
    """Exact expectations of uniformly random play: probability of a win, and turns used."""

    pass_rate: float
    turns: float


def random_play(
    model: Model, turns: int = MAX_TURNS, directions: tuple[str, ...] = DIRECTIONS
) -> RandomPlay:
    """Value of choosing uniformly among `directions` at every turn, by dynamic programming.

    An invalid move costs its turn; the second in a row ends the game (spec 3.5).
    """

    @cache
    def value(state: Hashable, warned: bool, left: int) -> tuple[float, float]:
        if left == 0:
            return 0.0, 0.0
        win, used = 0.0, 1.0
        for direction in directions:
            after = model.move(state, direction)
            if after is None:
                rest = (0.0, 0.0) if warned else value(state, True, left - 1)
            elif model.won(after):
                rest = (1.0, 0.0)
            elif model.lost(after):
                rest = (0.0, 0.0)
            else:
                rest = value(after, False, left - 1)
            win += rest[0] / len(directions)
            used += rest[1] / len(directions)
        return win, used

    return RandomPlay(*value(model.start, False, turns))
