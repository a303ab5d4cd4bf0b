"""Gradients in bfloat16 are sums over thousands of tokens that lose none of them.

Each operation that has a weight is compared with a sum in float64; that nothing else sums over
tokens is read from the trace of a whole micro-batch, and from what compilers make of it for GPUs
and TPUs, whose devices add up their sums.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.base.errors import UserError
from oel_jax.config.defaults import default
from oel_jax.distill.packing import Shape
from oel_jax.distill.step import accumulate
from oel_jax.distill.topk_kl import KLConfig, fused_topk_kl
from oel_jax.learner.settings import step_settings
from oel_jax.models import decoder, weighted
from oel_jax.models.config import ModelConfig
from oel_jax.parallel import vocabulary
from oel_jax.parallel.mesh import make_mesh, spec
from oel_jax.plan import targets
from oel_jax.plan.collectives import parse
from oel_jax.plan.programs import Arrays
from oel_jax.plan.workload import Layout, Workload
from oel_jax.sampler.config import SamplerConfig

BOUND = 0.003  # a float32 sum that is rounded to bfloat16: 0.002
ROWS, TOKENS, VOCABULARY, OFTEN = 4, 1021, 72, 3  # no other dimension has a multiple of TOKENS
SIZES = {"d": 32, "n": 4, "h": 8, "f": 48, "r": 6}
MESHES = pytest.mark.parametrize("shape", [None, (1, 1), (2, 2), (4, 1)], ids=str)

# Every kind of parameter in one model.
CFG = ModelConfig(
    family="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=None,
    tie_embeddings=False,
    attention_bias=True,
    qk_norm=True,
    max_positions=64,
)


def on(shape, x, *logical):
    """Placed on the mesh of the context, if there is one."""
    if shape is None:
        return x
    mesh = jax.sharding.get_mesh()
    return jax.device_put(x, jax.NamedSharding(mesh, spec(*logical)))


def gradient(shape, function, x, by, d_out):
    """Of the weight `by`; each argument is (array, logical axes)."""

    def run(x, by, d_out):
        return jax.vjp(lambda by: function(x, by), by)[1](d_out)[0]

    found = jax.jit(run)(*(on(shape, array, *logical) for array, logical in (x, by, d_out)))
    return jax.device_get(found)


def check(found, right):
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - right) <= BOUND * np.linalg.norm(right)


@pytest.fixture
def draw():
    generator = np.random.default_rng(0)

    def one(*sizes):
        """[sizes], with a mean that adds up over tokens."""
        values = generator.normal(size=sizes) + 0.3
        return jnp.asarray(values.astype(np.float32), jnp.bfloat16)

    return one


@pytest.fixture(autouse=True)
def mesh(request):
    """The mesh of the parameter `shape`, in context."""
    shape = request.node.callspec.params.get("shape") if hasattr(request.node, "callspec") else None
    if shape is None:
        yield
    else:
        devices = jax.devices()[: shape[0] * shape[1]]
        with jax.set_mesh(make_mesh(*shape, devices=devices)):
            yield


def matrices():
    """(letters, axes) of every weight and of the factors of its adapter."""
    for name, (into, out) in decoder.ADAPTABLE.items():
        sides = decoder.adapter_axes(name)
        yield f"{into},{out}", decoder._BLOCK_AXES[name]
        yield f"{into},r", sides["a"]
        yield f"r,{out}", sides["b"]


@MESHES
def test_matrices_lose_no_token(shape, draw):
    pairs = sorted(set(matrices()), key=str)
    assert len(pairs) == 12
    for letters, axes in pairs:
        into, out = letters.split(",")
        x, d_out = (draw(ROWS, TOKENS, *(SIZES[c] for c in part)) for part in (into, out))
        by = draw(*(SIZES[c] for c in into + out))
        found = gradient(
            shape,
            lambda x, by, letters=letters, axes=axes: weighted.project(x, by, letters, axes),
            (x, weighted._layout(into, letters, axes)),
            (by, axes),
            (d_out, weighted._layout(out, letters, axes)),
        )
        sides = (np.asarray(side, np.float64) for side in (x, d_out))
        check(found, np.einsum(f"bt{into},bt{out}->{into}{out}", *sides))


@MESHES
@pytest.mark.parametrize("heads", [False, True])
def test_norms_and_biases_lose_no_token(shape, heads, draw):
    sizes, axes = ((4, 8), ("heads", None)) if heads else ((32,), (None,))
    rows = ("batch", None, *axes)
    x, d_out = draw(ROWS, TOKENS, *sizes), draw(ROWS, TOKENS, *sizes)
    wide = np.asarray(d_out, np.float64)
    scale = (draw(sizes[-1]), (None,))
    found = gradient(shape, weighted.scale, (x, rows), scale, (d_out, rows))
    check(found, (wide * np.asarray(x, np.float64)).reshape(-1, sizes[-1]).sum(0))
    found = gradient(
        shape, lambda x, by: decoder.rms_norm(x, by, 1e-6), (x, rows), scale, (d_out, rows)
    )
    normed = np.asarray(jax.jit(decoder.rms_norm)(x, jnp.ones_like(scale[0]), 1e-6), np.float64)
    check(found, (wide * normed).reshape(-1, sizes[-1]).sum(0))
    if heads:
        found = gradient(shape, weighted.shift, (x, rows), (draw(*sizes), axes), (d_out, rows))
        check(found, wide.sum((0, 1)))


@MESHES
def test_an_embedding_loses_no_token(shape, draw):
    generator = np.random.default_rng(1)
    ids = generator.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
    ids = np.where(generator.random(ids.shape) < 0.3, OFTEN, ids).astype(np.int32)
    table, d_out = draw(VOCABULARY, 32), draw(ROWS, TOKENS, 32)
    found = gradient(
        shape,
        lambda ids, table: vocabulary.lookup(table, ids),
        (ids, ("batch", None)),
        (table, ("vocab", "embed")),
        (d_out, ("batch", None, None)),
    )
    right = np.zeros((VOCABULARY, 32))
    np.add.at(right, ids.ravel(), np.asarray(d_out, np.float64).reshape(-1, 32))
    seldom = np.arange(VOCABULARY) != OFTEN
    check(found[OFTEN], right[OFTEN])
    check(found[seldom], right[seldom])


@MESHES
def test_the_output_matrix_loses_no_token(shape, draw):
    """Negative log-likelihood of a token that is sampled often: its gradient is known."""
    hidden, matrix = draw(ROWS * TOKENS, 32), 0.05 * draw(VOCABULARY, 32)
    sampled = np.where(np.arange(ROWS * TOKENS) % 3, OFTEN, 5).astype(np.int32)
    weight = np.ones(ROWS * TOKENS, np.float32)
    cfg = KLConfig(1, 1.0, "nll", chunk=64)

    def loss(matrix, hidden, sampled, weight):
        return fused_topk_kl(cfg, hidden, matrix, hidden, matrix, sampled, weight)[0]

    found = jax.device_get(
        jax.jit(jax.grad(loss))(
            on(shape, matrix, "vocab", "embed"),
            on(shape, hidden, "batch", None),
            on(shape, sampled, "batch"),
            on(shape, weight, "batch"),
        )
    )
    h, m = (np.asarray(x, np.float64) for x in (hidden, matrix))
    z = h @ m.T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(p)), sampled] -= 1
    check(found[OFTEN], (p.T @ h)[OFTEN])


# --- a whole micro-batch --------------------------------------------------------------------------


def traced(kind, mesh, tokens):
    """A step's micro-batch of this many tokens in a row, in bfloat16, traced for `mesh`."""
    config = default()
    config.model.dtype, config.loss.chunk, config.loss.top_k = "bfloat16", 64, 16
    config.consolidate.retention = "knowledge"
    config.lora.rank = 4 if kind == "lora" else 0
    config.lora.targets = tuple(decoder.ADAPTABLE)
    cfg = dataclasses.replace(CFG, tie_embeddings=kind == "tied")
    slots = SamplerConfig(slots=16, response=32, length=128, longest_prefix=64, prefill_chunk=32)
    shape = Shape(4, tokens, tokens)
    work = Workload(slots, slots, None, 64, 1, shape, shape, 1, 1.0)
    with jax.set_mesh(mesh):
        a = Arrays(config, cfg, Layout(mesh, mesh, 1), work)
        text, step = a.knowledge(), step_settings(config, cfg)
        inputs = (a.masters, a.masters, a.teacher, text, a.micro_batch(shape), text)
        return accumulate.trace(*inputs, step=step)


