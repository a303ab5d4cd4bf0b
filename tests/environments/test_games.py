"""Games against the golden data of TextArena, and against exact values (spec 3, 4, 6.1)."""

import hashlib
import itertools
import json
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.data import prompts
from oel_jax.environments import boards

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BOARDS = json.loads((GOLDEN / "boards.json").read_text())
TRANSCRIPTS = json.loads((GOLDEN / "transcripts.json").read_text())
APPENDIX_C = json.loads((GOLDEN / "appendix_c.json").read_text())
NAMES = {"FrozenLake-v0-raw": "frozen_lake", "Sokoban-v0": "sokoban"}
RULES = "[a], [s], [d]"


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --- boards and seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "seeds"),
    [
        ("heldout", environments.heldout_seeds()),
        ("extract_r1", environments.extraction_seeds(1, 100)),
        ("deploy_r1_bs64_step1", environments.deploy_seeds(1, 1)),
    ],
)
def test_seeds_and_boards_are_golden(split, seeds):
    golden = BOARDS[split]
    assert [entry["seed"] for entry in golden] == seeds
    assert environments.board_ids("frozen_lake", seeds) == [
        "/".join(entry["fl"]) for entry in golden
    ]
    sokoban = ["/".join(entry["sk"]).replace(" ", "") for entry in golden]
    assert environments.board_ids("sokoban", seeds) == sokoban
    for entry, board in zip(golden, sokoban, strict=True):
        assert len(boards.shortest(environments.model("sokoban", board))) == entry["sk_opt"]


def test_heldout_board_hashes():
    ids = {
        name: environments.board_ids(name, environments.heldout_seeds()) for name in NAMES.values()
    }
    assert sha("\n".join(ids["frozen_lake"])) == (
        "e10b6218354fc4c338613f8b61776770a4b673c9cd1c3cbd9914068a864cdabc"
    )
    assert sha("\n".join(ids["sokoban"])) == (
        "ae2a43fdfca7e576dd8e454c7f0efca73d61bd9ae575e3dc8927143fd9979fcd"
    )
    assert len(set(ids["frozen_lake"])) == 19
    assert len(set(ids["sokoban"])) == 121


def test_seed_formulas_beyond_the_golden_lists():
    assert (
        environments.heldout_seeds()[0] == 468460046
        and environments.heldout_seeds()[-1] == 468587046
    )
    assert environments.extraction_seeds(3, 2) == [
        468382021 + 78025 + 1500000 + 128000,
        468382021 + 78025 + 1500000 + 129000,
    ]
    assert environments.deploy_seeds(2, 3, 5)[0] == 505019424 + 90039 + 100000 + 10000000 + 15000
    wide = [
        set(sum((environments.deploy_seeds(r, s, 128) for s in range(1, 101)), [])) for r in (1, 2)
    ]
    assert len(wide[0] & wide[1]) == 2800  # spec 3.2: B = 128 overlaps, B = 64 does not
    paper = [set(sum((environments.deploy_seeds(r, s) for s in range(1, 101)), [])) for r in (1, 2)]
    assert not paper[0] & paper[1] and len(paper[0]) == 6400


@pytest.mark.parametrize(
    "call",
    [
        lambda: environments.extraction_seeds(0, 1),
        lambda: environments.extraction_seeds(1, 0),
        lambda: environments.deploy_seeds(1, 0),
        lambda: environments.deploy_seeds(1, 1, True),
        lambda: environments.heldout_seeds(129),
        lambda: environments.make("sokoban", -1),
        lambda: environments.make("frozen_lake", 1.0),
    ],
)
def test_bad_numbers_are_refused(call):
    with pytest.raises(ValueError):
        call()


# --- golden transcripts ---------------------------------------------------------------------------


