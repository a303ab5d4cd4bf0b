"""Choosing the next token: temperature, then top-k, then top-p (spec section 5)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int, UInt32

from oel_jax.parallel import vocabulary as vocab


@dataclass(frozen=True)
class Sampling:
    """Static sampling settings.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: 0 keeps the whole vocabulary.
      top_p: keeps the smallest set of most likely tokens whose probability (after temperature and
        top-k) reaches this; 1 keeps all.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0


def _choose(
    how: Sampling, axis: str | None, z: Array, keys: Array, count: Array
) -> Int[Array, " B"]:
    """Draw one id per row from logits `z` that are already divided by the temperature."""
    if how.temperature == 0.0:
        return vocab.argmax(z, axis)
    width = z.shape[-1] * (1 if axis is None else jax.lax.axis_size(axis))

    def noise(key: Array, index: Array, size: int) -> Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        return jax.random.gumbel(folded, (size,))

    if how.top_k == 0 and how.top_p >= 1.0:
        gumbel = jax.vmap(partial(noise, size=width))(keys, count)
        start = vocab.offset(axis, z.shape[-1])
        return vocab.argmax(
            z + jax.lax.dynamic_slice_in_dim(gumbel, start, z.shape[-1], axis=1), axis
        )
    # A nucleus without top-k needs the whole order; with top-k only k candidates are ever sorted.
    kept = min(how.top_k, width) if how.top_k else width
    values, ids = vocab.top_k(z, kept, axis)
    if how.top_p < 1.0:
        probs = jax.nn.softmax(values)
        before = jnp.cumsum(probs, axis=-1) - probs
        values = jnp.where(before < how.top_p, values, -jnp.inf)
    gumbel = jax.vmap(partial(noise, size=kept))(keys, count)
    picked = jnp.argmax(values + gumbel, axis=-1)
    return jnp.take_along_axis(ids, picked[:, None], axis=1)[:, 0]


def _local(
    how: Sampling, limit: int, axis: str | None, logits: Array, keys: Array, count: Array
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One device's rows and its slice of the vocabulary."""
    ids = jnp.arange(logits.shape[-1]) + vocab.offset(axis, logits.shape[-1])
    z = jnp.where(ids < limit, logits, -jnp.inf)
    z = z / how.temperature if how.temperature > 0.0 else z
    token = _choose(how, axis, z, keys, count)
    columns, here = vocab.local_columns(token[:, None], z.shape[-1], axis)
    picked = jnp.where(here, jnp.take_along_axis(z, columns, axis=1), 0.0)
    return token, vocab.total(picked, axis)[:, 0] - vocab.logsumexp(z, axis)


def sample(
    how: Sampling,
    limit: int,
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    count: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Sample one token per row.

    Args:
      limit: ids >= limit (padding rows of the embedding) are never sampled.
      logits: float32; the vocabulary may be split over 'tp'.
      keys: raw key of each row's request; `count`, the number of tokens it has generated, is
        folded in, so the draw depends on nothing else in the batch.

    Returns:
      Token ids and their log-probability under softmax(logits / temperature) over ids < limit,
      before top-k and top-p.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _local(how, limit, None, logits, keys, count)
    rows = P("fsdp")
    return jax.shard_map(
        partial(_local, how, limit, "tp"),
        in_specs=(P("fsdp", "tp"), P("fsdp", None), rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(logits, keys, count)
