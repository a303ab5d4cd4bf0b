"""Attention of new tokens to what the sampler holds: a shared prefix and the cache of a slot.

One softmax runs over both, carried from block to block. On a mesh a slot's cache lies on one device
of 'fsdp', while the positions of a prefix are split over all of them. A prompt that is read has
many queries: the keys of the one layer at work are gathered. A token that is decoded is one query:
the queries of all slots are gathered, every device sees its own positions for them, and the parts
of the softmax are sent home and merged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.models.cache_storage import Store, as_heads, read_block
from oel_jax.parallel.mesh import all_rows, parts

_MASKED = -1e30  # finite, so that a row that sees nothing stays finite


class _Softmax(NamedTuple):
    """A softmax over the keys seen so far, float32; X = queries of one key head."""

    highest: Float[Array, "B K X"]
    total: Float[Array, "B K X"]
    out: Float[Array, "B K X H"]


def cached_attention(
    q: Float[Array, "B T N H"],
    own: tuple[Store, Store],
    bank: tuple[Store, Store],
    layer: Int[Array, ""],
    column: Int[Array, "B T"],
    shared: Int[Array, " B"],
    *,
    kv_heads: int,
    slot: Int[Array, " B"] | None,
    group: Int[Array, ""] | None,
    blocks: Int[Array, ""],
    longest: Int[Array, ""],
    block: tuple[int, int],
) -> Float[Array, "B T N H"]:
    """Attention of new tokens to a shared prefix and to their slot's cache, of one layer.

    Query t of row b sees the first shared[b] positions of its prefix and the columns up to
    column[b, t] of its slot. Only as many key blocks of each are read as some row needs. A block in
    which a row sees nothing adds exact zeros to it, so a row's result is the same to the bit
    however far the longest row reaches. All arrays are local (inside `shard_map`); p positions of
    the prefixes lie on this device.

    Args:
      kv_heads: K, of one device.
      slot: the slot of each row; None: row b is slot b, and the cache is read in place.
      group: the prefix that all rows read; None: row b reads prefix b % M, and B is a multiple of
        M. Either way each prefix is read once for all its rows.
      blocks: key blocks of the cache to read.
      longest: positions of the prefix that any row of any device sees.
      block: size of a block, of (cache, bank).
    """
    b, t, n, h = q.shape
    kv = kv_heads
    seen = _nothing(b, kv, t * n // kv, h)
    if bank[0].shape[2]:
        lane, lanes = (0, bank[0].shape[1]) if group is None else (group, 1)
        if parts("fsdp") == 1:
            seen = _see_bank(q, kv, bank, (layer, lane), lanes, shared, 0, longest, block[1])
        elif group is not None:
            keys = tuple(all_rows(side[layer, group])[None, None] for side in bank)
            seen = _see_bank(q, kv, keys, (0, 0), 1, shared, 0, longest, block[1])
        else:
            first = jax.lax.axis_index("fsdp") * bank[0].shape[2]
            everyone = all_rows(q), kv, bank, (layer, 0), lanes, all_rows(shared)
            seen = _merged(_see_bank(*everyone, first, longest, block[1]))
    seen = _see_own(seen, q, kv, own, layer, column, slot, blocks, block[0])
    out = (seen.out / seen.total[..., None]).astype(q.dtype)
    return out.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _nothing(b: int, kv: int, queries: int, h: int) -> _Softmax:
    zero = jnp.zeros((b, kv, queries, h), jnp.float32)
    return _Softmax(jnp.full_like(zero[..., 0], _MASKED), zero[..., 0], zero)


def _by_key_head(q: Float[Array, "B T N H"], kv: int) -> Float[Array, "B K GT H"]:
    """The queries that read the same keys beside each other."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)


