"""Log-probabilities of long answers, chunk by chunk, and what is taken out before recording."""

import numpy as np
import pytest
from served import serving, serving_tiny  # skips without the extra

from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import user
from oel_jax.logs.redaction import Redactor
from oel_jax.serve.token_scores import token_scores


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    with serving_tiny(tmp_path_factory) as made:
        yield made


@pytest.mark.parametrize("length, count", [(1, 1), (3, 64), (40, 65), (7, 150)])
def test_scores_equal_the_logits(policies, length, count):
    model, draw = policies.engine().model, np.random.default_rng(length)
    limit = model.vocab_limit
    prompt, ids = draw.integers(3, limit, length).tolist(), draw.integers(3, limit, count).tolist()
    z = np.asarray(model.logits([[*prompt, *ids]]))[0, length - 1 : -1, :limit].astype(np.float64)
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    scored = token_scores(model, prompt, ids, 4)
    assert [one.id for one in scored] == ids
    np.testing.assert_allclose(
        [one.log_prob for one in scored], logs[np.arange(count), ids], atol=1e-4
    )
    best = -np.sort(-logs, axis=-1)[:, :4]
    np.testing.assert_allclose([[p for _, p in one.top] for one in scored], best, atol=1e-4)
    assert token_scores(model, prompt, [], 4) == []
    assert token_scores(model, prompt, ids[:1], 0)[0].top == ()


def test_what_identifies_people_is_not_recorded(policies, tmp_path):
    store = ConversationStore(tmp_path, redactor=Redactor())
    with serving(policies, store=store) as served:
        first = served.chat("I am jane@example.org, tell me", user="jane@example.org").json()
        served.client.post(
            "/v1/feedback", json={"id": first["id"], "text": "Call +44 20 7946 0958!"}
        )
        (line,), (feedback,) = served.lines(), served.lines("feedback")
    turn = line["turns"][0]
    assert (
        turn["messages"] == [user("I am [EMAIL], tell me")] and line["user"] != "jane@example.org"
    )
    assert "prompt_ids" not in turn and "response_ids" not in turn
    assert line["id"] == first["id"] == feedback["id"] and "7946" not in feedback["text"]
