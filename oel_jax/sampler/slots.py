"""Device side of the sampler: the slot state, and the jitted calls that fill and decode slots.

A slot owns one row of the key/value cache and of every small array in `SlotState`; nothing a slot
computes depends on another slot. `extend` writes the cache of prompt tokens (all but the last, in
one or several pieces, behind what the slot already holds); `decode` feeds the last one, so that
logits are made and sampled in one place only.

Slots are split over 'fsdp' and a slot is filled by a row of its own device, so neither call moves
a slot's keys or values between devices. What many slots share (a knowledge text) lies once in the
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
from oel_jax.models.decoder import KeyValues, Params, embed, head, rms_norm, run_block
from oel_jax.models.rope import cos_sin
from oel_jax.models.shared_prefix import PREFIX
from oel_jax.parallel.mesh import all_rows, merge_rows, parts, spec, split_rows
from oel_jax.parallel.vocabulary import spread_over_all
from oel_jax.sampler.cached_attention import cached_attention
from oel_jax.sampler.draft import kept, propose
from oel_jax.sampler.sampling import Sampling, draw


@jax.tree_util.register_dataclass
@dataclass
class SlotState:
    """All slots; B slots, S cache positions, M shared prefixes of P positions, R response tokens.

    A slot reads the first `shared` positions of one prefix and then its own cache: slot b of a
    device reads prefix b % M. The rotary position of its next token is shared + column.

    Attributes:
      cache: keys and values, [L, B, S, K, H]; columns < `column` are written. Here S stands
        before K, so that one token of one slot is a contiguous piece: otherwise the compiler copies
        the whole cache to write it.
      bank: the shared prefixes, [L, M, P, K, H], P split over 'fsdp'; P may be 0.
      token: the token to be processed next.
      column: its place in the slot's cache.
      shared: how much of the prefix the slot reads.
      key: raw threefry key of the request.
      count: response tokens generated so far.
      budget: response tokens allowed.
      done: nothing to do (free, or finished and not yet fetched).
      response: generated ids; entries >= count are stale.
      log_prob: their log-probabilities at the sampling temperature.
      ids: the tokens at the columns of the slot's cache, for drafts; width 0 without them.
      drafts: tokens drafted and drafted tokens kept, since the state was made.
    """

    cache: KeyValues
    bank: KeyValues
    token: Int[Array, " B"]
    column: Int[Array, " B"]
    shared: Int[Array, " B"]
    key: UInt32[Array, "B 2"]
    count: Int[Array, " B"]
    budget: Int[Array, " B"]
    done: Bool[Array, " B"]
    response: Int[Array, "B R"]
    log_prob: Float[Array, "B R"]
    ids: Int[Array, "B S"]
    drafts: Int[Array, "2"]


@jax.tree_util.register_dataclass
@dataclass
class Piece:
    """A piece of R prompts on its way into their slots, right-padded to T.

    Row r lies on the device of its slot, and `slot` counts within that device; a slot beyond the
    device's last marks a padding row. All rows read the same shared prefix, number `group`.
    """

    tokens: Int[Array, "R T"]
    length: Int[Array, " R"]  # how many of the tokens are real
    column: Int[Array, " R"]  # where the first of them goes
    slot: Int[Array, " R"]
    shared: Int[Array, " R"]
    group: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass
class Admission:
    """Requests whose prompts are in place, ready to decode; padding rows as in `Piece`."""

    slot: Int[Array, " R"]
    last: Int[Array, " R"]  # last prompt token
    column: Int[Array, " R"]
    shared: Int[Array, " R"]
    key: UInt32[Array, "R 2"]
    budget: Int[Array, " R"]


# Heads are split over 'tp', whether or not their width is a separate dimension (`stored_shape`).
_CACHE = P(None, "fsdp", None, "tp")
_BANK = spec(None, None, "prefix", "kv_heads")


def cache_block(length: int) -> int:
    """Cache positions that attention reads at a time; every cache length is a multiple of it."""
    return 64 if length <= 2048 else 256


def abstract_state(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh,
    slots: int,
    length: int,
    response: int,
    dtype,
    *,
    groups: int = 1,
    shared: int = 0,
    drafting: bool = False,
) -> SlotState:
    """Shapes and shardings of all slots; cache lengths are rounded up to whole blocks."""
    length += -length % cache_block(length)
    devices = mesh.shape["fsdp"]
    shared += -shared % (devices * cache_block(-(-shared // devices)))
    heads = stored_shape(cfg.num_kv_heads, cfg.head_dim, mesh)
    stored = stored_dtype(dtype, platform_of(mesh))
    rows, wide = spec("batch"), spec("batch", None)

    def array(where: P, kind, *shape: int) -> jax.ShapeDtypeStruct:
        place = jax.sharding.NamedSharding(mesh, where)
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    cache = array(_CACHE, stored, cfg.num_layers, slots, length, *heads)
    bank = array(_BANK, stored, cfg.num_layers, groups, shared, *heads)
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
        done=array(rows, jnp.bool_, slots),
        response=array(wide, jnp.int32, slots, response),
        log_prob=array(wide, jnp.float32, slots, response),
        ids=array(wide, jnp.int32, slots, length if drafting else 0),
        drafts=array(P(), jnp.int32, 2),
    )


def empty_state(*sizes, **more) -> SlotState:
    """All slots free, created in their sharded places; arguments as of `abstract_state`."""
    shapes = abstract_state(*sizes, **more)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)
    return replace(state, done=jnp.ones_like(state.done))


def _per_device(function, in_specs, out_specs):
    """`function` on the local pieces of each device of the mesh in context."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@dataclass(frozen=True)
