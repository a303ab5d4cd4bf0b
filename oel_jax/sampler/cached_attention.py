"""Attention of new tokens to what the sampler holds: a shared prefix and the cache of a slot.

One softmax runs over both, carried from block to block. On a mesh a slot's cache is on one device
of 'fsdp', while the positions of a prefix are split over all of them. A prompt that is read has
many queries: the keys of the one layer at work are gathered. A token that is decoded is one query:
the queries of all slots are gathered, every device sees its own positions for them, and the parts
of the softmax are sent home and merged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oel_jax.models.cache_storage import Bank, Store, as_heads, read_block
from oel_jax.parallel.mesh import all_rows, axis_size

_MASKED = -1e30  # finite, so that a row that sees nothing stays finite


class _Softmax(NamedTuple):
    """A softmax over the keys seen so far, float32; X = queries of one key head."""

    highest: Float[Array, "B K X"]
    total: Float[Array, "B K X"]
    out: Float[Array, "B K X H"]


def prefill_attention(
    q: Float[Array, "B T N H"],
    own: tuple[Store, Store],
    bank: tuple[Bank, Bank],
    layer: Int[Array, ""],
    reach: Any,
    *,
    kv_heads: int,
    block: tuple[int, int],
) -> Float[Array, "B T N H"]:
    """Attention of pieces of prompts to a shared prefix and to their slots' cache, of one layer.

    Query t of row b sees the first shared[b] positions of the prefix and the columns up to
    column[b, t] of slot[b]. Only as many key blocks of each are read as some row needs. A block in
    which a row sees nothing adds exact zeros to it, so a row's result is the same to the bit
    however far the longest row reaches. All arrays are local (inside `shard_map`).

    Args:
      reach: `cached_layers.PrefillReach`.
      kv_heads: K, of one device.
      block: size of a block, of (cache, bank).
    """
    seen = _nothing(q, kv_heads)
    if bank[0].shape[2]:
        keys, at = bank, (layer, reach.prefix)
        if axis_size("fsdp") > 1:
            keys = tuple(all_rows(side[layer, reach.prefix])[None, None] for side in bank)
            at = (0, 0)
        seen = _see_bank(q, kv_heads, keys, at, 1, reach.shared, 0, reach.longest, block[1])
    columns = partial(_columns_of_slots, layer=layer, slot=reach.slot)
    return _output(_see_own(seen, q, kv_heads, own, reach, columns, block[0]), q)


def decode_attention(
    q: Float[Array, "B T N H"],
    own: tuple[Store, Store],
    bank: tuple[Bank, Bank],
    layer: Int[Array, ""],
    reach: Any,
    *,
    kv_heads: int,
    block: tuple[int, int],
) -> Float[Array, "B T N H"]:
    """As `prefill_attention`, for the newest tokens of all slots: row b is slot b.

    The cache is read in place. Row b reads prefix b % M, and B is a multiple of M: each prefix is
    read once for all its rows.

    Args:
      reach: `cached_layers.Reach`.
    """
    seen, prefixes = _nothing(q, kv_heads), bank[0].shape[1]
    if bank[0].shape[2]:
        shared, longest = reach.shared, reach.longest
        if axis_size("fsdp") == 1:
            seen = _see_bank(q, kv_heads, bank, (layer, 0), prefixes, shared, 0, longest, block[1])
        else:
            first = jax.lax.axis_index("fsdp") * bank[0].shape[2]
            everyone = all_rows(q), kv_heads, bank, (layer, 0), prefixes, all_rows(shared)
            seen = _merged(_see_bank(*everyone, first, longest, block[1]))
    columns = partial(_columns_in_place, layer=layer)
    return _output(_see_own(seen, q, kv_heads, own, reach, columns, block[0]), q)


def _output(seen: _Softmax, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    b, t, n, h = q.shape
    kv = seen.total.shape[1]
    out = (seen.out / seen.total[..., None]).astype(q.dtype)
    return out.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _nothing(q: Float[Array, "B T N H"], kv: int) -> _Softmax:
    """Before the first key."""
    b, t, n, h = q.shape
    zero = jnp.zeros((b, kv, t * n // kv, h), jnp.float32)
    return _Softmax(jnp.full_like(zero[..., 0], _MASKED), zero[..., 0], zero)


def _by_key_head(q: Float[Array, "B T N H"], kv: int) -> Float[Array, "B K GT H"]:
    """The queries that read the same keys next to each other."""
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
    bank: tuple[Bank, Bank],
    at: tuple[int | Array, int | Array],
    prefixes: int,
    shared: Int[Array, " B"],
    first: int | Array,
    longest: Array,
    size: int,
) -> _Softmax:
    """Row b sees those of its prefix's positions first .. first + p that are before shared[b].

    `at`: the layer, and the first of the `prefixes` prefixes that rows read in turn.
    """
    b, length, h = q.shape[0], bank[0].shape[2], q.shape[3]
    rows = _by_key_head(q, kv)
    lined = rows.reshape(b // prefixes, prefixes, kv, -1, h)  # rows of one prefix in a column

    def step(index: Array, carry: _Softmax) -> _Softmax:
        start = (*at, index * size)
        keys, values = (read_block(side, start, (1, prefixes, size), (kv, h))[0] for side in bank)
        scores = jnp.einsum("jmkxh,mskh->jmkxs", lined, keys, preferred_element_type=jnp.float32)
        place = first + index * size + jnp.arange(size)
        seen = place[None, None, :] < shared[:, None, None]

        def weigh(weights: Array) -> Array:
            lined_up = weights.reshape(b // prefixes, prefixes, kv, -1, size)
            part = jnp.einsum(
                "jmkxs,mskh->jmkxh", lined_up, values, preferred_element_type=jnp.float32
            )
            return part.reshape(rows.shape)

        return _fold(carry, q, scores.reshape(b, kv, -1, size), seen, weigh)

    blocks = -(-jnp.clip(longest - first, 0, length) // size)
    return jax.lax.fori_loop(0, blocks, step, _nothing(q, kv))


def _merged(of_all: _Softmax) -> _Softmax:
    """What each device has seen for the rows of all -> for one's own rows, what all have seen."""
    count = axis_size("fsdp")

    def home(x: Array) -> Array:
        x = x.reshape(count, -1, *x.shape[1:])
        return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)

    highest, total, out = (home(x) for x in of_all)
    top = highest.max(0)
    share = jnp.exp(highest - top)
    return _Softmax(top, (total * share).sum(0), (out * share[..., None]).sum(0))


