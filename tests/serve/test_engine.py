"""The engine: many clients, one sampler; each answer is the one that its request has alone."""

import asyncio
import gc
import threading
import tracemalloc
import weakref

import jax
import numpy as np
import pytest

from oel_jax.models.language_model import load_model
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, RequestError, Sampling, request_key
from oel_jax.sampler.sampler import Sampler
from oel_jax.serve.engine import Engine, Full, Unavailable, samples
from oel_jax.testing import write_dummy_model

SIZES = SamplerConfig(slots=4, prefill_rows=4, length=128, response=40, decode_steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_dummy_model(tmp_path_factory.mktemp("engine") / "model"))


@pytest.fixture
def engine(model):
    made = Engine(model, "round_000", SIZES, sampling=Sampling(0.9))
    yield made
    made.close()


def asked(count, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Request(
            draw.integers(8, 90, int(draw.integers(1, 50))).tolist(),
            request_key("engine", seed, index),
            int(draw.integers(1, 40)),
        )
        for index in range(count)
    ]


def endless(index=0):
    return Request([9, 10 + index], request_key("endless", index), 40, stop_ids=())


def alone(model, requests):
    sampler = Sampler(
        model.cfg,
        model.mesh,
        SIZES,
        limit=model.vocab_limit,
        stop_ids=model.tokenizer.stop_ids,
        sampling=Sampling(0.9),
    )
    return sampler.generate(model.params, requests)


def test_answers_read_from_asyncio_are_those_of_the_plain_path(model, engine):
    requests = asked(20)

    async def read(request):
        answer, ids = engine.submit(request), []
        async for piece in answer:
            assert piece.ids and len(piece.ids) == len(piece.log_probs)
            ids += piece.ids
        return answer, ids

    async def everyone():
        return await asyncio.gather(*map(read, requests))

    for (answer, ids), plain in zip(asyncio.run(everyone()), alone(model, requests), strict=True):
        assert ids == answer.ids == plain.ids
        np.testing.assert_array_equal(answer.log_probs, plain.log_probs)
        assert answer.finish == ("stop" if plain.stopped else "length")
        assert answer.policy == "round_000"
        assert answer.queued <= answer.first <= answer.ended
    counts = engine.counts()
    assert counts.submitted == 20 == counts.stop + counts.length
    assert counts.prompt_tokens == sum(len(r.prompt) for r in requests)


def test_threads_submit_and_cancel_at_once(model, engine):
    """Each thread gives up every third answer; the others are what they are alone."""
    requests = asked(16, seed=3)
    answers = [None] * len(requests)

    def client(first):
        for index in range(first, len(requests), 4):
            answers[index] = engine.submit(requests[index])
            if index % 3 == 0:
                answers[index].cancel()

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (answer, plain) in enumerate(zip(answers, alone(model, requests), strict=True)):
        assert answer.wait(300)
        if answer.finish == "cancelled":
            assert index % 3 == 0
            assert answer.ids == plain.ids[: len(answer.ids)]
        else:
            assert answer.ids == plain.ids
    assert engine.live == 0


def test_a_full_engine_refuses_and_says_when_to_come_back(model):
    engine = Engine(model, "p", SIZES, waiting=2)
    answers = [engine.submit(endless(i)) for i in range(5)]
    with pytest.raises(Full) as told:
        engine.submit_all([endless(7), endless(8)])  # all or none
    assert told.value.retry_after >= 1
    answers.append(engine.submit(endless(6)))
    for answer in answers:
        assert answer.wait(300) and answer.finish == "length"
    assert engine.submit(endless(9)).wait(300)
    assert engine.counts().refused == 2
    assert engine.close()


def test_what_cannot_be_served_is_refused_at_once(engine):
    for bad in (Request([], request_key(0), 3), Request([9] * 120, request_key(0), 20)):
        with pytest.raises(RequestError):
            engine.submit(bad)
    assert engine.live == 0


def test_a_deadline_ends_an_answer_with_what_is_there(engine):
    answer = engine.submit(endless(), seconds=0.0)
    assert answer.wait(300)
    assert (answer.finish, answer.reason) == ("cancelled", "deadline")
    assert engine.counts().cancelled == 1


def test_samples_of_one_prompt_share_its_encoding(model, engine):
    request = Request(list(range(9, 49)), request_key("n"), 12)
    answers = engine.submit_all(samples(request, 4))
    assert all(answer.wait(300) for answer in answers)
    assert answers[0].ids == alone(model, [request])[0].ids
    assert len({tuple(answer.ids) for answer in answers}) > 1
    assert engine.counts().encoded == 39


def test_a_failure_ends_running_answers_and_the_engine_serves_on(model, engine, caplog):
    whole = engine.model.params
    answers = [engine.submit(endless(i)) for i in range(2)]
    engine.model.params = {"layers": None}  # the next dispatch cannot be traced
    answers += [engine.submit(endless(2))]
    assert all(answer.wait(300) for answer in answers)
    failed = [answer for answer in answers if answer.finish == "error"]
    engine.model.params = whole
    assert failed and "Traceback" not in failed[0].reason
    assert len([r for r in caplog.records if r.exc_info]) == engine.counts().failures == 1
    request = asked(1)[0]
    answer = engine.submit(request)
    assert answer.wait(300) and answer.ids == alone(model, [request])[0].ids


def test_an_engine_that_fails_again_and_again_says_that_it_is_ill(model):
    engine = Engine(model, "p", SIZES)
    whole, engine.model.params = engine.model.params, {}
    try:
        for _ in range(3):
            assert engine.healthy
            assert engine.submit(endless()).wait(300)
        engine._thread.join(300)
        assert not engine.healthy
        with pytest.raises(Unavailable, match="log"):
            engine.submit(endless())
    finally:
        engine.model = model
        model.params = whole


def test_closing_finishes_what_is_taken_and_refuses_the_rest(model):
    engine = Engine(model, "p", SIZES)
    answers = [engine.submit(endless(i)) for i in range(6)]
    assert engine.close(300)
    assert {answer.finish for answer in answers} == {"length"}
    with pytest.raises(Unavailable, match="stopping"):
        engine.submit(endless())
    late = Engine(model, "p", SIZES)
    answers = [late.submit(endless(i)) for i in range(30)]
    assert not late.close(0)
    assert all(answer.finish for answer in answers)
    assert "cancelled" in {answer.finish for answer in answers}


def test_memory_does_not_grow_with_requests(model):
    """Device arrays, answers and the Python heap are what they were after hundreds before."""
    engine = Engine(model, "p", SIZES, waiting=50)
    alive = weakref.WeakSet()

    def many(count, first):
        for start in range(first, first + count, 40):
            some = []
            for index in range(start, start + 40):
                prompt = [9 + index % 80, 9 + index // 80 % 80, 11]
                some.append(engine.submit(Request(prompt, request_key(index), 1 + index % 3)))
                if index % 9 == 0:
                    some[-1].cancel()
            alive.update(some)
            assert all(answer.wait(300) for answer in some)

    def state():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays()), tracemalloc.get_traced_memory()[0]

    many(400, 0)
    tracemalloc.start()
    many(200, 400)
    arrays, heap = state()
    many(1400, 600)
    more_arrays, more_heap = state()
    tracemalloc.stop()
    assert more_arrays == arrays
    assert more_heap < heap + 100_000
    assert engine.close(300)
    engine = None
    gc.collect()
    assert len(alive) == 0
