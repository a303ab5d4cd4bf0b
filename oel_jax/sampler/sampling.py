"""Choosing the next token: temperature, then top-k, then top-p (spec section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from oel_jax.parallel import vocabulary as vocab
from oel_jax.parallel.arrays import Leaf
from oel_jax.parallel.mesh import all_rows, axis_size, spec
from oel_jax.sampler.requests import Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """Sampling settings of B rows, each with its own.

    Attributes:
      temperature: above 0; 1 in a row that takes the most likely token.
      candidates: how many of the likeliest tokens a row draws from, see `Sampling.candidates`.
      top_p: share of probability that the row keeps.
    """

    temperature: Float[Leaf, " B"]
    candidates: Int[Leaf, " B"]
    top_p: Float[Leaf, " B"]

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary: int) -> "RowSampling":
        """NumPy arrays of these settings, for a vocabulary of so many ids."""
        return cls(
            np.array([row.temperature or 1.0 for row in rows], np.float32),
            np.array([row.candidates(vocabulary) for row in rows], np.int32),
            np.array([row.top_p for row in rows], np.float32),
        )


def _from_all(z: Array, keys: Array, count: Array) -> Int[Array, " B"]:
    """Draw one id per row from all logits."""
    return vocab.argmax(z + _noise(keys, count, z.shape[-1]))


def _from_best(
    width: int, how: RowSampling, z: Array, keys: Array, count: Array
) -> Int[Array, " B"]:
    """Draw one id per row from its candidates, at most `width`, that are in the nucleus."""
    values, ids = vocab.top_k(z, width)
    if width == 1:
        return ids[:, 0]
    top_p = how.top_p
    values = jnp.where(jnp.arange(width) < how.candidates[:, None], values, -jnp.inf)
    probs = jax.nn.softmax(values)
    before = jnp.cumsum(probs, axis=-1) - probs
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    values = jnp.where(inside, values, -jnp.inf)
    picked = jnp.argmax(values + _noise(keys, count, width), axis=-1)
    return jnp.take_along_axis(ids, picked[:, None], axis=1)[:, 0]


def _noise(keys: Array, count: Array, size: int) -> Float[Array, "B size"]:
    def row(key: Array, index: Array) -> Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        return jax.random.gumbel(folded, (size,))

    return jax.vmap(row)(keys, count)


def _choose(
    how: RowSampling, widths: tuple[int, ...], z: Array, keys: Array, count: Array
) -> Int[Array, " B"]:
    """One id per row. Work for a width that no row asks for is not done."""

    def drawn(width: int) -> Int[Array, " B"]:
        if width == 0:
            return _from_all(z, keys, count)
        return _from_best(width, how, z, keys, count)

    if len(widths) == 1:
        return drawn(widths[0])
    token = nothing = jnp.zeros(z.shape[0], jnp.int32)
    for width, below in zip(widths, (-1, *widths), strict=False):
        mine = (how.candidates > below) & (how.candidates <= width)
        found = jax.lax.cond(mine.any(), partial(drawn, width), lambda: nothing)
        token = jnp.where(mine, found, token)
    return token


def sample(
    how: RowSampling,
    widths: tuple[int, ...],
    limit: int,
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    count: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Sample one token per row, all on one device.

    Args:
      how: settings of each row.
      widths: static, rising: a row sorts as many of the likeliest tokens as the first one that is
        not below its number of candidates; 0 must be there if a row has it. With one width every
        row is drawn in that way; a row that is above all of several gets a token of no meaning.
        The random numbers of a row depend on its width.
      limit: ids >= limit (padding rows of the embedding) are never sampled.
      logits: float32, whole rows.
      keys: raw key of each row's request; `count`, the number of tokens it has generated, is
        folded in, so the draw depends on nothing else in the batch.

    Returns:
      Token ids and their log-probability under softmax(logits / temperature) over ids < limit,
      before top-k and top-p; the softmax of the logits where the most likely token is taken.
    """
    z = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
    temperature = how.temperature[:, None]
    token = _choose(how, widths, z / temperature, keys, count)
    return token, vocab.log_softmax(z, temperature).at(token[:, None])[:, 0]


@jax.named_scope("sample")
def draw(
    how: RowSampling,
    widths: tuple[int, ...],
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

    def local(how, hidden, matrix, keys, count):
        rows = hidden.shape[0]
        more = -rows % axis_size("tp")  # each device along tp draws for equally many

        def padded(x: Array) -> Array:
            return jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1), mode="edge")

        how, hidden, keys, count = jax.tree.map(padded, (how, hidden, keys, count))
        z = vocab.whole_rows(vocab.logits(all_rows(hidden), matrix), size)
        mine = jax.tree.map(vocab.my_rows, (how, keys, count))
        drawn = sample(mine[0], widths, limit, z, *mine[1:])
        return jax.tree.map(lambda x: vocab.joined_rows(x)[:rows], drawn)

    if jax.sharding.get_abstract_mesh().empty:
        return local(how, hidden, matrix, keys, count)
    rows, wide = spec("batch"), spec("batch", None)
    return jax.shard_map(
        local,
        in_specs=(rows, wide, vocab.SPREAD, wide, rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(how, hidden, matrix, keys, count)
