"""Divergences between student and teacher over some entries, with what they ask of the logits.

An entry is a token, or all tokens outside the support taken together. With a and b the
log-probabilities of an entry for student and teacher, and p, q = exp(a), exp(b):

    reverse   sum p (a - b)                       the method's own (paper Eq. 2)
    forward   sum q (b - a)                       off-policy context distillation (spec 10.2)
    jsd       sum (p (a - m) + q (b - m)) / 2     m = log((p + q) / 2)
    nll       - a                                 plain supervised training on the sampled token

Let s = dD / dp be the slope of an entry. p comes out of a softmax, hence

    dD / dz_i = p_i (s_i - c)    c = sum of p s    for a token i that is an entry,
                - p_j c                            for a token j in no entry,

and a token within an entry of many gets its share of what the entry gets. Nothing is divided by
p: each formula is written with p s, which stays finite where p vanishes.

Where p and q are each complete, a constant in all slopes has no effect, and `jsd` takes differences
to the slope of the student's likeliest entry. Where student and teacher disagree all slopes but one
are log(2) / 2 to the last digit: c would come near them, and their difference keep few digits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# One entry may hold nearly all of p. Then s - c is a small difference of large numbers, and c is
# found from this entry's slope and the others. At most one entry of a row can be above it.
_ALMOST_ALL = -0.6  # log-probability, p = 0.55


def divergence_and_gradient(
    kind: str, a: Float[Array, "M n"], b: Float[Array, "M n"], complete: bool
) -> tuple[Float[Array, " M"], Float[Array, "M n"], Float[Array, " M"]]:
    """Divergence of each row, p_i (s_i - c) of each entry, and c.

    Args:
      kind: one of `choices.DIVERGENCES`.
      a, b: log-probabilities, finite; an entry that is none has the same very low one in both.
      complete: exp(a) and exp(b) sum to one. A constant in the slopes then has no effect.
    """
    p, q = jnp.exp(a), jnp.exp(b)
    if kind == "reverse":
        terms = p * (a - b)
        p_slope = terms if complete else terms + p
    elif kind == "forward":
        terms = q * (b - a)
        p_slope = -q
    elif kind == "jsd":
        above = -0.5 * _log_mean_exp(b - a)  # (a - m) / 2
        p_slope = p * above
        terms = p_slope - 0.5 * q * _log_mean_exp(a - b)
        if complete:
            return terms.sum(-1), *_from_likeliest(p, b - a)
    else:
        terms = -a
        p_slope = -jnp.ones_like(a)
    most = a > _ALMOST_ALL
    others = ~most
    slope = _sum(most, p_slope / jnp.where(most, p, 1.0))
    # What is not in that entry. -expm1(a) is 1 - p with all of its digits, if a has all of its:
    # that is so for a token, not for what `tail` adds up.
    rest = _sum(others, p) if complete else -_sum(most, jnp.expm1(a))
    shift = _sum(others, p_slope) - slope * rest  # c - slope
    center = slope + shift
    gradient = jnp.where(most, -p * shift, p_slope - p * center)
    return terms.sum(-1), gradient, center[:, 0]


def _from_likeliest(
    p: Float[Array, "M n"], x: Float[Array, "M n"]
) -> tuple[Float[Array, "M n"], Float[Array, " M"]]:
    """p_i (s_i - c) and c of `jsd`, from the slopes' differences to that of the likeliest entry.

    With x = log(q / p) a slope is -log((1 + exp(x)) / 2) / 2, so that the difference to that of an
    entry x' is -log(1 + exp(x') / (1 + exp(x')) (exp(x - x') - 1)) / 2: exact where it is small.
    """
    first = jnp.argmax(p, axis=-1)[:, None]
    there = jnp.take_along_axis(x, first, 1)
    ahead = jnp.minimum(x - there, 1e38)  # finite, also between the ends of the range
    near = jnp.log1p(jax.nn.sigmoid(there) * jnp.expm1(jnp.minimum(ahead, 30.0)))
    far = jax.nn.softplus(jnp.maximum(ahead, 30.0) + jax.nn.log_sigmoid(there))
    slope = -0.5 * jnp.where(ahead > 30.0, far, near)
    shift = (p * slope).sum(-1, keepdims=True)
    return p * (slope - shift), (shift - 0.5 * _log_mean_exp(there))[:, 0]


def _sum(where: Array, x: Float[Array, "M n"]) -> Float[Array, "M 1"]:
    return jnp.where(where, x, 0.0).sum(-1, keepdims=True)


def _log_mean_exp(x: Array) -> Array:
    """log((1 + exp(x)) / 2), exact near 0 and for large x."""
    return jnp.maximum(x, 0.0) + jnp.log1p(0.5 * jnp.expm1(-jnp.abs(x)))
