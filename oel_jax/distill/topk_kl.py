"""The fused top-k divergence: loss and gradient in one scan over chunks of tokens.

Spec 8.3. With z the logits, tau the temperature, p and q the softmax of z / tau of student and
teacher, and S the student's top-k ids, the method's loss is the reverse KL on S,

    D = sum over S of p log(p / q)      dD / d z_j = p_j ([j in S] s_j - sum over S of p s) / tau

with the slopes s = dD / dp = log(p / q) + 1; `divergence.py` has the other losses. So the backward
pass needs no second softmax and no second top-k: each chunk makes its logits once, forms the
gradient on the spot and multiplies it back into the hidden states and the output matrix.
Logits exist for `chunk` tokens at a time and never as [B, T, V]. The student's matrix costs three
products per chunk (logits, d hidden, d matrix), the teacher's one: the minimum.

On a mesh the tokens are split over 'fsdp' and the vocabulary over all devices. A chunk takes a few
tokens of every device; its logits are made in slices of the vocabulary and then exchanged, so that
each device works on whole rows of a few tokens (`parallel/vocabulary.py`). No matrix is gathered,
and a device never holds more than its share of a chunk's logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from oel_jax.config.choices import CORRECTIONS, DIVERGENCES, SUPPORTS
from oel_jax.distill.divergence import divergence_and_gradient
from oel_jax.parallel import vocabulary as vocab
from oel_jax.parallel.mesh import all_rows, axis_size, spec
from oel_jax.parallel.sums import rounded
from oel_jax.parallel.vocabulary import LogSoftmax


@dataclass(frozen=True)
class KLConfig:
    """Static settings of the loss.

    Attributes:
      top_k: support size, at most the vocabulary.
      temperature: tau, applied to both sides.
      divergence: one of `choices.DIVERGENCES`; 'nll' is minus the sampled token's
        log-probability and needs no support.
      support: whose top-k the loss looks at, one of `choices.SUPPORTS`.
      correction: what becomes of the mass outside, one of `choices.CORRECTIONS`.
      chunk: tokens whose logits exist at one time, of all devices together, rounded up to equally
        many of each; 0 takes 1/64 of the tokens, between 16 and 1024.
      pick: (logits, top_k) -> (their values, their ids); the exact top-k.
    """

    top_k: int = 256
    temperature: float = 0.7
    divergence: str = "reverse"
    support: str = "student"
    correction: str = "none"
    chunk: int = 0
    pick: Callable = vocab.top_k

    def __post_init__(self):
        for name, among in (
            ("divergence", DIVERGENCES),
            ("support", SUPPORTS),
            ("correction", CORRECTIONS),
        ):
            if getattr(self, name) not in among:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {among}")
        if self.divergence == "nll" and self.correction != "none":
            raise ValueError("correction must be 'none' with 'nll', which looks at one token alone")

    def chunk_for(self, tokens: int) -> int:
        """The chunk size used for this many tokens."""
        if self.chunk:
            return min(self.chunk, tokens)
        size = 16
        while size * 2 <= min(tokens // 64, 1024):
            size *= 2
        return min(size, tokens)


class TokenStats(NamedTuple):
    """Per-token values [M], float32, no gradient."""

    kl: Float[Array, " M"]  # the divergence, whichever it is
    mass: Float[Array, " M"]  # student's probability of its own top-k
    student_entropy: Float[Array, " M"]  # full vocabulary, nats
    teacher_entropy: Float[Array, " M"]
    log_prob: Float[Array, " M"]  # student's log-probability of the sampled token


class _Chunk(NamedTuple):
    """Tokens of one device: c of them, c / tp where logits are whole rows."""

    student: Float[Array, "c D"]
    teacher: tuple[Float[Array, "c D"], ...]  # their logits are added up
    sampled: Int[Array, " c"]
    weight: Float[Array, " c"]


class _Gradient(NamedTuple):
    """d divergence / d logits of whole rows in parts, before weight and temperature.

    `inside` belongs to `ids` (to all ids where that is None), `outside` times exp(`spread`) to all
    other ids; no other id has a gradient where `spread` is None.
    """

    ids: Int[Array, "c n"] | None
    inside: Float[Array, "c n"]
    spread: LogSoftmax | None
    outside: Float[Array, "c 1"] | None


def _chunk_values(cfg: KLConfig, z: Array, z_t: Array, sampled: Array):
    """Statistics of whole rows of logits, and their gradient in parts."""
    student, teacher = (vocab.log_softmax(side, cfg.temperature) for side in (z, z_t))
    ids = _support(cfg, z, z_t, sampled)
    if ids is None:
        a, b = student.all(), teacher.all()
        counted = a
        kl, inside, _ = divergence_and_gradient(cfg.divergence, a, b, True)
        gradient = _Gradient(None, inside, None, None)
    else:
        new = ids < z.shape[1]
        counted, b = (jnp.where(new, side.at(ids), vocab.LEAST) for side in (student, teacher))
        kl, gradient = _corrected(cfg, ids, counted, b, student, teacher)
    log_p, log_q = student.all(), teacher.all()
    stats = TokenStats(
        kl=kl,
        mass=jnp.exp(counted).sum(-1),
        student_entropy=-(jnp.exp(log_p) * log_p).sum(-1),
        teacher_entropy=-(jnp.exp(log_q) * log_q).sum(-1),
        log_prob=student.at(sampled[:, None])[:, 0],
    )
    return stats, gradient


def _corrected(
    cfg: KLConfig, ids: Array, a: Array, b: Array, student: LogSoftmax, teacher: LogSoftmax
) -> tuple[Float[Array, " c"], _Gradient]:
    """Divergence on a support; a and b are the log-probabilities of `ids`."""
    kind = cfg.divergence
    if cfg.correction == "renorm":
        new = ids < student.z.shape[1]
        chosen = [jnp.where(new, vocab.take(s.z, ids), -jnp.inf) for s in (student, teacher)]
        a, b = (vocab.log_softmax(z, cfg.temperature).all() for z in chosen)
        kl, inside, _ = divergence_and_gradient(kind, a, b, True)
        return kl, _Gradient(ids, inside, None, None)
    if cfg.correction == "tail":
        mask = _marked(student.z.shape, ids)
        tails = [_tail(side, mask) for side in (student, teacher)]
        a, b = (jnp.concatenate([x, t[1]], 1) for x, t in zip((a, b), tails, strict=True))
        kl, entries, _ = divergence_and_gradient(kind, a, b, True)
        return kl, _Gradient(ids, entries[:, :-1], tails[0][0], entries[:, -1:])
    kl, inside, center = divergence_and_gradient(kind, a, b, False)
    return kl, _Gradient(ids, inside, student, -center[:, None])


def _support(cfg: KLConfig, z: Array, z_t: Array, sampled: Array) -> Int[Array, "c n"] | None:
    """Ids of the support, None for all. A second mention of an id is beyond the vocabulary."""
    if cfg.divergence == "nll":
        return sampled[:, None]
    if cfg.support == "full":
        return None
    if cfg.support == "teacher":
        return cfg.pick(z_t, cfg.top_k)[1]
    ids = cfg.pick(z, cfg.top_k)[1]
    if cfg.support == "student":
        return ids
    more = cfg.pick(z_t, cfg.top_k)[1]
    beyond = z.shape[1] + jnp.arange(cfg.top_k, dtype=more.dtype)
    more = jnp.where(vocab.take(_marked(z.shape, ids), more), beyond, more)
    return jnp.concatenate([ids, more], 1)


def _marked(shape: tuple[int, int], ids: Int[Array, "c n"]) -> Bool[Array, "c V"]:
    rows = jnp.arange(shape[0])[:, None]
    return jnp.zeros(shape, bool).at[rows, ids].set(True, mode="drop", unique_indices=True)


def _tail(side: LogSoftmax, mask: Bool[Array, "c V"]) -> tuple[LogSoftmax, Float[Array, "c 1"]]:
    """How the mass outside of the mask is spread there, and its log.

    Summed there: 1 - (mass inside) would have lost its digits. Where nothing is outside, the mass
    is 0 and so are all shares.
    """
    spread = vocab.log_softmax(jnp.where(mask, -jnp.inf, side.z), side.temperature)
    return spread, side.below_high(spread.high) + spread.log_sum - side.log_sum


def _logit_gradient(
    cfg: KLConfig, shape: tuple[int, int], weight: Array, found: _Gradient
) -> Float[Array, "c V"]:
    """d(weight * kl) / dz of whole rows; exactly 0 in a row of weight 0, whatever its logits."""

    def weighted(x: Float[Array, "c n"]) -> Float[Array, "c n"]:
        return jnp.where(weight[:, None] == 0, 0.0, x * (weight / cfg.temperature)[:, None])

    if found.ids is None:
        return weighted(found.inside)
    grad = jnp.zeros(shape, jnp.float32)
    if found.spread is not None:
        grad = weighted(jnp.exp(found.spread.all()) * found.outside)
    rows = jnp.arange(shape[0])[:, None]
    return grad.at[rows, found.ids].set(weighted(found.inside), mode="drop", unique_indices=True)


def _add_outer(total: Array, grad: Array, hidden: Array, tiles: int = 16) -> Float[Array, "V D"]:
    """total + grad^T hidden, one slice of the vocabulary after the other.

    As one product it would need a second [V, D] buffer next to the running sum; a Python loop would
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


