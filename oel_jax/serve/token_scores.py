"""Log-probabilities of an answer's tokens and of the likeliest ones in their places.

The sampler knows the log-probability of the token that it has drawn, at the request's temperature.
Clients ask for the model's own, and for alternatives; they come from one pass over the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params, forward, unembed
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import padded_length
from oel_jax.parallel.mesh import put_batch

_CHUNK = 64  # tokens whose logits exist at the same time


@dataclass(frozen=True)
class TokenScore:
    """One token of an answer.

    Attributes:
      id: the token.
      log_prob: natural logarithm of its probability at temperature 1.
      top: (id, log-probability) of the likeliest tokens there, the likeliest first.
    """

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


def token_scores(
    model: LanguageModel, prompt: Sequence[int], ids: Sequence[int], top: int
) -> list[TokenScore]:
    """Score `ids` after `prompt`, over the tokens that can be sampled.

    Args:
      prompt: at least one id.
      top: how many of the likeliest tokens.
    """
    if not ids:
        return []
    text = [*prompt, *ids][:-1]  # the last id predicts nothing
    # Room for a whole chunk from any place on, so that no slice is moved to fit.
    width = padded_length(len(text) + _CHUNK)
    rows = model.mesh.shape["fsdp"]
    tokens, segments = np.zeros((2, rows, width), np.int32)
    tokens[:, : len(text)], segments[:, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    found: list[TokenScore] = []
    with jax.set_mesh(model.mesh):
        arrays = put_batch(model.mesh, (tokens, positions, segments))
        hidden = _hidden(model.cfg, model.params, *arrays)
        for first in range(0, len(ids), _CHUNK):
            chunk = ids[first : first + _CHUNK]
            at = np.int32(len(prompt) - 1 + first)
            logits = jax.device_get(_logits(model.cfg, model.params, hidden, at))
            found += _scores(logits[0, : len(chunk), : model.vocab_limit], chunk, top)
    return found


def _scores(z: np.ndarray, ids: Sequence[int], top: int) -> list[TokenScore]:
    z = z.astype(np.float64)
    high = z.max(-1, keepdims=True)
    log_probs = z - high - np.log(np.exp(z - high).sum(-1, keepdims=True))
    best = np.argsort(-log_probs, axis=-1, kind="stable")[:, :top]
    return [
        TokenScore(
            int(token),
            float(log_probs[row, token]),
            tuple((int(one), float(log_probs[row, one])) for one in best[row]),
        )
        for row, token in enumerate(ids)
    ]


@partial(jax.jit, static_argnames=("cfg",))
def _hidden(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    return forward(cfg, params, tokens, positions, segments)


@partial(jax.jit, static_argnames=("cfg",))
def _logits(
    cfg: ModelConfig, params: Params, hidden: Float[Array, "B T D"], first: Int[Array, ""]
) -> Float[Array, "B C V"]:
    """Logits of `_CHUNK` places, from `first` on."""
    return unembed(cfg, params, jax.lax.dynamic_slice_in_dim(hidden, first, _CHUNK, axis=1))