def equations(jaxpr):
    """All equations, those of inner functions and loops as well."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def sums_over_tokens(eqn):
    """Whether an equation adds up tokens, or devices' sums of them, in bfloat16."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if getattr(out, "dtype", None) != jnp.bfloat16:
        return False
    if name == "dot_general":
        summed = eqn.params["dimension_numbers"][0][0]
    elif name == "reduce_sum":
        summed = eqn.params["axes"]
    elif re.match("psum|reduce_scatter|scatter.add", name):
        return not any(size and size % TOKENS == 0 for size in out.shape)
    else:
        return False
    return any(eqn.invars[0].aval.shape[axis] % TOKENS == 0 for axis in summed)


@pytest.mark.parametrize("devices", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["all", "tied", "lora"])
def test_nothing_else_sums_over_tokens_in_bfloat16(kind, devices):
    mesh = make_mesh(*devices, devices=jax.devices()[: devices[0] * devices[1]])
    found = list(equations(traced(kind, mesh, TOKENS).jaxpr.jaxpr))
    assert len(found) > 1000
    assert not [str(eqn)[:300] for eqn in found if sums_over_tokens(eqn)]


@pytest.mark.parametrize("target", ["h200:4", "v5e:2x2"])
@pytest.mark.parametrize("kind", ["all", "lora"])
def test_devices_add_up_gradients_in_float32(target, kind):
    """In the programs of real accelerators, where their compilers are installed."""
    try:
        target = targets.find(target)
    except UserError as missing:
        pytest.skip(str(missing))
    if target.why:
        pytest.skip(target.why)
    mesh = make_mesh(2, 2, devices=target.devices)
    text = traced(kind, mesh, 64).lower().compile().as_text()
    sums = [one.shape for one in parse(text, 4) if one.kind in ("all-reduce", "reduce-scatter")]
    assert any("f32" in shape for shape in sums) and len(sums) > 4
    # What 'tp' adds up of an activation: rows of a device, tokens, width (or rank of an adapter);
    # compilers make one flat array of several.
    activation = 2 * 64 * (4 if kind == "lora" else 32)
    low = [dims for shape in sums for dims in re.findall(r"bf16\[([\d,]*)\]", shape)]
    assert [dims for dims in low if np.prod([int(n) for n in dims.split(",")]) % activation] == []
