"""Parts of the consolidation that wait in host memory while they are not needed.

`consolidate.offload` names them: 'optimizer' (both moments; they come to the device in the update
only), 'masters' (the student's float32 weights; away during rollouts, which read a bfloat16 copy)
and 'teacher' (its weights; away during rollouts). It costs transfers and changes no result.
"""

from typing import Any

import jax
from jaxtyping import Array

from oel_jax.base.errors import UserError

HOST = "pinned_host"  # the memory kind, as JAX names it


def offloaded_parts(section: Any) -> frozenset[str]:
    """What `config.consolidate` wants in host memory."""
    return frozenset(section.offload)


def check_offload(section: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuse what the platform cannot do, before a model is loaded.

    Raises:
      UserError: the devices of the mesh cannot address pinned host memory.
    """
    device = mesh.devices.flat[0]
    # Devices of another process cannot be asked, but they are of the same kind.
    local = [other for other in mesh.devices.flat if other in jax.local_devices()]
    kinds = {memory.kind for memory in (local or [device])[0].addressable_memories()}
    if offloaded_parts(section) and HOST not in kinds:
        raise UserError(
            f"config.consolidate.offload is {section.offload!r}, but {device.device_kind} devices "
            f"have no memory of kind {HOST!r} (only {', '.join(sorted(kinds))}); set it to ()"
        )


def to_host(tree: Any) -> Any:
    """The same arrays, split the same way, in host memory."""
    return _put(tree, HOST)


def to_device(tree: Any) -> Any:
    """The same arrays in device memory."""
    return _put(tree, "device")


def delete_on_host(tree: Any) -> None:
    """Free what of these arrays is in host memory, whoever holds them; nobody may read it again."""
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_deleted() and leaf.sharding.memory_kind == HOST:
            leaf.delete()


def _put(tree: Any, kind: str) -> Any:
    def put(leaf: jax.Array) -> jax.Array:
        if leaf.sharding.memory_kind == kind:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


def is_on_host(leaf: Array) -> bool:
    """Inside jit: whether it is in host memory."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def on_device(leaf: Array) -> Array:
    """Inside jit: in device memory, whichever it is in."""
    return jax.device_put(leaf, jax.memory.Space.Device) if is_on_host(leaf) else leaf


def back(new: Array, old: Array) -> Array:
    """Inside jit: `new` in the memory that `old` is in."""
    return jax.device_put(new, jax.memory.Space.Host) if is_on_host(old) else new
