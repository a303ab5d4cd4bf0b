"""Divergences between student and teacher on a support, with the gradient on that support.

All take log-probabilities over the whole vocabulary, looked up on the support: `log_s` and `log_t`
of shape [M, n]. With a, b what they become after the correction and p, q = exp(a), exp(b):

    reverse   sum p (a - b)                       the method's own (paper Eq. 2)
    forward   sum q (b - a)                       off-policy context distillation (spec 10.2)
    jsd       sum (p (a - m) + q (b - m)) / 2     m = log((p + q) / 2)
    nll       - a                                 plain supervised training on the sampled token

Corrections say what becomes of the mass outside the support:

    none      it is left out; p and q do not sum to one
    renorm    both sides are normalised over the support
    tail      it is one more entry of the support
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _divergence(kind: str, a: Float[Array, "M n"], b: Float[Array, "M n"]) -> Float[Array, " M"]:
    if kind == "reverse":
        return (jnp.exp(a) * (a - b)).sum(-1)
    if kind == "forward":
        return (jnp.exp(b) * (b - a)).sum(-1)
    if kind == "nll":
        return -a.sum(-1)
    m = jnp.logaddexp(a, b) - jnp.log(2.0)
    return 0.5 * (jnp.exp(a) * (a - m) + jnp.exp(b) * (b - m)).sum(-1)


def _slope(kind: str, a: Array, b: Array) -> Float[Array, "M n"]:
    """d divergence / d a; the teacher is constant."""
    if kind == "reverse":
        return jnp.exp(a) * (a - b + 1.0)
    if kind == "forward":
        return -jnp.exp(b)
    if kind == "nll":
        return -jnp.ones_like(a)
    return 0.5 * jnp.exp(a) * (a - jnp.logaddexp(a, b) + jnp.log(2.0))


def with_gradient(
    kind: str,
    correction: str,
    log_s: Float[Array, "M n"],
    log_t: Float[Array, "M n"],
    tails: tuple[Float[Array, " M"], Float[Array, " M"]] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, "M n"]]:
    """Divergence of each row, and its derivative with respect to `log_s` on the support.

    tails: log of the mass outside, of student and teacher; needed by 'tail' alone.
    """
    if correction == "tail":
        a = jnp.concatenate([log_s, tails[0][:, None]], axis=1)
        b = jnp.concatenate([log_t, tails[1][:, None]], axis=1)
        g = _slope(kind, a, b)
        # tail = log(1 - sum exp(log_s)), hence d tail / d log_s = - exp(log_s - tail)
        back = g[:, -1:] * jnp.exp(log_s - tails[0][:, None])
        return _divergence(kind, a, b), g[:, :-1] - back
    if correction == "renorm":
        a, b = jax.nn.log_softmax(log_s), jax.nn.log_softmax(log_t)
        g = _slope(kind, a, b)
        return _divergence(kind, a, b), g - jnp.exp(a) * g.sum(-1, keepdims=True)
    return _divergence(kind, log_s, log_t), _slope(kind, log_s, log_t)