class _Reach:
    """Which rows of the cache a call works on, and how far it reads."""

    slot: Int[Array, " B"] | None  # None: row b is slot b
    column: Int[Array, "B T"]
    shared: Int[Array, " B"]
    group: Int[Array, ""] | None  # None: row b reads prefix b % M
    blocks: Int[Array, ""]
    longest: Int[Array, ""]  # of the shared prefixes


def _reach(state: SlotState, slot, column, shared, group, busy) -> _Reach:
    """`busy` [B, T]: queries whose result matters; the others do not lengthen the reading."""
    block = cache_block(state.cache.keys.shape[2])
    longest = jnp.max(jnp.where(busy, column, 0))
    return _Reach(
        slot=slot,
        column=column,
        shared=shared,
        group=group,
        blocks=longest // block + 1,
        longest=jnp.max(jnp.where(busy[:, 0], shared, 0)),
    )


def _write_and_attend(reach_slot, reach_group, layer, q, k, v, cache, bank, rows, far):
    """One layer on one device: put new keys and values into the cache, then attend.

    q [B, T, N, H]; k, v [B, K, T, H]; `rows` = (slot, column, shared); `far` = (blocks, longest).
    """
    slot, column, shared = rows
    row = (jnp.arange(q.shape[0]) if reach_slot is None else slot)[:, None]
    updated = KeyValues(
        *(
            old.at[layer, row, column].set(as_stored_in(old, new.swapaxes(1, 2)), mode="drop")
            for old, new in zip(cache, (k, v), strict=True)
        )
    )
    out = cached_attention(
        q,
        updated,
        bank,
        layer,
        column,
        shared,
        kv_heads=k.shape[1],
        slot=None if reach_slot is None else slot,
        group=reach_group,
        blocks=far[0],
        longest=far[1],
        block=(cache_block(cache.keys.shape[2]), cache_block(bank.keys.shape[2])),
    )
    return out, updated


