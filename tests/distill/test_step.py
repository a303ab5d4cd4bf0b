"""The consolidation step: cached teacher, micro-batches, devices, optimizer, all against plain."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tiers import meshes

from oel_jax.chat.render import render
from oel_jax.data.messages import Context, Dialogue, user
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.reference import divergence
from oel_jax.distill.step import StepConfig, accumulate, update, zeros_like
from oel_jax.distill.topk_kl import KLConfig
from oel_jax.learner.memory import compile_step, memory_table, peak_memory
from oel_jax.learner.teacher import Teacher
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import (
    CachedPrefix,
    Params,
    forward,
    init_params,
    param_shardings,
    unembed,
)
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import common_prefix
from oel_jax.parallel.mesh import device_bytes, make_mesh, put_batch

TEXTS = ["- EXPERIENCE ITEM: H loses.\n- EXPERIENCE ITEM: G wins.", "Walk towards G.", ""]
CONTEXTS = [Context("knowledge", text) for text in TEXTS]
KL = KLConfig(top_k=16, temperature=0.7, chunk=32)


class Bytes:
    """A real tokenizer for a vocabulary of 304: one id per UTF-8 byte, wrapped in two controls."""

    def chat(self, text, *, thinking):
        return [300, *text.encode(), 301]


# Heads that four devices can split; odd head size.
CFG = ModelConfig(
    family="qwen3",
    vocab_size=304,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=24,
    intermediate_size=96,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=None,
    tie_embeddings=True,
    attention_bias=False,
    qk_norm=True,
    max_positions=2048,
)


def make_model(seed: int, mesh=None) -> LanguageModel:
    """A random model whose outputs are far from uniform (and whose gradients are not chaotic)."""
    mesh = mesh or make_mesh(1, 1, jax.devices()[:1])
    params = init_params(CFG, jax.random.key(seed))
    layers = jax.tree.map(lambda leaf: 3.0 * leaf if leaf.ndim > 2 else leaf, params["layers"])
    params |= {"layers": layers, "embed": 10.0 * params["embed"]}
    params = jax.device_put(jax.device_get(params), param_shardings(CFG, mesh))
    model = LanguageModel(Path("."), CFG, mesh, params)
    model.__dict__["tokenizer"] = Bytes()
    return model


@pytest.fixture(scope="module")
def student():
    return make_model(0)


def situation(text):
    return Dialogue((user(text),), "grid")


def make_teacher(mesh=None) -> Teacher:
    """Another model than the student, so that there is something to learn."""
    return Teacher(make_model(1, mesh), CONTEXTS, thinking=True)


@pytest.fixture(scope="module")
def prompts():
    return [situation(f"Board {'H' * (n % 5)}G{n}\n") for n in range(12)]


def make_samples(teacher, prompts):
    draw = np.random.default_rng(0)
    samples = []
    teacher.prepare(prompts[:4])
    for index, prompt in enumerate(prompts):
        text = index % len(TEXTS)
        shared, suffix = teacher.split(text, prompt)
        response = draw.integers(0, 256, int(draw.integers(1, 20))).tolist()
        ids = render(teacher.model.tokenizer, prompt, thinking=True)
        log_probs = np.zeros(len(response), np.float32)
        samples.append(Sample(ids, suffix, shared, response, log_probs, text))
    return samples


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def samples(teacher, prompts):
    return make_samples(teacher, prompts)


def run(
    student: LanguageModel, teacher, samples, budget, how="token_mean", remat="none", block=256
):
    """Gradient and sums of a whole step, accumulated over its micro-batches."""
    mesh = student.mesh
    step = StepConfig(student.cfg, KL, jnp.float32, remat, block)
    shape, batches = plan(samples, budget, mesh.shape["fsdp"])
    weights = sample_weights(samples, how, released_gpus=2)
    with jax.set_mesh(mesh):
        gradients, loss = zeros_like(student.params), 0.0
        for text, rows in batches:
            batch = put_batch(mesh, fill(samples, weights, rows, shape))
            cache = teacher.prefix(text).cache
            gradients, sums = accumulate(
                gradients, student.params, teacher.model.params, cache, batch, step=step
            )
            loss += float(sums.loss)
    return loss, jax.device_get(gradients), len(batches)


@pytest.fixture(scope="module")
def whole(student, teacher, samples):
    return run(student, teacher, samples, 100_000)


def close(ours: Params, theirs: Params, tolerance: float) -> None:
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(expected).max()), 1e-12)
        assert float(np.abs(np.asarray(mine) - expected).max()) <= tolerance * scale


@partial(jax.jit, static_argnames=("cfg",))
def plain_logits(cfg, params, tokens):
    """One sequence [T], read as a whole."""
    position = jnp.arange(tokens.shape[0])[None]
    hidden = forward(cfg, params, tokens[None], position, jnp.ones_like(position))
    return unembed(cfg, params, hidden)[0]


def padded(sequence, width=768):
    """Causal: what follows a token cannot change it, so one shape serves all lengths."""
    return np.pad(np.asarray(sequence, np.int32), (0, width - len(sequence)))


def test_step_equals_plain_unpacked_formula(student, teacher, samples, prompts, whole):
    """No cache, no packing, no fusion: one sample at a time, full logits, autodiff."""
    tokens = sum(len(s.response) for s in samples)
    rows = []
    for sample, prompt in zip(samples, prompts, strict=True):
        long = [*teacher.prompt(sample.knowledge, prompt), *sample.response]
        rows.append((padded([*sample.prompt, *sample.response]), padded(long)))
    mine, theirs = (jax.device_get(m.params) for m in (student, teacher.model))

    @jax.jit
    def one(params, short, at_short, long, at_long, mask):
        kl = divergence(
            plain_logits(student.cfg, params, short)[at_short],
            plain_logits(student.cfg, theirs, long)[at_long],
            top_k=KL.top_k,
            temperature=KL.temperature,
        )
        return jnp.sum(kl * mask) / tokens

    loss, gradient = 0.0, jax.tree.map(np.zeros_like, mine)
    for sample, prompt, (short, long) in zip(samples, prompts, rows, strict=True):
        n, width = len(sample.response), 20
        count = np.arange(width)
        mask = (count < n).astype(np.float32)
        first = len(sample.prompt) - 1, len(teacher.prompt(sample.knowledge, prompt)) - 1
        at = [np.minimum(f + count, f + n - 1) for f in first]
        value, grad = jax.value_and_grad(one)(mine, short, at[0], long, at[1], mask)
        loss += float(value)
        gradient = jax.tree.map(np.add, gradient, jax.device_get(grad))
    assert abs(whole[0] - loss) <= 1e-5 * abs(loss)
    close(whole[1], gradient, 1e-4)


def test_cached_prefix_equals_uncached_teacher(teacher, samples):
    """Log-probabilities of the responses: knowledge prefix from the cache, and read as a whole."""
    cfg, params = teacher.model.cfg, jax.device_get(teacher.model.params)

    @jax.jit
    def with_cache(params, cache, own, shared):
        position = (shared + jnp.arange(own.shape[0]))[None]
        prefix = CachedPrefix(cache, jnp.full_like(position, shared))
        ones = jnp.ones_like(position)
        return unembed(cfg, params, forward(cfg, params, own[None], position, ones, prefix=prefix))[
            0
        ]

    worst = 0.0
    assert min(s.shared for s in samples) > 50 and max(s.shared for s in samples) > 300
    for sample in samples:
        prefix = teacher.prefix(sample.knowledge)
        own = [*sample.suffix, *sample.response]
        sequence = [*prefix.ids[: sample.shared], *own]
        cache = jax.device_get(prefix.cache)
        cached = with_cache(params, cache, padded(own, 384), sample.shared)[: len(own)]
        plain = plain_logits(cfg, params, padded(sequence))[sample.shared : len(sequence)]
        difference = jax.nn.log_softmax(cached) - jax.nn.log_softmax(plain)
        worst = max(worst, float(jnp.abs(difference).max()))
    assert worst <= 1e-4, worst


def test_prefix_is_cut_at_a_token_and_encoded_once(teacher, prompts, samples):
    for text, prefix in enumerate(teacher.encoded):
        ids = teacher.prompt(text, prompts[0])
        assert tuple(ids[: len(prefix.ids)]) == prefix.ids
    before = teacher.prefix(0)
    teacher.prepare([situation("another prompt that is never read")])
    assert teacher.prefix(0) is before
    # A prompt that leaves the prefix early uses only the part it shares.
    odd = situation("Xylophone\n")
    shared, suffix = teacher.split(0, odd)
    assert [*before.ids[:shared], *suffix] == teacher.prompt(0, odd)
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2 == common_prefix([1, 2], [1, 2, 4])


@pytest.mark.parametrize("how", ["token_mean", "micro_token_mean"])
def test_micro_batch_size_cannot_change_the_result(student, teacher, samples, how):
    large = run(student, teacher, samples, 100_000, how)
    small = run(student, teacher, samples, 500, how)
    assert small[2] > large[2]
    assert abs(small[0] - large[0]) <= 1e-6 * abs(large[0])
    close(small[1], large[1], 2e-6)
    # At the paper's highest rate. AdamW's first step divides a gradient by its own size, so where
    # a gradient is nothing but rounding, its sign is too.
    tx = make_optimizer(settings(learning_rate=5e-6))
    with jax.set_mesh(student.mesh):
        after = [
            jax.device_get(
                update(
                    jax.tree.map(jnp.copy, student.params),
                    tx.init(student.params),
                    jax.device_put(g[1]),
                    tx=tx,
                    clip_norm=1.0,
                )[0]
            )
            for g in (large, small)
        ]
    for a, b in zip(jax.tree.leaves(after[0]), jax.tree.leaves(after[1]), strict=True):
        assert np.abs(a - b).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_memory_is_predicted_before_a_step(teacher, prompts, fsdp):
    """Compiled ahead = compiled on call; what layers keep shows in the compiler's number."""
    mesh = make_mesh(fsdp, 1, jax.devices()[:fsdp])
    student = make_model(0, mesh)
    teacher = make_teacher(mesh)
    samples = make_samples(teacher, prompts)
    shape, batches = plan(samples, 100_000, fsdp)
    weights = sample_weights(samples, "token_mean")
    temporaries = {}
    with jax.set_mesh(mesh):
        for remat in ("none", "products", "layer"):
            step = StepConfig(CFG, KL, jnp.float32, remat, 256)
            for text, rows in batches:
                batch = put_batch(mesh, fill(samples, weights, rows, shape))
                inputs = (student.params, teacher.model.params, teacher.prefix(text).cache, batch)
                gradients = zeros_like(student.params)
                add, temporaries[remat] = compile_step(step, gradients, *inputs)
                ours, _ = add(gradients, *inputs)
                plain, _ = accumulate(zeros_like(student.params), *inputs, step=step)
                jax.tree.map(np.testing.assert_array_equal, ours, plain)
    assert temporaries["none"] > temporaries["products"] > temporaries["layer"] > 0
    size = device_bytes(student.params)
    out = memory_table({"student": size}, temporaries["layer"], batch)
    held = 4 * sum(leaf.size for leaf in jax.tree.leaves(student.params))
    # Norms alone are whole on every device.
    assert held / fsdp <= size <= 1.05 * held / fsdp
    predicted = f"{(size + temporaries['layer']) / 1e6:,.1f}"
    assert predicted in out and "temporaries of a micro-batch" in out
    assert "GB" in peak_memory()


