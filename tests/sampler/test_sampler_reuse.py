"""What the sampler keeps, shares and copies changes nothing but the work it does."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from oel_jax.models.language_model import load_model
from oel_jax.models.lengths import padded_length
from oel_jax.parallel.mesh import make_mesh
from oel_jax.sampler import sampler as sampler_module
from oel_jax.sampler import scheduler, slots
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.prefill import extend
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

LIMIT, STOPS = 290, (5, 7)
PREFIX = 150


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


def make(model, mesh=None, how=None, **changes):
    config = SamplerConfig(**dict(slots=8, length=288, response=24) | changes)
    rest = dict(limit=LIMIT, stop_ids=STOPS, sampling=how or Sampling(0.7))
    return Sampler(model.cfg, mesh or model.mesh, config, **rest)


def ids(seed, count):
    return np.random.default_rng(seed).integers(8, 290, count).tolist()


def behind(prefixes, count, seed=0):
    """Requests that begin with one of the prefixes; some share only a part of it."""
    draw = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        prefix = prefixes[int(draw.integers(len(prefixes)))]
        cut = int(draw.integers(20, len(prefix))) if index % 5 == 4 else len(prefix)
        own = ids([seed, index], int(draw.integers(1, 60)))
        key = request_key("behind", seed, index)
        new = int(draw.integers(2, 20))
        requests.append(Request([*prefix[:cut], *own], key, new, index, prefix=tuple(prefix)))
    return requests


def plain(requests):
    return [replace(request, prefix=(), session=None) for request in requests]


def same(ours, theirs, bits=False):
    assert [a.ids for a in ours] == [a.ids for a in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=0 if bits else 2e-5, rtol=0)


def conversation(model, sampler, games=6, turns=4, sessions=True, prefixes=((),)):
    """Games whose prompt grows from turn to turn, as a history does; answers by (game, turn)."""
    texts = [[*prefixes[g % len(prefixes)], *ids([9, g % 4], 40)] for g in range(games)]
    answers = {}

    def request(g, turn):
        prompt = [*texts[g], *ids(77, 5)]  # the end is the same at every turn, behind the history
        return Request(
            prompt,
            request_key("game", g, turn),
            12,
            (g, turn),
            prefix=tuple(prefixes[g % len(prefixes)]),
            session=f"game {g}" if sessions else None,
        )

    sampler.submit(request(g, 0) for g in range(games))
    while sampler.busy:
        for done in sampler.poll(model.params):
            g, turn = done.tag
            answers[done.tag] = done
            texts[g] += [*done.ids[:3], *ids([8, g, turn], 7)]
            if turn + 1 < turns:
                sampler.submit([request(g, turn + 1)])
    return [answers[key] for key in sorted(answers)]


@pytest.fixture(scope="module")
def prefixes():
    return [ids([1, k], PREFIX - 10 * k) for k in range(3)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_shared_prefix_equals_the_concatenated_prompt(model, prefixes, count):
    requests = behind(prefixes, 24)
    expected = make(model).generate(model.params, plain(requests))
    sampler = make(model, length=200, longest_prefix=PREFIX, prefixes=count)
    same(sampler.generate(model.params, requests), expected)
    # With a place for each, every prefix goes through the model once for all its requests.
    if count == 4:
        own = sum(len(r.prompt) - 1 - sampler._schedule.shared(r) for r in requests)
        assert sampler.encoded == own + sum(map(len, prefixes))


def test_a_prefix_that_is_not_read_would_be_noticed(model, prefixes, monkeypatch):
    requests = behind(prefixes, 6)
    expected = make(model).generate(model.params, plain(requests))
    monkeypatch.setattr(sampler_module, "put_prefix", lambda state, number, cache: state)
    sampler = make(model, length=200, longest_prefix=PREFIX)
    answers = sampler.generate(model.params, requests)
    assert [a.ids for a in answers] != [a.ids for a in expected]


def test_turns_that_keep_their_beginning_equal_fresh_ones(model, prefixes):
    fresh = make(model)
    expected = conversation(model, fresh, sessions=False)
    kept = make(model)
    same(conversation(model, kept), expected)
    assert kept.encoded < 0.5 * fresh.encoded
    with_prefix = make(model, longest_prefix=PREFIX, prefixes=2, length=160)
    both = conversation(model, with_prefix, prefixes=prefixes[:2])
    same(both, conversation(model, make(model), sessions=False, prefixes=prefixes[:2]))


def test_keeping_too_much_would_be_noticed(model, monkeypatch):
    expected = conversation(model, make(model), sessions=False)
    longer = scheduler.common_prefix
    monkeypatch.setattr(scheduler, "common_prefix", lambda a, b: min(longer(a, b) + 6, len(b)))
    answers = conversation(model, make(model))
    assert [a.ids for a in answers] != [a.ids for a in expected]


def test_more_sessions_than_slots(model):
    expected = conversation(model, make(model), games=20, sessions=False)
    same(conversation(model, make(model), games=20), expected)


def test_equal_prompts_are_encoded_once(model):
    prompts = [ids([3, k % 3], 30 + k % 3) for k in range(8)]
    requests = [Request(p, request_key("equal", i), 9, i) for i, p in enumerate(prompts)]
    alone = [make(model).generate(model.params, [request])[0] for request in requests]
    sampler = make(model)
    same(sampler.generate(model.params, requests), alone, bits=True)
    assert sampler.encoded == sum(30 + k - 1 for k in range(3))


def test_prompts_encoded_in_pieces_equal_whole_ones(model, prefixes):
    requests = behind(prefixes, 12)
    whole = make(model).generate(model.params, plain(requests))
    same(make(model, prefill_chunk=32).generate(model.params, plain(requests)), whole)
    exact = [replace(r, prompt=r.prompt[:97]) for r in plain(requests)]  # three pieces, no rest
    pieces = make(model, prefill_chunk=32).generate(model.params, exact)
    same(pieces, make(model).generate(model.params, exact))


@pytest.mark.parametrize("shape", [(4, 2), (8, 1)])
def test_mesh_equals_one_device(model, prefixes, shape):
    """A prefix of positions on many devices: the last ones may have none that anyone sees."""
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    split = load_model(model.directory, mesh=mesh)
    settings = dict(length=200, longest_prefix=PREFIX, prefixes=2, prefill_chunk=32, slots=16)
    requests = behind(prefixes, 14) + [
        Request(ids(4, 33), request_key("copy", k), 8, 14 + k) for k in range(6)
    ]
    expected = make(model, **settings).generate(model.params, requests)
    same(make(split, mesh, **settings).generate(split.params, requests), expected)
    talk = conversation(model, make(model, **settings), prefixes=prefixes[:2])
    same(conversation(split, make(split, mesh, **settings), prefixes=prefixes[:2]), talk)


def test_results_do_not_depend_on_who_else_is_there(model, prefixes):
    settings = dict(length=200, longest_prefix=PREFIX, prefixes=2)
    requests = behind(prefixes, 16)
    expected = make(model, **settings).generate(model.params, requests)
    backwards = make(model, **settings).generate(model.params, requests[::-1])[::-1]
    same(backwards, expected, bits=True)
    for index in (2, 9):
        alone = make(model, **settings).generate(model.params, [requests[index]])
        same(alone, [expected[index]], bits=True)


def test_nothing_is_compiled_after_warm_up(model, prefixes):
    sampler = make(model, length=200, longest_prefix=PREFIX, prefixes=2)
    sampler.generate(model.params, behind(prefixes, 24))
    conversation(model, sampler, games=12, prefixes=prefixes)
    functions = (extend, slots.admit, slots.copy_slots, slots.put_prefix, decode)
    sizes = [function._cache_size() for function in functions]
    sampler.generate(model.params, behind(prefixes, 24, seed=5))
    conversation(model, sampler, games=12, prefixes=prefixes)
    assert [function._cache_size() for function in functions] == sizes


def test_changed_parameters_are_not_mixed_with_old_ones(model, prefixes):
    other = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    requests = behind(prefixes, 6)
    sampler = make(model, length=200, longest_prefix=PREFIX)
    sampler.generate(model.params, requests)
    sampler.forget()
    expected = make(model).generate(other, plain(requests))
    same(sampler.generate(other, requests), expected)


def test_padded_lengths_are_few_and_waste_little():
    lengths = [padded_length(n) for n in range(1, 2049)]
    assert all(size >= n for n, size in enumerate(lengths, 1))
    assert all(size <= max(16, 1.5 * n) for n, size in enumerate(lengths, 1))
    assert len(set(lengths)) <= 16


def test_what_does_not_fit_says_what_to_change(model, prefixes):
    with pytest.raises(ValueError, match="slots must be a multiple of both"):
        make(model, prefixes=3)
    sampler = make(model, length=64, longest_prefix=PREFIX)
    long = tuple(prefixes[0])
    sampler.submit([Request([*long, *ids(0, 40)], request_key(0), 20, prefix=long)])
    with pytest.raises(ValueError, match="does not fit"):
        sampler.submit([Request(ids(0, 60), request_key(0), 20, prefix=long)])
