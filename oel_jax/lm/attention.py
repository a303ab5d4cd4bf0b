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
    q: Float[Array, "B 1 N H"],
    keys: Float[Array, "L B S K H"],
    values: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    position: Int[Array, " B"],
    blocks: Int[Array, ""],
    *,
    block: int,
) -> Float[Array, "B 1 N H"]:
    """One query per row over its cache of one layer; reads only the first `blocks` key blocks.

    Row b sees entries with index <= position[b]; S is a multiple of `block`. The softmax is carried
    from block to block: a block in which a row sees nothing adds exact zeros to it, so a row's
    result is the same to the bit however far the longest row reaches.
    """
    b, _, n, h = q.shape
    kv = keys.shape[3]
    split = out_spec("batch", "kv_heads", None, None)
    grouped = jax.lax.reshape(q, (b, kv, n // kv, h), out_sharding=split)

    def piece(cache: Array, index: Array) -> Float[Array, "B block K H"]:
        start = (layer, 0, index * block, 0, 0)
        return jax.lax.dynamic_slice(cache, start, (1, b, block, kv, h))[0]

    def body(index: Array, carry: tuple[Array, Array, Array]):
        highest, total, out = carry
        scores = jnp.einsum(
            "bkgh,bskh->bkgs", grouped, piece(keys, index), preferred_element_type=jnp.float32
        )
        seen = index * block + jnp.arange(block)[None, :] <= position[:, None]
        scores = jnp.where(seen[:, None, None], scores * h**-0.5, _MASKED)
        top = jnp.maximum(highest, scores.max(-1))
        keep = jnp.exp(highest - top)
        weights = jnp.exp(scores - top[..., None])
        part = jnp.einsum(
            "bkgs,bskh->bkgh",
            weights.astype(q.dtype),
            piece(values, index),
            preferred_element_type=jnp.float32,
        )
        return top, total * keep + weights.sum(-1), out * keep[..., None] + part

    zero = jnp.zeros_like(grouped, jnp.float32)
    start = (jnp.full_like(zero[..., 0], _MASKED), zero[..., 0], zero)
    _, total, out = jax.lax.fori_loop(0, blocks, body, start)
    out = (out / total[..., None]).astype(q.dtype)
    return jax.lax.reshape(out, q.shape, out_sharding=out_spec("batch", None, "heads", None))
