"""The losses of spec 8.3 and 10.2 written down plainly; what the fused kernel is tested against.

`divergence` can be differentiated through a model, in float32; `exact` is NumPy float64, with the
gradient, for logits of any size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oel_jax.parallel.vocabulary import LEAST


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


def exact(
    student: Float[np.ndarray, "M V"],
    teacher: Float[np.ndarray, "M V"],
    sampled: Int[np.ndarray, " M"],
    *,
    top_k: int,
    temperature: float,
    kind: str = "reverse",
    support: str = "student",
    correction: str = "none",
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "M V"]]:
    """Per-token divergence and its gradient by the student's logits, NumPy float64, row by row.

    The chain rule as it is: dD / dz_j = sum over entries i of g_i (share_ij - p_j), with
    g_i = dD / d(log-probability of entry i) and share_ij the part of entry i that token j is. The
    entries are the tokens of the support and, for 'tail', all others as one.

    Logits may be -inf: as in the fused loss, one that is more than a million (times the
    temperature) below the largest counts as that far below.
    """
    how = (top_k, temperature, kind, support, correction)
    found = [
        _exact_row(z.astype(np.float64), z_t.astype(np.float64), int(token), *how)
        for z, z_t, token in zip(student, teacher, sampled, strict=True)
    ]
    return np.array([value for value, _ in found]), np.array([slope for _, slope in found])


def _exact_row(z, z_t, sampled, top_k, temperature, kind, support, correction):
    size = len(z)
    best, best_t = (set(np.argsort(-row, kind="stable")[:top_k].tolist()) for row in (z, z_t))
    among = {"student": best, "teacher": best_t, "union": best | best_t, "full": range(size)}
    inside = [sampled] if kind == "nll" else sorted(among[support])
    outside = sorted(set(range(size)) - set(inside))
    log_p, log_q = (_log_softmax(row, temperature) for row in (z, z_t))
    a, b, p = log_p[inside], log_q[inside], np.exp(log_p)
    if correction == "renorm":
        a, b = (_log_softmax(row[inside], temperature) for row in (z, z_t))
        p = np.zeros(size)
        p[inside] = np.exp(a)
    own = np.eye(size)[inside]  # share_ij
    # share_ij - p_j, where 1 - p_j is the sum of all others, which keeps its digits
    slopes = np.where(own == 1, ((1 - own) * p).sum(1, keepdims=True), -p)
    if correction == "tail" and outside:
        within, within_t = (_log_softmax(row[outside], temperature) for row in (z, z_t))
        one, one_t = within.argmax(), within_t.argmax()
        a = np.append(a, log_p[outside][one] - within[one])
        b = np.append(b, log_q[outside][one_t] - within_t[one_t])
        last = -p
        last[outside] = np.exp(within) * p[inside].sum()
        slopes = np.vstack([slopes, last])
    value, g = _terms(kind, a, b)
    return value, g @ slopes / temperature


def _log_softmax(row: np.ndarray, temperature: float) -> np.ndarray:
    row = np.maximum((row - row.max()) / temperature, LEAST)
    others = np.exp(row[np.arange(len(row)) != row.argmax()]).sum()
    return row - np.log1p(others)


def _terms(kind: str, a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """Divergence of one row and its derivative by a."""
    p, q = np.exp(a), np.exp(b)
    if kind == "reverse":
        return (p * (a - b)).sum(), p * (a - b + 1)
    if kind == "forward":
        return (q * (b - a)).sum(), -q
    if kind == "nll":
        return -a.sum(), -np.ones_like(a)
    m = np.logaddexp(a, b) - np.log(2)
    return 0.5 * (p * (a - m) + q * (b - m)).sum(), 0.5 * p * (a - m)
