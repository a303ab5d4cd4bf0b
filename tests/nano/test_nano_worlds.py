"""Nano worlds: the real games' texts, balanced symbols, a right planner."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from real_worlds import REAL, drawn, heldout_worlds, real_world, room_of

from oel_jax import environments
from oel_jax.data import prompts
from oel_jax.environments import boards, heldout_seeds
from oel_jax.environments.frozen_lake import RULE_TEXT as LAKE_RULES
from oel_jax.environments.sokoban import RULE_TEXT as ROOM_RULES
from oel_jax.environments.textarena import GENERIC_RULES
from oel_jax.nano import language as lang
from oel_jax.nano.players import GAMES, begin, play_out
from oel_jax.nano.room import Room, RoomWorld, carve, shortest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROLES = {"frozen_lake": lang.LAKE_ROLES, "sokoban": lang.ROOM_ROLES}


# --- worlds speak as the real games do


def perfect(rng, game):
    return rng.choice(game.options(game.world.roles))


def deadly(rng, game):
    """Takes the real losing cells for goals and avoids goals; in a room walks onto the target."""
    if game.game == "frozen_lake":
        return rng.choice(game.options({"H": "win", "G": "lose"}))
    target = game.world.target
    towards = [("up", target[0] < game.player[0]), ("down", target[0] > game.player[0])]
    towards += [("left", target[1] < game.player[1]), ("right", target[1] > game.player[1])]
    return rng.choice([d for d, yes in towards if yes] or list(lang.DIRECTIONS))


def stubborn(rng, game):
    """The same direction for ever: soon two invalid moves in a row."""
    return game.moves[-1] if game.moves else rng.choice(list(lang.DIRECTIONS))


def bumping(rng, game):
    """An impossible step every other turn, each of which is forgiven."""
    possible = game.passable()
    wrong = [d for d in lang.DIRECTIONS if d not in possible]
    return rng.choice(wrong if wrong and game.turns % 2 == 0 else possible)


def pacing(rng, game):
    """To and fro, until the time is up."""
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}
    if game.moves and back[game.moves[-1]] in game.passable():
        return back[game.moves[-1]]
    return rng.choice(game.passable())


def wild(rng, game):
    return rng.choice(list(lang.DIRECTIONS))


POLICIES = (perfect, deadly, stubborn, bumping, pacing, wild, wild)


@pytest.mark.parametrize("name", GAMES)
def test_a_world_with_a_real_board_speaks_exactly_as_the_real_game(name):
    seen: Counter[str] = Counter()
    for number, policy in enumerate(POLICIES):
        rng = random.Random(number)
        for seed in heldout_seeds()[number % 3 :: 3]:
            real, mine = environments.make(name, seed), begin(real_world(name, seed))
            while not real.done:
                assert not mine.done
                assert mine.situation() == real.situation()
                assert mine.observation() == real.observation()
                direction = policy(rng, mine)
                seen["forgiven"] += direction not in mine.passable()
                real.step(f"[{direction}]")
                mine.step(direction)
                seen["on target"] += name == "sokoban" and mine.player == mine.world.target
            assert mine.done
            assert mine.outcome() == real.outcome()
            assert (mine.result == "win") == real.passed
            seen[mine.result] += 1
    # The policies must have reached what they are there for.
    ends = ("win", "time", "invalid", *(("lose",) if name == "frozen_lake" else ("on target",)))
    assert all(seen[end] >= 15 for end in ends), seen
    assert seen["forgiven"] > 2 * seen["invalid"]


def transcripts():
    return json.loads((GOLDEN / "transcripts.json").read_text("utf-8"))


@pytest.mark.parametrize("transcript", transcripts(), ids=lambda t: t["env"])
def test_worlds_reproduce_the_golden_transcripts(transcript):
    name = "frozen_lake" if transcript["env"].startswith("FrozenLake") else "sokoban"
    rules = LAKE_RULES if name == "frozen_lake" else ROOM_RULES
    game = begin(real_world(name, transcript["seed"]))
    for turn in transcript["turns"]:
        assert not game.done
        assert (
            prompts.play_prompt(game.situation(), transcript.get("experience", ""))
            == (turn["prompt"])
        )
        news = turn["cur"].replace(rules, GENERIC_RULES)
        if turn["step"] == 0:
            news = turn["cur"].replace(rules, "").strip()
        assert game.observation() == news
        game.step(turn["action"][1:-1])
    if "pass" in transcript:
        assert game.done
        assert (game.result == "win") == transcript["pass"]
        reason = transcript["game_info"]["0"].get("reason") if transcript["done"] else None
        assert game.reason == reason


@pytest.mark.parametrize("name", GAMES)
def test_worlds_reproduce_the_golden_extraction_histories(name):
    wanted = json.loads((GOLDEN / "appendix_c.json").read_text("utf-8"))[f"{name}_history"]
    responses = re.findall(r"Round\d_Output: (\[\w+\])", wanted)
    game, turns = begin(real_world(name, 468460046)), []
    for response in responses:
        turns.append((game.observation(), response))
        game.step(environments.parse_action(response)[1:-1])
    assert prompts.extraction_history(turns, game.outcome()) == wanted


# --- symbols and boards


def imbalance(pairs, roles):
    """The largest deviation of a symbol's share of a role from the mean, in standard errors."""
    table = Counter(pairs)
    counts = np.array([[table[symbol, role] for role in roles] for symbol in lang.SYMBOLS])
    total = counts.sum(1, keepdims=True)
    mean = counts.sum(0) / counts.sum()
    return (np.abs(counts / total - mean) / np.sqrt(mean * (1 - mean) / total)).max()


