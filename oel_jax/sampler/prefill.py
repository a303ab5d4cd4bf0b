"""Prompts into slots: the keys and values of prompt tokens, without logits."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Int

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params
from oel_jax.parallel.arrays import Leaf
from oel_jax.parallel.mesh import spec
from oel_jax.sampler.cached_layers import PrefillReach, prefill_layer, reach_of, through_layers
from oel_jax.sampler.slots import SlotState, per_device


@jax.tree_util.register_dataclass
@dataclass
class Piece:
    """A piece of R prompts on its way into their slots, right-padded to T.

    Row r is on the device of its slot, and `slot` counts within that device; a slot beyond the
    device's last marks a padding row. All rows read the same shared prefix, number `prefix`.
    """

    tokens: Int[Leaf, "R T"]
    length: Int[Leaf, " R"]  # how many of the tokens are real
    column: Int[Leaf, " R"]  # where the first of them goes
    slot: Int[Leaf, " R"]
    shared: Int[Leaf, " R"]
    prefix: Int[Leaf, ""]


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
@jax.named_scope("prefill")
def extend(cfg: ModelConfig, params: Params, state: SlotState, new: Piece) -> SlotState:
    """Write the keys and values of a piece of some prompts into their slots; `state` is donated."""
    index = jnp.broadcast_to(jnp.arange(new.tokens.shape[1]), new.tokens.shape)
    real = index < new.length[:, None]
    # Padding is written nowhere: its column is beyond the cache.
    column = jnp.where(real, new.column[:, None] + index, state.cache.keys.shape[2])
    reach = PrefillReach(
        **reach_of(state, column, new.shared, real), slot=new.slot, prefix=new.prefix
    )
    _, cache = through_layers(cfg, params, new.tokens, state, reach, prefill_layer)
    rows, wide = spec("batch"), spec("batch", None)

    def remember(ids, slot, column, tokens):
        return ids.at[slot[:, None], column].set(tokens, mode="drop")

    write = per_device(remember, (wide, rows, wide, wide), wide)
    return replace(state, cache=cache, ids=write(state.ids, new.slot, column, new.tokens))
