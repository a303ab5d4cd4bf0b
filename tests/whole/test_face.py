"""The Python face: what a notebook needs, and nothing else."""

import sys

import numpy as np
import pytest
from tiny_run import tiny_config

import oel_jax
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.chat.render import render
from oel_jax.data import trajectories
from oel_jax.data.messages import Dialogue

TEXTS = ["What is two plus three?", "Say blue.", "Go up or down."]


@pytest.fixture(scope="module")
def model():
    return oel_jax.load_model("nano")


def greedy(model, messages, count):
    """The most likely tokens one after the other, each from the logits of all before it."""
    ids = list(render(model.tokenizer, Dialogue(tuple(messages)), thinking=False))
    start = len(ids)
    while len(ids) < start + count and (
        len(ids) == start or ids[-1] not in model.tokenizer.stop_ids
    ):
        padded = [*ids, *[0] * (64 - len(ids))]  # one shape; what comes later changes nothing
        logits = np.asarray(model.logits([padded]))[0, len(ids) - 1, : model.vocab_limit]
        ids.append(int(logits.argmax()))
    return model.tokenizer.decode(ids[start:])


def test_every_public_name_is_there():
    for name in dir(oel_jax):
        assert getattr(oel_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = oel_jax.nothing
    assert oel_jax.default_config().rounds >= 1


def test_answers_are_those_of_a_plain_greedy_loop(model):
    conversation = [{"role": "user", "content": TEXTS[1]}]
    prompts = [TEXTS[0], conversation]
    plain = [[{"role": "user", "content": TEXTS[0]}], conversation]
    expected = [greedy(model, messages, 6) for messages in plain]
    assert model.generate(prompts, temperature=0, max_tokens=6) == expected
    assert model.generate(conversation, temperature=0, max_tokens=6) == expected[1]
    assert model.generate(TEXTS[0], temperature=0, max_tokens=6) == expected[0]


def test_an_answer_follows_from_its_seed_not_from_its_company(model):
    ask = dict(temperature=1.5, max_tokens=8, thinking=True)
    together = model.generate(TEXTS, seed=3, **ask)
    assert len(together) == 3 and together[0] == model.generate(TEXTS[0], seed=3, **ask)
    assert model.generate(TEXTS, seed=3, slots=1, **ask) == together
    assert model.generate(TEXTS, seed=4, **ask) != together
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("x", {"max_tokens": 0}, "max_tokens is 0"),
        ("x", {"max_tokens": 1.5}, "max_tokens is 1.5"),
        ("x", {"max_tokens": 10**6}, "positions"),
        ("x", {"temperature": -1}, "temperature is -1"),
        ("x", {"temperature": float("nan")}, "temperature is nan"),
        ("x", {"temperature": "hot"}, "temperature is 'hot'"),
        ("x", {"top_p": 0}, r"top_p is 0; it must be a number in \(0, 1\]"),
        ("x", {"top_k": -1}, "top_k is -1"),
        ("x", {"slots": 0}, "slots is 0"),
        (7, {}, "prompts is int"),
        ([7], {}, r"prompts\[0\] is int"),
        ([[]], {}, r"prompts\[0\] is list"),
        ([{"role": "nobody", "content": "x"}], {}, r"prompts\[0\] must have a 'role', one of"),
        (["x", [{"role": "user"}]], {}, r"prompts\[1\]\[0\] must have .* a text as 'content'"),
    ],
)
def test_what_cannot_be_is_refused(model, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        model.generate(prompts, **settings)


def test_a_run_is_read_as_it_was_written(finished_run, monkeypatch):
    results = oel_jax.read_run(finished_run)
    config = tiny_config()
    first = finished_run / "round_001"
    assert results.config["extract"]["n"] == config.extract.n
    assert results.start == read_json(finished_run / "evaluate" / "start.json")
    (one,) = results.rounds
    assert one.number == 1 and one.policy == first / "policy"
    assert one.consolidated == read_json(first / "evaluate" / "consolidated.json")
    assert one.in_context == read_json(first / "evaluate" / "in_context.json")
    assert list(one.knowledge) == read_json(first / "knowledge" / "knowledge.json")["texts"]
    assert set(one.seconds) == {"deploy", "extract", "consolidate", "evaluate"}
    games = one.trajectories()
    assert all(isinstance(game, oel_jax.Trajectory) for game in games)
    for purpose in trajectories.PURPOSES:
        assert one.trajectories(purpose) == [game for game in games if game.purpose == purpose]
    assert len(one.trajectories("extract")) == config.extract.chains * config.extract.n_run
    steps = config.consolidate.steps * config.deploy.games_per_step
    assert len(one.trajectories("deploy")) == steps
    with pytest.raises(UserError, match="no trajectories for 'play'; choose one of"):
        one.trajectories("play")
    rows = results.rows()
    assert [(row["round"], row["what"]) for row in rows] == [
        (0, "start"),
        (1, "in_context"),
        (1, "consolidated"),
    ]
    assert rows[2]["pass_rate"] == one.consolidated["pass_rate"]
    assert f"{one.consolidated['pass_rate']:.1%}" in repr(results)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        results.to_dataframe()


def test_a_data_frame_has_the_rows(finished_run):
    pytest.importorskip("pandas", reason="pandas is optional")
    results = oel_jax.read_run(finished_run)
    assert results.to_dataframe().to_dict("records") == results.rows()


def test_there_must_be_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        oel_jax.read_run(tmp_path)
