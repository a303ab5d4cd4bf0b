"""Attention of new tokens to what the sampler holds: a shared prefix and the cache of a slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30  # finite, so that a row that sees nothing stays finite


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
