"""Attention over one or several sources of keys and values.

A query may look at its own sequence, at a cache, and at a knowledge prefix that many rows share.
Each of these is a `Source`; one softmax runs over all of them, so attending to a cached prefix and
then to oneself equals attending to the concatenated sequence. A shared source has no batch axis:
nothing is copied per row.

The scores are computed in query blocks, so that memory stays at [B, N, block, S].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oel_jax.parallel.mesh import out_spec

_MASKED = -1e30  # finite, so that a padding row (nothing visible) stays finite


@dataclass(frozen=True)
class Source:
    """Keys and values, and which of them a query may see.

    Attributes:
      keys, values: [B, K, S, H], or [K, S, H] when all rows share them.
      limit: [B, T]; query t of row b sees entries with index <= limit[b, t].
      segments: ([B, T], [B, S]) segment ids; unequal ids do not see each other. None: all equal.
    """

    keys: Float[Array, "*B K S H"]
    values: Float[Array, "*B K S H"]
    limit: Int[Array, "B T"]
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None

    def pad_queries(self, extra: int) -> "Source":
        """The same source for `extra` more queries that see nothing."""

        def pad(x: Array, value: int) -> Array:
            return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)

        segments = self.segments and (pad(self.segments[0], -1), self.segments[1])
        return Source(self.keys, self.values, pad(self.limit, -1), segments)

    def visible(self, start: int | Array, size: int) -> Bool[Array, "B size S"]:
        """Mask of the query block [start, start + size)."""
        limit = jax.lax.dynamic_slice_in_dim(self.limit, start, size, axis=1)
        mask = jnp.arange(self.keys.shape[-2])[None, None, :] <= limit[:, :, None]
        if self.segments is None:
            return mask
        own = jax.lax.dynamic_slice_in_dim(self.segments[0], start, size, axis=1)
        return mask & (own[:, :, None] == self.segments[1][:, None, :])


def _merge(x: Float[Array, "B K G T X"]) -> Float[Array, "B K GT X"]:
    """G and T as one axis. With B = T = 1 JAX cannot tell which axis was split, hence the spec."""
    b, kv, groups, size, last = x.shape
    split = out_spec("batch", "kv_heads", None, None)
    return jax.lax.reshape(x, (b, kv, groups * size, last), out_sharding=split)


def _block(q: Float[Array, "B K G T H"], sources: tuple[Source, ...], start: int | Array):
    """One query block; returns [B, K, G, T, H]."""
    b, kv, groups, size, dim = q.shape
    rows = _merge(q)
    scores = []
    for source in sources:
        keys = "bksh" if source.keys.ndim == 4 else "ksh"
        score = jnp.einsum(
            f"bkxh,{keys}->bkxs", rows, source.keys, preferred_element_type=jnp.float32
        ).reshape(b, kv, groups, size, -1)
        mask = source.visible(start, size)[:, None, None]
        scores.append(jnp.where(mask, score * dim**-0.5, _MASKED))
    highest = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        highest = jnp.maximum(highest, score.max(-1, keepdims=True))
    highest = jax.lax.stop_gradient(highest)
    out, total = 0.0, 0.0
    for source, score in zip(sources, scores, strict=True):
        weights = jnp.exp(score - highest)
        total = total + weights.sum(-1, keepdims=True)
        values = "bksh" if source.values.ndim == 4 else "ksh"
        flat = _merge(weights.astype(q.dtype))
        part = jnp.einsum(
            f"bkxs,{values}->bkxh", flat, source.values, preferred_element_type=jnp.float32
        )
        out = out + part.reshape(b, kv, groups, size, dim)
    return (out / total).astype(q.dtype)


def attention(
    q: Float[Array, "B T N H"], sources: tuple[Source, ...], *, block: int = 512
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of `q` over all `sources`, softmax in float32.

    Query head n reads key/value head n // (N / K). `block` bounds the number of query positions
    whose scores exist at one time (forward and backward).
    """
    b, t, n, h = q.shape
    kv = sources[0].keys.shape[-3]
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)
    if t <= block:
        out = _block(grouped, sources, 0)
    elif t % block:
        # Pad the queries to whole blocks; the padding sees nothing and is cut off again.
        extra = -t % block
        padded = tuple(source.pad_queries(extra) for source in sources)
        q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
        return attention(q, padded, block=block)[:, :t]
    else:
        one = jax.checkpoint(
            lambda start: _block(
                jax.lax.dynamic_slice_in_dim(grouped, start, block, axis=3), sources, start
            )
        )
        parts = jax.lax.map(one, jnp.arange(0, t, block))  # [blocks, B, K, G, block, H]
        out = parts.transpose(1, 2, 3, 0, 4, 5).reshape(b, kv, n // kv, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def cached_attention(
    q: Float[Array, "B T N H"],
    own: tuple[Float[Array, "L slots S K H"], Float[Array, "L slots S K H"]],
    bank: tuple[Float[Array, "L M P K H"], Float[Array, "L M P K H"]],
    layer: Int[Array, ""],
    column: Int[Array, "B T"],
    shared: Int[Array, " B"],
    *,
    slot: Int[Array, " B"] | None,
    group: Int[Array, ""] | None,
    blocks: tuple[Int[Array, ""], Int[Array, ""]],
    block: tuple[int, int],
) -> Float[Array, "B T N H"]:
    """Attention of new tokens to a shared prefix and to their slot's cache, of one layer.

    Query t of row b sees the first shared[b] positions of its prefix and the columns up to
    column[b, t] of its slot. Only the first `blocks` key blocks of each are read. The softmax is
    carried from block to block: a block in which a row sees nothing adds exact zeros to it, so a
    row's result is the same to the bit however far the longest row reaches. All arrays are local
    (inside `shard_map`).

    Args:
      slot: the slot of each row; None: row b is slot b, and the cache is read in place.
      group: the prefix that all rows read; None: row b reads prefix b % M, and B is a multiple of
        M. Either way each prefix is read once for all its rows.
      blocks, block: number of key blocks to read and their size, for (cache, bank).
    """
    b, t, n, h = q.shape
    kv = own[0].shape[3]
    lanes = bank[0].shape[1] if group is None else 1
    # [B, K, G T, H], rows of one prefix in a column of [B / lanes, lanes]
    rows = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
    lined = rows.reshape(b // lanes, lanes, kv, -1, h)

    def own_piece(cache: Array, index: Array) -> Float[Array, "B block K H"]:
        if slot is None:
            start = (layer, 0, index * block[0], 0, 0)
            return jax.lax.dynamic_slice(cache, start, (1, b, block[0], kv, h))[0]
        columns = index * block[0] + jnp.arange(block[0])
        return cache.at[layer, slot[:, None], columns[None, :]].get(mode="clip")

    def bank_piece(cache: Array, index: Array) -> Float[Array, "lanes block K H"]:
        first = 0 if group is None else group
        start = (layer, first, index * block[1], 0, 0)
        return jax.lax.dynamic_slice(cache, start, (1, lanes, block[1], kv, h))[0]

    def fold(carry, scores, seen, weigh):
        """One block into the running softmax: scores [B, K, GT, s], seen [B, T or 1, s]."""
        highest, total, out = carry
        wide = scores.reshape(b, kv, n // kv, t, -1)
        wide = jnp.where(seen[:, None, None], wide * h**-0.5, _MASKED)
        scores = wide.reshape(scores.shape)
        top = jnp.maximum(highest, scores.max(-1))
        keep = jnp.exp(highest - top)
        weights = jnp.exp(scores - top[..., None])
        part = weigh(weights.astype(q.dtype))
        return top, total * keep + weights.sum(-1), out * keep[..., None] + part

    def see_bank(index: Array, carry):
        keys, values = (bank_piece(side, index) for side in bank)
        scores = jnp.einsum("jmkxh,mskh->jmkxs", lined, keys, preferred_element_type=jnp.float32)
        seen = index * block[1] + jnp.arange(block[1])[None, None, :] < shared[:, None, None]

        def weigh(weights: Array) -> Array:
            lined_up = weights.reshape(b // lanes, lanes, kv, -1, block[1])
            part = jnp.einsum(
                "jmkxs,mskh->jmkxh", lined_up, values, preferred_element_type=jnp.float32
            )
            return part.reshape(rows.shape)

        return fold(carry, scores.reshape(b, kv, -1, block[1]), seen, weigh)

    def see_own(index: Array, carry):
        keys, values = (own_piece(side, index) for side in own)
        scores = jnp.einsum("bkxh,bskh->bkxs", rows, keys, preferred_element_type=jnp.float32)
        seen = index * block[0] + jnp.arange(block[0])[None, None, :] <= column[:, :, None]

        def weigh(weights: Array) -> Array:
            return jnp.einsum(
                "bkxs,bskh->bkxh", weights, values, preferred_element_type=jnp.float32
            )

        return fold(carry, scores, seen, weigh)

    zero = jnp.zeros_like(rows, jnp.float32)
    carry = (jnp.full_like(zero[..., 0], _MASKED), zero[..., 0], zero)
    if bank[0].shape[2]:
        carry = jax.lax.fori_loop(0, blocks[1], see_bank, carry)
    _, total, out = jax.lax.fori_loop(0, blocks[0], see_own, carry)
    out = (out / total[..., None]).astype(q.dtype)
    return out.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
