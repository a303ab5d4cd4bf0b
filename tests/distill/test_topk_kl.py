"""The fused loss against NumPy float64, autodiff of the plain formula, and finite differences.

`test_loss_table.py` has the losses over the whole range of logits.
"""

from decimal import Decimal, localcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from tiers import meshes

from oel_jax.config.choices import CORRECTIONS, SUPPORTS, nonsense
from oel_jax.distill.reference import divergence, exact
from oel_jax.distill.topk_kl import KLConfig, fused_topk_kl
from oel_jax.parallel.mesh import make_mesh

TOKENS, WIDTH, VOCAB = 48, 16, 64


@pytest.fixture(scope="module")
def data():
    return make_data(VOCAB)


def make_data(vocab):
    """Student, a teacher near it, sampled ids, and weights of which a third are zero."""
    draw = np.random.default_rng(0)
    h_s = draw.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    w_s = draw.normal(size=(vocab, WIDTH)).astype(np.float32)
    h_t = h_s + 0.3 * draw.normal(size=h_s.shape).astype(np.float32)
    w_t = w_s + 0.1 * draw.normal(size=w_s.shape).astype(np.float32)
    weight = np.where(draw.random(TOKENS) < 0.66, draw.random(TOKENS), 0.0) / TOKENS
    ids = draw.integers(0, vocab, TOKENS).astype(np.int32)
    return h_s, w_s, h_t, w_t, ids, weight.astype(np.float32)


def float64(
    h_s, w_s, h_t, w_t, ids, weight, *, k, tau, kind="reverse", support="student", correction="none"
):
    """Spec 8.3 and 10.2 in float64: loss, d hidden, d matrix, and the per-token quantities."""
    h_s, w_s, h_t, w_t, weight = (a.astype(np.float64) for a in (h_s, w_s, h_t, w_t, weight))
    z, z_t = h_s @ w_s.T, h_t @ w_t.T
    how = dict(kind=kind, support=support, correction=correction)
    kl, slope = exact(z, z_t, ids, top_k=k, temperature=tau, **how)

    def log_softmax(z):
        z = z / tau - z.max(-1, keepdims=True) / tau
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    ls, lt = log_softmax(z), log_softmax(z_t)
    inside = {"student": top(ls, k), "teacher": top(lt, k), "full": np.ones_like(ls)}
    inside["union"] = np.maximum(inside["student"], inside["teacher"])
    inside = np.eye(ls.shape[1])[ids] if kind == "nll" else inside[support]
    stats = {
        "kl": kl,
        "mass": (inside * np.exp(ls)).sum(-1),
        "student_entropy": -(np.exp(ls) * ls).sum(-1),
        "teacher_entropy": -(np.exp(lt) * lt).sum(-1),
        "log_prob": ls[np.arange(len(ids)), ids],
    }
    grad = slope * weight[:, None]
    return (weight * kl).sum(), grad @ w_s, grad.T @ h_s, stats


def top(log_p, k):
    inside = np.zeros_like(log_p)
    np.put_along_axis(inside, np.argsort(-log_p, -1, kind="stable")[:, :k], 1.0, axis=1)
    return inside


COMBINATIONS = [
    (kind, support, correction)
    for kind in ("reverse", "forward", "jsd")
    for support in SUPPORTS
    for correction in CORRECTIONS
    if not nonsense(kind, support, correction, 8)
] + [("nll", "student", "none")]