@pytest.mark.parametrize("name", GAMES)
def test_every_symbol_has_every_role_equally_often(name):
    pairs = [pair for world in drawn(name) for pair in world.roles.items()]
    assert imbalance(pairs, ROLES[name]) < 4
    # The bound can fail: it notices when every seventh 'H' has one role instead of its own.
    first, rng = ROLES[name][0], random.Random(0)
    leaning = [(s, first if s == "H" and rng.random() < 1 / 7 else r) for s, r in pairs]
    assert imbalance(leaning, ROLES[name]) > 4
    # Symbols themselves are equally frequent (in a room exactly three of ten).
    shares = np.array([Counter(symbol for symbol, _ in pairs)[x] for x in lang.SYMBOLS])
    assert np.abs(shares / shares.mean() - 1).max() < 4 / np.sqrt(shares.mean())


def pattern(rows):
    """Rows with symbols numbered in reading order: what is left when names do not matter."""
    numbers: dict[str, int] = {}
    return tuple(
        "".join(c if c == " " else str(numbers.setdefault(c, len(numbers))) for c in row)
        for row in rows
    )


def test_lake_boards_go_beyond_the_19_real_ones_and_contain_them():
    real = {real_world("frozen_lake", seed).rows for seed in (*range(300), *heldout_seeds())}
    assert len(real) == 19
    shapes = {(world.start, pattern(world.rows)) for world in drawn("frozen_lake")}
    assert all(((0, 0), pattern(rows)) in shapes for rows in real)
    assert len(shapes) > 1000
    assert len({start for start, _ in shapes}) == 9
    named = {w.rows for w in drawn("frozen_lake") if w.roles == REAL["frozen_lake"]}
    assert len(named & real) >= 10


def test_room_boards_go_beyond_the_held_out_ones_and_contain_them():
    rng = random.Random(1)
    carved = {carve(rng) for _ in range(12_000)}
    held_out = heldout_worlds("sokoban")
    assert sum(world.walls in carved for world in held_out) > 100

    def place(world):
        return world.walls, world.player, world.box, world.target

    known, mine = {place(w) for w in held_out}, {place(w) for w in drawn("sokoban")}
    assert len(known & mine) >= 8
    assert len(mine) > 20 * len(known)
    lengths = Counter(solution_length(w) for w in drawn("sokoban")[:2000])
    assert set(lengths) == set(range(1, 8))
    assert min(lengths[n] for n in (1, 2, 4, 5)) > 200


def test_drawn_rooms_are_well_formed():
    for world in drawn("sokoban")[:2000]:
        inner = {(r, c) for r in range(1, 5) for c in range(1, 5)}
        assert world.walls <= inner
        assert {world.player, world.box, world.target} <= inner - world.walls
        assert world.box not in (world.player, world.target)
        assert sorted(world.roles.values()) == sorted(lang.ROOM_ROLES)


# --- the room's planner


def solution_length(world):
    """Least moves by the planner: follows its advice to the end. None: it sees no solution."""
    game, steps = Room(world), 0
    while game.result != "win":
        plan = shortest(world.walls, world.target, game.player, game.box)
        if plan is None:
            return None
        # Room has a turn limit, a chain of rooms has none.
        world = after(world, plan.first[0])
        steps += 1
        if world is None:
            return steps
        game = Room(world)
    return steps


