"""Sums over the tokens of all devices: in float32 from the first term to the last, rounded once.

In bfloat16 a sum over thousands of tokens loses most of its terms, and a sum over devices rounds
each one's share.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oel_jax.parallel.mesh import axis_size


def summed_over_rows(total: Float[Array, "..."], split: int | None) -> Float[Array, "..."]:
    """The devices' sums over their own rows -> the sum over all rows; inside `shard_map`.

    Each device keeps its part of dimension `split`, or all where that is None.
    """
    if axis_size("fsdp") == 1:
        return total
    if split is None:
        return jax.lax.psum(total, "fsdp")
    return jax.lax.psum_scatter(total, "fsdp", scatter_dimension=split, tiled=True)


def rounded(total: Float[Array, "..."], dtype: jnp.dtype) -> Array:
    """A float32 sum in the dtype of what it belongs to.

    Rounded by a separate operation: for a TPU, XLA would otherwise sum over the devices in the
    dtype of the conversion that follows.
    """
    if dtype == jnp.bfloat16:
        total = jax.lax.reduce_precision(total, exponent_bits=8, mantissa_bits=7)
    return total.astype(dtype)
