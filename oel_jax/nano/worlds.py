"""Procedurally generated worlds: Frozen Lake whose letters mean something else every time.

In each world every letter is drawn to win, to lose or to be safe ground, independently of which
letter it is. The real game (H loses, G wins) is one such world, so only experience can tell what a
letter does. Boards, messages and history are the real game's, character for character: `Lake`
speaks exactly as TextArena's Frozen Lake does through the harness (tests compare the two).

    python -m oel_jax.nano.worlds --show 5
"""

import argparse
import dataclasses
import random
from collections import deque
from collections.abc import Sequence

from oel_jax.games.adapter import GENERIC_RULES
from oel_jax.nano import language as lang

SIZE = 3
MAX_TURNS = 5
_RULE = "+-----+-----+-----+"
_ACTIONS = "Available Actions: [up], [down], [left], [right], [w], [a], [s], [d]"
_CELLS = tuple((r, c) for r in range(SIZE) for c in range(SIZE))


@dataclasses.dataclass(frozen=True)
class World:
    """A board and what its letters do.

    Attributes:
      rows: three strings of three characters, a letter or a blank; the start cell is blank.
      start: (row, column) where the player begins.
      roles: what each letter on the board does ('lose', 'win' or 'safe').
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

    def __init__(self, world: World):
        self.world = world
        self.place = world.start
        self.turns = 0
        self.reason: str | None = None
        self.result = "time"  # 'win', 'lose', 'invalid' or 'time'
        self.moves: list[str] = []
        self.crossed: list[str] = []  # safe letters stepped onto
        self._errors = 0
        self._last_target: tuple[int, int] | None = None
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

    def target(self, direction: str) -> tuple[int, int] | None:
        """The cell that `direction` leads to; None for the wall."""
        step = lang.DIRECTIONS[direction]
        cell = (self.place[0] + step[0], self.place[1] + step[1])
        return cell if cell in _CELLS else None

    def target_of_last_move(self) -> tuple[int, int] | None:
        """The cell the last move led to; None for the wall."""
        return self._last_target

    def step(self, direction: str) -> None:
        """Play one move."""
        cell = self.target(direction)
        self.turns += 1
        self.moves.append(direction)
        self._last_target = cell
        if cell is None:
            self._bump(direction)
            return
        self._errors = 0
        self.place = cell
        letter = self.world.rows[cell[0]][cell[1]]
        role = self.world.roles.get(letter, "free")
        if role == "win":
            self.result, self.reason = "win", "Congratulations! You reached the goal!"
        elif role == "lose":
            self.result = "lose"
            self.reason = (
                "You fell into a hole! Game over. You completed "
                f"{self._percent()}% of the journey to the goal."
            )
        else:
            self.crossed += [letter] if role == "safe" else []
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
            return "Environment terminated because the round limit is reached"
        word = "Success" if self.result == "win" else "Failure"
        return f"Summary:\nFinal Result: {word}\nFeedback: {self.reason}\n"


def letters_in(view: Sequence[str]) -> list[str]:
    """Distinct letters of a board in view, in reading order."""
    return list(dict.fromkeys(c for row in view for c in row if c not in "P "))


def draw_world(rng: random.Random) -> World:
    """A random world: half of them shaped like the real game, half anything else."""
    roles = {letter: rng.choice(lang.ROLES) for letter in lang.LETTERS}
    grid = {p: " " for p in _CELLS}
    if rng.random() < 0.65:  # one letter in the far corner, two of another elsewhere
        start = (0, 0)
        far, near = rng.sample(lang.LETTERS, 2)
        if rng.random() < 0.6:
            roles[far], roles[near] = "win", "lose"
        grid[(2, 2)] = far
        for p in rng.sample([p for p in _CELLS if p not in (start, (2, 2))], 2):
            grid[p] = near
    else:
        start = rng.choice(_CELLS)
        kinds = rng.sample(lang.LETTERS, rng.choice((1, 2, 2, 3)))
        cells = rng.sample([p for p in _CELLS if p != start], rng.choice((2, 3, 4)))
        for index, p in enumerate(cells):
            grid[p] = kinds[index] if index < len(kinds) else rng.choice(kinds)
    rows = tuple("".join(grid[(r, c)] for c in range(SIZE)) for r in range(SIZE))
    present = {c for row in rows for c in row if c != " "}
    return World(rows, start, {letter: roles[letter] for letter in sorted(present)})


def best_directions(view: Sequence[str], beliefs: dict[str, str]) -> list[str]:
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


def decide(
    rng: random.Random,
    game: Lake,
    facts: Sequence[tuple[str, str]],
    *,
    clumsy: float = 0.0,
    blind: bool = False,
    infer: bool = False,
) -> tuple[str, str]:
    """One turn of the scripted player, who believes `facts` and guesses the rest anew.

    `clumsy` is the chance of running into a wall when no letter is believed to win; `blind` takes
    any step that stays on the board; `infer` as in `language.guess`. Returns the direction and
    the response text.
    """
    view = game.view()
    beliefs, guessed = lang.believe(rng, letters_in(view), facts, infer=infer)
    options = best_directions(view, beliefs)
    if rng.random() < clumsy and "win" not in beliefs.values():
        options = [d for d in lang.DIRECTIONS if game.target(d) is None] or options
    if blind:
        options = [d for d in lang.DIRECTIONS if game.target(d) is not None]
    direction = rng.choice(options)
    cell = game.target(direction)
    target = None if cell is None else game.world.rows[cell[0]][cell[1]]
    parts = [lang.belief_text(rng, beliefs, guessed), lang.map_text(view, beliefs)]
    thought = " ".join(p for p in parts if p) + lang.step_text(direction, target)
    return direction, lang.response(thought, f"[{direction}]")


def play_out(
    rng: random.Random,
    world: World,
    facts: Sequence[tuple[str, str]],
    *,
    knowing: float = 1.0,
    stray: float = 0.0,
    clumsy: float = 0.05,
) -> tuple[Lake, list[tuple[str, str]]]:
    """A whole game of the scripted player; returns it with its (observation, response) turns.

    At each turn the player remembers `facts` with probability `knowing` and otherwise guesses;
    with probability `stray` the step is drawn blindly (and still reported truthfully).
    """
    game, turns = Lake(world), []
    while not game.done:
        known = facts if rng.random() < knowing else ()
        observation = game.observation()
        direction, text = decide(
            rng, game, known, clumsy=clumsy, blind=stray > 0 and rng.random() < stray
        )
        turns.append((observation, text))
        game.step(direction)
    return game, turns


def main() -> None:
    """Show some training examples."""
    from oel_jax.nano.examples import draw_example

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--show", type=int, default=5, help="how many examples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.show):
        example = draw_example(rng)
        print(f"===== {example.task}\n{example.prompt}\n----- reply\n{example.reply}")


if __name__ == "__main__":
    main()
