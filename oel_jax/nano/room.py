"""Sokoban worlds: 6x6 rooms with one box, whose symbols mean something else every time.

In each room three symbols are dealt to wall, box and target. The real game (# X O) is one such
deal, so only experience can tell which is which. `Room` speaks exactly as TextArena's Sokoban does
through the harness (tests compare the two).
"""

import dataclasses
import random
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache

from oel_jax.environments.protocol import MAX_TURNS
from oel_jax.environments.textarena import GENERIC_RULES, ROUND_LIMIT
from oel_jax.nano import language as lang

SIZE = 6
_INNER = tuple((r, c) for r in range(1, SIZE - 1) for c in range(1, SIZE - 1))
_COLUMNS = ".abcd."
_WALL_HIT = "You cannot move into a wall!"
_PLAN = lang.PLAN
# chance of a room that takes so many moves; the real ones: 31, 23, 0, 11, 23, 9, 3 %
_LENGTHS = {1: 0.27, 2: 0.22, 3: 0.06, 4: 0.14, 5: 0.19, 6: 0.08, 7: 0.04}
Cell = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The next push of a shortest solution: where the box is, from where, in which direction.

    `first` are the directions of the very next step (several when they are equally short).
    """

    stand: Cell
    push: str
    first: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RoomWorld:
    """A room and what its symbols are.

    Attributes:
      walls: inner cells that are wall (the border always is).
      player, box, target: cells.
      roles: symbol -> 'wall', 'box' or 'target'.
    """

    walls: frozenset[Cell]
    player: Cell
    box: Cell
    target: Cell
    roles: dict[str, str]


class Room:
    """One game in a room, with the harness's texts (spec 3.4 to 3.7, 4.2, 4.3, 6.1)."""

    game = "sokoban"
    roles = lang.ROOM_ROLES

    def __init__(self, world: RoomWorld):
        self.world = world
        self.player, self.box = world.player, world.box
        self._symbol = {role: symbol for symbol, role in world.roles.items()}
        self.turns = 0
        self.reason: str | None = None
        self.result = "time"  # 'win', 'invalid' or 'time'
        self.moves: list[str] = []
        self.pushed = self.blocked = False
        self.last_reach = ""
        self._errors = 0
        board = f"[GAME] {self._board_message()}"
        self._history = f"[GAME] {GENERIC_RULES}\n        \n{board}"
        self._new = f"[GAME] \n        \n{board}"

    @property
    def done(self) -> bool:
        """True after the game ended or five turns were used."""
        return self.reason is not None or self.turns >= MAX_TURNS

    def view(self) -> tuple[str, ...]:
        """Six rows of six symbols; '_' is floor; what is under the player is hidden."""
        return tuple("".join(self._at((r, c)) for c in range(SIZE)) for r in range(SIZE))

    def _at(self, cell: Cell) -> str:
        if cell == self.player:
            return "P"
        if cell == self.box:
            return self._symbol["box"]
        if self._is_wall(cell):
            return self._symbol["wall"]
        return self._symbol["target"] if cell == self.world.target else "_"

    def _is_wall(self, cell: Cell) -> bool:
        return cell not in _INNER or cell in self.world.walls

    def _board_message(self) -> str:
        rows = "".join(" ".join(row) + "\n" for row in self.view())
        return f"Current Board:\n\n{rows}\nAvailable Moves: up, down, left, right"

    def situation(self) -> str:
        """{obs} of spec 4.3: everything so far, ending in one newline."""
        return self._history.strip() + "\n"

    def observation(self) -> str:
        """What is new at this turn, as the extraction history shows it."""
        return self._new

    def ahead(self, direction: str) -> tuple[str, str | None]:
        """The symbol that a step leads to, and the one after that (None outside the room)."""
        near = _step(self.player, direction)
        far = _step(near, direction)
        inside = 0 <= far[0] < SIZE and 0 <= far[1] < SIZE
        return self._at(near), self._at(far) if inside else None

    def _possible(self, direction: str) -> bool:
        near = _step(self.player, direction)
        return not self._is_wall(near) and not (
            near == self.box and self._is_wall(_step(near, direction))
        )

    def passable(self) -> list[str]:
        """Directions of valid moves."""
        return [d for d in lang.DIRECTIONS if self._possible(d)]

    def step(self, direction: str) -> None:
        """Play one move."""
        near = _step(self.player, direction)
        self.last_reach = lang.reach_text(*self.ahead(direction))
        self.turns += 1
        self.moves.append(direction)
        if not self._possible(direction):
            self._bump(near)
            return
        self._errors = 0
        push = near == self.box
        if push:
            self.box = _step(near, direction)
        self.player = near
        won = push and self.box == self.world.target
        # What the last turn did is never shown, unless it ended the game.
        self.pushed = self.pushed or (push and (won or self.turns < MAX_TURNS))
        if won:
            self.result = "win"
            self.reason = "Congratulations! You have solved the Sokoban puzzle!"
            return
        how = "pushed a box while" if push else ""
        self._append(f"[GAME] You {how} moved [{direction}].\n[GAME] {self._board_message()}")

    def _bump(self, near: Cell) -> None:
        self._errors += 1
        over = self._errors > 1
        shown = over or self.turns < MAX_TURNS
        self.blocked = self.blocked or (shown and self._is_wall(near))
        if over:
            self.result, self.reason = "invalid", f"Invalid Move: {_WALL_HIT}"
            return
        self._append(
            f"[GAME] You attempted an invalid move. Reason: {_WALL_HIT} Please resubmit a valid "
            "move and remember to follow the game rules to avoid penalties."
        )

    def _append(self, message: str) -> None:
        self._new = message
        self._history += message

    def outcome(self) -> str:
        """Outcome text of spec 3.7."""
        if self.reason is None:
            return ROUND_LIMIT
        word = "Success" if self.result == "win" else "Failure"
        return f"Summary:\nFinal Result: {word}\nFeedback: {self.reason}\n"

    def evidence(self) -> list[tuple[str, str]]:
        """What the finished game shows: target and box on a win, else what was pushed or hit.

        A box that cannot be pushed is reported by the game as a wall; it shows nothing.
        """
        roles = ["target"] if self.result == "win" else []
        roles += ["box"] if self.pushed else []
        roles += ["wall"] if self.blocked else []
        return [(self._symbol[role], role) for role in roles]

    def recap(self) -> str:
        """The extractor's thought about the finished game."""
        text = lang.LAST_STEP + self.last_reach + lang.VERDICT[self.result]
        text += f"{lang.PUSHED}{self._symbol['box']}." if self.pushed else ""
        return text + (f"{lang.BLOCKED}{self._symbol['wall']}." if self.blocked else "")

    def believe(
        self, rng: random.Random, facts: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, str], set[str]]:
        """Belief about each symbol in view: the majority of `facts`, else one of the roles left.

        Returns the beliefs and the set of symbols that were only guessed.
        """
        symbols = dict.fromkeys(c for row in self.view() for c in row if c not in "P_")
        return believe(rng, list(symbols), facts)

    def _picture(self, beliefs: Mapping[str, str]) -> "_Picture":
        places: dict[str, list[Cell]] = {role: [] for role in lang.ROOM_ROLES}
        view = self.view()
        for cell in _INNER:
            role = beliefs.get(view[cell[0]][cell[1]])
            if role:
                places[role].append(cell)
        # A target that is not in view is under the player.
        targets = places["target"] or [self.player]
        known = len(places["box"]) == len(targets) == 1
        plan = None
        if known:
            plan = shortest(frozenset(places["wall"]), targets[0], self.player, places["box"][0])
        return _Picture(places["box"], targets, frozenset(places["wall"]), plan)

    def options(self, beliefs: Mapping[str, str]) -> list[str]:
        """The directions that are best under `beliefs`: a shortest solution, else any step that is
        not believed to be blocked, else any at all."""
        picture = self._picture(beliefs)
        if picture.plan:
            return list(picture.plan.first)
        believed = [d for d in lang.DIRECTIONS if beliefs.get(self.ahead(d)[0]) != "wall"]
        return believed or list(lang.DIRECTIONS)

    def hopeful(self, beliefs: Mapping[str, str]) -> bool:
        """Whether the player sees a way to win."""
        return self._picture(beliefs).plan is not None

    def plan_text(self, beliefs: Mapping[str, str]) -> str:
        """The inner map with roles in place of symbols, where things are, and the next push."""
        inner = [row[1:-1] for row in self.view()[1:-1]]
        text = lang.map_text(inner, beliefs)
        picture = self._picture(beliefs)
        if picture.plan is None:
            return text
        parts = (self.player, picture.boxes[0], picture.targets[0])
        words = [_PLAN[i] + cell_name(cell) for i, cell in enumerate(parts)]
        plan = picture.plan
        words += [_PLAN[3] + plan.push, _PLAN[4] + cell_name(plan.stand), _PLAN[5]]
        return text + "".join(words)