@pytest.mark.parametrize("remat", ["products", "layer"])
def test_remat_and_query_blocks_change_nothing(student, teacher, samples, whole, remat):
    other = run(student, teacher, samples, 100_000, remat=remat, block=100)
    assert abs(other[0] - whole[0]) <= 1e-6 * abs(whole[0])
    close(other[1], whole[1], 1e-5)


@pytest.mark.parametrize("shape", meshes((2, 4), (4, 2), (8, 1)))
def test_eight_devices_equal_one(prompts, whole, shape):
    """Student, teacher, cached prefixes and loss, all split: loss, gradients, updated weights."""
    mesh = make_mesh(*shape)
    student, teacher = make_model(0, mesh), make_teacher(mesh)
    samples = make_samples(teacher, prompts)
    cache = teacher.prefix(0).cache.keys
    assert device_bytes(cache) == cache.nbytes // 8
    loss, gradients, _ = run(student, teacher, samples, 100_000)
    assert abs(loss - whole[0]) <= 1e-5 * abs(whole[0])
    close(gradients, whole[1], 1e-4)
    tx = make_optimizer(settings(learning_rate=5e-6))
    places = param_shardings(CFG, mesh)
    after = []
    with jax.set_mesh(mesh):
        for found in (gradients, whole[1]):
            params = jax.tree.map(jnp.copy, student.params)
            found = jax.device_put(found, places)
            after.append(update(params, tx.init(params), found, tx=tx, clip_norm=1.0)[0])
    for a, b in zip(*(jax.tree.leaves(jax.device_get(one)) for one in after), strict=True):
        assert np.abs(a - b).max() <= 1e-5


