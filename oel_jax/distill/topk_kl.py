"""The fused top-k reverse KL: loss and gradient in one scan over chunks of tokens.

Spec 8.3. With z the logits, tau the temperature, p = softmax(z_S / tau), r = log p_S - log p_T,
S the student's top-k ids and A = sum over S of p (r + 1):

    kl = sum over S of p r            d kl / d z_j = (p_j / tau) ([j in S] (r_j + 1) - A)

so the backward pass needs no second softmax and no second top-k: each chunk makes its logits once,
forms the gradient on the spot and multiplies it back into the hidden states and the output matrix.
Logits exist for `chunk` tokens at a time and never as [B, T, V]. The student's matrix costs three
products per chunk (logits, d hidden, d matrix), the teacher's one: the minimum.

The vocabulary stays split over 'tp' and the tokens over 'fsdp'; per chunk only k x tp candidates
and a few scalars per token cross devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from oel_jax.parallel import vocabulary as vocab


@dataclass(frozen=True)
class KLConfig:
    """Static settings of the loss.

    Attributes:
      top_k: support size, at most the vocabulary.
      temperature: tau, applied to both sides.
      renorm: renormalise both sides over the support.
      chunk: tokens whose logits exist at one time; 0 takes 1/64 of the tokens, between 16 and 1024.
      support: picks S: (student's logits, top_k, axis) -> (their values, their ids).
    """

    top_k: int = 256
    temperature: float = 0.7
    renorm: bool = False
    chunk: int = 0
    support: Callable = vocab.top_k

    def chunk_for(self, tokens: int) -> int:
        """The chunk size used for this many tokens on one device."""
        if self.chunk:
            return min(self.chunk, tokens)
        size = 16
        while size * 2 <= min(tokens // 64, 1024):
            size *= 2
        return min(size, tokens)


class TokenStats(NamedTuple):
    """Per-token values [M], float32, no gradient."""

    kl: Float[Array, " M"]
    mass: Float[Array, " M"]  # student's probability of its own top-k
    student_entropy: Float[Array, " M"]  # full vocabulary, nats
    teacher_entropy: Float[Array, " M"]
    log_prob: Float[Array, " M"]  # student's log-probability of the sampled token


class _Chunk(NamedTuple):
    student: Float[Array, "c D"]
    teacher: Float[Array, "c D"]
    sampled: Int[Array, " c"]
    weight: Float[Array, " c"]


def _logits(hidden: Array, matrix: Array, temperature: float) -> Float[Array, "c V"]:
    z = jnp.einsum("cd,vd->cv", hidden, matrix, preferred_element_type=jnp.float32)
    return z / temperature


def _entropy(z: Array, lse: Array, axis: str | None) -> Float[Array, " c"]:
    log_p = z - lse[:, None]
    return vocab.total(-(jnp.exp(log_p) * log_p).sum(-1), axis)


def _chunk_values(cfg: KLConfig, axis: str | None, chunk: _Chunk, w_s: Array, w_t: Array):
    """Statistics of a chunk and what its gradient needs: (stats, z, lse, ids, p, slope, shift).

    d kl / d z_j = (p_j / tau) ([j in S] slope_j - shift)
    """
    z = _logits(chunk.student, w_s, cfg.temperature)
    lse = vocab.logsumexp(z, axis)
    top, ids = cfg.support(z, cfg.top_k, axis)
    z_t = _logits(chunk.teacher, w_t, cfg.temperature)
    lse_t = vocab.logsumexp(z_t, axis)
    log_s = top - lse[:, None]
    log_t = vocab.take(z_t, ids, axis) - lse_t[:, None]
    mass = jnp.exp(log_s).sum(-1)
    if cfg.renorm:
        log_s = jax.nn.log_softmax(log_s)
        log_t = jax.nn.log_softmax(log_t)
    p, r = jnp.exp(log_s), log_s - log_t
    kl = (p * r).sum(-1)
    slope = r - kl[:, None] if cfg.renorm else r + 1.0
    shift = jnp.zeros_like(kl) if cfg.renorm else (p * slope).sum(-1)
    stats = TokenStats(
        kl=kl,
        mass=mass,
        student_entropy=_entropy(z, lse, axis),
        teacher_entropy=_entropy(z_t, lse_t, axis),
        log_prob=vocab.take(z, chunk.sampled[:, None], axis)[:, 0] - lse,
    )
    return stats, (z, lse, ids, p, slope, shift)


def _chunk_gradient(
    cfg: KLConfig, axis: str | None, chunk: _Chunk, w_s: Array, parts: tuple, d_matrix: Array
):
    """d(weight * kl) for the chunk's hidden states; `d_matrix` plus that for the output matrix."""
    z, lse, ids, p, slope, shift = parts
    scale = (chunk.weight / cfg.temperature)[:, None]
    grad = jnp.exp(z - lse[:, None]) * (-shift[:, None] * scale)
    columns, here = vocab.local_columns(ids, z.shape[-1], axis)
    sparse = jnp.where(here, p * slope * scale, 0.0)
    rows = jnp.arange(z.shape[0])[:, None]
    grad = grad.at[rows, columns].add(sparse).astype(chunk.student.dtype)
    d_hidden = jnp.einsum("cv,vd->cd", grad, w_s, preferred_element_type=jnp.float32)
    return vocab.total(d_hidden, axis), _add_outer(d_matrix, grad, chunk.student)


def _add_outer(total: Array, grad: Array, hidden: Array, tiles: int = 16) -> Float[Array, "V D"]:
    """total + grad^T hidden, one slice of the vocabulary after the other.

    As one product it would need a second [V, D] buffer beside the running sum; a Python loop would
    let the scheduler compute all slices first.
    """

    def add(total: Array, start: int | Array, size: int) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(grad, start, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(total, start, size, axis=0)
        new = old + jnp.einsum("cv,cd->vd", columns, hidden, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis=0)

    size = max(total.shape[0] // tiles, 1)
    whole = total.shape[0] // size
    total = jax.lax.fori_loop(0, whole, lambda i, acc: add(acc, i * size, size), total)
    rest = total.shape[0] - whole * size
    return add(total, whole * size, rest) if rest else total


def _local(cfg: KLConfig, axis: str | None, with_grad: bool, h_s, w_s, h_t, w_t, sampled, weight):
    """One device's share: its tokens, its slice of the vocabulary."""
    count = h_s.shape[0]
    size = cfg.chunk_for(count)
    extra = -count % size

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    chunks = _Chunk(split(h_s), split(h_t), split(sampled), split(weight))

    def body(d_matrix, chunk: _Chunk):
        stats, parts = _chunk_values(cfg, axis, chunk, w_s, w_t)
        if not with_grad:
            return d_matrix, (stats, None)
        d_hidden, d_matrix = _chunk_gradient(cfg, axis, chunk, w_s, parts, d_matrix)
        return d_matrix, (stats, d_hidden.astype(h_s.dtype))

    start = jnp.zeros(w_s.shape, jnp.float32) if with_grad else None
    d_matrix, (stats, d_hidden) = jax.lax.scan(body, start, chunks)
    stats = jax.tree.map(lambda x: x.reshape(-1)[:count], stats)
    loss = jnp.sum(stats.kl * weight)
    if axis is not None:
        loss = jax.lax.psum(loss, "fsdp")
    if not with_grad:
        return loss, stats
    if axis is not None:
        d_matrix = jax.lax.psum(d_matrix, "fsdp")
    return loss, stats, d_hidden.reshape(-1, h_s.shape[1])[:count], d_matrix.astype(w_s.dtype)


def _run(cfg: KLConfig, with_grad: bool, *args: Array):
    """Call `_local` on the mesh of the context, or directly where none is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return _local(cfg, None, with_grad, *args)
    tokens, matrix = P("fsdp", None), P("tp", None)
    out = (P(), TokenStats(*[P("fsdp")] * 5))
    out += (tokens, matrix) if with_grad else ()
    return jax.shard_map(
        partial(_local, cfg, "tp", with_grad),
        in_specs=(tokens, matrix, tokens, matrix, P("fsdp"), P("fsdp")),
        out_specs=out,
        check_vma=False,
    )(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_topk_kl(
    cfg: KLConfig,
    h_s: Float[Array, "M D"],
    w_s: Float[Array, "V D"],
    h_t: Float[Array, "M D"],
    w_t: Float[Array, "V D"],
    sampled: Int[Array, " M"],
    weight: Float[Array, " M"],
) -> tuple[Float[Array, ""], TokenStats]:
    """Weighted sum of the per-token top-k reverse KL, and per-token statistics.

    Args:
      h_s, w_s: student hidden states and output matrix; the only arguments with a gradient.
      h_t, w_t: teacher's; constants.
      sampled: the response token that follows each position.
      weight: per-token weight (response mask over a denominator); 0 drops a token.
    On a mesh, tokens are split over 'fsdp' and the matrices over 'tp' (and gathered over 'fsdp').

    Raises:
      ValueError: top_k exceeds the vocabulary.
    """
    _check(cfg, w_s)
    return _run(cfg, False, h_s, w_s, h_t, w_t, sampled, weight)


def _check(cfg: KLConfig, w_s: Array) -> None:
    if not 1 <= cfg.top_k <= w_s.shape[0]:
        raise ValueError(
            f"config.loss.top_k={cfg.top_k} must lie between 1 and the vocabulary "
            f"size {w_s.shape[0]}"
        )


def _forward(cfg: KLConfig, *args: Array):
    _check(cfg, args[1])
    loss, stats, d_hidden, d_matrix = _run(cfg, True, *args)
    return (loss, stats), (d_hidden, d_matrix)


def _backward(cfg: KLConfig, saved: tuple[Array, Array], cotangents: tuple):
    d_hidden, d_matrix = saved
    upstream = cotangents[0]
    return (
        (upstream * d_hidden).astype(d_hidden.dtype),
        (upstream * d_matrix).astype(d_matrix.dtype),
        None,
        None,
        None,
        None,
    )


fused_topk_kl.defvjp(_forward, _backward)
