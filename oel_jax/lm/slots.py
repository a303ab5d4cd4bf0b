"""Device side of the sampler: the slot state, jitted prefill and multi-token decode.

A slot owns one row of the key/value cache and of every small array in `SlotState`; nothing a slot
computes depends on another slot. `prefill` writes the cache of all prompt tokens but the last;
`decode` feeds the last one, so that logits are made and sampled in one place only.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int, UInt32

from oel_jax.lm.attention import cached_attention
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import KeyValues, Params, embed, forward, rms_norm, run_block, unembed
from oel_jax.lm.rope import cos_sin
from oel_jax.lm.sampling import Sampling, sample
from oel_jax.parallel.mesh import spec


@jax.tree_util.register_dataclass
@dataclass
class SlotState:
    """All slots; B slots, S cache positions, R response tokens.

    Attributes:
      cache: keys and values, [L, B, S, K, H]; positions < `position` are written. Here S stands
        before K, so that one token of one slot is a contiguous piece: otherwise the compiler copies
        the whole cache to write it.
      token: the token to be processed next.
      position: its position.
      key: raw threefry key of the request.
      count: response tokens generated so far.
      budget: response tokens allowed.
      done: nothing to do (free, or finished and not yet fetched).
      response: generated ids; entries >= count are stale.
      log_prob: their log-probabilities at the sampling temperature.
    """

    cache: KeyValues
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    key: UInt32[Array, "B 2"]
    count: Int[Array, " B"]
    budget: Int[Array, " B"]
    done: Bool[Array, " B"]
    response: Int[Array, "B R"]
    log_prob: Float[Array, "B R"]


@jax.tree_util.register_dataclass
@dataclass
class Admission:
    """Prompts entering slots: R rows, right-padded to T; rows with slot == B are padding."""

    tokens: Int[Array, "R T"]  # all prompt tokens but the last
    length: Int[Array, " R"]  # how many of them are real
    last: Int[Array, " R"]
    slot: Int[Array, " R"]
    key: UInt32[Array, "R 2"]
    budget: Int[Array, " R"]


_CACHE = P(None, "fsdp", None, "tp", None)


def cache_block(length: int) -> int:
    """Cache positions that decoding reads at a time; every cache length is a multiple of it."""
    return 64 if length <= 2048 else 256


def empty_state(
    cfg: ModelConfig, mesh: jax.sharding.Mesh, slots: int, length: int, response: int, dtype
) -> SlotState:
    """All slots free; the cache is created in its sharded place, `length` rounded up to blocks."""
    length += -length % cache_block(length)
    shape = (cfg.num_layers, slots, length, cfg.num_kv_heads, cfg.head_dim)
    rows, wide = spec("batch"), spec("batch", None)
    specs = SlotState(KeyValues(_CACHE, _CACHE), rows, rows, wide, rows, rows, rows, wide, wide)

    def make() -> SlotState:
        ints = jnp.zeros(slots, jnp.int32)
        return SlotState(
            cache=KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
            token=ints,
            position=ints,
            key=jnp.zeros((slots, 2), jnp.uint32),
            count=ints,
            budget=ints,
            done=jnp.ones(slots, bool),
            response=jnp.zeros((slots, response), jnp.int32),
            log_prob=jnp.zeros((slots, response), jnp.float32),
        )

    places = jax.tree.map(
        lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    return jax.jit(make, out_shardings=places)()


def _on_mesh(function, in_specs, out_specs, *args):
    """Run per shard on the mesh of the context; `function` gets the axis names or None."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(None, *args)
    return jax.shard_map(
        partial(function, "fsdp"), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*args)


def _scatter_rows(axis: str | None, slot: Array, target, rows):
    """target[slot[r]] = rows[r] on every leaf (leading axis = slots); slots elsewhere are dropped.

    Rows are few, so on a mesh every shard receives all of them and keeps its own.
    """
    if axis is not None:
        slot = jax.lax.all_gather(slot, axis, tiled=True)
        rows = jax.tree.map(lambda r: jax.lax.all_gather(r, axis, tiled=True), rows)
    size = jax.tree.leaves(target)[0].shape[0]
    start = 0 if axis is None else jax.lax.axis_index(axis) * size
    local = slot - start
    local = jnp.where((local >= 0) & (local < size), local, size)  # size: out of range, dropped
    return jax.tree.map(lambda t, r: t.at[local].set(r, mode="drop"), target, rows)


def _scatter_cache(axis: str | None, slot: Array, target: Array, rows: Array) -> Array:
    """target[:, slot[r], :T] = rows[:, r]; rows are [L, R, T, K, H]."""
    if axis is not None:
        slot = jax.lax.all_gather(slot, axis, tiled=True)
        rows = jax.lax.all_gather(rows, axis, axis=1, tiled=True)
    size, length = target.shape[1], rows.shape[2]
    start = 0 if axis is None else jax.lax.axis_index(axis) * size
    local = slot - start
    local = jnp.where((local >= 0) & (local < size), local, size)
    return target.at[:, local, :length].set(rows.astype(target.dtype), mode="drop")


