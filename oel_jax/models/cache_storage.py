"""How keys and values are stored, and how pieces of a large store are read and written.

Nothing in the sampler may convert, copy or transpose a whole cache. Four habits of XLA do that if
they are let:

- On a CPU it has no bfloat16 slices, updates or scatters. It turns the whole array into float32
  around each of them, for every layer of every token. There, bfloat16 is stored as its 16 bits.
- On a GPU it gives an array the layout that its reader likes best. A matrix product of a block of
  keys then transposes the cache when a loop begins and when it ends. There, a block is held to the
  order it is stored in, and only the block is transposed.
- On a TPU it fills tiles of 128 numbers. An array whose last dimension does not fill them (heads of
  64) is kept in one order and written in another: all of it is transposed when a program begins and
  when it ends. There, such heads are one dimension together, padded to whole tiles.
- On a TPU matrix products of float32 read bfloat16, and it converts the cache for them and not the
  block. There, float32 is stored as its 32 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Shaped

# A cache and a bank of prefixes: [layers, slots or prefixes, positions, *stored_shape(...)].
Store = Shaped[Array, "L slots S *heads"]
Bank = Shaped[Array, "L M P *heads"]

_AS_BITS = {("cpu", "bfloat16"): "uint16", ("tpu", "float32"): "uint32"}
_NUMBERS = {bits: number for (_, number), bits in _AS_BITS.items()}
_TILE = 128
_GPU = ("gpu", "cuda", "rocm")


def platform_of(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """'cpu', 'gpu' or 'tpu'; '' where a mesh is only a shape, as in a plan by hand."""
    device = mesh.abstract_mesh.abstract_device
    return device.platform if device is not None else ""


def _platform() -> str:
    """What the program that is being traced will run on."""
    return platform_of(jax.sharding.get_abstract_mesh()) or jax.default_backend()


def stored_dtype(dtype: Any, platform: str) -> jnp.dtype:
    """The dtype in which keys and values of `dtype` are stored on a platform."""
    name = jnp.dtype(dtype).name
    return jnp.dtype(_AS_BITS.get((platform, name), name))


def _bitcast(values: Array, dtype: Any) -> Array:
    return values if values.dtype == dtype else jax.lax.bitcast_convert_type(values, dtype)


def to_stored(values: Array) -> Array:
    """Keys or values as they are stored on the platform of the program that is being traced."""
    return _in_order(_bitcast(values, stored_dtype(values.dtype, _platform())))


def from_stored(values: Array) -> Array:
    """The inverse of `to_stored`; best used on pieces, after they were cut out."""
    name = values.dtype.name
    return _bitcast(values, jnp.dtype(_NUMBERS.get(name, name)))


def stored_shape(kv_heads: int, head_dim: int, mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """The last dimensions of a store: heads and their width, or both as one padded dimension."""
    if platform_of(mesh) != "tpu" or head_dim % _TILE == 0:
        return kv_heads, head_dim
    devices = mesh.shape["tp"]
    width = kv_heads // devices * head_dim  # of one device
    return (devices * (width + -width % _TILE),)


def as_stored_in(store: Store, values: Array) -> Array:
    """New keys or values [..., K, H], of whatever dtype, as a store has them."""
    if store.ndim == 4:
        values = values.reshape(*values.shape[:-2], -1)
        padding = store.shape[3] - values.shape[-1]
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)])
    number = _NUMBERS.get(store.dtype.name, store.dtype.name)
    return _bitcast(values.astype(number), store.dtype)


def as_heads(stored: Array, rank: int, heads: tuple[int, int]) -> Array:
    """A piece of a store, with `rank` dimensions before its heads, as numbers [..., K, H]."""
    values = from_stored(stored)
    if values.ndim == rank + 2:
        return values
    kv_heads, head_dim = heads
    return values[..., : kv_heads * head_dim].reshape(*values.shape[:-1], kv_heads, head_dim)


def read_block(
    store: Store, start: tuple[Any, Any, Any], sizes: tuple[int, int, int], heads: tuple[int, int]
) -> Array:
    """A block of a store as numbers [*sizes, K, H].

    Args:
      start, sizes: where it begins in the first three dimensions, and how much of them it takes.
      heads: K and H, those of one device.
    """
    rest = store.shape[3:]
    block = jax.lax.dynamic_slice(store, (*start, *[0] * len(rest)), (*sizes, *rest))
    return as_heads(_in_order(block), 3, heads)


def _in_order(block: Array) -> Array:
    """A block in the layout it is stored in: who reads or writes it cannot change the store's."""
    if _platform() not in _GPU:
        return block
    return with_layout_constraint(block, Layout(major_to_minor=tuple(range(block.ndim))))