@pytest.mark.parametrize("golden", TRANSCRIPTS, ids=range(len(TRANSCRIPTS)))
def test_transcripts_byte_for_byte(golden):
    game = environments.make(NAMES[golden["env"]], golden["seed"])
    for t, turn in enumerate(golden["turns"]):
        assert game.turns == t and not game.done and not game.passed
        assert prompts.play_prompt(game.situation(), golden.get("experience", "")) == turn["prompt"]
        assert game.news == turn["cur"]
        if "action" in turn:
            assert game.step(turn["resp"]) == turn["action"]
    if "done" not in golden:
        return
    assert game.done
    assert game.passed == golden["pass"]
    reason = golden["game_info"]["0"].get("reason")
    assert game.reason() == (reason if golden["done"] else None)
    if golden["done"]:
        result = "Success" if golden["pass"] else "Failure"
        assert game.outcome() == f"Summary:\nFinal Result: {result}\nFeedback: {reason}\n"
    else:
        assert game.outcome() == "Environment terminated because the round limit is reached"


def play(name, seed, responses, layout="released"):
    """The game after its responses, and its (observation, response) pairs."""
    game, turns = environments.make(name, seed, layout), []
    for response in responses:
        turns.append((game.observation(), response))
        game.step(response)
    return game, turns


def test_turn_zero_prompt_hashes():
    fl = prompts.play_prompt(environments.make("frozen_lake", 468460046).situation())
    sk = prompts.play_prompt(environments.make("sokoban", 468460046).situation())
    assert (len(fl), len(sk)) == (764, 676)
    assert sha(fl) == "d4d761013e9c58afe1bc5857ad230525bc851ffc594b5f08ac28e735cd5a00d6"
    assert sha(sk) == "4b063e0ff222f0508bbb5863e8032ffb38debd6c4683ef5d33dc306f1f7ebd4d"


@pytest.mark.parametrize(
    ("name", "responses", "action"),
    [
        ("frozen_lake", ["[a]", "[d]", "[w]", "[s]", "[s]"], "[right]"),
        ("sokoban", ["[up]", "[down]", "[up]", "[down]", "[up]"], "[up]"),
    ],
)
def test_appendix_c_strings(name, responses, action):
    game, turns = play(name, 468460046, responses)
    history = prompts.extraction_history(turns, game.outcome())
    assert history == APPENDIX_C[f"{name}_history"]
    first, _ = play(name, 468460046, [action])
    assert prompts.play_prompt(first.situation()) == APPENDIX_C[f"{name}_turn1_prompt"]


def test_reason_texts_that_only_the_outcome_shows():
    hole, _ = play("frozen_lake", 468460046, ["[down]"])
    assert hole.done and not hole.passed and hole.turns == 1
    assert hole.outcome() == (
        "Summary:\nFinal Result: Failure\nFeedback: You fell into a hole! Game over. "
        "You completed 25% of the journey to the goal.\n"
    )
    mute, _ = play("sokoban", 468460046, ["no idea", "[UP]"])
    assert mute.done and mute.reason() == (
        "Invalid Move: The submitted move does not follow the correct format. "
        "Use [up], [down], [left], [right] or [w], [a], [s], [d]."
    )
    with pytest.raises(ValueError, match="is over"):
        mute.step("[up]")
    with pytest.raises(ValueError, match="no outcome yet"):
        environments.make("sokoban", 1).outcome()


def test_pushing_and_solving_sokoban():
    game, turns = play("sokoban", 468460046, ["[right]"])
    assert game.situation().endswith("right[GAME] You pushed a box while moved [right].\n"
        "[GAME] Current Board:\n\n# # # # # #\n# # # # # #\n# # # # # #\n# _ _ _ _ #\n"
        "# _ P X O #\n# # # # # #\n\nAvailable Moves: up, down, left, right\n")  # fmt: skip
    game.step("[d]")
    assert game.done and game.passed and game.turns == 2


# --- layouts --------------------------------------------------------------------------------------