def _fold(
    carry: _Softmax, q: Array, scores: Float[Array, "B K GT s"], seen: Array, weigh: Callable
) -> _Softmax:
    """One block into the softmax; seen [B, T or 1, s]."""
    b, t, n, h = q.shape
    kv = scores.shape[1]
    wide = scores.reshape(b, kv, n // kv, t, -1)
    wide = jnp.where(seen[:, None, None], wide * h**-0.5, _MASKED)
    scores = wide.reshape(scores.shape)
    top = jnp.maximum(carry.highest, scores.max(-1))
    keep = jnp.exp(carry.highest - top)
    weights = jnp.exp(scores - top[..., None])
    part = weigh(weights.astype(q.dtype))
    return _Softmax(top, carry.total * keep + weights.sum(-1), carry.out * keep[..., None] + part)


def _see_bank(
    q: Float[Array, "B T N H"],
    kv: int,
    bank: tuple[Store, Store],
    at: tuple[int | Array, int | Array],
    lanes: int,
    shared: Int[Array, " B"],
    first: int | Array,
    longest: Array,
    size: int,
) -> _Softmax:
    """Row b sees those of its prefix's positions first .. first + p that lie before shared[b].

    `at`: the layer, and the first of the `lanes` prefixes that rows read in turn.
    """
    b, length, h = q.shape[0], bank[0].shape[2], q.shape[3]
    rows = _by_key_head(q, kv)
    lined = rows.reshape(b // lanes, lanes, kv, -1, h)  # rows of one prefix in a column

    def step(index: Array, carry: _Softmax) -> _Softmax:
        start = (*at, index * size)
        keys, values = (read_block(side, start, (1, lanes, size), (kv, h))[0] for side in bank)
        scores = jnp.einsum("jmkxh,mskh->jmkxs", lined, keys, preferred_element_type=jnp.float32)
        place = first + index * size + jnp.arange(size)
        seen = place[None, None, :] < shared[:, None, None]

        def weigh(weights: Array) -> Array:
            lined_up = weights.reshape(b // lanes, lanes, kv, -1, size)
            part = jnp.einsum(
                "jmkxs,mskh->jmkxh", lined_up, values, preferred_element_type=jnp.float32
            )
            return part.reshape(rows.shape)

        return _fold(carry, q, scores.reshape(b, kv, -1, size), seen, weigh)

    blocks = -(-jnp.clip(longest - first, 0, length) // size)
    return jax.lax.fori_loop(0, blocks, step, _nothing(b, kv, rows.shape[2], h))


def _merged(of_all: _Softmax) -> _Softmax:
    """What each device has seen for the rows of all -> for one's own rows, what all have seen."""
    count = parts("fsdp")

    def home(x: Array) -> Array:
        x = x.reshape(count, -1, *x.shape[1:])
        return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)

    highest, total, out = (home(x) for x in of_all)
    top = highest.max(0)
    share = jnp.exp(highest - top)
    return _Softmax(top, (total * share).sum(0), (out * share[..., None]).sum(0))


def _see_own(
    seen: _Softmax,
    q: Float[Array, "B T N H"],
    kv: int,
    own: tuple[Store, Store],
    layer: Array,
    column: Int[Array, "B T"],
    slot: Int[Array, " B"] | None,
    blocks: Array,
    size: int,
) -> _Softmax:
    """Columns up to column[b, t] of the slot of row b."""
    b, _, _, h = q.shape
    rows = _by_key_head(q, kv)

    def piece(cache: Array, index: Array) -> Float[Array, "B size K H"]:
        if slot is None:
            start = (layer, 0, index * size)
            return read_block(cache, start, (1, b, size), (kv, h))[0]
        columns = index * size + jnp.arange(size)
        stored = cache.at[layer, slot[:, None], columns[None, :]].get(mode="clip")
        return as_heads(stored, 2, (kv, h))

    def step(index: Array, carry: _Softmax) -> _Softmax:
        keys, values = (piece(side, index) for side in own)
        scores = jnp.einsum("bkxh,bskh->bkxs", rows, keys, preferred_element_type=jnp.float32)
        visible = index * size + jnp.arange(size)[None, None, :] <= column[:, :, None]

        def weigh(weights: Array) -> Array:
            return jnp.einsum(
                "bkxs,bskh->bkxh", weights, values, preferred_element_type=jnp.float32
            )

        return _fold(carry, q, scores, visible, weigh)

    return jax.lax.fori_loop(0, blocks, step, seen)
