"""Decoding: the newest token of every busy slot through the model, and the next one drawn."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import KeyValues, Params, output_matrix, rms_norm
from oel_jax.parallel.mesh import merge_rows, spec, split_rows
from oel_jax.parallel.vocabulary import spread_over_all
from oel_jax.sampler.cached_layers import Reach, decode_layer, reach_of, through_layers
from oel_jax.sampler.draft import accepted, propose
from oel_jax.sampler.sampling import draw
from oel_jax.sampler.slots import SlotState, per_device


@partial(
    jax.jit,
    static_argnames=("cfg", "limit", "widths", "draft"),
    donate_argnames=("state",),
)
@jax.named_scope("decode")
def decode(
    cfg: ModelConfig,
    params: Params,
    state: SlotState,
    steps: Int[Array, ""],
    *,
    limit: int,
    widths: tuple[int, ...],
    draft: int = 0,
) -> SlotState:
    """Read the newest token of every busy slot `steps` times; stops early when all are done.

    A pass gives a slot one token, or up to 1 + `draft` (`sampler/draft.py`). `state` is donated:
    its cache is updated in place.

    Args:
      limit: ids >= limit are never sampled.
      widths: every number of candidates that a busy slot has, see `sampling.sample`.
    """

    matrix = spread_over_all(output_matrix(cfg, params))  # once, not at every step
    rows, wide = spec("batch"), spec("batch", None)
    look = per_device(partial(propose, size=draft), (wide, rows), wide)

    def body(carry):
        step, state = carry
        busy = ~state.done
        guesses = look(state.ids, state.column) if draft else state.ids[:, :0]
        tokens = jnp.concatenate([state.token[:, None], jnp.maximum(guesses, 0)], axis=1)
        ahead = jnp.arange(1 + draft)[None, :]
        column = state.column[:, None] + ahead
        # A draft may reach beyond the cache: nothing of it is written there, or kept.
        inside = busy[:, None] & (column < state.cache.keys.shape[2])
        reach = Reach(**reach_of(state, column, state.shared, inside))
        x, cache = through_layers(cfg, params, tokens, state, reach, decode_layer)
        hidden = merge_rows(rms_norm(x, params["final_norm"], cfg.rms_norm_eps))

        def each_token(x: Array) -> Array:
            shape = (x.shape[0], 1 + draft, *x.shape[1:])
            return merge_rows(jnp.broadcast_to(x[:, None], shape))

        # What a free slot was asked for last is no reason to work.
        how = replace(state.sampling, candidates=jnp.where(busy, state.sampling.candidates, -1))
        how, keys = jax.tree.map(each_token, (how, state.key))
        counts = merge_rows(state.count[:, None] + ahead)
        drawn = draw(how, widths, limit, hidden, matrix, cfg.vocab_size, keys, counts)
        sampled, log_prob = (split_rows(x, 1 + draft) for x in drawn)
        room = state.budget - state.count
        taken = jnp.where(busy, accepted(guesses, sampled, state.stops, room), 0)
        return step + 1, _take(state, cache, sampled, log_prob, taken, guesses)

    def more(carry):
        return (carry[0] < steps) & ~jnp.all(carry[1].done)

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]


def _take(
    state: SlotState,
    cache: KeyValues,
    sampled: Int[Array, "B T"],
    log_prob: Float[Array, "B T"],
    taken: Int[Array, " B"],
    guesses: Int[Array, "B T-1"],
) -> SlotState:
    """The first taken[b] of the sampled tokens belong to slot b now."""

    rows, wide = spec("batch"), spec("batch", None)

    def put(old: Array, new: Array, first: Array, taken: Array) -> Array:
        index = jnp.arange(old.shape[1])[None, :] - first[:, None]
        here = (index >= 0) & (index < taken[:, None])
        index = jnp.clip(index, 0, new.shape[1] - 1)
        return jnp.where(here, jnp.take_along_axis(new, index, axis=1), old)

    def into(old: Array, new: Array, first: Array) -> Array:
        return per_device(put, (wide, wide, rows, rows), wide)(old, new, first, taken)

    places = jnp.arange(sampled.shape[1])[None, :]
    last = jnp.where(places == taken[:, None] - 1, sampled, 0).sum(axis=1)
    token = jnp.where(taken > 0, last, state.token)
    stopped: Bool[Array, " B"] = (token[:, None] == state.stops).any(axis=1)
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
