"""Reductions over a vocabulary that is split over the 'tp' axis.

These run inside `shard_map`, on the local slice [..., V / tp]; `axis` is 'tp' there and None where
no mesh is set. Full logits are never gathered: a top-k gathers k candidates per shard, everything
else a scalar per row.
"""

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


def top_k(
    z: Float[Array, "R V"], k: int, axis: str | None
) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
    """Exact k largest values and their global ids, in two stages when the vocabulary is split."""
    local = z.shape[-1]
    values, ids = jax.lax.top_k(z, min(k, local))
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