def _columns_in_place(
    cache: Store, index: Array, size: int, heads: tuple[int, int], rows: int, *, layer: Array
) -> Float[Array, "B size K H"]:
    """Block `index` of the columns of all slots, of one layer."""
    return read_block(cache, (layer, 0, index * size), (1, rows, size), heads)[0]


def _columns_of_slots(
    cache: Store,
    index: Array,
    size: int,
    heads: tuple[int, int],
    rows: int,
    *,
    layer: Array,
    slot: Int[Array, " B"],
) -> Float[Array, "B size K H"]:
    """The same of the slots of `rows` rows."""
    columns = index * size + jnp.arange(size)
    stored = cache.at[layer, slot[:, None], columns[None, :]].get(mode="clip")
    return as_heads(stored, 2, heads)


def _see_own(
    seen: _Softmax,
    q: Float[Array, "B T N H"],
    kv: int,
    own: tuple[Store, Store],
    reach: Any,
    columns: Callable[..., Float[Array, "B size K H"]],
    size: int,
) -> _Softmax:
    """Columns up to column[b, t] of the slot of row b; `columns` reads a block of them."""
    b, _, _, h = q.shape
    rows = _by_key_head(q, kv)

    def step(index: Array, carry: _Softmax) -> _Softmax:
        keys, values = (columns(side, index, size, (kv, h), b) for side in own)
        scores = jnp.einsum("bkxh,bskh->bkxs", rows, keys, preferred_element_type=jnp.float32)
        visible = index * size + jnp.arange(size)[None, None, :] <= reach.column[:, :, None]

        def weigh(weights: Array) -> Array:
            return jnp.einsum(
                "bkxs,bskh->bkxh", weights, values, preferred_element_type=jnp.float32
            )

        return _fold(carry, q, scores, visible, weigh)

    return jax.lax.fori_loop(0, reach.blocks, step, seen)
