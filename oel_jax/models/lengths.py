"""Lengths of token sequences and what they begin with. Imports no JAX."""

from collections.abc import Sequence

import numpy as np

SHARED_FROM = 64  # tokens: what is shorter is cheaper to encode again than to read apart


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading ids two sequences share."""
    limit = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:limit]) != np.asarray(second[:limit]))
    return int(differ[0]) if differ.size else limit


def shared_start(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that all prompts begin with; the last one of every prompt stays its own."""
    length = min(common_prefix(prompts[0], other) for other in prompts)
    return tuple(prompts[0][: min([length, *(len(prompt) - 1 for prompt in prompts)])])


def padded_length(length: int, least: int = 16) -> int:
    """Padded length of tokens: `least` (a power of two), then powers of two and the halves between.

    Few shapes, hence few compilations, and at most a third of padding.
    """
    size = least
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
