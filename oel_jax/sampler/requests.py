"""What the sampler is asked for and what it answers."""

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


@dataclass(frozen=True)
class Request:
    """One generation: prompt ids, random key and budget; `tag` is handed back untouched.

    Attributes:
      prefix: ids that many prompts begin with (a knowledge text in its template). They are encoded
        once and read by all; a prompt that shares only a part of them uses that part. The same
        tuple must come with all these requests. () : none.
      session: a conversation. What its next prompt has in common with its last one stays in the
        slot and is not encoded again. None: the prompt stands alone.
    """

    prompt: Sequence[int]
    key: np.ndarray
    max_new: int
    tag: Any = None
    prefix: tuple[int, ...] = ()
    session: Hashable = None


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