def _through_layers(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], state: SlotState, reach: _Reach
):
    """Tokens through all layers; returns (hidden [B, T, D] before the final norm, cache).

    The cache travels in the scan's carry: as scanned input and output it would be copied whole.
    """
    rope = cos_sin(cfg, reach.shared[:, None] + reach.column)
    slot = jnp.zeros_like(reach.shared) if reach.slot is None else reach.slot
    group = jnp.zeros((), jnp.int32) if reach.group is None else reach.group
    queries, fresh = P("fsdp", None, "tp", None), P("fsdp", "tp", None, None)
    line, caches, banks = P("fsdp"), KeyValues(_CACHE, _CACHE), KeyValues(_BANK, _BANK)

    def local(layer, q, k, v, cache, bank, rows, group, far):
        chosen = None if reach.group is None else group
        return _write_and_attend(reach.slot, chosen, layer, q, k, v, cache, bank, rows, far)

    on_devices = _per_device(
        local,
        (P(), queries, fresh, fresh, caches, banks, (line, P("fsdp", None), line), P(), (P(), P())),
        (queries, caches),
    )

    def body(carry, layer):
        x, cache = carry
        weights, index = layer

        def attend(q: Array, k: Array, v: Array):
            rows = (slot, reach.column, reach.shared)
            far = (reach.blocks, reach.longest)
            return on_devices(index, q, k, v, cache, state.bank, rows, group, far)

        return run_block(cfg, weights, x, rope, attend), None

    layers = (params["layers"], jnp.arange(cfg.num_layers))
    return jax.lax.scan(body, (embed(params, tokens), state.cache), layers)[0]


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def extend(cfg: ModelConfig, params: Params, state: SlotState, new: Piece) -> SlotState:
    """Write the keys and values of a piece of some prompts into their slots; `state` is donated."""
    index = jnp.broadcast_to(jnp.arange(new.tokens.shape[1]), new.tokens.shape)
    real = index < new.length[:, None]
    # Padding is written nowhere: its column lies behind the cache.
    column = jnp.where(real, new.column[:, None] + index, state.cache.keys.shape[2])
    reach = _reach(state, new.slot, column, new.shared, new.group, real)
    _, cache = _through_layers(cfg, params, new.tokens, state, reach)
    rows, wide = P("fsdp"), P("fsdp", None)

    def remember(ids, slot, column, tokens):
        return ids.at[slot[:, None], column].set(tokens, mode="drop")

    write = _per_device(remember, (wide, rows, wide, wide), wide)
    return replace(state, cache=cache, ids=write(state.ids, new.slot, column, new.tokens))


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
        "done": zeros.astype(bool),
    }
    targets = {name: getattr(state, name) for name in values}
    specs = {name: spec("batch", *[None] * (leaf.ndim - 1)) for name, leaf in values.items()}

    def local(slot, targets, values, ids):
        targets = jax.tree.map(lambda t, v: t.at[slot].set(v, mode="drop"), targets, values)
        return targets, ids.at[slot, values["column"]].set(values["token"], mode="drop")

    wide = P("fsdp", None)
    placed = _per_device(local, (P("fsdp"), specs, specs, wide), (specs, wide))
    started, ids = placed(new.slot, targets, values, state.ids)
    return replace(state, ids=ids, **started)


def _copy_row(row: Array, source: Array, target: Array, width: int, leaf: Array) -> Array:
    """[:, source[row], :width] to target[row], which may lie outside: then nothing changes."""
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

    rows, places = P("fsdp"), (KeyValues(_CACHE, _CACHE), P("fsdp", None))
    copied = _per_device(local, (*places, rows, rows), places)
    cache, ids = copied(state.cache, state.ids, source, target)
    return replace(state, cache=cache, ids=ids)


@partial(jax.jit, donate_argnames=("state",))
def put_prefix(state: SlotState, group: Int[Array, ""], prefix: KeyValues) -> SlotState:
    """Put an encoded prefix, [L, K, P', H] with P' <= P, into the bank; `state` is donated."""

    def put(bank: Array, new: Array, group: Array) -> Array:
        def one(layer: Array, bank: Array) -> Array:
            # Shorter than the bank, a text is cut at other positions: one layer is whole at a time.
            whole = all_rows(from_stored(new[layer]).swapaxes(0, 1))
            whole = as_stored_in(bank, whole)
            size = bank.shape[2]
            first = 0 if parts("fsdp") == 1 else jax.lax.axis_index("fsdp") * size
            place = first + jnp.arange(size)
            mine = whole.at[place].get(mode="fill", fill_value=0)
            start = (layer, group, *[0] * (bank.ndim - 2))
            return jax.lax.dynamic_update_slice(bank, mine[None, None], start)

        return jax.lax.fori_loop(0, new.shape[0], one, bank)

    banks, fresh = (KeyValues(where, where) for where in (_BANK, PREFIX))
    local = _per_device(
        lambda bank, new, group: jax.tree.map(partial(put, group=group), bank, new),
        (banks, fresh, P()),
        banks,
    )
    return replace(state, bank=local(state.bank, prefix, group))


