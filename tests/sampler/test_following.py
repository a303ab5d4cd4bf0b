"""Requests that are watched and given up while they run: the others are what they are alone."""

import numpy as np
import pytest

from oel_jax.models.language_model import load_model
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

LIMIT, STOPS = 290, (5, 7)


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


def make(model, **changes):
    sizes = SamplerConfig(**dict(slots=4, length=128, response=40, decode_steps=3) | changes)
    return Sampler(
        model.cfg, model.mesh, sizes, limit=LIMIT, stop_ids=STOPS, sampling=Sampling(0.9)
    )


def asked(count, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Request(
            draw.integers(8, LIMIT, int(draw.integers(1, 50))).tolist(),
            request_key("follow", seed, index),
            int(draw.integers(1, 40)),
            index,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def alone(model):
    """The plain path's answers to the first requests."""
    return make(model).generate(model.params, asked(14))


def same(ours, theirs):
    assert (ours.tag, ours.ids, ours.stopped) == (theirs.tag, theirs.ids, theirs.stopped)
    np.testing.assert_array_equal(ours.log_probs, theirs.log_probs)


def play(model, sampler, requests, each_poll=lambda: None):
    """(completions by tag, progress by tag)."""
    sampler.submit(requests)
    done, pieces = {}, {}
    while sampler.busy:
        for one in sampler.poll(model.params):
            done[one.tag] = one
        for one in sampler.progress:
            pieces.setdefault(one.tag, []).append(one)
        each_poll()
    return done, pieces


@pytest.mark.parametrize(
    "changes",
    [{}, {"overlap": True}, {"draft": 2}, {"decode_steps": 64}, {"decode_steps": 1}],
    ids=str,
)
def test_progress_adds_up_to_the_answer(model, changes):
    requests = asked(14)
    expected = make(model, **changes).generate(model.params, requests)
    done, pieces = play(model, make(model, follow=True, **changes), requests)
    for plain in expected:
        same(done[plain.tag], plain)
        mine = pieces[plain.tag]
        assert all(one.ids for one in mine)
        assert [i for one in mine for i in one.ids] == plain.ids
        np.testing.assert_array_equal(np.concatenate([p.log_probs for p in mine]), plain.log_probs)
    if not changes:
        assert max(map(len, pieces.values())) > 3  # they came in pieces


def test_without_follow_nothing_is_fetched(model):
    sampler = make(model)
    _, pieces = play(model, sampler, asked(3))
    assert pieces == {}


@pytest.mark.parametrize("changes", [{}, {"overlap": True}, {"draft": 2}], ids=str)
@pytest.mark.parametrize("follow", [False, True])
def test_a_cancelled_request_frees_its_slot_and_changes_no_other(model, alone, changes, follow):
    """Running and pending ones are given up at every poll; the rest is as alone, to the bit."""
    requests = asked(14)
    if changes:
        alone = make(model, **changes).generate(model.params, requests)
    sampler = make(model, follow=follow, **changes)
    gone, order = set(), iter([0, 13, 2, 5, 6, 1])

    def each_poll():
        tag = next(order, None)
        if tag is not None:
            sampler.cancel([requests[tag]])
            gone.add(tag)
            assert requests[tag] not in sampler._schedule.pending
            assert all(slot.running is not requests[tag] for slot in sampler._schedule.slots)

    done, pieces = play(model, sampler, requests, each_poll)
    assert gone == {0, 13, 2, 5, 6, 1}
    assert set(range(14)) - set(done) <= gone
    assert 13 not in done  # it was pending
    for one in done.values():
        same(one, alone[one.tag])
    for tag, mine in pieces.items():
        ids = [i for one in mine for i in one.ids]
        assert ids == alone[tag].ids[: len(ids)]
    assert not sampler.busy


def test_a_freed_slot_is_taken_at_the_next_poll(model):
    sampler = make(model, slots=2, prefill_rows=2, decode_steps=1, follow=True)
    requests = [Request([9 + i], request_key(i), 40, i, stop_ids=()) for i in range(3)]
    sampler.submit(requests)
    sampler.poll(model.params)
    assert {one.tag for one in sampler.progress} == {0, 1}
    sampler.cancel([requests[1]])
    sampler.poll(model.params)
    assert {one.tag for one in sampler.progress} == {0, 2}


def test_what_a_cancelled_turn_left_is_reused_rightly(model):
    """The session's next prompt goes on from the part of the answer that was seen."""
    sampler = make(model, follow=True)
    first = Request([9, 10, 11, 12], request_key("turn"), 40, 0, session="talk", stop_ids=())
    sampler.submit([first])
    for _ in range(3):
        sampler.poll(model.params)
    sampler.cancel([first])
    said = make(model).generate(model.params, [first])[0].ids[:9]
    again = Request([*first.prompt, *said, 33, 34], request_key("next"), 9, 1, session="talk")
    before = sampler.encoded
    done, _ = play(model, sampler, [again])
    assert sampler.encoded - before < len(again.prompt) - 8
    (plain,) = make(model).generate(model.params, [again])
    plain = type(plain)(1, plain.ids, plain.log_probs, plain.stopped)
    assert done[1].ids == plain.ids
    np.testing.assert_allclose(done[1].log_probs, plain.log_probs, atol=2e-5)


def test_cancelling_what_is_not_there_changes_nothing(model, alone):
    sampler, requests = make(model), asked(14)
    stranger = asked(14)[0]  # equal, but not the very object
    done, _ = play(model, sampler, requests, lambda: sampler.cancel([stranger]))
    for plain in alone:
        same(done[plain.tag], plain)
    sampler.cancel(requests)  # all have finished
    assert not sampler.busy