@dataclasses.dataclass(frozen=True)
class _Picture:
    """What the player believes to see inside the room."""

    boxes: list[Cell]
    targets: list[Cell]
    walls: frozenset[Cell]
    plan: Plan | None


def cell_name(cell: Cell) -> str:
    """'b3': column letter a to d, row 1 to 4, inside the border."""
    return f"{_COLUMNS[cell[1]]}{cell[0]}"


def _step(cell: Cell, direction: str) -> Cell:
    move = lang.DIRECTIONS[direction]
    return cell[0] + move[0], cell[1] + move[1]


def believe(
    rng: random.Random, symbols: Sequence[str], facts: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], set[str]]:
    """`Room.believe` for any symbols: what is not stated gets one of the roles that are left."""
    table = lang.votes(facts, lang.ROOM_ROLES)
    stated = {s: lang.majority(rng, table[s]) for s in symbols if s in table}
    taken = set(stated.values()) | {
        counts.most_common(1)[0][0] for s, counts in table.items() if s not in symbols
    }
    left = [role for role in lang.ROOM_ROLES if role not in stated.values()]
    rng.shuffle(left)
    # A role that is known to belong to a symbol out of view is the least likely one.
    left.sort(key=lambda role: role in taken)
    beliefs, guessed = {}, set()
    for symbol in symbols:
        if symbol in stated:
            beliefs[symbol] = stated[symbol]
            continue
        # Who knows nothing guesses each symbol by itself.
        beliefs[symbol] = left.pop(0) if left and table else rng.choice(lang.ROOM_ROLES)
        guessed.add(symbol)
    return beliefs, guessed


