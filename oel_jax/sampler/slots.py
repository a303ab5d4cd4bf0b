"""Device side of the sampler: the state of the slots, and what changes it without the model.

A slot owns one row of the key/value cache and of every small array in `SlotState`; nothing a slot
computes depends on another slot. `prefill.extend` writes the cache of prompt tokens (all but the
last, in one or several pieces, after what the slot already holds); `decode.decode` feeds the last
one, so that logits are made and sampled in one place only.

Slots are split over 'fsdp' and a slot is filled by a row of its own device, so neither call moves
a slot's keys or values between devices. What many slots share (a knowledge text) is once in the
bank, its positions split over 'fsdp' too (`cached_attention.py` tells how they are read).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int, UInt32

from oel_jax.models.cache_storage import (
    as_stored_in,
    from_stored,
    platform_of,
    stored_dtype,
    stored_shape,
)
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues
from oel_jax.models.shared_prefix import PREFIX
from oel_jax.parallel.arrays import Leaf
from oel_jax.parallel.mesh import all_rows, axis_size, spec
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.sampling import RowSampling


@jax.tree_util.register_dataclass
@dataclass
class SlotState:
    """All slots; B slots, S cache positions, M shared prefixes of P positions, R response tokens,
    E stop ids.

    A slot reads the first `shared` positions of one prefix and then its own cache: slot b of a
    device reads prefix b % M. The rotary position of its next token is shared + column.

    Attributes:
      cache: keys and values, [L, B, S, K, H]; columns < `column` are written. Here S is
        before K, so that one token of one slot is a contiguous piece: otherwise the compiler copies
        the whole cache to write it.
      bank: the shared prefixes, [L, M, P, K, H], P split over 'fsdp'; P may be 0.
      token: the token to be processed next.
      column: its place in the slot's cache.
      shared: how much of the prefix the slot reads.
      key: raw threefry key of the request.
      count: response tokens generated so far.
      budget: response tokens allowed.
      sampling: how each slot's tokens are chosen.
      stops: ids that end its response; -1 fills up.
      done: nothing to do (free, or finished and not yet fetched).
      response: generated ids; entries >= count are stale.
      log_prob: their log-probabilities at the sampling temperature.
      ids: the tokens at the columns of the slot's cache, for drafts; width 0 without them.
      drafts: tokens drafted and drafted tokens kept, since the state was made.
    """

    cache: KeyValues
    bank: KeyValues
    token: Int[Leaf, " B"]
    column: Int[Leaf, " B"]
    shared: Int[Leaf, " B"]
    key: UInt32[Leaf, "B 2"]
    count: Int[Leaf, " B"]
    budget: Int[Leaf, " B"]
    sampling: RowSampling
    stops: Int[Leaf, "B E"]
    done: Bool[Leaf, " B"]
    response: Int[Leaf, "B R"]
    log_prob: Float[Leaf, "B R"]
    ids: Int[Leaf, "B S"]
    drafts: Int[Leaf, "2"]


@jax.tree_util.register_dataclass
@dataclass
class Admission:
    """Requests whose prompts are in place, ready to decode.

    Row r is on the device of its slot, and `slot` counts within that device; a slot beyond the
    device's last marks a padding row.
    """

    slot: Int[Leaf, " R"]
    last: Int[Leaf, " R"]  # last prompt token
    column: Int[Leaf, " R"]
    shared: Int[Leaf, " R"]
    key: UInt32[Leaf, "R 2"]
    budget: Int[Leaf, " R"]
    sampling: RowSampling
    stops: Int[Leaf, "R E"]


# Heads are split over 'tp', whether or not their width is a separate dimension (`stored_shape`).
CACHE = spec(None, "batch", None, "kv_heads")
BANK = spec(None, None, "prefix", "kv_heads")


def cache_block(length: int) -> int:
    """Cache positions that attention reads at a time; every cache length is a multiple of it."""
    return 64 if length <= 2048 else 256


def abstract_state(cfg: ModelConfig, mesh: jax.sharding.Mesh, config: SamplerConfig) -> SlotState:
    """Shapes and shardings of all slots; cache lengths are rounded up to whole blocks."""
    slots, devices = config.slots, mesh.shape["fsdp"]
    length, shared = config.length, config.longest_prefix
    length += -length % cache_block(length)
    shared += -shared % (devices * cache_block(-(-shared // devices)))
    heads = stored_shape(cfg.num_kv_heads, cfg.head_dim, mesh)
    stored = stored_dtype(config.dtype, platform_of(mesh))
    rows, wide = spec("batch"), spec("batch", None)

    def array(where: P, kind, *shape: int) -> jax.ShapeDtypeStruct:
        place = jax.sharding.NamedSharding(mesh, where)
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    cache = array(CACHE, stored, cfg.num_layers, slots, length, *heads)
    bank = array(BANK, stored, cfg.num_layers, config.prefixes, shared, *heads)
    number = array(rows, jnp.int32, slots)
    return SlotState(
        cache=KeyValues(cache, cache),
        bank=KeyValues(bank, bank),
        token=number,
        column=number,
        shared=number,
        key=array(wide, jnp.uint32, slots, 2),
        count=number,
        budget=number,
        sampling=RowSampling(
            array(rows, jnp.float32, slots), number, array(rows, jnp.float32, slots)
        ),
        stops=array(wide, jnp.int32, slots, config.stops),
        done=array(rows, jnp.bool_, slots),
        response=array(wide, jnp.int32, slots, config.response),
        log_prob=array(wide, jnp.float32, slots, config.response),
        ids=array(wide, jnp.int32, slots, length if config.draft else 0),
        drafts=array(P(), jnp.int32, 2),
    )


def empty_state(cfg: ModelConfig, mesh: jax.sharding.Mesh, config: SamplerConfig) -> SlotState:
    """All slots free, created in their sharded places."""
    shapes = abstract_state(cfg, mesh, config)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)
    return replace(state, done=jnp.ones_like(state.done))


def per_device(function, in_specs, out_specs):
    """`function` on the local pieces of each device of the mesh in context."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.jit, donate_argnames=("state",))
