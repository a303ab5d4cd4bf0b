"""The public tools for tests: runs that a script plays, a dummy model, and no compiler."""

import jax
import numpy as np
import pytest

from oel_jax import load_model, run, testing
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data.trajectory_files import read
from oel_jax.models.bundled import model_dir
from oel_jax.runs.profiling import compile_seconds
from oel_jax.sampler.requests import Request, request_key
from oel_jax.testing import ScriptedSampler, scripted, tiny_config

NANO = model_dir("tiny")


def request(tokenizer, text, max_new=20, tag=None):
    return Request(tokenizer.chat(text, thinking=False), request_key(text), max_new, tag)


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    return testing.write_dummy_model(tmp_path_factory.mktemp("dummy") / "model")


def test_answers_come_from_a_function_or_a_table():
    tokenizer = load_tokenizer(NANO)
    asked = [request(tokenizer, text, tag=text) for text in ("red", "green", "red and green")]
    sampler = ScriptedSampler({"red": "[up]", "green": "[down]"}, tokenizer, at_once=2)
    sampler.submit(asked)
    found = []
    while sampler.busy:
        found.append(sampler.poll())
        assert len(found[-1]) <= 2
    answers = [one for some in found for one in some]
    assert [one.tag for one in answers] == ["red", "green", "red and green"]
    assert [tokenizer.decode(one.ids) for one in answers] == ["[up]", "[down]", "[up]"]
    assert all(one.stopped and one.ids[-1] in tokenizer.stop_ids for one in answers)
    assert all(len(one.ids) == len(one.log_probs) for one in answers)
    assert sampler.generated == sampler.written == sum(len(one.ids) for one in answers)
    assert "red and green" in sampler.prompts[2]

    echo = ScriptedSampler(lambda prompt: prompt, tokenizer)
    (whole,) = echo.generate(None, [request(tokenizer, "a", max_new=500)])
    (cut,) = echo.generate(None, [request(tokenizer, "a", max_new=3)])
    assert cut.ids == whole.ids[:3] and whole.stopped and not cut.stopped


def test_a_script_without_an_answer_says_what_was_asked():
    tokenizer = load_tokenizer(NANO)
    with pytest.raises(LookupError, match="no answer to .*purple"):
        ScriptedSampler({"red": ""}, tokenizer).generate(None, [request(tokenizer, "purple")])


def test_thoughts_of_a_script_are_control_tokens():
    tokenizer = load_tokenizer(NANO)
    sampler = ScriptedSampler(lambda _: "<think>\nhm\n</think>\n\n[up]", tokenizer)
    (answer,) = sampler.generate(None, [request(tokenizer, "a", max_new=99)])
    assert sum(i in tokenizer.control for i in answer.ids) == 3  # and the stop token
    assert tokenizer.decode(answer.ids) == "<think>\nhm\n</think>\n\n[up]"


def test_stages_without_a_compiler(dummy, tmp_path):
    """Games, texts, resuming and the refusals between stages, in seconds and word for word."""

    def script(prompt):
        return "- EXPERIENCE ITEM: go right" if "EXPERIENCE ITEM" in prompt else "[right]"

    config, before = tiny_config(model_path=str(dummy)), compile_seconds()
    work, one = tmp_path / "run", {"devices": jax.devices()[:1]}
    with scripted(script, dummy) as made:
        run(config, work, ["deploy", "extract"], **one)
        asked = sum(len(sampler.prompts) for sampler in made)
        run(config, work, ["deploy", "extract"], **one)
        assert asked == sum(len(sampler.prompts) for sampler in made) > 0
        with pytest.raises(UserError, match="needs consolidate first"):
            run(config, work, ["evaluate"], **one)
    games = [game for path in sorted(work.rglob("deploy_*.jsonl")) for game in read(path)]
    assert len(games) == 12
    assert {turn.action for game in games for turn in game.turns} == {"[right]"}
    texts = read_json(work / "round_001" / "knowledge" / "knowledge.json")["texts"]
    assert len(texts) == 2 and all("go right" in text for text in texts)
    assert compile_seconds() - before < 2.0  # small arithmetic only: no sampler, no model


def test_the_sampler_is_put_back(dummy):
    from oel_jax.runs import samplers

    before = dict(vars(samplers))
    with pytest.raises(KeyError), scripted({}, dummy):
        assert vars(samplers) != before
        raise KeyError
    assert vars(samplers) == before


def test_a_dummy_model_is_whole_and_depends_on_its_seed(dummy, tmp_path):
    again, other = (testing.write_dummy_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    weights = [(path / "model.safetensors").read_bytes() for path in (dummy, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert sum(path.stat().st_size for path in dummy.iterdir()) < 400_000
    model = load_model(dummy)
    ids = model.tokenizer.encode("go right")
    assert np.isfinite(np.asarray(model.logits([ids]))).all()
