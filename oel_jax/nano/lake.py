"""Frozen Lake worlds: boards whose symbols mean something else every time.

Every symbol was drawn to lose, to win or to be safe ground, independently of which symbol it is.
The real game (H loses, G wins) is one such world, so only experience can tell what a symbol does.
Boards, messages and history are the real game's, character for character: `Lake` speaks exactly as
TextArena's Frozen Lake does through the harness (tests compare the two).
"""

import dataclasses
import random
from collections import deque
from collections.abc import Mapping, Sequence

from oel_jax.environments.protocol import MAX_TURNS
from oel_jax.environments.textarena import GENERIC_RULES, ROUND_LIMIT
from oel_jax.nano import language as lang

SIZE = 3
_RULE = "+-----+-----+-----+"
_ACTIONS = "Available Actions: [up], [down], [left], [right], [w], [a], [s], [d]"
_CELLS = tuple((r, c) for r in range(SIZE) for c in range(SIZE))


@dataclasses.dataclass(frozen=True)
class World:
    """A board and what its letters do.

    Attributes:
      rows: three strings of three characters, a symbol or a blank; the start cell is blank.
      start: (row, column) where the player begins.
      roles: what each symbol on the board does ('lose', 'win' or 'safe').
    """

    rows: tuple[str, str, str]
    start: tuple[int, int]
    roles: dict[str, str]

    def goal(self) -> tuple[int, int] | None:
        """The winning cell nearest to the bottom right corner, if there is one."""
        wins = [p for p in _CELLS if self.roles.get(self.rows[p[0]][p[1]]) == "win"]
        return max(wins) if wins else None


class Lake:
    """One game in a world, with the harness's texts (spec 3.4 to 3.7, 4.2, 4.3, 6.1)."""

    game = "frozen_lake"
    roles = lang.LAKE_ROLES

    def __init__(self, world: World):
        self.world = world
        self.place = world.start
        self.turns = 0
        self.reason: str | None = None
        self.result = "time"  # 'win', 'lose', 'invalid' or 'time'
        self.moves: list[str] = []
        self.crossed: list[str] = []  # safe symbols stepped onto
        self._errors = 0
        self.last_reach = ""  # where the last step went, in the words of a thought
        self._new = self._board_message()
        self._history = f"[GAME] {GENERIC_RULES}{self._new.lstrip()}"
        self._opening = f"[GAME] {self._new.lstrip()}"

    @property
    def done(self) -> bool:
        """True after the game ended or five turns were used."""
        return self.reason is not None or self.turns >= MAX_TURNS

    def view(self) -> tuple[str, ...]:
        """The board in view, player drawn."""
        rows = [list(row) for row in self.world.rows]
        rows[self.place[0]][self.place[1]] = "P"
        return tuple("".join(row) for row in rows)

    def _board_message(self) -> str:
        lines = [_RULE]
        for row in self.view():
            lines += ["|" + "|".join(f"  {c}  " for c in row) + "|", _RULE]
        return "\n[GAME] Current Board:\n\n" + "\n".join(lines) + f"\n\n{_ACTIONS}"

    def situation(self) -> str:
        """{obs} of spec 4.3: everything so far, ending in one newline."""
        return self._history.strip() + "\n"

    def observation(self) -> str:
        """What is new at this turn, as the extraction history shows it."""
        return self._opening if self.turns == 0 else self._new

    def _target(self, direction: str) -> tuple[int, int] | None:
        """The cell that `direction` leads to; None for the wall."""
        step = lang.DIRECTIONS[direction]
        cell = (self.place[0] + step[0], self.place[1] + step[1])
        return cell if cell in _CELLS else None

    def ahead(self, direction: str) -> tuple[str | None, None]:
        """What a step leads to (a symbol, a blank, None for the wall); nothing beyond matters."""
        cell = self._target(direction)
        return None if cell is None else self.world.rows[cell[0]][cell[1]], None

    def passable(self) -> list[str]:
        """Directions that stay on the board."""
        return [d for d in lang.DIRECTIONS if self._target(d) is not None]

    def step(self, direction: str) -> None:
        """Play one move."""
        cell = self._target(direction)
        self.turns += 1
        self.moves.append(direction)
        self.last_reach = lang.reach_text(*self.ahead(direction))
        if cell is None:
            self._bump(direction)
            return
        self._errors = 0
        self.place = cell
        symbol = self.world.rows[cell[0]][cell[1]]
        role = self.world.roles.get(symbol, "free")
        if role == "win":
            self.result, self.reason = "win", "Congratulations! You reached the goal!"
        elif role == "lose":
            self.result = "lose"
            self.reason = (
                "You fell into a hole! Game over. You completed "
                f"{self._percent()}% of the journey to the goal."
            )
        else:
            self.crossed += [symbol] if role == "safe" else []
            where = f"({cell[0]}, {cell[1]})"
            self._append(direction, f"You moved {direction} to position {where}.")

    def _bump(self, direction: str) -> None:
        self._errors += 1
        reason = f"You tried to move {direction} but hit a wall!"
        if self._errors > 1:
            self.result, self.reason = "invalid", f"Invalid Move: {reason}"
            return
        self._append(
            direction,
            f"You attempted an invalid move. Reason: {reason} Please resubmit a valid move and "
            "remember to follow the game rules to avoid penalties.",
        )

    def _append(self, direction: str, message: str) -> None:
        self._new = f"\n[GAME] {message}{self._board_message()}"
        self._history += f"\n[Player] [{direction}]{self._new}"

    def _percent(self) -> int:
        goal = self.world.goal()
        if goal is None:
            return 50
        start = self.world.start
        whole = abs(goal[0] - start[0]) + abs(goal[1] - start[1])
        gone = abs(self.place[0] - start[0]) + abs(self.place[1] - start[1])
        return round(100 * max(min(gone / whole, 0.95), 0.1)) if whole else 50

    def outcome(self) -> str:
        """Outcome text of spec 3.7."""
        if self.reason is None:
            return ROUND_LIMIT
        word = "Success" if self.result == "win" else "Failure"
        return f"Summary:\nFinal Result: {word}\nFeedback: {self.reason}\n"

    def evidence(self) -> list[tuple[str, str]]:
        """What the finished game shows about symbols: its end first, then safe ones crossed."""
        found = []
        if self.result in ("win", "lose"):
            row, column = self.place
            found.append((self.world.rows[row][column], self.result))
        return found + [(symbol, "safe") for symbol in dict.fromkeys(self.crossed)]

    def recap(self) -> str:
        """The extractor's thought about the finished game."""
        crossed = "".join(f"{lang.CROSSED}{symbol}." for symbol in dict.fromkeys(self.crossed))
        return lang.LAST_STEP + self.last_reach + lang.VERDICT[self.result] + crossed

    def believe(
        self, rng: random.Random, facts: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, str], set[str]]:
        """Belief about each symbol in view: the majority of `facts`, else a fresh guess.

        Returns the beliefs and the set of symbols that were only guessed.
        """
        return believe(rng, symbols_in(self.view()), facts)

    def options(self, beliefs: Mapping[str, str]) -> list[str]:
        """The directions that are best under `beliefs`."""
        return best_directions(self.view(), beliefs)

    def hopeful(self, beliefs: Mapping[str, str]) -> bool:
        """Whether any symbol in view is believed to win."""
        return "win" in beliefs.values()

    def plan_text(self, beliefs: Mapping[str, str]) -> str:
        """What is said about the board after the beliefs: the map, roles in place of symbols."""
        return lang.map_text(self.view(), beliefs)


