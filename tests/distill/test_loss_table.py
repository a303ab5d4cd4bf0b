"""Every loss that a config can ask for is right over the whole range of logits, or refused."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import loss_table
from oel_jax.base.errors import UserError
from oel_jax.config.checks import validate
from oel_jax.config.choices import CORRECTIONS, SUPPORTS
from oel_jax.config.defaults import default
from oel_jax.distill.topk_kl import KLConfig
from oel_jax.parallel.vocabulary import LEAST, log_softmax

VOCAB = loss_table.VOCABULARY
# What float32 keeps of the difference of two nearly equal distributions; all else is far below.
LOSS, GRADIENT = 3e-4, 1e-4
LOOSE = "close"


@cache
def records():
    return loss_table.table()


def test_each_combination_is_right_or_refused():
    refused = set()
    for record in records():
        what = tuple(record[name] for name in ("mode", "divergence", "support", "correction"))
        if "refused" in record:
            refused.add(what)
            continue
        for name, errors in record["errors"].items():
            part = 1 if name == LOOSE else 0.1
            assert errors["loss"] <= LOSS * part, (what, name)
            assert errors["gradient"] <= GRADIENT * part, (what, name)
    wrong = {
        (mode, kind, "full", correction)
        for mode in ("on_policy", "off_policy")
        for kind in ("reverse", "forward", "jsd")
        for correction in ("renorm", "tail")
    }
    wrong |= {(mode, "reverse", "teacher", "none") for mode in ("on_policy", "off_policy")}
    wrong |= set(itertools.product(["sft"], ("reverse", "forward", "jsd"), SUPPORTS, CORRECTIONS))
    assert refused == wrong and len(records()) == 3 * (1 + 3 * 4 * 3)


def test_a_mode_brings_its_own_loss():
    own = {r["mode"]: r["trained"] for r in records() if r["divergence"] is None}
    assert own == {
        "on_policy": ["reverse", "student", "none"],
        "off_policy": ["forward", "teacher", "none"],  # spec 10.2
        "sft": ["nll", "student", "none"],
    }


@pytest.mark.parametrize("mode, field, value", [
    ("sft", "divergence", "reverse"),
    ("sft", "support", "full"),
    ("sft", "correction", "renorm"),
    ("sft", "correction", "tail"),
    ("off_policy", "divergence", "reverse"),  # on the teacher's top k, which the mode brings
])  # fmt: skip
def test_a_refusal_names_the_field_and_the_mode(mode, field, value):
    config = default()
    config.consolidate.mode, config.loss[field] = mode, value
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert f"loss.{field}" in message and f"config.consolidate.mode={mode!r}" in message


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_a_support_that_covers_the_vocabulary_has_no_tail(kind, support):
    for top_k in (VOCAB, VOCAB // 2 + 1) if support == "union" else (VOCAB,):
        errors = loss_table.measure(KLConfig(top_k, 0.7, kind, support, "tail"))
        for name, (loss, gradient) in errors.items():
            assert loss <= LOSS and gradient <= GRADIENT, (top_k, name)


@pytest.mark.parametrize("how", [
    ("reverse", "student", "none"), ("forward", "teacher", "tail"), ("jsd", "union", "renorm"),
], ids="-".join)  # fmt: skip
def test_bfloat16_rounds_the_gradient_alone(how):
    errors = loss_table.measure(KLConfig(5, 0.7, *how), jnp.bfloat16)
    for loss, gradient in errors.values():
        assert loss <= LOSS and gradient <= 2**-8


@pytest.mark.parametrize("correction", ["none", "tail"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_without_weight_cannot_spoil_a_step(bad, correction):
    """Hidden states of padding may be anything: loss and both gradients stay as without it."""
    draw = np.random.default_rng(0)
    good = [draw.normal(size=shape).astype(np.float32) for shape in ((4, 8), (30, 8)) * 2]
    weight = np.array([0.5, 0.0, 0.5, 0.0], np.float32)
    cfg = KLConfig(3, 0.7, "forward", "student", correction, chunk=2)

    def run(h_s, w_s, h_t, w_t):
        ids = np.arange(4, dtype=np.int32)
        loss = lambda *s: loss_table.fused_topk_kl(cfg, *s, h_t, w_t, ids, weight)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(h_s, w_s)

    spoiled = [side.copy() for side in good]
    for hidden in (spoiled[0], spoiled[2]):
        hidden[weight == 0] = bad
    assert jax.tree.all(jax.tree.map(np.array_equal, run(*spoiled), run(*good)))
    assert not np.asarray(run(*spoiled)[1][0])[weight == 0].any()


def test_minus_log_likelihood_has_nothing_outside():
    with pytest.raises(ValueError, match="correction must be 'none' with 'nll'"):
        KLConfig(8, 0.7, "nll", correction="tail")


def test_log_softmax_keeps_its_digits():
    z = np.array([
        [50.0, 20.0, 35.0, -np.inf],  # nearly certain: a log-probability of -3e-7
        [1e4, -1e4, 1e4, 9e3],  # ties at the top
        [-np.inf] * 4,
        [3e38, -3e38, 0.0, 1.0],
    ], np.float32)  # fmt: skip
    for temperature in (0.7, 1.0):
        ours = log_softmax(jnp.asarray(z), temperature)
        with np.errstate(invalid="ignore"):
            exact = z.astype(np.float64)
            exact = np.maximum((exact - exact.max(-1, keepdims=True)) / temperature, LEAST)
        others = np.sort(np.exp(exact), -1)[:, :-1].sum(-1, keepdims=True)
        exact -= np.log1p(others)
        exact[2] = LEAST
        np.testing.assert_allclose(ours.all(), exact, rtol=2e-6)
        ids = jnp.tile(jnp.array([2, 0]), (4, 1))
        np.testing.assert_array_equal(ours.at(ids), ours.all()[:, [2, 0]])