def admit(state: SlotState, new: Admission) -> SlotState:
    """Start decoding in slots whose prompts are in place; `state` is donated."""
    zeros = jnp.zeros_like(new.slot)
    values = {
        "token": new.last,
        "column": new.column,
        "shared": new.shared,
        "key": new.key,
        "count": zeros,
        "budget": new.budget,
        "sampling": new.sampling,
        "stops": new.stops,
        "done": zeros.astype(bool),
    }
    targets = {name: getattr(state, name) for name in values}
    specs = jax.tree.map(lambda leaf: spec("batch", *[None] * (leaf.ndim - 1)), values)

    def local(slot, targets, values, ids):
        targets = jax.tree.map(lambda t, v: t.at[slot].set(v, mode="drop"), targets, values)
        return targets, ids.at[slot, values["column"]].set(values["token"], mode="drop")

    rows, wide = spec("batch"), spec("batch", None)
    placed = per_device(local, (rows, specs, specs, wide), (specs, wide))
    started, ids = placed(new.slot, targets, values, state.ids)
    return replace(state, ids=ids, **started)


@partial(jax.jit, donate_argnames=("state",))
def release(state: SlotState, slots: Bool[Array, " B"]) -> SlotState:
    """Stop decoding in the marked slots; `state` is donated."""
    return replace(state, done=state.done | slots)


@partial(jax.jit, static_argnames=("width",))
def read_responses(
    state: SlotState, first: Int[Array, " B"], *, width: int
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """Generated ids first .. first + width of each slot, and their log-probabilities.

    Where `first` is within `width` of the end of the responses, the window begins earlier.
    """

    def window(side: Array, first: Array) -> Array:
        cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))
        return cut(side, first)

    rows, wide = spec("batch"), spec("batch", None)
    read = per_device(window, (wide, rows), wide)
    return read(state.response, first), read(state.log_prob, first)


def _copy_row(row: Array, source: Array, target: Array, width: int, leaf: Array) -> Array:
    """[:, source[row], :width] to target[row], which may be outside: then nothing changes."""
    rest = [0] * (leaf.ndim - 3)
    size = (leaf.shape[0], 1, min(width, leaf.shape[2]), *leaf.shape[3:])
    places = [(0, jnp.minimum(slot[row], leaf.shape[1] - 1), 0, *rest) for slot in (source, target)]
    new, old = (jax.lax.dynamic_slice(leaf, place, size) for place in places)
    new = jnp.where(target[row] < leaf.shape[1], new, old)
    return jax.lax.dynamic_update_slice(leaf, new, places[1])


@partial(jax.jit, static_argnames=("width",), donate_argnames=("state",))
def copy_slots(
    state: SlotState, source: Int[Array, " R"], target: Int[Array, " R"], *, width: int
) -> SlotState:
    """Copy the first `width` cache columns from slot to slot of one device; `state` is donated."""

    def local(cache, ids, source, target):
        # One row after the other, as slices: a gather of all would transpose the cache on a TPU.
        def copy(row: Array, leaves: Any) -> Any:
            return jax.tree.map(partial(_copy_row, row, source, target, width), leaves)

        copied = jax.lax.fori_loop(0, source.shape[0], copy, (cache, ids[None]))
        return copied[0], copied[1][0]

    rows, places = spec("batch"), (KeyValues(CACHE, CACHE), spec("batch", None))
    copied = per_device(local, (*places, rows, rows), places)
    cache, ids = copied(state.cache, state.ids, source, target)
    return replace(state, cache=cache, ids=ids)


@partial(jax.jit, donate_argnames=("state",))
def put_prefix(state: SlotState, number: Int[Array, ""], prefix: KeyValues) -> SlotState:
    """Put an encoded prefix, [L, K, P', H] with P' <= P, into the bank; `state` is donated."""

    def put(bank: Array, new: Array, number: Array) -> Array:
        def one(layer: Array, bank: Array) -> Array:
            # Shorter than the bank, a text is cut at other positions: one layer is whole at a time.
            whole = all_rows(from_stored(new[layer]).swapaxes(0, 1))
            whole = as_stored_in(bank, whole)
            size = bank.shape[2]
            first = 0 if axis_size("fsdp") == 1 else jax.lax.axis_index("fsdp") * size
            place = first + jnp.arange(size)
            mine = whole.at[place].get(mode="fill", fill_value=0)
            start = (layer, number, *[0] * (bank.ndim - 2))
            return jax.lax.dynamic_update_slice(bank, mine[None, None], start)

        return jax.lax.fori_loop(0, new.shape[0], one, bank)

    banks, fresh = (KeyValues(where, where) for where in (BANK, PREFIX))
    local = per_device(
        lambda bank, new, number: jax.tree.map(partial(put, number=number), bank, new),
        (banks, fresh, P()),
        banks,
    )
    return replace(state, bank=local(state.bank, prefix, number))
