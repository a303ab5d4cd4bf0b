"""AdamW as an `optax.GradientTransformation`, whose moments may be in bfloat16 or in host memory.

In bfloat16 both moments are stored in half the bytes and computed with in float32. The second one
moves by (1 - b2) of itself and less in a step, with b2 = 0.999 a quarter of what separates two
bfloat16 numbers: rounded to the nearest it would never move. So a value between two numbers goes
up in the share of steps that it is above the lower one. Which steps these are follows from the
step count and the element's place alone: nothing depends on the devices or on an interruption.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from oel_jax.distill.dither import dither
from oel_jax.parallel.offload import back, is_on_host, on_device


class Moments(NamedTuple):
    """AdamW's state: updates done, and both moments as trees like the parameters."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


@cache  # equal settings are one object: jitted functions that take it are compiled once
def adamw(
    rate: float | optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    decay: float,
    dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay on all parameters (Loshchilov and Hutter 2017).

    As `optax.adamw`, with two differences. The moments are stored in `dtype`, 'float32' or
    'bfloat16' (see above), and may be in host memory: then they come to the device one leaf after
    the other, and go back. And `update` takes one more argument, `finite`: where it is false, the
    state stays as it is and the updates are zeros.

    Args:
      rate: a number, or any optax schedule; a schedule is asked with the count of updates done.
      b1, b2, eps, decay: as the `consolidate` section names them.
    """

    def init(params: optax.Params) -> Moments:
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), params)
        return Moments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def step_leaf(
        p: Array, g: Array, mu: Array, nu: Array, count: Array, number: int
    ) -> tuple[Array, Array, Array]:
        """One leaf's update, float32, and its moments, as they are stored, after update `count`."""
        mu = (1 - b1) * g + b1 * mu.astype(jnp.float32)
        nu = (1 - b2) * jnp.square(g) + b2 * nu.astype(jnp.float32)
        corrected = mu / (1 - b1**count), nu / (1 - b2**count)
        change = corrected[0] / (jnp.sqrt(corrected[1]) + eps) + decay * p
        now = rate(count - 1) if callable(rate) else rate
        if dtype == "bfloat16":
            mu, nu = dither(mu, count, 2 * number), dither(nu, count, 2 * number + 1)
        return -now * change, mu, nu

    def update(
        updates: optax.Updates,
        state: Moments,
        params: optax.Params | None = None,
        *,
        finite: Bool[Array, ""] | bool = True,
        **_: Any,
    ) -> tuple[optax.Updates, Moments]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(gradients, state, params)")
        count = on_device(state.count) + 1
        old = zip(*map(jax.tree.leaves, (params, updates, state.mu, state.nu)), strict=True)
        new: list[tuple[Array, Array, Array]] = []
        for number, (p, g, mu, nu) in enumerate(old):
            if new and is_on_host(mu):
                # Not before the last leaf is done: else all would be on the device at once.
                mu, nu, *last = jax.lax.optimization_barrier((mu, nu, *new[-1]))
                new[-1] = tuple(last)
            here = on_device(mu), on_device(nu)
            stepped = step_leaf(p, g, *here, count, number)
            kept = [
                jnp.where(finite, after, before)
                for after, before in zip(stepped, (jnp.zeros_like(p), *here), strict=True)
            ]
            new.append((kept[0], back(kept[1], mu), back(kept[2], nu)))
        structure = jax.tree.structure(params)
        changes, mu, nu = (jax.tree.unflatten(structure, side) for side in zip(*new, strict=True))
        count = back(jnp.where(finite, count, count - 1), state.count)
        return changes, Moments(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(section: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW of a config's `consolidate` section: one group, constant rate, decay on all (8.6)."""
    return adamw(
        section.learning_rate,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        decay=section.weight_decay,
        dtype=section.moments_dtype,
    )