def test_paper_layout_ends_the_rules_in_a_newline_and_shows_actions():
    fl, _ = play("frozen_lake", 468460046, ["[right]"], "paper")
    released, _ = play("frozen_lake", 468460046, ["[right]"])
    assert f"{RULES}[GAME] Current" in released.situation()
    assert fl.situation() == released.situation().replace(f"{RULES}[GAME]", f"{RULES}\n[GAME]")

    sk, _ = play("sokoban", 468460046, ["[up]", "[up]"], "paper")
    text = sk.situation()
    assert f"{RULES}\n\n        \n[GAME] Current" in text
    assert "left, right\n[Player] [up]\n[GAME] You  moved [up].\n[GAME] Current Board" in text
    assert text.endswith("right\n[Player] [up]\n[GAME] You attempted an invalid move. Reason: "
        "You cannot move into a wall! Please resubmit a valid move and remember to follow the game "
        "rules to avoid penalties.\n")  # fmt: skip
    assert text.count("[GAME]") == 5


def test_extraction_observations_do_not_depend_on_the_layout():
    for name in NAMES.values():
        both = [
            play(name, 468460046, ["[right]", "[up]"], layout)[1] for layout in environments.LAYOUTS
        ]
        assert both[0] == both[1]


def test_unknown_layout_and_game_are_user_errors():
    with pytest.raises(UserError, match="game.layout"):
        environments.make("sokoban", 1, "modern")
    with pytest.raises(UserError, match="frozen_lake, sokoban"):
        environments.make("frozen_pond", 1)


# --- actions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("<think>[up] or [left]?</think> I go [s]", "[down]"),
        ("[right] " * 3 + "[w", "[right]"),
        ("[[d]]", "[right]"),
        ("[up][down][a]", "[left]"),
        ("<think> maybe [w], then", "[up]"),
        ("[UP]", environments.NO_ACTION),
        ("[ up ]", environments.NO_ACTION),
        ("[x] up down", environments.NO_ACTION),
        ("", environments.NO_ACTION),
    ],
)
def test_parse_action(response, action):
    assert environments.parse_action(response) == action


# --- randomness -----------------------------------------------------------------------------------


def test_global_random_states_are_left_alone():
    random.seed(7)
    np.random.seed(7)
    expected = [random.random() for _ in range(4)], np.random.random(4).tolist()
    random.seed(7)
    np.random.seed(7)
    seen = [], []
    for name in [*NAMES.values()] * 2:
        game = environments.make(name, 468460046)
        game.step("[right]")
        game.situation()
        seen[0].append(random.random())
        seen[1].append(np.random.random())
    assert seen == expected


def test_games_made_by_many_threads_have_their_own_boards():
    seeds = environments.heldout_seeds()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # make threads change places inside a reset
    try:
        with ThreadPoolExecutor(8) as pool:
            fl = list(pool.map(lambda s: environments.make("frozen_lake", s).board_id(), seeds * 4))
            sk = list(pool.map(lambda s: environments.make("sokoban", s).board_id(), seeds[:64]))
    finally:
        sys.setswitchinterval(interval)
    assert fl == environments.board_ids("frozen_lake", seeds) * 4
    assert sk == environments.board_ids("sokoban", seeds[:64])


# --- floors and ceilings --------------------------------------------------------------------------


def models(name):
    return [
        environments.model(name, board)
        for board in environments.board_ids(name, environments.heldout_seeds())
    ]


@pytest.mark.parametrize(
    ("name", "percent", "turns"), [("frozen_lake", 1.69, 3.01), ("sokoban", 16.40, 3.66)]
)
def test_exact_floors(name, percent, turns):
    plays = [boards.random_play(model) for model in models(name)]
    floor = sum(play.pass_rate for play in plays) / 128
    assert floor == environments.bounds(name).floor  # a dyadic fraction: exact in floating point
    assert round(100 * floor, 2) == percent
    assert round(sum(play.turns for play in plays) / 128, 2) == turns


def test_exact_floor_of_down_and_right_only():
    plays = [boards.random_play(m, directions=("down", "right")) for m in models("frozen_lake")]
    assert round(100 * sum(play.pass_rate for play in plays) / 128, 2) == 20.73


