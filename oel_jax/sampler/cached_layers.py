"""New tokens through all layers of the model, in front of what the slots hold.

A prefill reads pieces of prompts: row b belongs to some slot, and all rows read one shared prefix.
A decoding reads the newest tokens of all slots: row b is slot b, and each reads its own prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from oel_jax.models.cache_storage import as_stored_in
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues, Params, embed, run_block
from oel_jax.models.rope import cos_sin
from oel_jax.parallel.arrays import Leaf
from oel_jax.parallel.mesh import spec
from oel_jax.sampler.cached_attention import decode_attention, prefill_attention
from oel_jax.sampler.slots import BANK, CACHE, SlotState, cache_block, per_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reach:
    """Where B rows of T new tokens are, and how far they read.

    Attributes:
      column: of each token in its slot's cache; beyond the cache: it is not written.
      shared: how much of its prefix a row reads.
      blocks: key blocks of the cache to read.
      longest: positions of a prefix that any row of any device reads.
    """

    column: Int[Leaf, "B T"]
    shared: Int[Leaf, " B"]
    blocks: Int[Leaf, ""]
    longest: Int[Leaf, ""]

    def specs(self) -> Any:
        """The same tree with the mesh axes of each array."""
        names = {0: (), 1: ("batch",), 2: ("batch", None)}
        return type(self)(
            **{f.name: spec(*names[getattr(self, f.name).ndim]) for f in fields(self)}
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillReach(Reach):
    """`Reach` of rows that belong to slots.

    Attributes:
      slot: of each row, counted within its device.
      prefix: number of the shared prefix that all rows read.
    """

    slot: Int[Leaf, " B"]
    prefix: Int[Leaf, ""]


def reach_of(
    state: SlotState,
    column: Int[Array, "B T"],
    shared: Int[Array, " B"],
    busy: Bool[Array, "B T"],
) -> dict[str, Array]:
    """Fields of a `Reach`; `busy`: tokens whose result matters. Only these lengthen the reading."""
    block = cache_block(state.cache.keys.shape[2])
    return {
        "column": column,
        "shared": shared,
        "blocks": jnp.max(jnp.where(busy, column, 0)) // block + 1,
        "longest": jnp.max(jnp.where(busy[:, 0], shared, 0)),
    }


def prefill_layer(
    layer: Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    cache: KeyValues,
    bank: KeyValues,
    reach: PrefillReach,
) -> tuple[Float[Array, "B T N H"], KeyValues]:
    """One layer on one device: write the new keys and values into their slots, then attend."""
    cache = _write(layer, reach.slot, reach.column, k, v, cache)
    out = prefill_attention(
        q, cache, bank, layer, reach, kv_heads=k.shape[1], block=_blocks(cache, bank)
    )
    return out, cache


def decode_layer(
    layer: Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    cache: KeyValues,
    bank: KeyValues,
    reach: Reach,
) -> tuple[Float[Array, "B T N H"], KeyValues]:
    """One layer on one device, row b being slot b: write the keys and values, then attend."""
    cache = _write(layer, jnp.arange(q.shape[0]), reach.column, k, v, cache)
    out = decode_attention(
        q, cache, bank, layer, reach, kv_heads=k.shape[1], block=_blocks(cache, bank)
    )
    return out, cache


def _write(
    layer: Array, slot: Int[Array, " B"], column: Int[Array, "B T"], k: Array, v: Array, cache
) -> KeyValues:
    return KeyValues(
        *(
            old.at[layer, slot[:, None], column].set(
                as_stored_in(old, new.swapaxes(1, 2)), mode="drop"
            )
            for old, new in zip(cache, (k, v), strict=True)
        )
    )


def _blocks(cache: KeyValues, bank: KeyValues) -> tuple[int, int]:
    return cache_block(cache.keys.shape[2]), cache_block(bank.keys.shape[2])


def through_layers(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    state: SlotState,
    reach: Reach,
    layer_on_device: Callable[..., tuple[Array, KeyValues]],
) -> tuple[Float[Array, "B T D"], KeyValues]:
    """Tokens through all layers; returns (hidden before the final norm, cache).

    The cache travels in the scan's carry: as scanned input and output it would be copied whole.

    Args:
      layer_on_device: `prefill_layer` or `decode_layer`.
    """
    rope = cos_sin(cfg, reach.shared[:, None] + reach.column)
    queries = spec("batch", None, "heads", None)
    fresh = spec("batch", "kv_heads", None, None)
    caches, banks = KeyValues(CACHE, CACHE), KeyValues(BANK, BANK)
    on_devices = per_device(
        layer_on_device,
        (P(), queries, fresh, fresh, caches, banks, reach.specs()),
        (queries, caches),
    )

    def body(carry, layer):
        x, cache = carry
        weights, index = layer

        def attend(q: Array, k: Array, v: Array):
            return on_devices(index, q, k, v, cache, state.bank, reach)

        return run_block(cfg, weights, x, rope, attend), None

    layers = (params["layers"], jnp.arange(cfg.num_layers))
    return jax.lax.scan(body, (embed(params, tokens), state.cache), layers)[0]
