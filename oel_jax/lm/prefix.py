"""Prompt beginnings that are encoded once: finding them and encoding them."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import KeyValues, Params, forward
from oel_jax.parallel.mesh import put_batch

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
    """Keys and values of `ids` at positions 0.., [L, K, width, H]; those behind mean nothing.

    `block`: query block of the attention.
    """
    rows = mesh.shape["fsdp"]  # every device row encodes the same text: a batch it can split
    tokens = np.zeros((rows, width), np.int32)
    tokens[:, : len(ids)] = ids
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    segments = (positions < len(ids)).astype(np.int32)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, (tokens, positions, segments))
        return _encode(cfg, params, *batch, block=block)


@partial(jax.jit, static_argnames=("cfg", "block"))
def _encode(cfg, params: Params, tokens, positions, segments, *, block: int) -> KeyValues:
    _, cache = forward(cfg, params, tokens, positions, segments, block=block, with_cache=True)
    first = jax.P(None, None, "tp", None, None)
    return KeyValues(
        *(
            (leaf if jax.sharding.get_abstract_mesh().empty else jax.reshard(leaf, first))[:, 0]
            for leaf in cache
        )
    )
