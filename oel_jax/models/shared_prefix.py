"""Prompt beginnings that are encoded once: finding them and encoding them."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax import P
from jaxtyping import Array, Float

from oel_jax.models.cache_storage import to_stored
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues, Params, forward
from oel_jax.parallel.mesh import parts, put_batch, spec

PREFIX = spec(None, "kv_heads", "prefix", None)  # an encoded prefix at rest, [L, K, P, H]
SHARED_FROM = 64  # tokens: what is shorter is cheaper to encode again than to read apart


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading ids two sequences share."""
    limit = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:limit]) != np.asarray(second[:limit]))
    return int(differ[0]) if differ.size else limit


def shared_start(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that all prompts begin with; the last one of every prompt stays its own."""
    length = min(common_prefix(prompts[0], other) for other in prompts)
    return tuple(prompts[0][: min([length, *(len(prompt) - 1 for prompt in prompts)])])


def padded_length(length: int, least: int = 16) -> int:
    """Padded length of tokens: `least` (a power of two), then powers of two and the halves between.

    Few shapes, hence few compilations, and at most a third of padding.
    """
    size = least
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def encode_prefix(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh,
    params: Params,
    ids: Sequence[int],
    *,
    width: int,
    block: int = 256,
) -> KeyValues:
    """Keys and values of `ids` at positions 0.., [L, K, P, H]; those behind mean nothing.

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
        size = side.shape[2] // parts("fsdp")
        first = jax.lax.axis_index("fsdp") * size
        return jax.lax.dynamic_slice_in_dim(side[0], first, size, axis=1)

    rows, mine = spec("batch", "kv_heads", None, None), P(*PREFIX[1:])
    return jax.shard_map(local, in_specs=rows, out_specs=mine, check_vma=False)(side)
