"""What weights do to activations, with gradients that are summed over tokens in float32.

Weights are used in the compute dtype, and so are their gradients; but these are summed in float32
over the tokens of a device, then over the devices, and rounded once. XLA does so within one product
only: a plain sum and a sum between devices have the dtype of their terms. An embedding's gradient
is summed in `parallel.vocabulary.lookup`, the output matrix's in the loss. An activation that the
few devices of 'tp' make together is summed in its own dtype: each adds one term.

Shapes: B rows, T tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oel_jax.parallel.mesh import constrain, out_spec, spec
from oel_jax.parallel.sums import rounded, summed_over_rows

Axes = tuple[str | None, ...]  # logical names of the dimensions of a weight at rest


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Float[Array, "B T *into"], weight: Float[Array, "*into_out"], letters: str, axes: Axes
) -> Float[Array, "B T *out"]:
    """Product with a weight, e.g. of the letters 'd,nh': [B, T, d] times [d, n, h].

    Args:
      letters: of the dimensions that the product sums over, and of those it makes.
      axes: of the weight. It is gathered over 'fsdp' just before use, in both directions.
    """
    into, out = letters.split(",")
    weight = constrain(weight, *_gathered(axes))
    where = out_spec(*_layout(out, letters, axes))
    return jnp.einsum(f"bt{into},{into}{out}->bt{out}", x, weight, out_sharding=where)


def _gathered(axes: Axes) -> Axes:
    return tuple(None if axis == "embed" else axis for axis in axes)


def _layout(part: str, letters: str, axes: Axes) -> Axes:
    """Logical names of an activation [B, T, *part]."""
    names = dict(zip(letters.replace(",", ""), _gathered(axes), strict=True))
    return ("batch", None, *(names[letter] for letter in part))


def _project_forward(x: Array, weight: Array, letters: str, axes: Axes):
    return project(x, weight, letters, axes), (x, weight)


def _project_backward(letters: str, axes: Axes, saved: tuple[Array, Array], d_out: Array):
    x, weight = saved
    into, out = letters.split(",")
    d_x = jnp.einsum(
        f"bt{out},{into}{out}->bt{into}",
        d_out,
        constrain(weight, *_gathered(axes)),
        out_sharding=out_spec(*_layout(into, letters, axes)),
    )

    def local(x: Array, d_out: Array) -> Array:
        total = jnp.einsum(
            f"bt{into},bt{out}->{into}{out}", x, d_out, preferred_element_type=jnp.float32
        )
        split = axes.index("embed") if "embed" in axes else None
        return rounded(summed_over_rows(total, split), weight.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return d_x, local(x, d_out)
    layouts = tuple(spec(*_layout(part, letters, axes)) for part in (into, out))
    sides = (jax.reshard(side, at) for side, at in zip((x, d_out), layouts, strict=True))
    run = jax.shard_map(local, in_specs=layouts, out_specs=spec(*axes), check_vma=False)
    return d_x, run(*sides)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def scale(x: Float[Array, "B T *n H"], by: Float[Array, " H"]) -> Float[Array, "B T *n H"]:
    """x times a weight for each entry of its last dimension."""
    return by * x


def _scale_forward(x: Array, by: Array):
    return by * x, (x, by)


def _scale_backward(saved: tuple[Array, Array], d_out: Array):
    x, by = saved
    return by * d_out, _summed(by, d_out, x)


scale.defvjp(_scale_forward, _scale_backward)


@jax.custom_vjp
def shift(x: Float[Array, "B T n H"], by: Float[Array, "n H"]) -> Float[Array, "B T n H"]:
    """x plus a weight for each entry of its last two dimensions."""
    return x + by


def _shift_backward(by: Array, d_out: Array):
    return d_out, _summed(by, d_out)


shift.defvjp(lambda x, by: (x + by, by), _shift_backward)


def _summed(weight: Array, *factors: Array) -> Array:
    """Sum of a product over all dimensions that the weight does not have, rounded once."""
    total, *rest = (factor.astype(jnp.float32) for factor in factors)
    for factor in rest:
        total *= factor
    total = total.sum(tuple(range(total.ndim - weight.ndim)))
    return rounded(total, weight.dtype)