def believe(
    rng: random.Random, symbols: Sequence[str], facts: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], set[str]]:
    """`Lake.believe` for any symbols."""
    table = lang.votes(facts, lang.LAKE_ROLES)
    goal_known = any(roles["win"] for roles in table.values())
    beliefs, guessed = {}, set()
    for symbol in symbols:
        if symbol in table:
            beliefs[symbol] = lang.majority(rng, table[symbol])
            continue
        # Someone who knows what wins is wary of the rest, someone who knows only other things
        # hopes for it; who knows nothing guesses evenly.
        weights = (1, 1, 1) if not table else (0.6, 0.1, 0.3) if goal_known else (0.2, 0.5, 0.3)
        beliefs[symbol] = rng.choices(lang.LAKE_ROLES, weights)[0]
        guessed.add(symbol)
    return beliefs, guessed


def symbols_in(view: Sequence[str]) -> list[str]:
    """Distinct symbols of a board in view, in reading order."""
    return list(dict.fromkeys(c for row in view for c in row if c not in "P "))


def draw_world(rng: random.Random) -> World:
    """A random world: half of them shaped like the real game, half anything else."""
    roles = {symbol: rng.choice(lang.LAKE_ROLES) for symbol in lang.SYMBOLS}
    grid = {p: " " for p in _CELLS}
    if rng.random() < 0.65:  # one symbol in the far corner, two of another elsewhere
        start = (0, 0)
        far, near = rng.sample(lang.SYMBOLS, 2)
        if rng.random() < 0.6:
            roles[far], roles[near] = "win", "lose"
        grid[(2, 2)] = far
        for p in rng.sample([p for p in _CELLS if p not in (start, (2, 2))], 2):
            grid[p] = near
    else:
        start = rng.choice(_CELLS)
        kinds = rng.sample(lang.SYMBOLS, rng.choice((1, 2, 2, 3)))
        cells = rng.sample([p for p in _CELLS if p != start], rng.choice((2, 3, 4)))
        for index, p in enumerate(cells):
            grid[p] = kinds[index] if index < len(kinds) else rng.choice(kinds)
    rows = tuple("".join(grid[(r, c)] for c in range(SIZE)) for r in range(SIZE))
    present = {c for row in rows for c in row if c != " "}
    return World(rows, start, {symbol: roles[symbol] for symbol in sorted(present)})


def best_directions(view: Sequence[str], beliefs: Mapping[str, str]) -> list[str]:
    """Directions that shorten the way to a believed win, avoiding believed losses.

    Without a believed win in reach: every step onto ground not believed to lose; if there is none,
    every step that stays on the board.
    """
    marks = {(r, c): beliefs.get(view[r][c], "free") for r, c in _CELLS}
    place = next(p for p in _CELLS if view[p[0]][p[1]] == "P")
    steps = {d: (place[0] + v[0], place[1] + v[1]) for d, v in lang.DIRECTIONS.items()}
    steps = {d: p for d, p in steps.items() if p in marks}
    distance = {d: _distance(p, place, marks) for d, p in steps.items()}
    best = min((v for v in distance.values() if v is not None), default=None)
    if best is not None:
        return [d for d, v in distance.items() if v == best]
    return [d for d, p in steps.items() if marks[p] != "lose"] or list(steps)


def _distance(
    origin: tuple[int, int], place: tuple[int, int], marks: dict[tuple[int, int], str]
) -> int | None:
    """Steps from `origin` to the nearest believed win, not through losses or the player's cell."""
    queue, seen = deque([(origin, 0)]), {origin, place}
    while queue:
        p, gone = queue.popleft()
        if marks[p] == "win":
            return gone
        if marks[p] == "lose":
            continue
        for v in lang.DIRECTIONS.values():
            q = (p[0] + v[0], p[1] + v[1])
            if q in marks and q not in seen:
                seen.add(q)
                queue.append((q, gone + 1))
    return None