def after(world, direction):
    """The room one step later; None when that step wins, the same room when it is invalid."""
    game = Room(world)
    game.step(direction)
    if game.result == "win":
        return None
    return RoomWorld(world.walls, game.player, game.box, world.target, world.roles)


def wins_within(world, moves):
    """Depth-first over the room itself: whether `moves` steps can win. Slow, no memory."""
    if moves == 0:
        return False
    following = [after(world, direction) for direction in lang.DIRECTIONS]
    return None in following or any(wins_within(w, moves - 1) for w in following)


def model_of(world):
    """The package's own model of a room, which knows nothing of `oel_jax.nano`."""
    names = {role: symbol for symbol, role in REAL["sokoban"].items()}
    dress = {symbol: names[role] for symbol, role in world.roles.items()} | {"_": "_", "P": "P"}
    rows = ["".join(dress[c] for c in row) for row in Room(world).view()]
    return boards.SokobanModel(rows)


def any_room(rng):
    """A room with everything anywhere, mostly unsolvable or far from its end."""
    while True:
        walls = carve(rng)
        free = [(r, c) for r in range(1, 5) for c in range(1, 5) if (r, c) not in walls]
        if len(free) >= 5:
            player, box = rng.sample(free, 2)
            target = rng.choice([cell for cell in free if cell != box])
            symbols = dict(zip(rng.sample(lang.SYMBOLS, 3), lang.ROOM_ROLES, strict=True))
            return RoomWorld(walls, player, box, target, symbols)


def test_the_planner_agrees_with_a_depth_first_search_of_the_room_itself():
    rng = random.Random(4)
    found = Counter()
    for world in [*drawn("sokoban")[:14], *(any_room(rng) for _ in range(8))]:
        slow = next((n for n in range(1, 6) if wins_within(world, n)), None)
        fast = solution_length(world)
        assert slow == (fast if fast is None or fast <= 5 else None)
        found[slow] += 1
    assert len(found) >= 4


def test_the_planner_agrees_with_the_breadth_first_search_of_the_real_game():
    rng = random.Random(5)
    unsolvable = 0
    rooms = heldout_worlds("sokoban") + drawn("sokoban")[:150]
    for world in rooms + [any_room(rng) for _ in range(150)]:
        path = boards.shortest(model_of(world))
        plan = shortest(world.walls, world.target, world.player, world.box)
        if path is None:
            assert plan is None
            unsolvable += 1
            continue
        assert solution_length(world) == len(path)
        # Exactly the directions it names leave one move less.
        for direction in lang.DIRECTIONS:
            following = after(world, direction)
            left = [] if following is None else boards.shortest(model_of(following))
            best = left is not None and len(left) == len(path) - 1
            assert best == (direction in plan.first)
        # The push it names is a possible one.
        down, right = lang.DIRECTIONS[plan.push]
        assert (plan.stand[0] + down, plan.stand[1] + right) == world.box
    assert unsolvable > 30


def test_held_out_rooms_take_as_many_moves_as_the_spec_says():
    rooms = heldout_worlds("sokoban")
    lengths = Counter(solution_length(world) for world in rooms)
    assert lengths == {1: 40, 2: 30, 4: 14, 5: 29, 6: 11, 7: 2, 8: 1, 9: 1}
    rng = random.Random(0)
    gold = list(REAL["sokoban"].items())
    results = [play_out(rng, world, gold, clumsy=0.0)[0].result for world in rooms]
    assert results.count("win") == 113
    assert results.count("time") == 15


def test_a_target_out_of_view_is_sought_under_the_player():
    beliefs = {"#": "wall", "X": "box"}
    world = room_of(["######", "#____#", "#PX__#", "#____#", "######", "######"])
    assert world.target == world.player
    game, rng = Room(world), random.Random(0)
    assert game.believe(rng, list(REAL["sokoban"].items())) == (beliefs, set())
    assert " Player a2, box b2, target a2; push left from c2." in game.plan_text(beliefs)
    assert set(game.options(beliefs)) == {"up", "down"}
    finished, _ = play_out(rng, world, list(REAL["sokoban"].items()), clumsy=0.0)
    assert (finished.result, finished.turns) == ("win", 5)
    narrow = Room(room_of(["######", "#P_X_#", "##_###", "##_###", "######", "######"]))
    assert narrow.plan_text(beliefs) == "P_o_/x_xx/x_xx/xxxx/"
    assert narrow.options(beliefs) == ["right"]
