"""How likely a model finds given text: what multiple-choice and perplexity tasks ask for.

Many short pairs of very different length are scored in few shapes: rows of similar length travel
together, and logits exist only for the tokens that are scored, a chunk at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params, forward, output_matrix
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import padded_length
from oel_jax.parallel import vocabulary as vocab
from oel_jax.parallel.mesh import all_rows, axis_size, put_batch, spec

_CHUNK = 512  # scored tokens whose logits exist at the same time, of all devices together


@dataclass(frozen=True)
class Scored:
    """A continuation under a model.

    Attributes:
      total: sum over its tokens of log p(token | all before it), natural logarithm.
      greedy: whether each of its tokens is the likeliest one (the lowest id where several are).
    """

    total: float
    greedy: bool


def score(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    token_budget: int = 8192,
    block: int = 256,
    done: Callable[[int], object] = lambda count: None,
) -> list[Scored]:
    """Score continuations, at temperature 1 over the model's whole vocabulary.

    Args:
      pairs: (context ids, continuation ids); the context has at least one token, since nothing
        predicts a first token. An empty continuation is certain: total 0, greedy.
      token_budget: tokens in a batch, padding included; a longer sequence is a batch by itself.
      block: query block of the attention.
      done: told how many more pairs are scored.

    Returns:
      One result per pair, in their order. It does not depend on the other pairs but for rounding.
    """
    if not all(len(context) for context, _ in pairs):
        raise ValueError("score: a context without a token")
    results = [Scored(0.0, True)] * len(pairs)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        if continuation:
            length = padded_length(len(context) + len(continuation) - 1)
            buckets[length, padded_length(len(continuation), least=4)].append(index)
    done(sum(not continuation for _, continuation in pairs))
    # The longest come first: if memory does not suffice, one learns of it at once.
    for (length, scored), indices in sorted(buckets.items(), reverse=True):
        rows = _rows(len(indices), token_budget // length, model.mesh.shape["fsdp"])
        for first in range(0, len(indices), rows):
            batch = indices[first : first + rows]
            arrays = _arrays([pairs[i] for i in batch], rows, length, scored)
            with jax.set_mesh(model.mesh):
                values = _score(model.cfg, model.params, *put_batch(model.mesh, arrays), block)
            log_probs, likeliest = jax.device_get(values)
            for row, index in enumerate(batch):
                count = len(pairs[index][1])
                total = log_probs[row, :count].astype(np.float64).sum()
                results[index] = Scored(float(total), bool(likeliest[row, :count].all()))
            done(len(batch))
    return results


def _rows(wanted: int, most: int, devices: int) -> int:
    """Rows of a batch: a power of two per device, so that there are few shapes."""
    rows = 1
    while rows * 2 * devices <= most and rows * devices < wanted:
        rows *= 2
    return rows * devices


def _arrays(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, length: int, scored: int
) -> tuple[np.ndarray, ...]:
    """Padded ids, segments [rows, length]; predicting columns and targets [rows, scored].

    The last id predicts nothing and is left out.
    """
    tokens, segments = np.zeros((2, rows, length), np.int32)
    columns, targets = np.zeros((2, rows, scored), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        ids = [*context, *continuation][:-1]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        first = len(context) - 1
        columns[row, : len(continuation)] = range(first, first + len(continuation))
        targets[row, : len(continuation)] = continuation
    return tokens, segments, columns, targets


@partial(jax.jit, static_argnames=("cfg", "block"))
def _score(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    columns: Int[Array, "B C"],
    targets: Int[Array, "B C"],
    block: int,
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """Log-probability of each target, and whether it is the likeliest token."""
    # Columns count from 0 in every row; segments do it in the batch's own layout.
    positions = jnp.cumsum(jnp.ones_like(segments), axis=1) - 1
    hidden = forward(cfg, params, tokens, positions, segments, block=block)
    hidden = jnp.take_along_axis(hidden, columns[:, :, None], axis=1)
    run = partial(_local, cfg.vocab_size)
    if jax.sharding.get_abstract_mesh().empty:
        return run(hidden, output_matrix(cfg, params), targets)
    rows = spec("batch", None)
    return jax.shard_map(
        run,
        in_specs=(spec("batch", None, None), vocab.AT_REST, rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(hidden, output_matrix(cfg, params), targets)


def _local(
    vocabulary: int,
    hidden: Float[Array, "b C D"],
    matrix: Float[Array, "v d"],
    targets: Int[Array, "b C"],
) -> tuple[Float[Array, "b C"], Bool[Array, "b C"]]:
    """One device's rows and its part of the output matrix."""
    count, devices = targets.size, axis_size("fsdp")
    size = -(-min(_CHUNK, count * devices) // devices)
    size += -size % axis_size("tp")
    extra = -count % size
    matrix = vocab.spread(matrix)

    def split(x: Array, width: tuple[int, ...]) -> Array:
        flat = jnp.pad(x.reshape(count, *width), ((0, extra),) + ((0, 0),) * len(width))
        return flat.reshape(-1, size, *width)

    def chunk(tokens: tuple[Array, Array]) -> tuple[Array, Array]:
        h, wanted = tokens
        z = vocab.whole_rows(vocab.logits(all_rows(h), matrix), vocabulary)
        wanted = vocab.my_rows(wanted)
        log_probs = vocab.log_softmax(z).at(wanted[:, None])[:, 0]
        found = (log_probs, vocab.argmax(z) == wanted)
        return tuple(vocab.joined_rows(x) for x in found)

    values = jax.lax.map(chunk, (split(hidden, hidden.shape[2:]), split(targets, ())))
    log_probs, likeliest = (x.reshape(-1)[:count].reshape(targets.shape) for x in values)
    return log_probs, likeliest
