"""Choosing the next token: temperature, then top-k, then top-p (spec section 5)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int, UInt32

from oel_jax.parallel import vocabulary as vocab
from oel_jax.parallel.mesh import all_rows, parts


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


def _choose(how: Sampling, z: Array, keys: Array, count: Array) -> Int[Array, " B"]:
    """Draw one id per row from logits `z` that are already divided by the temperature."""
    if how.temperature == 0.0:
        return vocab.argmax(z)
    width = z.shape[-1]

    def noise(key: Array, index: Array, size: int) -> Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        return jax.random.gumbel(folded, (size,))

    if how.top_k == 0 and how.top_p >= 1.0:
        return vocab.argmax(z + jax.vmap(partial(noise, size=width))(keys, count))
    # A nucleus without top-k needs the whole order; with top-k only k candidates are ever sorted.
    kept = min(how.top_k, width) if how.top_k else width
    values, ids = vocab.top_k(z, kept)
    if how.top_p < 1.0:
        probs = jax.nn.softmax(values)
        before = jnp.cumsum(probs, axis=-1) - probs
        values = jnp.where(before < how.top_p, values, -jnp.inf)
    gumbel = jax.vmap(partial(noise, size=kept))(keys, count)
    picked = jnp.argmax(values + gumbel, axis=-1)
    return jnp.take_along_axis(ids, picked[:, None], axis=1)[:, 0]


def sample(
    how: Sampling,
    limit: int,
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    count: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Sample one token per row, all on one device.

    Args:
      limit: ids >= limit (padding rows of the embedding) are never sampled.
      logits: float32, whole rows.
      keys: raw key of each row's request; `count`, the number of tokens it has generated, is
        folded in, so the draw depends on nothing else in the batch.

    Returns:
      Token ids and their log-probability under softmax(logits / temperature) over ids < limit,
      before top-k and top-p; the softmax of the logits where the temperature is 0.
    """
    z = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
    temperature = how.temperature or 1.0
    token = _choose(how, z / temperature, keys, count)
    return token, vocab.log_softmax(z, temperature).at(token[:, None])[:, 0]


def draw(
    how: Sampling,
    limit: int,
    hidden: Float[Array, "B D"],
    matrix: Float[Array, "W D"],
    size: int,
    keys: UInt32[Array, "B 2"],
    count: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """`sample` from the logits that hidden states make, on the mesh of the context.

    Each device makes the logits of its slice of the vocabulary for all rows, then draws for a few
    rows with all their logits: the draw is that of one device.

    Args:
      matrix: the output matrix after `vocabulary.spread_over_all`; `size`, its vocabulary.
    """

    def local(hidden, matrix, keys, count):
        rows = hidden.shape[0]
        more = -rows % parts("tp")  # each device along tp draws for equally many
        hidden, keys, count = (
            jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1)) for x in (hidden, keys, count)
        )
        z = vocab.whole_rows(vocab.logits(all_rows(hidden), matrix), size)
        drawn = sample(how, limit, z, vocab.my_rows(keys), vocab.my_rows(count))
        return jax.tree.map(lambda x: vocab.joined_rows(x)[:rows], drawn)

    if jax.sharding.get_abstract_mesh().empty:
        return local(hidden, matrix, keys, count)
    rows, wide = P("fsdp"), P("fsdp", None)
    return jax.shard_map(
        local, in_specs=(wide, vocab.SPREAD, wide, rows), out_specs=(rows, rows), check_vma=False
    )(hidden, matrix, keys, count)
