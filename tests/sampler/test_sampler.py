"""The sampler: cached decoding equals the full forward, slots are independent, draws are right."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import meshes

from oel_jax.evaluate import likelihood
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh, replicate
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.pace import Pace
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler
from oel_jax.sampler.sampling import RowSampling, draw, sample

LIMIT, STOPS = 290, (5, 7)  # 304 embedding rows; ids from 290 on are taken for padding


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


@pytest.fixture(scope="module")
def requests():
    draw = np.random.default_rng(0)
    return [
        Request(
            draw.integers(0, 300, int(draw.integers(1, 70))).tolist(),
            request_key("test", index),
            int(draw.integers(1, 20)),
            index,
        )
        for index in range(24)
    ]


def make(model, mesh=None, how=None, **changes):
    rest = dict(limit=LIMIT, stop_ids=STOPS, sampling=how or Sampling(0.7))
    rest |= {name: changes.pop(name) for name in rest if name in changes}
    config = SamplerConfig(**dict(slots=8, length=96, response=24) | changes)
    return Sampler(model.cfg, mesh or model.mesh, config, **rest)


@pytest.fixture(scope="module")
def answers(model, requests):
    return make(model).generate(model.params, requests)


def test_responses_are_well_formed(requests, answers):
    assert [a.tag for a in answers] == list(range(len(requests)))
    for request, answer in zip(requests, answers, strict=True):
        assert 1 <= len(answer.ids) <= request.max_new
        assert answer.stopped == (answer.ids[-1] in STOPS)
        assert answer.stopped or len(answer.ids) == request.max_new
        assert not set(answer.ids[:-1]) & set(STOPS)
        assert max(answer.ids) < LIMIT
    assert len({len(a.ids) for a in answers}) > 5
    assert any(a.stopped for a in answers)  # several stop ids end a response


@pytest.mark.parametrize("overlap", [False, True])
def test_a_slow_device_gets_less_at_once_and_says_the_same(model, requests, answers, overlap):
    sampler, places = make(model, overlap=overlap, seconds=0.0), []  # whatever it does is too long
    slow = sampler.generate(
        model.params, requests, lambda: places.append(sampler.encoded + sampler.generated)
    )
    assert [a.ids for a in slow] == [a.ids for a in answers]
    for mine, other in zip(slow, answers, strict=True):
        np.testing.assert_array_equal(mine.log_probs, other.log_probs)
    assert sampler._pace.steps == 1  # and not 16
    tokens = max(len(answer.ids) for answer in answers)
    assert len(places) > tokens and len(set(places)) > 3  # also while prompts are encoded


def test_the_pace_follows_the_device(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("oel_jax.sampler.pace.monotonic", lambda: clock[0])
    pace = Pace(16)

    def dispatch(seconds, host=0.0):
        pace.begin()
        clock[0] += 0.0 if host else seconds
        pace.started()
        clock[0] += host
        pace.decoded(waited=not host)
        return pace.steps

    assert [dispatch(s) for s in (20, 4, 1, 1, 1, 6)] == [4, 4, 8, 16, 16, 13]
    assert dispatch(0.0, host=60.0) == 16  # the host was slow, not the device
    pace.encode()
    assert pace.encoding(100)  # nothing is known yet
    clock[0] += 10
    pace.encoded()
    pace.encode()
    assert not pace.encoding(40) and pace.encoding(20)


def test_tokens_are_counted_from_the_first_dispatch(model, requests):
    sampler, counts, ids = make(model, decode_steps=2), [], 0
    sampler.submit(requests)
    while sampler.busy:
        ids += sum(len(done.ids) for done in sampler.poll(model.params))
        counts.append((sampler.written, sampler.generated))
    assert 0 < counts[0][0] <= 16  # eight slots, two tokens each
    assert counts == sorted(counts) and all(written >= whole for written, whole in counts)
    assert any(written > whole for written, whole in counts)  # answers that are not finished
    assert counts[-1] == (ids, ids)


def test_cached_log_probs_equal_the_full_forward(model, requests, answers):
    worst = 0.0
    pairs = list(zip(requests, answers, strict=True))
    logits = np.asarray(model.logits([[*r.prompt, *a.ids] for r, a in pairs]))
    for (request, answer), z in zip(pairs, logits, strict=True):
        first = len(request.prompt) - 1
        expected = jax.nn.log_softmax(z[first : first + len(answer.ids), :LIMIT] / 0.7)
        chosen = expected[np.arange(len(answer.ids)), np.array(answer.ids)]
        worst = max(worst, float(np.abs(chosen - answer.log_probs).max()))
    assert worst <= 1e-4, worst


def test_greedy_is_transformers_argmax(tiny_models, model, requests):
    torch = pytest.importorskip("torch", reason="compares with transformers' PyTorch model")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["qwen3_tied"]).eval()
    answers = make(model, how=Sampling(0.0), limit=304, stop_ids=(2,)).generate(
        model.params, requests
    )
    compared = 0
    for request, answer in zip(requests, answers, strict=True):
        sequence = torch.tensor([[*request.prompt, *answer.ids]])
        with torch.no_grad():
            z = theirs(sequence).logits[0, len(request.prompt) - 1 : -1].numpy()
        two = np.sort(z, axis=-1)[:, -2:]
        clear = two[:, 1] - two[:, 0] > 1e-4  # a tie may fall either way
        compared += clear.sum()
        assert (z.argmax(-1) == answer.ids)[clear].all()
    assert compared > 100


def test_answers_do_not_depend_on_the_batch(model, requests, answers):
    """Other slot counts, other dispatch lengths, other neighbours, other order, alone."""
    runs = {
        "16 slots": make(model, slots=16).generate(model.params, requests),
        "1 token a dispatch": make(model, decode_steps=1).generate(model.params, requests),
        "reversed": make(model).generate(model.params, requests[::-1])[::-1],
    }
    for name, other in runs.items():
        assert [a.ids for a in other] == [a.ids for a in answers], name
    for index in (3, 17):
        alone = make(model).generate(model.params, [requests[index]])[0]
        assert alone.ids == answers[index].ids
        np.testing.assert_array_equal(alone.log_probs, answers[index].log_probs)


@pytest.mark.parametrize("shape", meshes((2, 2), (4, 2), (8, 1)))
@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(0.7, 20, 0.8), Sampling(0.0)])
def test_mesh_equals_one_device(model, requests, shape, how):
    expected = make(model, how=how).generate(model.params, requests[:10])
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    split = load_model(model.directory, mesh=mesh)
    on_mesh = make(model, mesh, how).generate(split.params, requests[:10])
    assert [a.ids for a in on_mesh] == [a.ids for a in expected]


def gathered(sampler, params):
    """Elements of the largest array that compiled decoding gathers."""
    how = {"limit": sampler.limit, "widths": (0,)}
    with jax.set_mesh(sampler.mesh):
        program = decode.lower(sampler.cfg, params, sampler._state, np.int32(4), **how)
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program.compile().as_text())
    return max((math.prod(map(int, dims.split(","))) for dims in found if dims), default=0)


@pytest.mark.parametrize("shape", meshes((2, 2), (4, 1)))
def test_whole_weights_say_the_same_and_gather_nothing_of_them(model, requests, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    split = load_model(model.directory, mesh=mesh).params
    both = {"split": split, "whole": split | {"layers": replicate(split["layers"])}}
    samplers = {name: make(model, mesh) for name in both}
    said = {name: samplers[name].generate(both[name], requests[:10]) for name in both}
    assert [a.ids for a in said["whole"]] == [a.ids for a in said["split"]]
    largest = {name: gathered(samplers[name], both[name]) for name in both}
    slice_of_layer = model.cfg.hidden_size * model.cfg.intermediate_size // shape[1]
    assert largest["whole"] < slice_of_layer <= largest["split"]
    for leaf in jax.tree.leaves(both["whole"]["layers"]):
        assert "fsdp" not in leaf.sharding.spec


def test_a_key_is_a_stream_of_its_own(model, requests):
    again = Request(requests[0].prompt, request_key("test", "other"), 20)
    same, other = (
        make(model).generate(model.params, [r])[0].ids
        for r in (Request(requests[0].prompt, requests[0].key, 20), again)
    )
    assert same != other
    keys = {request_key("a", 1, 23).tobytes(), request_key("a", 12, 3).tobytes()}
    assert len(keys) == 2  # parts are separated, not glued


def test_decoding_updates_the_cache_in_place(model):
    """The compiled step holds no second cache: temporaries stay far below its size."""
    sampler = make(model, slots=64, length=512)
    with jax.set_mesh(model.mesh):
        compiled = decode.lower(
            model.cfg,
            model.params,
            sampler._state,
            np.int32(4),
            limit=LIMIT,
            widths=(0,),
        ).compile()
    cache = sum(leaf.nbytes for leaf in sampler._state.cache)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    # One layer's keys and values are read out at a time; a copy of the cache would add all layers.
    assert memory.temp_size_in_bytes < cache


# --- one draw -------------------------------------------------------------------------------------


def rows_of(how, count, vocabulary):
    """Equal settings of so many rows, and their widths."""
    return RowSampling.of([how] * count, vocabulary), (how.candidates(vocabulary),)


def frequencies(how, z, limit, draws=20_000):
    keys = np.stack([request_key("draw", index) for index in range(draws)])
    logits = np.broadcast_to(z, (draws, len(z)))
    token, log_prob = jax.jit(sample, static_argnums=(1, 2))(
        *rows_of(how, draws, len(z)), limit, logits, keys, np.zeros(draws, np.int32)
    )
    return np.bincount(token, minlength=len(z)) / draws, np.asarray(token), np.asarray(log_prob)


def expected_distribution(how, z, limit):
    """Spec section 5, the order of vLLM: temperature, then top-k, then top-p; plain NumPy."""
    z = np.asarray(z, np.float64)[:limit] / how.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(limit, bool)
    if how.top_k:
        keep[order[how.top_k :]] = False
    p = np.where(keep, p, 0.0)
    p /= p.sum()
    if how.top_p < 1.0:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= how.top_p]] = False
        p = np.where(keep, p, 0.0)
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "how",
    [
        Sampling(0.7),
        Sampling(1.3),
        Sampling(0.7, 20, 0.8),
        Sampling(0.7, 3, 1.0),
        Sampling(1.0, 0, 0.6),
        Sampling(0.7, 1, 1.0),
        Sampling(0.7, 500, 0.9),
    ],
)
def test_draws_follow_the_distribution(how):
    z = np.random.default_rng(2).normal(size=32).astype(np.float32) * 2
    limit = 28
    expected = expected_distribution(how, z, limit)
    seen, _, _ = frequencies(how, z, limit)
    assert not seen[limit:].any() and not seen[:limit][expected == 0].any()
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert (np.abs(seen[:limit] - expected) <= 4.5 * error + 1e-9).all()


def test_log_prob_is_the_plain_one_at_the_temperature():
    z = np.random.default_rng(2).normal(size=32).astype(np.float32)
    _, token, log_prob = frequencies(Sampling(0.7, 5, 0.8), z, 28, draws=50)
    expected = jax.nn.log_softmax(z[:28] / 0.7)
    np.testing.assert_allclose(log_prob, np.asarray(expected)[token], atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def confident_logits():
    """[V, D] in bfloat16, and -inf: column c is what the c-th unit vector makes, exactly.

    A likely token, others far below or nearly as likely, at levels up to +-1e4.
    """
    draw, vocabulary = np.random.default_rng(0), 72
    columns = []
    for level in (0, 30, 60, -200, 1e3, 1e4, -1e4):
        for gap in (0.0, 8.0, 20.0, 60.0):
            z = level - gap - np.abs(draw.normal(size=vocabulary)) * 2 * max(1, abs(level) / 128)
            z[draw.integers(vocabulary)] = level
            columns.append(z)
    matrix = np.array(columns).T
    matrix[-3:] = -np.inf
    return np.asarray(jnp.asarray(matrix.astype(np.float32), jnp.bfloat16))


def exact_log_probs(matrix, temperature=1.0):
    """[D, V] in float64."""
    z = matrix.T.astype(np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    ends = z == 0
    others = np.where(ends, 0, np.exp(z)).sum(-1, keepdims=True)
    ties = ends.sum(-1, keepdims=True) - 1
    return z - np.log1p(others + ties)


def finite(matrix):
    """A product with -inf is NaN; the lowest number takes its place."""
    return jnp.maximum(jnp.asarray(matrix), jnp.finfo(jnp.bfloat16).min / 2)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_drawn_log_probs_of_confident_tokens_are_exact(temperature):
    matrix = confident_logits()
    count = np.arange(matrix.shape[1], dtype=np.int32)
    keys = np.asarray([request_key("confident", int(row)) for row in count])
    eye = jnp.eye(len(count), dtype=jnp.bfloat16)
    how = Sampling(temperature)
    rows = rows_of(how, len(count), len(matrix))
    token, log_prob = draw(*rows, 70, eye, finite(matrix), len(matrix), keys, count)
    right = exact_log_probs(
        np.where(np.arange(72)[:, None] < 70, matrix, -np.inf), how.temperature or 1
    )
    right = right[count, np.asarray(token)]
    assert (right > -1e-6).sum() >= 5 and (right < -0.1).sum() >= 1
    np.testing.assert_allclose(log_prob, right, rtol=2e-5, atol=1e-30)
    # Whole rows that hold -inf themselves.
    whole = jnp.asarray(matrix.T, jnp.float32)
    token, log_prob = sample(*rows, 72, whole, keys, count)
    right = exact_log_probs(matrix, how.temperature or 1)[count, np.asarray(token)]
    np.testing.assert_allclose(log_prob, right, rtol=2e-5, atol=1e-30)


def test_scored_log_probs_of_confident_tokens_are_exact():
    matrix = confident_logits()
    width = matrix.shape[1]
    targets = np.stack([matrix.T.argmax(-1), np.arange(width)], axis=1).astype(np.int32)
    hidden = jnp.repeat(jnp.eye(width, dtype=jnp.bfloat16)[:, None], 2, axis=1)
    found, likeliest = likelihood._local(len(matrix), hidden, finite(matrix), jnp.asarray(targets))
    right = np.take_along_axis(exact_log_probs(matrix), targets, axis=1)
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-30)
    assert likeliest[:, 0].all()


def test_a_prompt_that_cannot_fit_says_what_to_change(model):
    sampler = make(model)
    with pytest.raises(ValueError, match=r"does not fit into the cache of 96 tokens"):
        sampler.submit([Request([1] * 90, request_key(0), 20)])
    with pytest.raises(ValueError, match="empty prompt"):
        sampler.submit([Request([], request_key(0), 20)])
    with pytest.raises(ValueError, match="new tokens"):
        sampler.submit([Request([1], request_key(0), 25)])
    sampler.submit([Request([1] * 76, request_key(0), 20)])  # exactly full
    (done,) = [c for _ in range(4) for c in sampler.poll(model.params)]
    assert len(done.ids) <= 20


def test_slots_must_fit_the_mesh(model):
    mesh = make_mesh(4, 2)
    with pytest.raises(ValueError, match=r"slots is 6: it must be a positive multiple of the 4"):
        make(model, mesh, slots=6)
