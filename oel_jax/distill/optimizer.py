"""AdamW, and how its moments are kept: in float32 or bfloat16, on the device or on the host.

In bfloat16 both moments are stored in half the bytes and computed with in float32. The second one
moves by (1 - b2) of itself and less in a step, with b2 = 0.999 a quarter of what separates two
bfloat16 numbers: rounded to the nearest it would stand still. So a value between two numbers goes
up in the share of steps that it lies above the lower one. Which steps these are follows from the
step count and the element's place alone: nothing depends on the devices or on an interruption.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt32

from oel_jax.parallel.offload import back, on_device, on_host


class Moments(NamedTuple):
    """AdamW's state: updates done, and both moments as trees like the parameters."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay on all parameters (Loshchilov and Hutter 2017).

    Attributes:
      rate, b1, b2, eps, decay: as the `consolidate` section names them.
      dtype: of the stored moments, 'float32' or 'bfloat16'.
    """

    rate: float
    b1: float
    b2: float
    eps: float
    decay: float
    dtype: str

    def init(self, params: Any) -> Moments:
        """Zero moments in the places of the parameters."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, self.dtype), params)
        return Moments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        self, params: Any, gradients: Any, state: Moments, finite: Bool[Array, ""]
    ) -> tuple[Any, Moments]:
        """Stepped parameters and moments, or the old ones where `finite` is false.

        Moments that lie in host memory come to the device one leaf after the other, and go back.
        """
        count = on_device(state.count) + 1
        old = zip(*map(jax.tree.leaves, (params, gradients, state.mu, state.nu)), strict=True)
        new: list[tuple[Array, Array, Array]] = []
        for number, (p, g, mu, nu) in enumerate(old):
            if new and on_host(mu):
                # Not before the last leaf is done: else all would be on the device at once.
                mu, nu, *last = jax.lax.optimization_barrier((mu, nu, *new[-1]))
                new[-1] = tuple(last)
            stepped = self._leaf(p, g, on_device(mu), on_device(nu), count, number)
            kept = [
                jnp.where(finite, after, before)
                for after, before in zip(stepped, (p, on_device(mu), on_device(nu)), strict=True)
            ]
            new.append((kept[0], back(kept[1], mu), back(kept[2], nu)))
        structure = jax.tree.structure(params)
        params, mu, nu = (jax.tree.unflatten(structure, side) for side in zip(*new, strict=True))
        count = back(jnp.where(finite, count, count - 1), state.count)
        return params, Moments(count, mu, nu)

    def _leaf(
        self, p: Array, g: Array, mu: Array, nu: Array, count: Array, number: int
    ) -> tuple[Array, Array, Array]:
        """One leaf's parameters, float32, and moments, as they are stored, after update `count`."""
        mu = (1 - self.b1) * g + self.b1 * mu.astype(jnp.float32)
        nu = (1 - self.b2) * jnp.square(g) + self.b2 * nu.astype(jnp.float32)
        corrected = mu / (1 - self.b1**count), nu / (1 - self.b2**count)
        change = corrected[0] / (jnp.sqrt(corrected[1]) + self.eps) + self.decay * p
        p = p - self.rate * change
        if self.dtype == "bfloat16":
            mu, nu = dithered(mu, count, 2 * number), dithered(nu, count, 2 * number + 1)
        return p, mu, nu


def optimizer(section: Any) -> AdamW:
    """AdamW of a config's `consolidate` section: one group, constant rate, decay on all (8.6)."""
    return AdamW(
        section.learning_rate,
        section.b1,
        section.b2,
        section.eps,
        section.weight_decay,
        section.moments_dtype,
    )


def dithered(x: Float[Array, "..."], step: Array, seed: int) -> BFloat16[Array, "..."]:
    """Round float32 to bfloat16, up or down, without bias.

    An element rounds up where the fraction it lies above the lower number, plus a threshold,
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
    """Each element's number in the whole array (modulo 2^32), made where the element lies."""
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
