"""The losses of spec 8.3 and 10.2 written down plainly; what the fused kernel is tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def divergence(
    student: Float[Array, "M V"],
    teacher: Float[Array, "M V"],
    sampled: Int[Array, " M"] | None = None,
    *,
    top_k: int,
    temperature: float,
    kind: str = "reverse",
    support: str = "student",
    correction: str = "none",
) -> Float[Array, " M"]:
    """Per-token divergence of two rows of logits, float32; arguments as `KLConfig`'s.

    Both softmaxes run over the full vocabulary at `temperature`. The support is a 0/1 row over the
    vocabulary; it and the teacher carry no gradient.
    """
    ls = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    lt = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature))
    if kind == "nll":
        return -jnp.take_along_axis(ls, sampled[:, None], axis=1)[:, 0]
    rank_s = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(ls), stable=True), stable=True)
    rank_t = jnp.argsort(jnp.argsort(-lt, stable=True), stable=True)
    inside = {
        "student": rank_s < top_k,
        "teacher": rank_t < top_k,
        "union": (rank_s < top_k) | (rank_t < top_k),
        "full": jnp.ones_like(rank_s, bool),
    }[support]
    outside = [jax.nn.logsumexp(jnp.where(inside, -jnp.inf, x), axis=-1) for x in (ls, lt)]
    a, b = (jnp.where(inside, x, 0.0) for x in (ls, lt))
    if correction == "renorm":
        sums = [jax.nn.logsumexp(jnp.where(inside, x, -jnp.inf), axis=-1) for x in (ls, lt)]
        a, b = (jnp.where(inside, x - s[:, None], 0.0) for x, s in zip((a, b), sums, strict=True))
    if correction == "tail":
        a, b = (jnp.concatenate([x, o[:, None]], 1) for x, o in zip((a, b), outside, strict=True))
        inside = jnp.concatenate([inside, jnp.ones_like(inside[:, :1])], 1)
    p, q = jnp.exp(a), jnp.exp(b)
    m = jnp.log((p + q) / 2)
    terms = {
        "reverse": p * (a - b),
        "forward": q * (b - a),
        "jsd": 0.5 * (p * (a - m) + q * (b - m)),
    }[kind]
    return jnp.where(inside, terms, 0.0).sum(-1)