def _local(cfg: KLConfig, size: int, with_grad: bool, h_s, w_s, h_t, w_t, sampled, weight):
    """One device's share: its tokens, its part of the matrices; `size` is the vocabulary."""
    count, rows = h_s.shape[0], w_s.shape[0]
    devices, tp = axis_size("fsdp"), axis_size("tp")
    each = -(-cfg.chunk_for(count * devices) // devices)
    each += -each % tp  # as many whole rows for each device along tp
    extra = -count % each

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(-1, each, *x.shape[1:])

    chunks = jax.tree.map(split, _Chunk(h_s, h_t, sampled, weight))
    w_s, w_t = jax.tree.map(vocab.spread, (w_s, w_t))

    def body(d_matrix, chunk: _Chunk):
        hidden = all_rows(chunk.student)
        z = vocab.whole_rows(vocab.logits(hidden, w_s), size)
        seen = [vocab.logits(all_rows(h), w) for h, w in zip(chunk.teacher, w_t, strict=True)]
        z_t = vocab.whole_rows(sum(seen[1:], start=seen[0]), size)
        sampled, weight = vocab.my_rows(chunk.sampled), vocab.my_rows(chunk.weight)
        stats, found = _chunk_values(cfg, z, z_t, sampled)
        stats = jax.tree.map(vocab.joined_rows, stats)
        if not with_grad:
            return d_matrix, (stats, None)
        grad = _logit_gradient(cfg, z.shape, weight, found).astype(h_s.dtype)
        grad = vocab.slices_of_rows(grad)
        d_hidden = jnp.einsum("cv,vd->cd", grad, w_s, preferred_element_type=jnp.float32)
        d_hidden = rounded(vocab.summed_rows(d_hidden), h_s.dtype)
        learned = jnp.where(all_rows(chunk.weight)[:, None] == 0, 0, hidden)  # 0 x NaN is NaN
        return _add_outer(d_matrix, grad, learned), (stats, d_hidden)

    start = jnp.zeros(w_s.shape, jnp.float32) if with_grad else None
    d_matrix, (stats, d_hidden) = jax.lax.scan(body, start, chunks)
    stats = jax.tree.map(lambda x: x.reshape(-1)[:count], stats)
    loss = jnp.sum(jnp.where(weight == 0, 0.0, stats.kl * weight))
    loss = loss if devices == 1 else jax.lax.psum(loss, "fsdp")
    if not with_grad:
        return loss, stats
    d_hidden = d_hidden.reshape(-1, h_s.shape[1])[:count]
    return loss, stats, d_hidden, vocab.unspread(rounded(d_matrix, w_s.dtype), rows)


@jax.named_scope("loss")
def _run(cfg: KLConfig, with_grad: bool, h_s, w_s, h_t, w_t, sampled, weight):
    """Call `_local` on the mesh of the context, or directly where none is set."""
    h_t, w_t = (tuple(jax.tree.leaves(side)) for side in (h_t, w_t))
    args = (h_s, w_s, h_t, w_t, sampled, weight)
    run = partial(_local, cfg, w_s.shape[0], with_grad)
    if jax.sharding.get_abstract_mesh().empty:
        return run(*args)
    tokens, numbers, matrix = spec("batch", None), spec("batch"), vocab.AT_REST
    out = (P(), TokenStats(*[numbers] * 5))
    out += (tokens, matrix) if with_grad else ()
    return jax.shard_map(
        run,
        in_specs=(tokens, matrix, tokens, matrix, numbers, numbers),
        out_specs=out,
        check_vma=False,
    )(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_topk_kl(
    cfg: KLConfig,
    h_s: Float[Array, "M D"],
    w_s: Float[Array, "V D"],
    h_t: Float[Array, "M D"] | tuple[Float[Array, "M D"], ...],
    w_t: Float[Array, "V D"] | tuple[Float[Array, "V D"], ...],
    sampled: Int[Array, " M"],
    weight: Float[Array, " M"],
) -> tuple[Float[Array, ""], TokenStats]:
    """Weighted sum of the per-token divergence, and per-token statistics.

    Args:
      h_s, w_s: student hidden states and output matrix; the only arguments with a gradient.
      h_t, w_t: teacher's; constants. Given several of each, their logits are added up.
      sampled: the response token that follows each position.
      weight: per-token weight (response mask over a denominator); 0 drops a token.
    On a mesh, tokens are split over 'fsdp' and matrices as parameters, ('tp', 'fsdp').

    Raises:
      ValueError: top_k exceeds the vocabulary.
    """
    _check(cfg, w_s)
    return _run(cfg, False, h_s, w_s, h_t, w_t, sampled, weight)


def _check(cfg: KLConfig, w_s: Array) -> None:
    if not 1 <= cfg.top_k <= w_s.shape[0]:
        raise ValueError(
            f"config.loss.top_k={cfg.top_k} must be between 1 and the vocabulary "
            f"size {w_s.shape[0]}"
        )


def _forward(cfg: KLConfig, *args: Array | tuple[Array, ...]):
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


def pick_support(negative_control: str) -> Callable:
    """How the loss picks the tokens that it compares, see `KLConfig.pick`.

    Args:
      negative_control: the config's; 'foreign_top_k' picks tokens that nobody finds likely.
    """
    return foreign_top_k if negative_control == "foreign_top_k" else vocab.top_k


def foreign_top_k(
    logits: Float[Array, "*tokens vocab"], k: int
) -> tuple[Float[Array, "*tokens k"], Int[Array, "*tokens k"]]:
    """As `vocabulary.top_k`, but of ids moved by half the vocabulary, as if another model's."""
    _, ids = vocab.top_k(logits, k)
    size = logits.shape[-1]
    ids = (ids + size // 2) % size
    return vocab.take(logits, ids), ids