@partial(
    jax.jit,
    static_argnames=("cfg", "how", "limit", "stop_ids", "draft"),
    donate_argnames=("state",),
)
def decode(
    cfg: ModelConfig,
    params: Params,
    state: SlotState,
    steps: Int[Array, ""],
    *,
    how: Sampling,
    limit: int,
    stop_ids: tuple[int, ...],
    draft: int = 0,
) -> SlotState:
    """Read the newest token of every busy slot `steps` times; stops early when all are done.

    A pass gives a slot one token, or up to 1 + `draft` (`lm/draft.py`). `limit`: ids >= limit are
    never sampled. `state` is donated: its cache is updated in place.
    """

    matrix = spread_over_all(head(cfg, params))  # once, not at every step
    look = _per_device(partial(propose, size=draft), (P("fsdp", None), P("fsdp")), P("fsdp", None))

    def body(carry):
        step, state = carry
        busy = ~state.done
        guesses = look(state.ids, state.column) if draft else state.ids[:, :0]
        tokens = jnp.concatenate([state.token[:, None], jnp.maximum(guesses, 0)], axis=1)
        ahead = jnp.arange(1 + draft)[None, :]
        column = state.column[:, None] + ahead
        # A draft may reach behind the cache: nothing of it is written there, or kept.
        inside = busy[:, None] & (column < state.cache.keys.shape[2])
        reach = _reach(state, None, column, state.shared, None, inside)
        x, cache = _through_layers(cfg, params, tokens, state, reach)
        hidden = merge_rows(rms_norm(x, params["final_norm"], cfg.rms_norm_eps))
        keys = merge_rows(jnp.broadcast_to(state.key[:, None], (*tokens.shape, 2)))
        counts = merge_rows(state.count[:, None] + ahead)
        drawn = draw(how, limit, hidden, matrix, cfg.vocab_size, keys, counts)
        sampled, log_prob = (split_rows(x, 1 + draft) for x in drawn)
        taken = jnp.where(busy, kept(guesses, sampled, stop_ids, state.budget - state.count), 0)
        return step + 1, _take(state, cache, sampled, log_prob, taken, guesses, stop_ids)

    def more(carry):
        return (carry[0] < steps) & ~jnp.all(carry[1].done)

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]


def _take(
    state: SlotState, cache: KeyValues, sampled, log_prob, taken, guesses, stop_ids
) -> SlotState:
    """The first taken[b] of the sampled tokens [B, T] belong to slot b now."""

    rows, wide = P("fsdp"), P("fsdp", None)

    def put(old: Array, new: Array, first: Array, taken: Array) -> Array:
        index = jnp.arange(old.shape[1])[None, :] - first[:, None]
        here = (index >= 0) & (index < taken[:, None])
        index = jnp.clip(index, 0, new.shape[1] - 1)
        return jnp.where(here, jnp.take_along_axis(new, index, axis=1), old)

    def into(old: Array, new: Array, first: Array) -> Array:
        return _per_device(put, (wide, wide, rows, rows), wide)(old, new, first, taken)

    places = jnp.arange(sampled.shape[1])[None, :]
    last = jnp.where(places == taken[:, None] - 1, sampled, 0).sum(axis=1)
    token = jnp.where(taken > 0, last, state.token)
    stopped = jnp.zeros_like(state.done)
    for stop in stop_ids:
        stopped |= token == stop
    count = state.count + taken
    ended = (taken > 0) & (stopped | (count >= state.budget))
    proposed = jnp.where((taken > 0)[:, None], guesses >= 0, False)
    drafts = jnp.stack([proposed.sum(), (taken - (taken > 0)).sum()])
    return replace(
        state,
        cache=cache,
        token=token,
        column=state.column + taken,
        count=count,
        done=state.done | ended,
        response=into(state.response, sampled, state.count),
        log_prob=into(state.log_prob, log_prob, state.count),
        ids=into(state.ids, sampled, state.column + 1) if state.ids.shape[1] else state.ids,
        drafts=state.drafts + drafts.astype(jnp.int32),
    )
