"""The mesh and the one table of sharding rules.

A run lives on a mesh with two Explicit axes: `fsdp` (parameters, optimizer state and the batch are
split over it) and `tp` (attention heads, MLP width and vocabulary). One device is a 1 x 1 mesh and
runs the same code. Explicit axes turn an accidental all-gather into an error at trace time.

Every array dimension has a *logical* name; `RULES` maps it to a mesh axis. Nothing else in the
package knows where a dimension lives.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from oel_jax.errors import UserError

RULES: dict[str | None, str | None] = {
    "batch": "fsdp",
    "embed": "fsdp",  # the model width of *parameters*; activations keep it whole
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    None: None,  # never split: layers, positions, head_dim, norms
}


def spec(*logical: str | None) -> P:
    """Mesh axes of an array whose dimensions have these logical names."""
    return P(*(RULES[name] for name in logical))


def make_mesh(fsdp: int = -1, tp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh ('fsdp', 'tp') over all devices; `fsdp=-1` takes what `tp` leaves.

    Raises:
      UserError: the product does not equal the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp == -1 and tp > 0 and count % tp == 0:
        fsdp = count // tp
    if fsdp < 1 or tp < 1 or fsdp * tp != count:
        raise UserError(
            f"config.mesh: fsdp={fsdp} x tp={tp} does not match the {count} device(s) of this "
            f"machine; set config.mesh.fsdp=-1 and config.mesh.tp to a divisor of {count}"
        )
    grid = np.asarray(devices).reshape(fsdp, tp)
    return Mesh(grid, ("fsdp", "tp"), axis_types=(AxisType.Explicit, AxisType.Explicit))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Move `x` to the layout its logical axes ask for; no-op where no mesh is set.

    Dimensions named 'embed' in a weight are gathered simply by passing None in their place.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(x)
    return jax.reshard(x, spec(*logical))


def out_spec(*logical: str | None) -> P | None:
    """`out_sharding=` for einsum and gather; None where no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(*logical)


def merge_rows(x: jax.Array) -> jax.Array:
    """[B, R, ...] -> [B * R, ...], rows still split over 'fsdp'."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jax.lax.reshape(x, shape, out_sharding=out_spec("batch", *[None] * (x.ndim - 2)))


def split_rows(x: jax.Array, size: int) -> jax.Array:
    """[B * size, ...] -> [B, size, ...]: what `merge_rows` did, undone."""
    shape = (x.shape[0] // size, size, *x.shape[1:])
    return jax.lax.reshape(x, shape, out_sharding=out_spec("batch", *[None] * x.ndim))


def shardings(mesh: Mesh, axes: Any) -> Any:
    """Tree of NamedSharding for a tree of logical-axis tuples."""
    return jax.tree.map(
        lambda logical: NamedSharding(mesh, spec(*logical)),
        axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of `tree` hold on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays [rows, ...] -> device arrays with rows split over 'fsdp'."""

    def put(array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, spec("batch", *[None] * (array.ndim - 1))))

    return jax.tree.map(put, tree)
