"""Speculative decoding from what a slot has already read: drafts, and how much of one is kept.

A structured text repeats itself and its prompt. The tokens that followed the last occurrence of the
newest two or three are the draft; the model reads them in one pass with the newest token, and every
position is sampled with the random numbers it would have had anyway. A drafted token is kept as
long as it *is* the sampled one. The answer is therefore the one that decoding token by token gives,
not just one of the same distribution (a token of probability p is accepted with probability p, as
in speculative sampling with a deterministic draft).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int


def propose(ids: Int[Array, "B S"], column: Int[Array, " B"], *, size: int) -> Int[Array, "B size"]:
    """What followed the last occurrence of the newest three tokens, else of the newest two.

    Args:
      ids: what each slot holds; entries after `column`, its newest token, mean nothing.

    Returns:
      drafts; -1 where there is none.
    """
    place = jnp.arange(ids.shape[1])[None, :]

    def newest(back: int) -> Int[Array, "B 1"]:
        return jnp.take_along_axis(ids, jnp.maximum(column - back, 0)[:, None], axis=1)

    def earlier(back: int) -> Int[Array, "B S"]:
        return jnp.pad(ids, ((0, 0), (back, 0)), constant_values=-1)[:, : ids.shape[1]]

    two = (ids == newest(0)) & (earlier(1) == newest(1)) & (place < column[:, None])
    three = two & (earlier(2) == newest(2)) & (column[:, None] >= 2)
    rank = jnp.where(two & (column[:, None] >= 1), place + ids.shape[1] * three, -1)
    best = rank.max(axis=1, keepdims=True)
    source = best % ids.shape[1] + 1 + jnp.arange(size)[None, :]
    known = (best >= 0) & (source <= column[:, None])
    found = jnp.take_along_axis(ids, jnp.minimum(source, ids.shape[1] - 1), axis=1)
    return jnp.where(known, found, -1)


def accepted(
    draft: Int[Array, "B D"],
    sampled: Int[Array, "B D+1"],
    stop_ids: Int[Array, "B E"],
    room: Int[Array, " B"],
) -> Int[Array, " B"]:
    """How many of the sampled tokens count: up to the first that is not the drafted one.

    That one still counts, since everything before it was right. A stop token and the budget that is
    left (`room`) end a response early.

    Args:
      stop_ids: of each row; -1 fills up.
    """
    agree = jnp.cumprod((draft == sampled[:, :-1]).astype(jnp.int32), axis=1).sum(axis=1) + 1
    stops = (sampled[:, :, None] == stop_ids[:, None, :]).any(axis=-1)
    first = jnp.where(stops.any(axis=1), stops.argmax(axis=1) + 1, sampled.shape[1])
    return jnp.minimum(jnp.minimum(agree, first), room)
