"""Runs that are broken on purpose do not learn, and the same run unbroken does.

One round of the real loop with the bundled model: the sound run comes first and must rise, then
each control resumes from a copy of its games (and of its knowledge, where it leaves that alone).
"""

import difflib
import importlib
import itertools
import re
import string

import numpy as np
import pytest
from tiny_run import contents, copy_of, go, tiny_config

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.chat.render import render
from oel_jax.config import negative_control
from oel_jax.config.checks import validate
from oel_jax.data.trajectory_files import read
from oel_jax.distill import topk_kl
from oel_jax.models import bundled
from oel_jax.parallel import vocabulary
from oel_jax.runs.metrics import read_metrics

# By name: the package's attributes could be mistaken for the functions in them.
consolidate, round_evaluation = (
    importlib.import_module(f"oel_jax.{name}")
    for name in ("learner.consolidate", "actor.round_evaluation")
)

MODEL = bundled.MODEL_DIR
MODEL_SYMBOLS = "HGKMTXOBD#"  # symbols that the model has learned to read facts about
RISE = 0.25  # the sound run gains at least this much
NO_RISE = 0.10  # a broken one at most this much: noise of 256 games on few different boards
SETTING = {
    "model.path": str(MODEL),
    "sampler.slots": 128,
    "sampler.prefill_rows": 16,
    "sampler.decode_steps": 8,
    "sampler.max_len": 0,
    "sampler.max_prompt": 384,
    "sampler.max_response": 64,  # of Sokoban's thoughts, for 'foreign_extraction'
    "deploy.games_per_step": 16,
    "extract.chains": 4,
    "extract.n": 12,
    "extract.n_run": 12,
    "extract.l_max": 96,
    "extract.max_prompt": 640,
    "consolidate.steps": 12,
    "consolidate.learning_rate": 5e-4,
    "consolidate.save_every": 100,
    "consolidate.token_budget": 4096,
    "loss.top_k": 64,
    "loss.chunk": 2048,
    "evaluate.maps": 64,
    "evaluate.seeds": 4,
}
# What of the sound run a control changes, so that it cannot be copied.
REDONE = {"foreign_extraction": ["extract", "consolidate", "evaluate"]}
IN_CONTEXT = ("none", "shuffled_knowledge")  # runs that also play with knowledge: it takes time


def config_of(control="none", **changes):
    setting = {name.replace(".", "__"): value for name, value in SETTING.items()}
    setting["evaluate__in_context"] = control in IN_CONTEXT
    return tiny_config(negative_control=control, **setting | changes)


def rise(work, name="consolidated"):
    """Pass rate after the round, or with its knowledge in context, minus that of the start."""
    summary = read_json(work / "summary.json")
    return summary["rounds"][0][name]["pass_rate"] - summary["start"]["pass_rate"]


