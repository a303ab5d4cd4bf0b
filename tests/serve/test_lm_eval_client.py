"""lm-evaluation-harness over HTTP gives the answers of our own adapter."""

# ruff: noqa: E402  (the harness is asked for before what imports it)

import os

import pytest

for package in ("lm_eval", "langdetect", "immutabledict", "nltk", "aiohttp", "tenacity"):
    pytest.importorskip(package, reason="lm-eval is an optional extra: requirements-eval.txt")

from conftest import REPOSITORY
from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalChatCompletion
from served import make_policies, serving

from oel_jax.evaluate.model import PolicyLM
from oel_jax.evaluate.tasks import select
from oel_jax.models.language_model import load_model

pytestmark = pytest.mark.lm_eval

ANSWER = 32  # tokens


def real_model():
    if "OEL_SMOLLM2" not in os.environ:
        pytest.skip("OEL_SMOLLM2 does not name a directory with SmolLM2-135M-Instruct")
    return load_model(os.environ["OEL_SMOLLM2"])


def test_ifeval_over_http_is_ifeval_of_the_adapter(tmp_path, monkeypatch):
    data = REPOSITORY.parent / "shared" / "ifeval"
    if not (data / "input_data.jsonl").is_file():
        pytest.skip("IF-Eval's prompts are not in ../shared/ifeval")
    model, prompts = real_model(), 4
    sampling = {"do_sample": False, "temperature": 0.0, "max_gen_toks": ANSWER}

    def run(lm):
        task = select(["ifeval"], ifeval_data=data, sampling=sampling, limit=prompts)[0]
        task.seed()
        found = evaluate(lm, task.loaded, limit=prompts, apply_chat_template=True)
        samples = sorted(found["samples"]["ifeval"], key=lambda one: one["doc_id"])
        return [one["filtered_resps"][0] for one in samples], [
            one["prompt_level_strict_acc"] for one in samples
        ]

    expected = run(PolicyLM(model))
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    policies = make_policies(model, length=1600, response=ANSWER)
    with serving(policies, tmp_path) as served:
        over_http = LocalChatCompletion.create_from_arg_obj(
            {
                "model": "policy",
                "base_url": f"{served.url}/v1/chat/completions",
                "num_concurrent": 3,
                "max_retries": 1,
            }
        )
        assert run(over_http) == expected
        assert len(served.lines()) == prompts
    policies.close()
    assert len(set(expected[0])) > prompts // 2  # the answers are not all the same
