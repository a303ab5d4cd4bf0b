"""Requests that bring their own sampling settings: the answers they would have alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.parallel.vocabulary import argmax, log_softmax, top_k
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.requests import Request, RequestError, Sampling, request_key
from oel_jax.sampler.sampler import MOST_WIDTHS, Sampler
from oel_jax.sampler.sampling import RowSampling, sample

LIMIT, STOPS = 290, (5, 7)
KINDS = [
    Sampling(0.7),
    Sampling(1.0),
    Sampling(0.0),
    Sampling(0.7, 20, 0.8),
    Sampling(1.3, 20, 1.0),
    Sampling(0.7, 3, 0.5),
    Sampling(1.0, 0, 0.6),
    Sampling(0.9, 1, 1.0),
    Sampling(0.7, 500, 0.9),
]


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


@pytest.fixture(scope="module")
def requests():
    draw = np.random.default_rng(0)
    return [
        Request(
            draw.integers(0, 300, int(draw.integers(1, 50))).tolist(),
            request_key("kinds", index),
            int(draw.integers(4, 16)),
            index,
            sampling=KINDS[index % len(KINDS)],
        )
        for index in range(3 * len(KINDS))
    ]


def make(model, mesh=None, sampling=KINDS[0], **changes):
    config = SamplerConfig(**dict(slots=8, length=96, response=24) | changes)
    mesh = mesh or model.mesh
    return Sampler(model.cfg, mesh, config, limit=LIMIT, stop_ids=STOPS, sampling=sampling)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.stopped) == (b.ids, b.stopped)
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(model, requests):
    """Each kind in a sampler whose own settings it is, with no other kind near."""
    answers = {}
    for how in KINDS:
        mine = [replace(r, sampling=None) for r in requests if r.sampling == how]
        for done in make(model, sampling=how).generate(model.params, mine):
            answers[done.tag] = done
    return [answers[index] for index in range(len(requests))]


@pytest.mark.parametrize("draft", [0, 2])
def test_neighbours_of_other_kinds_change_nothing(model, requests, alone, draft):
    together = make(model, draft=draft).generate(model.params, requests)
    if draft:  # several queries in a pass: numbers differ in their last digits
        assert [a.ids for a in together] == [a.ids for a in alone]
    else:
        same(together, alone)
    assert len({tuple(a.ids) for a in alone}) > len(KINDS)


def test_order_and_default_settings_change_nothing(model, requests, alone):
    other = make(model, sampling=KINDS[3])
    same(other.generate(model.params, requests[::-1])[::-1], alone)


def test_mesh_equals_one_device(model, requests, alone):
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    split = load_model(model.directory, mesh=mesh)
    ours = make(split, mesh).generate(split.params, requests)
    assert [a.ids for a in ours] == [a.ids for a in alone]


def test_stop_ids_of_a_request(model, requests):
    request = replace(requests[0], max_new=16, stop_ids=())
    (free,) = make(model).generate(model.params, [request])
    assert len(free.ids) == 16 and not free.stopped
    stop = free.ids[3]
    first = free.ids.index(stop)
    ends = (*range(291, 295), stop)
    cut, default = make(model).generate(
        model.params, [replace(request, stop_ids=ends), replace(requests[1], tag=1)]
    )
    assert cut.ids == free.ids[: first + 1] and cut.stopped
    same([default], make(model).generate(model.params, [requests[1]]))


def test_settings_that_make_no_sense_are_refused(model, requests):
    sampler = make(model)
    for wrong in (Sampling(-0.1), Sampling(0.7, -1), Sampling(0.7, 0, 0.0), Sampling(0.7, 0, 1.1)):
        with pytest.raises(RequestError, match="top_p above 0"):
            sampler.submit([replace(requests[0], sampling=wrong)])
        with pytest.raises(RequestError, match="top_p above 0"):
            make(model, sampling=wrong)
    with pytest.raises(RequestError, match="9 stop ids; this sampler has room for 8"):
        sampler.submit([replace(requests[0], stop_ids=tuple(range(9)))])
    assert not sampler.busy


def test_a_kind_that_comes_and_goes_compiles_once(model, requests):
    sampler = make(model)
    sampler.generate(model.params, requests)
    programs = decode._cache_size()
    for how in KINDS:
        sampler.generate(model.params, [replace(requests[0], sampling=how)])
    assert decode._cache_size() == programs
    many = [replace(requests[0], max_new=1, sampling=Sampling(0.7, k)) for k in range(30, 42)]
    for request in many:
        sampler.generate(model.params, [request])
        assert len(sampler._recent_widths) <= MOST_WIDTHS


# --- one draw -------------------------------------------------------------------------------------


def static(how, limit, logits, keys, count):
    """A draw with settings that the compiler knows, as plain as it can be written."""
    z = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
    temperature = how.temperature or 1.0
    scaled, width = z / temperature, z.shape[-1]

    def noise(size):
        def row(key, index):
            return jax.random.gumbel(
                jax.random.fold_in(jax.random.wrap_key_data(key), index), (size,)
            )

        return jax.vmap(row)(keys, count)

    if how.temperature == 0:
        token = argmax(scaled)
    elif how.top_k == 0 and how.top_p == 1:
        token = argmax(scaled + noise(width))
    else:
        size = min(how.top_k or width, width)
        values, ids = top_k(scaled, size)
        if how.top_p < 1:
            probs = jax.nn.softmax(values)
            values = jnp.where(jnp.cumsum(probs, axis=-1) - probs < how.top_p, values, -jnp.inf)
        picked = jnp.argmax(values + noise(size), axis=-1)
        token = jnp.take_along_axis(ids, picked[:, None], axis=1)[:, 0]
    return token, log_softmax(z, temperature).at(token[:, None])[:, 0]


@pytest.mark.parametrize("width", [72, 1500])
def test_mixed_rows_equal_static_settings(width):
    """The same tokens; log-probabilities but for the last digit, since the compiler fuses them in
    another way."""
    rows = 40 * len(KINDS)
    draw = np.random.default_rng(width)
    logits = (draw.normal(size=(rows, width)) * 3).astype(np.float32)
    keys = np.stack([request_key("row", row) for row in range(rows)])
    count = draw.integers(0, 100, rows).astype(np.int32)
    settings = [KINDS[row % len(KINDS)] for row in range(rows)]
    widths = tuple(sorted({how.candidates(width) for how in settings}))
    ours = jax.jit(sample, static_argnums=(1, 2))
    mixed = ours(RowSampling.of(settings, width), widths, 60, logits, keys, count)
    for number, one in enumerate(KINDS):
        mine = slice(number, None, len(KINDS))
        given = (60, logits[mine], keys[mine], count[mine])
        expected = jax.jit(static, static_argnums=(0, 1))(one, *given)
        np.testing.assert_array_equal(np.asarray(mixed[0])[mine], expected[0])
        np.testing.assert_allclose(np.asarray(mixed[1])[mine], expected[1], rtol=1e-5, atol=1e-6)


def test_a_vocabulary_is_sorted_only_where_it_is_asked_for():
    width = 32_768
    how = RowSampling.of([Sampling(1.0)] * 2, width)
    given = (np.zeros((2, width), np.float32), np.zeros((2, 2), np.uint32), np.zeros(2, np.int32))

    def text(*widths):
        lowered = jax.jit(sample, static_argnums=(1, 2)).lower(how, widths, width, *given)
        return lowered.as_text()

    plain = text(0)
    assert "stablehlo.sort" not in plain and "chlo.top_k" not in plain
    assert "chlo.top_k" in text(20)
    cases = plain.count("stablehlo.case")
    assert text(0, width).count("stablehlo.case") == cases + 2  # each where a row asks for it


# --- settings of any kind, in few widths ----------------------------------------------------------


def rounded(how, width, limit, logits, keys, count):
    """A draw from the sorted `width` likeliest tokens of which the settings allow some."""
    z = np.where(np.arange(logits.shape[-1]) < limit, logits, -np.inf) / how.temperature
    drawn = []
    for row, key, index in zip(z, keys, count, strict=True):
        order = np.argsort(-row, kind="stable")[:width]
        values = row[order].astype(np.float64)
        values[min(how.top_k or len(row), len(row)) :] = -np.inf
        probs = np.exp(values - values[0])
        before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
        values[before >= how.top_p] = -np.inf
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        drawn.append(order[np.argmax(values + np.asarray(jax.random.gumbel(folded, (width,))))])
    return drawn


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (40, 0.9), (64, 0.5), (5, 0.3), (65, 0.8)])
def test_a_width_above_the_candidates_leaves_the_others_out(top_k, top_p):
    draw = np.random.default_rng(top_k)
    logits = (draw.normal(size=(200, 300)) * 2).astype(np.float32)
    keys = np.stack([request_key("wide", row) for row in range(200)])
    count = draw.integers(0, 100, 200).astype(np.int32)
    how, widths = Sampling(0.8, top_k, top_p), (0, 1, 64, 128, 300)
    rows = RowSampling.of([how] * 200, 300)
    given = (290, logits, keys, count)
    tokens = jax.jit(sample, static_argnums=(1, 2))(rows, widths, *given)[0]
    expected = rounded(how, 64 if top_k <= 64 else 128, *given)
    np.testing.assert_array_equal(tokens, expected)


def test_settings_of_any_kind_compile_nothing(model, requests):
    sampler = make(model, any_settings=True, slots=4)
    sampler.generate(model.params, requests[:1])
    programs = decode._cache_size()
    kinds = [Sampling(0.3 + k / 40, k, 1 - k / 90) for k in range(40)]
    asked = [replace(requests[k % 27], sampling=how, tag=k) for k, how in enumerate(kinds)]
    together = sampler.generate(model.params, asked)
    assert decode._cache_size() == programs
    for k in (0, 1, 7, 39):  # the answer that it has alone
        (one,) = make(model, any_settings=True, slots=4).generate(model.params, [asked[k]])
        assert one.ids == together[k].ids
    plain = make(model).generate(model.params, requests)
    ours = sampler.generate(model.params, requests)
    for a, b, request in zip(ours, plain, requests, strict=True):
        if request.sampling.candidates(model.cfg.vocab_size) in (0, 1, model.cfg.vocab_size):
            assert a.ids == b.ids  # what is not rounded draws as ever