def steps(work, name):
    """One metric of consolidation, step by step."""
    rows = read_metrics(work / "metrics.jsonl")
    return [row["values"][name] for row in rows if row["stage"] == "consolidate"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Workdir of the run that is not broken."""
    work = tmp_path_factory.mktemp("runs") / "sound"
    go(work, config_of())
    return work


@pytest.fixture(params=negative_control.CONTROLS)
def control(request):
    return request.param


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_sound_run_rises(sound):
    assert rise(sound) >= RISE and rise(sound, "in_context") >= RISE
    assert steps(sound, "kl")[0] > 0.1 and min(steps(sound, "mass_topk")) > 0.99
    assert read_json(sound / "summary.json").keys() == {"start", "rounds", "gain_error"}


@pytest.mark.e2e
def test_a_broken_run_does_not_rise(sound, tmp_path, control, monkeypatch, capsys):
    work = copy_of(sound, tmp_path / "run", *REDONE.get(control, ["consolidate", "evaluate"]))
    if control == "foreign_extraction":
        for pattern in ("extract_*", "deploy_0001*"):
            for path in (work / "round_001" / "trajectories").glob(pattern):
                path.unlink()
    read_by = record_texts(monkeypatch)
    go(work, config_of(control), change=True)

    assert rise(work) <= NO_RISE
    out = capsys.readouterr().out
    line = f"negative control '{control}': this run is broken on purpose"
    assert out.count(line) == 2 and line in out[: out.index("=== round 1")]
    assert line in out[out.index("round 1 evaluate: done") : out.index("before, without knowledge")]
    assert read_json(work / "summary.json")["negative_control"] == control
    assert read_json(work / "config.json")["negative_control"] == control
    CHECKS[control](sound, work, read_by)


def record_texts(monkeypatch):
    """Texts of the teacher and of the evaluation, and prompt ids (student's, teacher's)."""
    read_by = {"teacher": [], "evaluation": [], "prompts": []}

    class Recording(consolidate.Teacher):
        def __init__(self, model, contexts, **how):
            read_by["teacher"] += [context.text for context in contexts]
            super().__init__(model, contexts, **how)

        def split(self, number, dialogue, own=None):
            student = render(self.model.tokenizer, dialogue, thinking=True)
            read_by["prompts"].append((student, self.prompt(number, dialogue, own)))
            return super().split(number, dialogue, own)

    def evaluate(*args, texts=(), **how):
        read_by["evaluation"] += texts
        return original(*args, texts=texts, **how)

    original = round_evaluation.evaluate
    monkeypatch.setattr(consolidate, "Teacher", Recording)
    monkeypatch.setattr(round_evaluation, "evaluate", evaluate)
    return read_by


def knowledge_of(work):
    return read_json(work / "round_001" / "knowledge" / "knowledge.json")["texts"]


def check_shuffled(sound, work, read_by):
    texts = knowledge_of(work)
    assert texts == knowledge_of(sound)  # what was extracted is kept as it was
    assert read_by["teacher"] == read_by["evaluation"] != texts
    assert re.search(r"\bH\b", "\n".join(texts)) and re.search(r"\bG\b", "\n".join(texts))
    assert not re.search(r"\b[HG]\b", "\n".join(read_by["teacher"]))
    assert rise(work, "in_context") <= NO_RISE


def check_without_knowledge(sound, work, read_by):
    assert read_by["prompts"] and all(mine == yours for mine, yours in read_by["prompts"])
    # Zero up to numerics: the teacher reads its prompt in another batch. Then AdamW, which knows no
    # gradient too small to follow, walks about and is called back.
    assert abs(steps(work, "kl")[0]) < 1e-6
    assert max(map(abs, steps(work, "kl"))) < 0.01


def check_foreign_extraction(sound, work, read_by):
    places = {"extract_*": "sokoban", "deploy_*": "frozen_lake"}
    for pattern, game in places.items():
        files = sorted((work / "round_001" / "trajectories").glob(f"{pattern}.jsonl"))
        played = [game_ for file in files for game_ in read(file)]
        assert {game_.game for game_ in played} == {game}
        boards = {"# # #" in game_.turns[0].messages[0]["content"] for game_ in played}
        assert boards == {game == "sokoban"}
    # The prefixes that were played again are those of the sound run; so is the policy.
    name = "round_001/trajectories/deploy_*.jsonl"
    assert contents(work, name) == contents(sound, name)
    assert read_by["teacher"] == knowledge_of(work) != knowledge_of(sound)


def check_foreign_top_k(sound, work, read_by):
    assert read_by["teacher"] == knowledge_of(sound)
    assert max(steps(work, "mass_topk")) < 0.01


CHECKS = {
    "shuffled_knowledge": check_shuffled,
    "teacher_without_knowledge": check_without_knowledge,
    "foreign_extraction": check_foreign_extraction,
    "foreign_top_k": check_foreign_top_k,
}


@pytest.mark.e2e
def test_a_control_cannot_be_slipped_into_a_sound_run(sound, tmp_path, control):
    work = copy_of(sound, tmp_path / "run", "evaluate")
    with pytest.raises(UserError, match=f'config.negative_control: "none" -> "{control}"'):
        go(work, config_of(control))


# --- names in another world -----------------------------------------------------------------------

WORLDS = list(itertools.product((0, 1, 50, 2**31 - 1), (1, 2, 3)))


@pytest.fixture(scope="module")
def shown():
    """Game -> all symbols on its held-out boards, the player among them."""
    found = {}
    for name in ("frozen_lake", "sokoban"):
        boards = environments.board_ids(name, environments.heldout_seeds())
        found[name] = {*"".join(boards), "P"} - {" ", "/"}
    assert found["frozen_lake"] == {"H", "G", "P"} and {"#", "X", "O"} <= found["sokoban"]
    return found


@pytest.mark.parametrize("seed, round_number", WORLDS)
def test_every_symbol_gets_another_name_and_no_two_the_same(seed, round_number, shown):
    names = negative_control.renamed_symbols(seed, round_number)
    assert set(names) == set(names.values())  # a permutation
    assert all(name != old for old, name in names.items())
    assert set(names) >= set(string.ascii_uppercase) - {"A", "I"}
    on_boards = set.union(*shown.values())
    assert on_boards <= set(names)
    assert all(names[symbol] not in on_boards for symbol in on_boards)
    # Neither may what this model can mistake for a symbol of a board become one.
    assert all(names[s] not in on_boards for s in set(MODEL_SYMBOLS) - on_boards)
    for symbol in "HG":  # else the model would not understand the fact and the control be too weak
        assert names[symbol] in MODEL_SYMBOLS


def test_the_names_depend_on_seed_and_round_alone():
    def draw():
        return [tuple(negative_control.renamed_symbols(*world).items()) for world in WORLDS]

    worlds = draw()
    assert worlds == draw() and len(set(worlds)) == len(WORLDS)


KNOWLEDGE = """\
# Experience
- EXPERIENCE ITEM: H is deadly, 'G' wins; the box (X) goes onto O.
- EXPERIENCE ITEM: A wall (#) stops P. I saw H! Is it G? Yes,\tH\r
  HG, H2, 3G, Hole, GH, _x_, ##, #1, a, h, 7, *, -, |, Ä, «√»: all but one are no symbols.
G"""
# One character per symbol that must be renamed, at its place.
MARKED = """\
? Experience
- EXPERIENCE ITEM: ? is deadly, '?' wins; the box (?) goes onto ?.
- EXPERIENCE ITEM: A wall (?) stops ?. I saw ?! Is it ?? Yes,\t?\r
  HG, H2, 3G, Hole, GH, _x_, ##, #1, a, h, 7, *, -, |, Ä, «?»: all but one are no symbols.
?"""


@pytest.mark.parametrize("seed, round_number", WORLDS[:4])
def test_lone_symbols_are_renamed_and_all_else_is_kept(seed, round_number):
    config = config_of("shuffled_knowledge", seed=seed)
    names = negative_control.renamed_symbols(seed, round_number)
    expected = "".join(
        names[old] if mark == "?" and old != "?" else old
        for old, mark in zip(KNOWLEDGE, MARKED, strict=True)
    )
    found = negative_control.knowledge_texts(config, round_number, [KNOWLEDGE, "", "H"])
    assert found == [expected, "", names["H"]], "\n".join(difflib.ndiff([found[0]], [expected]))
    assert negative_control.teacher_texts(config, round_number, [KNOWLEDGE]) == [expected]


# --- the other controls, one by one ---------------------------------------------------------------


def test_a_control_touches_its_own_link_only():
    texts = ["H is deadly.", ""]
    # control -> (texts in context, texts of the teacher, game for knowledge, support) as in 'none'
    kept = {
        "none": (True, True, True, True),
        "shuffled_knowledge": (False, False, True, True),
        "teacher_without_knowledge": (True, False, True, True),
        "foreign_extraction": (True, True, False, True),
        "foreign_top_k": (True, True, True, False),
    }
    assert kept.keys() == {"none", *negative_control.CONTROLS}
    for name, expected in kept.items():
        config = config_of(name)
        found = (
            negative_control.knowledge_texts(config, 1, texts) == texts,
            negative_control.teacher_texts(config, 1, texts) == texts,
            negative_control.played_game(config, "extract") == "frozen_lake",
            topk_kl.pick_support(config.negative_control) is vocabulary.top_k,
        )
        assert found == expected, name
        assert negative_control.played_game(config, "deploy") == "frozen_lake"
    assert negative_control.announcement(config_of()) == ""


def test_sokobans_other_game_is_frozen_lake():
    config = config_of("foreign_extraction", game__name="sokoban")
    validate(config, games=environments.names())
    assert negative_control.played_game(config, "extract") == "frozen_lake"
    assert negative_control.played_game(config, "deploy") == "sokoban"


def test_foreign_ids_are_half_a_vocabulary_away_with_their_own_values():
    logits = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    values, ids = topk_kl.foreign_top_k(logits, 6)
    best = np.argsort(-logits, axis=1)[:, :6]
    np.testing.assert_array_equal(ids, (best + 16) % 32)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, np.asarray(ids), axis=1))


@pytest.mark.parametrize("value", ["sabotage", "", None, True, "None"])
def test_a_wrong_value_is_refused(value):
    with pytest.raises(UserError) as caught:
        validate(config_of(value))
    message = str(caught.value)
    assert f"config.negative_control is {value!r}; it must be 'none' or 'shuffled_know" in message


def test_a_game_of_ones_own_has_no_other_game():
    config = config_of("foreign_extraction", game__name="cups")
    with pytest.raises(UserError, match="'foreign_extraction'; it must be another one.*'cups'"):
        validate(config, games=("cups", "frozen_lake"))
    validate(config_of("shuffled_knowledge", game__name="cups"), games=("cups",))