@pytest.mark.parametrize("name", ["frozen_lake", "sokoban"])
def test_perfect_play_reaches_the_ceiling_in_textarena(name):
    won = 0
    for seed in environments.heldout_seeds():
        game = environments.make(name, seed)
        path = boards.shortest(environments.model(name, game.board_id()))
        for direction in path[: environments.MAX_TURNS]:
            game.step(f"I choose [{direction}]")
        assert game.done and game.passed == (len(path) <= environments.MAX_TURNS)
        won += game.passed
    assert won / 128 == environments.bounds(name).ceiling
    assert won == {"frozen_lake": 128, "sokoban": 113}[name]


@pytest.mark.parametrize(("name", "repeats"), [("frozen_lake", 40), ("sokoban", 6)])
def test_random_play_in_textarena_agrees_with_the_models(name, repeats):
    """Move by move the models predict TextArena; on average play meets the exact floor."""
    rng = random.Random(20260316)
    passed, variance = 0, 0.0
    for seed, model in zip(environments.heldout_seeds(), models(name), strict=True):
        chance = boards.random_play(model).pass_rate
        variance += repeats * chance * (1 - chance)
        for _ in range(repeats):
            game, state, warned, over = environments.make(name, seed), model.start, False, False
            while not game.done:
                assert not over
                direction = rng.choice(boards.DIRECTIONS)
                game.step(f"[{direction}]")
                after = model.move(state, direction)
                over = (after is None and warned) or (
                    after is not None and (model.won(after) or model.lost(after))
                )
                warned, state = after is None, state if after is None else after
            assert over or game.turns == environments.MAX_TURNS
            assert game.passed == model.won(state)
            passed += game.passed
    games_played = 128 * repeats
    standard_error = math.sqrt(variance) / games_played
    assert abs(passed / games_played - environments.bounds(name).floor) < 3 * standard_error


def test_models_know_blocked_boxes_goals_under_the_player_and_hopeless_boards():
    two = boards.SokobanModel(["######", "#PXX_#", "#OO__#", "######"])
    assert two.move(two.start, "right") is None  # a box after a box
    hidden = boards.SokobanModel(["#####", "#P_X#", "#####"])
    assert hidden.goals == {(1, 1)} and boards.shortest(hidden) is None
    up = boards.SokobanModel(["####", "#O_#", "#X_#", "#P_#", "####"])
    assert boards.shortest(up) == ["up"]
    assert boards.random_play(up).pass_rate > 0.25
    assert boards.shortest(boards.FrozenLakeModel([" H ", "H  ", "  G"])) is None
    with pytest.raises(ValueError, match="no board"):
        boards.sokoban_rows("[GAME] You attempted an invalid move.")


# --- a game of one's own --------------------------------------------------------------------------


def docstring_game():
    """The class that the protocol's docstring shows, executed as it is there."""
    text = environments.protocol.__doc__
    lines = iter(text[text.index("    from oel_jax") :].split("\n"))
    code = itertools.takewhile(lambda line: not line or line.startswith("    "), lines)
    scope = {}
    exec("\n".join(line[4:] for line in code), scope)
    return scope["GuessTheSide"]


def test_the_documented_game_plays():
    cls = docstring_game()
    try:
        game = environments.make("side", 1)
        assert isinstance(game, environments.Game) and isinstance(
            environments.make("sokoban", 1), environments.Game
        )
        assert game.step("hm, [left]") == "[left]" and not game.done
        assert game.situation().endswith("[right].\n[left] is empty.\n")
        game.step("[d]")
        assert game.done and game.passed and game.outcome().split("\n")[1].endswith("Success")
        assert environments.bounds("side") is None and "side" in environments.names()
        with pytest.raises(ValueError, match="already"):
            environments.register("side", lambda seed, layout: cls(seed))
        with pytest.raises(UserError, match="no board model"):
            environments.model("side", "1")
    finally:
        environments._factories.pop("side")
