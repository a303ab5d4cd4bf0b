"""Numbers of held-out conversations against slow references."""

import numpy as np
import pytest

from oel_jax.actor.chat_evaluation import _mean_log_prob
from oel_jax.data.messages import Context, Dialogue, user
from oel_jax.distill.packing import Sample
from oel_jax.learner.heldout import heldout_divergence
from oel_jax.learner.rollouts import _place
from oel_jax.learner.teacher import Teacher
from oel_jax.models.language_model import load_model
from oel_jax.testing import tiny_config, write_dummy_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return [load_model(write_dummy_model(root / str(seed), seed=seed)) for seed in (1, 2)]


def log_softmax(z):
    z = z.astype(np.float64) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_the_divergence_is_the_reverse_kl_on_the_students_top_k(models):
    student, base = models
    config = tiny_config(loss__top_k=8)
    contexts = [Context("knowledge", text, "user") for text in ("go up", "go down twice")]
    teacher = Teacher(base, contexts, thinking=False)
    dialogues = [Dialogue((user(text),)) for text in ("where to go", "which way", "left or right")]
    teacher.prepare(dialogues)
    answers = [[5, 9, 11], [7], [3, 3, 8, 12]]
    samples, total, tokens = [], 0.0, 0
    for index, (dialogue, answer) in enumerate(zip(dialogues, answers, strict=True)):
        number = index % 2
        shared, suffix = teacher.split(number, dialogue)
        prompt = student.tokenizer.chat(dialogue.messages[0]["content"], thinking=False)
        samples.append(
            Sample(prompt, suffix, shared, answer, np.zeros(len(answer), np.float32), number)
        )
        told = teacher.prompt(number, dialogue)
        for place in range(len(answer)):
            own = np.asarray(student.logits([[*prompt, *answer[:place]]])[0, -1])
            theirs = np.asarray(base.logits([[*told, *answer[:place]]])[0, -1])
            p, q = (log_softmax(z / config.loss.temperature) for z in (own, theirs))
            top = np.argsort(-own, kind="stable")[:8]
            total += float((np.exp(p[top]) * (p[top] - q[top])).sum())
            tokens += 1
    found = heldout_divergence(config, student, teacher, samples)
    assert found.tokens == tokens == 8
    assert found.kl == pytest.approx(total / tokens, rel=1e-3, abs=1e-6)


def test_the_mean_log_probability_is_that_of_each_token(models):
    model = models[0]
    pairs = [([4, 5], [6, 7, 8]), ([9], [10])]
    total = 0.0
    for before, after in pairs:
        logits = log_softmax(np.asarray(model.logits([[*before, *after]])[0]))
        total += sum(logits[len(before) + i - 1, token] for i, token in enumerate(after))
    found = _mean_log_prob(tiny_config(), model, pairs)
    assert found["tokens"] == 4
    assert found["log_prob"] == pytest.approx(total / 4, rel=1e-4)
    assert _mean_log_prob(tiny_config(), model, []) is None


@pytest.mark.parametrize("count", [1, 5, 12])
def test_conversations_come_again_only_when_all_have_come(count):
    places = [_place(3, count, position) for position in range(4 * count)]
    epochs = [places[first : first + count] for first in range(0, len(places), count)]
    assert epochs[0] == list(range(count))
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 12 or len({tuple(epoch) for epoch in epochs}) == 4
    assert places == [_place(3, count, position) for position in range(4 * count)]