def relative(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


@cache  # a compilation for each config, not for each test
def compiled(cfg, fused):
    return jax.jit(jax.value_and_grad(partial(fused, cfg), argnums=(0, 1), has_aux=True))


def value_and_gradient(cfg, data, fused=fused_topk_kl):
    (loss, stats), gradient = compiled(cfg, fused)(*data)
    return loss, stats, gradient


@pytest.mark.parametrize("k", [2, 8, VOCAB])
@pytest.mark.parametrize("chunk", [0, 1, 7, 48, 1000])
def test_equals_float64(data, k, chunk):
    check_against_float64(KLConfig(top_k=k, temperature=0.7, chunk=chunk), data)


@pytest.mark.parametrize("how", COMBINATIONS, ids="-".join)
def test_every_divergence_equals_float64(data, how):
    check_against_float64(KLConfig(8, 0.7, *how, chunk=7), data)


def check_against_float64(cfg, data):
    how = dict(kind=cfg.divergence, support=cfg.support, correction=cfg.correction)
    loss, d_hidden, d_matrix, expected = float64(*data, k=cfg.top_k, tau=cfg.temperature, **how)
    ours, stats, gradient = value_and_gradient(cfg, data)
    assert relative(ours, loss) <= 1e-5
    assert relative(gradient[0], d_hidden) <= 1e-5
    assert relative(gradient[1], d_matrix) <= 1e-5
    for name, values in expected.items():
        assert relative(getattr(stats, name), values) <= 1e-5, name
    without = fused_topk_kl(cfg, *data)[0]  # the primal, which skips the gradient
    assert relative(without, loss) <= 1e-5


@pytest.mark.parametrize("how", COMBINATIONS, ids="-".join)
def test_equals_autodiff_of_the_plain_formula(data, how):
    h_s, w_s, h_t, w_t, ids, weight = data
    names = dict(zip(("kind", "support", "correction"), how, strict=True))

    def plain(h, w):
        kl = divergence(h @ w.T, h_t @ w_t.T, ids, top_k=8, temperature=0.7, **names)
        return jnp.sum(weight * kl)

    loss, gradient = jax.value_and_grad(plain, argnums=(0, 1))(h_s, w_s)
    ours, _, fused = value_and_gradient(KLConfig(8, 0.7, *how, chunk=7), data)
    # Autodiff of the plain formula rounds more than the fused loss does.
    assert relative(ours, loss) <= 1e-3
    for mine, theirs in zip(fused, gradient, strict=True):
        assert relative(mine, np.asarray(theirs, np.float64)) <= 1e-3


GAPS = (0.0, 3.0, 8.0, 16.0, 25.0, 60.0, 100.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("how", [("teacher", "renorm"), ("full", "none"), ("union", "tail")])
def test_jsd_keeps_its_digits_where_student_and_teacher_disagree(how, temperature):
    """Each prefers one token by `GAPS` over what the other prefers; against 60 decimal digits.

    In float64 the plain formula is not enough: from a gap of 40 the slopes differ by less than its
    last digit.
    """
    rows, size, k = 3 * len(GAPS), 24, 5
    draw = np.random.default_rng(3)
    z = 3 * draw.normal(size=(rows, size))
    z_t = z + draw.normal(size=z.shape)
    z[:, 0] += np.repeat(GAPS, 3)
    z_t[:, 1] += np.repeat(GAPS, 3)
    z, z_t, eye = (x.astype(np.float32) for x in (z, z_t, np.eye(size)))
    ids, weight = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    cfg = KLConfig(k, temperature, "jsd", *how, chunk=rows)
    _, stats, (gradient, _) = value_and_gradient(cfg, (z, eye, z_t, eye, ids, weight))
    for row, gap in enumerate(np.repeat(GAPS, 3)):
        value, exact = exact_jsd(z[row], z_t[row], k, temperature, *how)
        assert float(stats.kl[row]) == pytest.approx(value, rel=2e-6, abs=1e-30)
        error, largest = np.abs(gradient[row] - exact).max(), np.abs(exact).max()
        # The inputs' own last digits move log(q / p), which is up to 2 * gap / temperature.
        assert error <= 3e-7 * (4 + gap / temperature) * largest + 1e-35, (gap, error, largest)


def exact_jsd(z, z_t, k, temperature, support, correction):
    """JSD of one row and its gradient by the student's logits, in decimal arithmetic."""
    with localcontext() as context:
        context.prec = 60
        context.Emin = -(10**6)
        tau = Decimal(float(np.float32(temperature)))
        sides = [[Decimal(float(x)) / tau for x in side] for side in (z, z_t)]
        best = [set(np.argsort(-side, kind="stable")[:k].tolist()) for side in (z, z_t)]
        inside = {"teacher": best[1], "union": best[0] | best[1], "full": set(range(len(z)))}
        inside = sorted(inside[support])
        left = [i for i in range(len(z)) if i not in inside]
        scope = inside if correction == "renorm" else range(len(z))
        p, q = ([side[i].exp() for i in scope] for side in sides)
        p, q = (dict(zip(scope, (x / sum(s) for x in s), strict=True)) for s in (p, q))
        entries = [[i] for i in inside] + ([left] if correction == "tail" and left else [])
        value, center, slopes = Decimal(0), Decimal(0), []
        for entry in entries:
            a, b = (sum(side[i] for i in entry) for side in (p, q))
            middle = (a + b) / 2
            value += (a * (a / middle).ln() + b * (b / middle).ln()) / 2
            slopes.append((a / middle).ln() / 2)
            center += a * slopes[-1]
        exact = np.zeros(len(z))
        for entry, slope in zip(entries, slopes, strict=True):
            for i in entry:
                exact[i] = float(p[i] * (slope - center) / tau)
        return float(value), exact


@pytest.mark.parametrize("k", [1, 8, VOCAB])
def test_a_union_counts_no_token_twice(data, k):
    cfg = KLConfig(k, 0.7, "jsd", "union")
    same = (*data[:2], *data[:2], *data[4:])  # student's and teacher's top k are the same ids
    loss, stats, _ = value_and_gradient(cfg, same)
    _, alone, _ = value_and_gradient(KLConfig(k, 0.7, "jsd"), same)
    np.testing.assert_allclose(stats.mass, alone.mass, rtol=1e-6)
    assert abs(float(loss)) <= 1e-6


@pytest.mark.parametrize(
    "how",
    [("reverse", "teacher", "none"), ("forward", "full", "tail"), ("jsd", "full", "renorm")],
    ids="-".join,
)
def test_combinations_without_a_use_are_explained(how):
    assert nonsense(*how, 8)


def test_one_token_normalised_over_itself_teaches_nothing(data):
    assert nonsense("reverse", "student", "renorm", 1) and not nonsense("jsd", "union", "renorm", 1)
    loss, _, (d_hidden, _) = value_and_gradient(KLConfig(1, 0.7, correction="renorm"), data)
    assert float(loss) == 0 and not np.asarray(d_hidden).any()


@pytest.mark.parametrize("how", COMBINATIONS, ids="-".join)
def test_equals_finite_differences(data, how):
    """Independent of the closed form: central differences of the float64 loss."""
    cfg = KLConfig(8, 0.7, *how, chunk=7)
    names = dict(zip(("kind", "support", "correction"), how, strict=True))
    _, _, (d_hidden, d_matrix) = value_and_gradient(cfg, data)
    draw = np.random.default_rng(5)
    for argument, gradient in ((0, d_hidden), (1, d_matrix)):
        direction = draw.normal(size=gradient.shape)
        # The support is constant under differentiation: a step must not change it.
        losses = []
        for sign in (1, -1):
            moved = [a.astype(np.float64) for a in data[:4]] + list(data[4:])
            moved[argument] = moved[argument] + sign * 1e-7 * direction
            losses.append(float64(*moved, k=8, tau=0.7, **names)[0])
        slope = (losses[0] - losses[1]) / 2e-7
        assert abs(slope - float((np.asarray(gradient) * direction).sum())) <= 1e-4 * abs(slope)


def test_gradient_scales_with_the_loss_and_zero_weight_drops_a_token(data):
    cfg = KLConfig(top_k=8)
    _, _, once = value_and_gradient(cfg, data)
    _, _, twice = value_and_gradient(
        cfg, data, fused=lambda *a: jax.tree.map(lambda x: 2.0 * x, fused_topk_kl(*a))
    )
    np.testing.assert_allclose(twice[1], 2 * np.asarray(once[1]), rtol=1e-6)
    weight = data[5]
    assert (weight == 0).any()
    assert not np.asarray(once[0])[weight == 0].any()


def test_teacher_gets_no_gradient(data):
    run = jax.grad(lambda h, w: fused_topk_kl(KLConfig(8), *data[:2], h, w, *data[4:])[0], (0, 1))
    for gradient in run(*data[2:4]):
        assert not np.asarray(gradient).any()


ON_MESHES = [how for how in COMBINATIONS if how[1] != "student" or how[2] == "tail"]


@pytest.mark.parametrize("how", [*ON_MESHES, ("nll", "student", "none")])
def test_eight_devices_equal_one(data, how):
    """Tokens split over fsdp, vocabulary over all: same loss, same gradients, still split."""
    check_on_mesh(data, (2, 4), how)


@pytest.mark.parametrize("shape", meshes((2, 4), (4, 2), (8, 1), (1, 8)))
def test_any_split_of_eight_devices_equals_one(data, shape):
    check_on_mesh(data, shape, COMBINATIONS[0])


@pytest.mark.parametrize("how", [COMBINATIONS[0], ("jsd", "full", "none")])
@pytest.mark.parametrize("shape", meshes((2, 4), (4, 2), (8, 1)))
def test_a_vocabulary_that_the_devices_do_not_divide(shape, how):
    """76 = 4 * 19 ids: what fills up the slices has no logit, no mass and no gradient."""
    check_on_mesh(make_data(76), shape, how)


def check_on_mesh(data, shape, how):
    cfg = KLConfig(8, 0.7, *how, chunk=5)
    loss, stats, gradient = value_and_gradient(cfg, data)
    mesh = make_mesh(*shape)
    specs = [P("fsdp", None), P("tp", "fsdp")] * 2 + [P("fsdp"), P("fsdp")]

    with jax.set_mesh(mesh):
        split = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(data, specs, strict=True)
        ]
        run = jax.value_and_grad(partial(fused_topk_kl, cfg), argnums=(0, 1), has_aux=True)
        (ours, on_mesh), grads = jax.jit(run)(*split)
    assert relative(ours, float(loss)) <= 1e-5
    assert relative(on_mesh.kl, np.asarray(stats.kl, np.float64)) <= 1e-5
    for mine, theirs in zip(grads, gradient, strict=True):
        assert relative(mine, np.asarray(theirs, np.float64)) <= 2e-5
    assert jax.typeof(grads[1]).sharding.spec == P("tp", "fsdp")


def test_bfloat16_inputs_stay_close(data):
    low = [jnp.asarray(a, jnp.bfloat16) for a in data[:4]]
    rounded = [np.asarray(a, np.float32) for a in low]
    loss, d_hidden, d_matrix, _ = float64(*rounded, *data[4:], k=8, tau=0.7)
    ours, _, gradient = value_and_gradient(KLConfig(8), [*low, *data[4:]])
    assert gradient[0].dtype == jnp.bfloat16
    assert relative(ours, loss) <= 1e-4  # logits and KL are float32
    assert relative(gradient[0].astype(jnp.float32), d_hidden) <= 2e-2
    assert relative(gradient[1].astype(jnp.float32), d_matrix) <= 2e-2


def test_support_beyond_the_vocabulary_names_the_field(data):
    for k in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=r"config\.loss\.top_k"):
            fused_topk_kl(KLConfig(top_k=k), *data)


@pytest.mark.parametrize("width", [128, 1024])
def test_memory_is_an_eighth_of_full_logits(width):
    """Compiled temporaries at T=2048, V=151,936, k=256, loss and gradient (nothing is run)."""
    tokens, vocab = 2048, 151_936
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    arrays = [shape((tokens, width)), shape((vocab, width))] * 2 + [ids, shape((tokens,))]
    run = jax.value_and_grad(partial(fused_topk_kl, KLConfig(256)), argnums=(0, 1), has_aux=True)
    memory = jax.jit(run).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= tokens * vocab * 4 / 8
