"""Encodes a prompt beginning once, for all that read it."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax import P
from jaxtyping import Array, Float

from oel_jax.models.cache_storage import to_stored
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues, Params, forward
from oel_jax.parallel.mesh import axis_size, put_batch, spec

PREFIX = spec(None, "kv_heads", "prefix", None)  # an encoded prefix at rest, [L, K, P, H]


def encode_prefix(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh,
    params: Params,
    ids: Sequence[int],
    *,
    width: int,
    block: int = 256,
) -> KeyValues:
    """Keys and values of `ids` at positions 0.., [L, K, P, H]; later ones mean nothing.

    P is `width` or, so that 'fsdp' divides it, the next that fits: positions rest split over
    'fsdp', see `PREFIX`. `block`: query block of the attention.
    """
    rows = mesh.shape["fsdp"]  # every device row encodes the same text: a batch it can split
    width += -width % rows
    tokens = np.zeros((rows, width), np.int32)
    tokens[:, : len(ids)] = ids
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    segments = (positions < len(ids)).astype(np.int32)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, (tokens, positions, segments))
        return encode_rows(cfg, params, *batch, block=block)


@partial(jax.jit, static_argnames=("cfg", "block"))
def encode_rows(cfg, params: Params, tokens, positions, segments, *, block: int) -> KeyValues:
    """Keys and values of the text that is in every row, [L, K, T, H], as they are stored."""
    return forward(cfg, params, tokens, positions, segments, block=block, keep=_own_positions)[1]


def _own_positions(side: Float[Array, "B K T H"]) -> Float[Array, "K T H"]:
    """Of rows that are all the same, each device keeps its part of the positions of the one it has.

    They are kept as they are stored, so that collecting the layers converts nothing.
    """
    side = to_stored(side)
    if jax.sharding.get_abstract_mesh().empty:
        return side[0]

    def local(side: Array) -> Array:
        size = side.shape[2] // axis_size("fsdp")
        first = jax.lax.axis_index("fsdp") * size
        return jax.lax.dynamic_slice_in_dim(side[0], first, size, axis=1)

    rows, mine = spec("batch", "kv_heads", None, None), P(*PREFIX[1:])
    return jax.shard_map(local, in_specs=rows, out_specs=mine, check_vma=False)(side)
