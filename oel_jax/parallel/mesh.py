"""The mesh and the one table of sharding rules.

A run lives on a mesh with two Explicit axes: `fsdp` (parameters, optimizer state and the batch are
split over it) and `tp` (attention heads, MLP width and vocabulary). One device is a 1 x 1 mesh and
runs the same code. Explicit axes turn an accidental all-gather into an error at trace time.

Every array dimension has a *logical* name; `RULES` maps it to a mesh axis. Nothing else in the
package knows where a dimension lives.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from oel_jax.base.errors import UserError

RULES: dict[str | None, str | None] = {
    "batch": "fsdp",
    "embed": "fsdp",  # the model width of *parameters*; activations keep it whole
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "prefix": "fsdp",  # positions of a knowledge text's keys and values, where they rest
    None: None,  # never split: layers, positions, head_dim, norms
}


def spec(*logical: str | None) -> P:
    """Mesh axes of an array whose dimensions have these logical names.

    Raises:
      ValueError: two dimensions would be split over the same mesh axis.
    """
    axes = [RULES[name] for name in logical]
    split = [axis for axis in axes if axis is not None]
    if len(set(split)) < len(split):
        raise ValueError(
            f"an array with dimensions {logical} would be split twice over one mesh axis: {axes}"
        )
    return P(*axes)


def all_devices() -> list[jax.Device]:
    """All devices, those of one process side by side.

    Raises:
      UserError: JAX cannot start on the platform that it is to use.
    """
    # A plugin that fails is logged with its whole traceback; then JAX tries the next platform.
    logger, kept = logging.getLogger("jax._src.xla_bridge"), _Kept()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(kept)
    try:
        found = sorted(jax.devices(), key=lambda device: device.process_index)
    except Exception as error:  # RuntimeError, AssertionError, a plugin's own kinds of error
        asked = jax.config.jax_platforms
        named = f"JAX_PLATFORMS={asked}" if asked else "the accelerator of this machine"
        words = _first_line(error) or "; ".join(kept.words) or "it finds no such device"
        raise UserError(
            f"JAX cannot start on {named} ({words}). See that the driver works (nvidia-smi) and "
            "that JAX is installed for it (JAX='jax[cuda12]' bash launch/install.sh), or run on "
            "the CPU: JAX_PLATFORMS=cpu"
        ) from error
    finally:
        logger.removeHandler(kept)
        logger.propagate = before
    for words in kept.words:
        print(f"note: JAX: {words}", file=sys.stderr)
    return found


class _Kept(logging.Handler):
    """Keeps what is logged: of an exception its first line, otherwise the message."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        raised = record.exc_info[1] if record.exc_info else None
        self.words.append(_first_line(raised) if raised else record.getMessage())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def make_mesh(fsdp: int = -1, tp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh ('fsdp', 'tp') over all devices; `fsdp=-1` takes what `tp` leaves.

    Devices of one process are side by side, so that its part of the mesh is a mesh (`host_mesh`).

    Raises:
      UserError: the product does not equal the number of devices.
    """
    devices = all_devices() if devices is None else devices
    count = len(devices)
    if fsdp == -1 and tp > 0 and count % tp == 0:
        fsdp = count // tp
    if fsdp < 1 or tp < 1 or fsdp * tp != count:
        raise UserError(
            f"config.mesh: fsdp={fsdp} x tp={tp} does not match the {count} device(s) of this "
            f"machine; set config.mesh.fsdp=-1 and config.mesh.tp={_one_of(count)}"
        )
    grid = np.asarray(devices).reshape(fsdp, tp)
    return Mesh(grid, ("fsdp", "tp"), axis_types=(AxisType.Explicit, AxisType.Explicit))


def host_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that is in this process: the mesh itself where there is one process.

    Raises:
      UserError: heads are split over the devices of several processes.
    """
    mine, tp = jax.local_devices(), mesh.shape["tp"]
    if len(mine) == mesh.devices.size:
        return mesh
    if len(mine) % tp:
        raise UserError(
            f"config.mesh.tp={tp} does not divide the {len(mine)} device(s) of one process: each "
            f"process samples on its own devices; set it to one of {_divisors(len(mine))}"
        )
    return make_mesh(len(mine) // tp, tp, [d for d in mesh.devices.flat if d in mine])


def _one_of(number: int) -> str:
    *some, last = map(str, _divisors(number))
    return f"{', '.join(some)} or {last}" if some else last


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def gather_to_host(tree: Any, mesh: Mesh, host: Mesh) -> Any:
    """Arrays split over a mesh of several processes -> the same, whole, on each process's own part.

    Nothing is copied where there is one process.
    """
    if mesh is host:
        return tree
    hosts = mesh.devices.size // host.devices.size
    shape = (hosts, *host.devices.shape)
    kinds = (AxisType.Explicit,) * 3
    wide = Mesh(mesh.devices.reshape(shape), ("host", "fsdp", "tp"), axis_types=kinds)

    def own(leaf: jax.Array) -> jax.Array:
        here = leaf.sharding.spec
        spread = jax.device_put(leaf, NamedSharding(wide, here))
        parts = [shard.data for shard in spread.addressable_shards]
        return jax.make_array_from_single_device_arrays(
            leaf.shape, NamedSharding(host, here), parts
        )

    return jax.tree.map(own, tree)


def replicate(tree: Any) -> Any:
    """Weights that every device of 'fsdp' holds whole; the split over 'tp' stays.

    A sampler that reads them gathers nothing between tokens.
    """

    return jax.tree.map(lambda leaf: jax.device_put(leaf, whole_place(leaf.sharding)), tree)


def whole_place(place: NamedSharding) -> NamedSharding:
    """The same placement without the split over 'fsdp'."""
    return NamedSharding(place.mesh, P(*(a if a != "fsdp" else None for a in place.spec)))


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


def axis_size(axis: str) -> int:
    """Devices along a mesh axis; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def all_rows(x: jax.Array) -> jax.Array:
    """[r, ...] -> [fsdp * r, ...]: the rows of all devices along 'fsdp'; inside `shard_map`."""
    return x if axis_size("fsdp") == 1 else jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)


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
        where = NamedSharding(mesh, spec("batch", *[None] * (array.ndim - 1)))
        if where.is_fully_addressable:
            return jax.device_put(array, where)
        return jax.make_array_from_callback(array.shape, where, lambda part: array[part])

    return jax.tree.map(put, tree)
