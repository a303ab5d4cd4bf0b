"""What the sampler is asked for and what it answers. Imports no JAX."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def request_key(*parts: object) -> np.ndarray:
    """Raw threefry key [2] uint32 that depends on `parts` alone (purpose, round, seed, turn ...).

    The token index is folded in on the device (spec section 5 [D]).
    """
    text = "\x1f".join(str(part) for part in parts)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32).copy()


class RequestError(ValueError):
    """A request that the sampler cannot serve; the message says what does not fit."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: 0 keeps the whole vocabulary.
      top_p: keeps the smallest set of most likely tokens whose probability (after temperature and
        top-k) reaches this; 1 keeps all.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def candidates(self, vocabulary: int) -> int:
        """How many of the likeliest tokens are sorted to draw one; 0: none, all can be drawn."""
        if self.temperature == 0:
            return 1
        if self.top_k:
            return min(self.top_k, vocabulary)
        return vocabulary if self.top_p < 1 else 0  # a nucleus without top-k needs the whole order

    def check(self) -> None:
        """Raises RequestError where a setting makes no sense."""
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise RequestError(
                f"{self}: temperature and top_k must be at least 0, top_p above 0 and at most 1"
            )


@dataclass(frozen=True)
class Request:
    """One generation: prompt ids, random key and budget; `tag` is handed back untouched.

    Attributes:
      prefix: ids that many prompts begin with (a knowledge text in its template). They are encoded
        once and read by all; a prompt that shares only a part of them uses that part. The same
        tuple must come with all these requests. () : none.
      session: a conversation. What its next prompt has in common with its last one stays in the
        slot and is not encoded again. None: the prompt is alone.
      sampling: how its tokens are chosen. None: as the sampler's own settings say.
      stop_ids: tokens that end the response. None: those of the sampler.
    """

    prompt: Sequence[int]
    key: np.ndarray
    max_new: int
    tag: Any = None
    prefix: tuple[int, ...] = ()
    session: Hashable = None
    sampling: Sampling | None = None
    stop_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
      ids: response ids, the stop token included.
      log_probs: float32 [len(ids)], at the sampling temperature before top-k and top-p.
      stopped: a stop token ended it (False: the budget did).
    """

    tag: Any
    ids: list[int]
    log_probs: np.ndarray
    stopped: bool


@dataclass(frozen=True)
class RequestProgress:
    """What one dispatch added to the response of a request that runs or has just finished.

    Attributes:
      ids: the new ids, at least one.
      log_probs: float32 [len(ids)], as those of a `Completion`.
    """

    tag: Any
    ids: list[int]
    log_probs: np.ndarray