@lru_cache(maxsize=20_000)
def _distances(walls: frozenset[Cell], target: Cell) -> dict[tuple[Cell, Cell], int]:
    """Least number of moves that solve the room from every (player, box) from which that is
    possible: breadth-first search backwards from the solved states."""
    free = [cell for cell in _INNER if cell not in walls]
    inside = set(free)
    found: dict[tuple[Cell, Cell], int] = {}
    queue: deque[tuple[Cell, Cell]] = deque()
    for direction in lang.DIRECTIONS:  # one push before the end
        back = lang.DIRECTIONS[direction]
        box = (target[0] - back[0], target[1] - back[1])
        player = (box[0] - back[0], box[1] - back[1])
        if box in inside and player in inside:
            found[player, box] = 1
            queue.append((player, box))
    while queue:
        player, box = queue.popleft()
        gone = found[player, box] + 1
        for move in lang.DIRECTIONS.values():
            behind = (player[0] - move[0], player[1] - move[1])
            if behind not in inside or behind == box:
                continue
            states = [(behind, box)]
            if (player[0] + move[0], player[1] + move[1]) == box:  # the step before pushed the box
                states.append((behind, player))
            for state in states:
                if state not in found and state[1] != target:
                    found[state] = gone
                    queue.append(state)
    return found


@lru_cache(maxsize=50_000)
def shortest(walls: frozenset[Cell], target: Cell, player: Cell, box: Cell) -> Plan | None:
    """The next push of a shortest solution, or None if the room cannot be solved from here.

    Among equally short solutions the one that comes first in the order of `DIRECTIONS` is followed.
    """
    distance = _distances(walls, target)
    if (player, box) not in distance:
        return None
    first: list[str] = []
    at, stand, push = player, None, ""
    while stand is None:
        best = []
        for direction in lang.DIRECTIONS:
            near = _step(at, direction)
            moved = _step(box, direction) if near == box else box
            solved = near == box and moved == target
            after = 0 if solved else distance.get((near, moved))
            if after is not None and after == distance[at, box] - 1:
                best.append(direction)
        first = first or best
        near = _step(at, best[0])
        if near == box:
            stand, push = at, best[0]
        at = near
    return Plan(stand, push, tuple(first))


def carve(rng: random.Random) -> frozenset[Cell]:
    """Inner walls of a room: all that a random walk, which stamps small shapes, did not clear."""
    at = rng.choice(_INNER)
    free = {at}
    shape = rng.choice((((0, 0),), ((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (1, 0), (1, 1))))
    direction = rng.choice(list(lang.DIRECTIONS))
    for _ in range(rng.randint(4, 20)):
        if rng.random() < 0.4:
            direction = rng.choice(list(lang.DIRECTIONS))
            shape = rng.choice((shape, ((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (0, -1))))
        near = _step(at, direction)
        at = near if near in _INNER else at
        free |= {(at[0] + r, at[1] + c) for r, c in shape}
    return frozenset(cell for cell in _INNER if cell not in free)


def draw_room(rng: random.Random) -> RoomWorld:
    """A random solvable room with random symbols."""
    wanted = rng.choices(list(_LENGTHS), list(_LENGTHS.values()))[0]
    while True:
        walls = carve(rng)
        free = [cell for cell in _INNER if cell not in walls]
        if len(free) < 4:
            continue
        target = rng.choice(free)
        starts = [state for state, n in _distances(walls, target).items() if n == wanted]
        if starts:
            break
    player, box = rng.choice(sorted(starts))
    symbols = rng.sample(lang.SYMBOLS, 3)
    return RoomWorld(walls, player, box, target, dict(zip(symbols, lang.ROOM_ROLES, strict=True)))