@partial(jax.jit, static_argnames=("cfg", "block"), donate_argnames=("state",))
def prefill(
    cfg: ModelConfig, params: Params, state: SlotState, new: Admission, *, block: int
) -> SlotState:
    """Encode prompts and put them into their slots; `state` is donated."""
    columns = jnp.broadcast_to(jnp.arange(new.tokens.shape[1]), new.tokens.shape)
    segments = (columns < new.length[:, None]).astype(jnp.int32)
    _, fresh = forward(cfg, params, new.tokens, columns, segments, block=block, with_cache=True)
    cache = KeyValues(
        *(
            _on_mesh(
                _scatter_cache,
                (P("fsdp"), _CACHE, _CACHE),
                _CACHE,
                new.slot,
                old,
                rows.swapaxes(2, 3),
            )
            for old, rows in zip(state.cache, fresh, strict=True)
        )
    )
    zeros = jnp.zeros_like(new.length)
    target = (state.token, state.position, state.key, state.count, state.budget, state.done)
    rows = (new.last, new.length, new.key, zeros, new.budget, zeros.astype(bool))
    specs = tuple(P("fsdp", None) if leaf.ndim == 2 else P("fsdp") for leaf in target)
    token, position, key, count, budget, done = _on_mesh(
        _scatter_rows, (P("fsdp"), specs, specs), specs, new.slot, target, rows
    )
    return SlotState(
        cache, token, position, key, count, budget, done, state.response, state.log_prob
    )


def _write(axis: str | None, cache: Array, new: Array, layer: Array, position: Array) -> Array:
    """cache[layer, b, position[b]] = new[b, :, 0] for every slot b."""
    slots = jnp.arange(cache.shape[1])
    return cache.at[layer, slots, position].set(new[:, :, 0].astype(cache.dtype))


def _decode_hidden(cfg: ModelConfig, params: Params, state: SlotState):
    """One token per slot through all layers; the cache travels in the scan's carry."""
    rope = cos_sin(cfg, state.position[:, None])
    block = cache_block(state.cache.keys.shape[2])
    longest = jnp.max(jnp.where(state.done, 0, state.position))
    fresh = P("fsdp", "tp", None, None)

    def body(carry, layer):
        x, cache = carry
        weights, index = layer

        def attend(q: Array, k: Array, v: Array):
            updated = KeyValues(
                *(
                    _on_mesh(
                        _write,
                        (_CACHE, fresh, P(), P("fsdp")),
                        _CACHE,
                        old,
                        new,
                        index,
                        state.position,
                    )
                    for old, new in zip(cache, (k, v), strict=True)
                )
            )
            blocks = longest // block + 1
            out = cached_attention(q, *updated, index, state.position, blocks, block=block)
            return out, updated

        return run_block(cfg, weights, x, rope, attend), None

    layers = (params["layers"], jnp.arange(cfg.num_layers))
    start = (embed(params, state.token[:, None]), state.cache)
    (x, cache), _ = jax.lax.scan(body, start, layers)
    return rms_norm(x, params["final_norm"], cfg.rms_norm_eps)[:, 0], cache


@partial(jax.jit, static_argnames=("cfg", "how", "limit", "stop_ids"), donate_argnames=("state",))
def decode(
    cfg: ModelConfig,
    params: Params,
    state: SlotState,
    steps: Int[Array, ""],
    *,
    how: Sampling,
    limit: int,
    stop_ids: tuple[int, ...],
) -> SlotState:
    """Generate up to `steps` tokens in every busy slot; stops early when all are done.

    `limit`: ids >= limit are never sampled. `state` is donated: its cache is updated in place.
    """

    def body(carry):
        step, state = carry
        hidden, cache = _decode_hidden(cfg, params, state)
        token, log_prob = sample(how, limit, unembed(cfg, params, hidden), state.key, state.count)
        busy = ~state.done
        column = jnp.arange(state.response.shape[1])[None, :]
        here = (column == state.count[:, None]) & busy[:, None]
        count = state.count + busy
        stopped = jnp.zeros_like(busy)
        for stop in stop_ids:
            stopped |= token == stop
        return step + 1, SlotState(
            cache=cache,
            token=jnp.where(busy, token, state.token),
            position=state.position + busy,
            key=state.key,
            count=count,
            budget=state.budget,
            done=state.done | stopped | (count >= state.budget),
            response=jnp.where(here, token[:, None], state.response),
            log_prob=jnp.where(here, log_prob[:, None], state.log_prob),
        )

    def more(carry):
        return (carry[0] < steps) & ~jnp.all(carry[1].done)

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]
