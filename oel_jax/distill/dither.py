"""Rounding from float32 to bfloat16 without bias, the same on any number of devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt32


def dither(x: Float[Array, "..."], step: Array, seed: int) -> BFloat16[Array, "..."]:
    """Round float32 to bfloat16, up or down, without bias.

    An element rounds up where the fraction by which it is above the lower number, plus a threshold,
    reaches 1. Its thresholds are its hash (of place and `seed`) plus multiples of the golden ratio,
    modulo 1: spread evenly over the steps, so that errors stay smaller than with independent draws.

    Args:
      step: int32 scalar; other thresholds in each step.
      seed: another pattern for each array.
    """
    turn = jnp.asarray(step, jnp.uint32) * jnp.uint32(0x9E3779B9)  # 2^32 / golden ratio
    threshold = (_hash(_place(x) + jnp.uint32(seed * 0x85EBCA6B % 2**32)) + turn) >> 16
    # Adding below the 16 bits that stay carries over into them; the sign does not take part.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _place(x: Array) -> UInt32[Array, "..."]:
    """Each element's number in the whole array (modulo 2^32), made where the element is."""
    where = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=where)
        place = place * jnp.uint32(size % 2**32) + along
    return place


def _hash(number: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix 32 bits so that neighbours have nothing in common."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = (number ^ (number >> shift)) * jnp.uint32(factor)
    return number ^ (number >> 16)
