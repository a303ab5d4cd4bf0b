"""Speculative decoding gives the tokens that decoding one by one gives."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiers import meshes

from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.sampler import decode as decoding
from oel_jax.sampler import draft
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

LIMIT, STOPS = 290, (5, 7)


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


def make(model, mesh=None, how=None, **changes):
    config = SamplerConfig(**dict(slots=8, length=160, response=48) | changes)
    rest = dict(limit=LIMIT, stop_ids=STOPS, sampling=how or Sampling(0.7))
    return Sampler(model.cfg, mesh or model.mesh, config, **rest)


@pytest.fixture(scope="module")
def requests():
    """Prompts that repeat a phrase, so that there is something to draft."""
    draw = np.random.default_rng(0)
    found = []
    for index in range(12):
        phrase = draw.integers(8, LIMIT, 6).tolist()
        prompt = phrase * int(draw.integers(2, 6))
        new = int(draw.integers(1, 49))
        found.append(Request(prompt, request_key("draft", index), new, index))
    return found


def slowly(ids, column, size):
    """The draft of one row by plain search."""
    seen = list(ids[: column + 1])
    for length in (3, 2):
        for at in range(column - 1, length - 2, -1):
            if column + 1 >= length and seen[at - length + 1 : at + 1] == seen[-length:]:
                found = seen[at + 1 : at + 1 + size]
                return found + [-1] * (size - len(found))
    return [-1] * size


def test_drafts_equal_a_plain_search():
    draw = np.random.default_rng(1)
    ids = draw.integers(0, 3, (400, 24))
    column = draw.integers(0, 24, 400)
    found = np.asarray(draft.propose(ids, column, size=4))
    expected = np.array([slowly(row, at, 4) for row, at in zip(ids.tolist(), column, strict=True)])
    np.testing.assert_array_equal(found, expected)
    assert (expected[:, 0] == -1).any() and (expected[:, -1] >= 0).any()


@pytest.mark.parametrize(
    ("guess", "sampled", "room", "count"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 9, 4),  # all right: one more for free
        ([1, 2, 3], [1, 9, 3, 4], 9, 2),  # wrong at the second: what was sampled there counts
        ([8, 2, 3], [1, 2, 3, 4], 9, 1),
        ([-1, -1, -1], [1, 2, 3, 4], 9, 1),  # nothing drafted
        ([1, 5, 3], [1, 5, 3, 4], 9, 2),  # a stop token ends it
        ([1, 2, 3], [1, 2, 3, 4], 2, 2),  # the budget ends it
    ],
)
def test_what_is_kept_of_a_draft(guess, sampled, room, count):
    found = draft.accepted(
        np.array([guess]), np.array([sampled]), np.array([STOPS]), np.array([room])
    )
    assert found.tolist() == [count]


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(0.05), Sampling(0.7, 20, 0.8)])
@pytest.mark.parametrize("size", [1, 4])
def test_speculative_equals_one_by_one(model, requests, how, size):
    plain = make(model, how=how).generate(model.params, requests)
    sampler = make(model, how=how, draft=size)
    ours = sampler.generate(model.params, requests)
    assert [a.ids for a in ours] == [b.ids for b in plain]
    assert [a.stopped for a in ours] == [b.stopped for b in plain]
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=3e-5, rtol=0)
    proposed, accepted = sampler.drafts()
    assert proposed > 5
    if how.temperature == 0.05:  # nearly greedy texts fall into loops, which drafts foresee
        assert accepted > 20


def test_keeping_a_wrong_draft_would_be_noticed(model, requests, monkeypatch):
    right = draft.accepted

    def too_much(guess, sampled, stop_ids, room):
        return right(sampled[:, :-1], sampled, stop_ids, room)

    plain = make(model).generate(model.params, requests)
    jax.clear_caches()
    monkeypatch.setattr(decoding, "accepted", too_much)
    ours = make(model, draft=4).generate(model.params, requests)
    jax.clear_caches()
    assert [a.ids for a in ours] != [b.ids for b in plain]


@pytest.mark.parametrize("shape", meshes((2, 2), (2, 1)))
def test_mesh_equals_one_device(model, requests, shape):
    plain = make(model, draft=3).generate(model.params, requests)
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    other = load_model(model.directory, mesh=mesh)
    ours = make(other, mesh, draft=3).generate(other.params, requests)
    assert [a.ids for a in ours] == [b.ids for b in plain]


def test_drafts_go_with_sessions_and_copies(model, requests):
    """What a slot keeps from turn to turn, and what it copies from an equal prompt."""
    first = [replace(request, session=request.tag, max_new=20) for request in requests[:4]] * 2
    first = [replace(r, tag=i, session=i) for i, r in enumerate(first)]

    def two_turns(sampler):
        answers = sampler.generate(model.params, first)
        again = [
            replace(r, prompt=[*r.prompt, *a.ids, 9, 8, 9], key=request_key("second", r.tag))
            for r, a in zip(first, answers, strict=True)
        ]
        return [a.ids for a in (*answers, *sampler.generate(model.params, again))]

    assert two_turns(make(model, draft=4)) == two_turns(make(model))


@pytest.mark.parametrize("size", [0, 2])
def test_a_single_slot(model, requests, size):
    plain = make(model).generate(model.params, requests[:3])
    ours = make(model, slots=1, prefill_rows=1, draft=size).generate(model.params, requests[:3])
    assert [a.ids for a in ours] == [b.ids for b in plain]


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_overlap_changes_nothing_but_when_answers_come(model, requests, draft_tokens):
    plain = make(model, slots=4, prefill_rows=4)
    ours = make(model, slots=4, prefill_rows=4, overlap=True, draft=draft_tokens)
    expected = plain.generate(model.params, requests)
    assert [a.ids for a in ours.generate(model.params, requests)] == [a.ids for a in expected]
    ours.submit(requests[:1])
    assert ours.poll(model.params) == []  # started, not waited for
    assert ours.busy