# --- optimizer ------------------------------------------------------------------------------------


def settings(**changes):
    return ml_collections.ConfigDict(
        dict(
            learning_rate=1e-3,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            moments_dtype="float32",
        )
        | changes
    )


def tree(seed, scale=1.0):
    draw = np.random.default_rng(seed)
    return {
        "w": (scale * draw.normal(size=(4, 3))).astype(np.float32),
        "norm": (scale * draw.normal(size=3)).astype(np.float32),
    }


def test_adamw_equals_numpy_over_three_steps():
    """Decoupled decay on every parameter, bias correction, clipping at global norm 1 (8.6)."""
    tx, params = make_optimizer(settings()), tree(0)
    expected = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in expected.items()} for _ in range(2))
    ours, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    for step in range(1, 4):
        g = tree(step, scale=10.0 if step == 2 else 0.1)
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values()))
        for k in expected:
            clipped = g[k] * min(1.0, 1.0 / norm)
            m[k] = 0.9 * m[k] + 0.1 * clipped
            v[k] = 0.999 * v[k] + 0.001 * clipped**2
            change = m[k] / (1 - 0.9**step) / (np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8)
            expected[k] = expected[k] - 1e-3 * (change + 0.01 * expected[k])
        ours, state, done = update(ours, state, jax.tree.map(jnp.asarray, g), tx=tx, clip_norm=1.0)
        assert np.isclose(float(done.grad_norm), norm, rtol=1e-5) and not done.skipped
    for k in expected:
        np.testing.assert_allclose(ours[k], expected[k], atol=1e-6)


def test_a_non_finite_gradient_changes_nothing():
    tx, params = make_optimizer(settings()), tree(0)
    start = jax.tree.map(jnp.asarray, params)
    good = jax.tree.map(jnp.asarray, tree(1))
    start, state, _ = update(start, tx.init(params), good, tx=tx, clip_norm=1.0)
    before = jax.device_get((start, state))
    bad = tree(2)
    bad["w"][0, 0] = np.inf
    after, after_state, done = update(
        start, state, jax.tree.map(jnp.asarray, bad), tx=tx, clip_norm=1.0
    )
    assert bool(done.skipped)
    for a, b in zip(jax.tree.leaves((after, after_state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
