"""Reductions over a vocabulary that is split over the 'tp' axis.

These run inside `shard_map`, on the local slice [..., V / tp]; `axis` is 'tp' there and None where
no mesh is set. Full logits are never gathered: a top-k gathers k candidates per shard, everything
else a scalar per row.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def offset(axis: str | None, local_size: int) -> int | Array:
    """Global id of the first local column."""
    return 0 if axis is None else jax.lax.axis_index(axis) * local_size


def total(x: Array, axis: str | None) -> Array:
    """Sum over the shards."""
    return x if axis is None else jax.lax.psum(x, axis)


def logsumexp(z: Float[Array, "*B V"], axis: str | None) -> Float[Array, " *B"]:
    """Log-sum-exp over the whole vocabulary."""
    high = z.max(-1)
    high = high if axis is None else jax.lax.pmax(high, axis)
    return high + jnp.log(total(jnp.exp(z - high[..., None]).sum(-1), axis))


def block_top_k(
    z: Float[Array, "R V"], k: int, block: int
) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """`jax.lax.top_k`, ties included, by sorting V / block + k * block values in place of V.

    The k largest lie in the k blocks with the largest maxima: each of those has an element that no
    element of another block exceeds. Where such a maximum ties, `top_k` takes the earlier block,
    and the candidates keep the order of their ids, so that equal values come lowest id first.
    """
    rows, width = z.shape
    padded = jnp.pad(z, ((0, 0), (0, -width % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, block)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
    values, place = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(chosen, place // block, axis=1) * block + place % block


def _local_top_k(z: Float[Array, "R V"], k: int) -> tuple[Array, Array]:
    """The k largest values of each row and their columns."""
    if k == 1:
        # XLA's argmax is one slow reduction of pairs on a CPU; these are two fast ones.
        high = z.max(-1, keepdims=True)
        places = jnp.where(z == high, jnp.arange(z.shape[-1]), z.shape[-1] - 1)
        return high, places.min(-1, keepdims=True)
    ratio = z.shape[-1] // k
    if ratio < 32:  # blocks would not save half of the work
        return jax.lax.top_k(z, k)
    return block_top_k(z, k, 1 << round(math.log2(ratio) / 2))


def top_k(
    z: Float[Array, "R V"], k: int, axis: str | None
) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """Exact k largest values and their global ids, in two stages when the vocabulary is split."""
    local = z.shape[-1]
    values, ids = _local_top_k(z, min(k, local))
    if axis is None:
        return values, ids
    ids = ids + offset(axis, local)
    values = jax.lax.all_gather(values, axis, axis=1, tiled=True)
    ids = jax.lax.all_gather(ids, axis, axis=1, tiled=True)
    values, picked = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, picked, axis=1)


def local_columns(
    ids: Int[Array, "R k"], local_size: int, axis: str | None
) -> tuple[Int[Array, "R k"], Array]:
    """Global ids -> (local column, clipped into range; whether the id lives on this shard)."""
    columns = ids - offset(axis, local_size)
    here = (columns >= 0) & (columns < local_size)
    return jnp.clip(columns, 0, local_size - 1), here


def take(z: Float[Array, "R V"], ids: Int[Array, "R k"], axis: str | None) -> Float[Array, "R k"]:
    """Values of `z` at global ids."""
    columns, here = local_columns(ids, z.shape[-1], axis)
    values = jnp.take_along_axis(z, columns, axis=1)
    return total(jnp.where(here, values, 0.0), axis)


def argmax(z: Float[Array, "R V"], axis: str | None) -> Int[Array, " R"]:
    """Global id of the largest value."""
    return top_k(z, 1, axis)[1][:, 0]
