"""How the response tokens of a step share its loss: a weight for each of them (spec 8.4).

The weights are made from the samples alone. How they are packed into micro-batches, and for how
many devices, is not part of the result.
"""

from collections import Counter
from collections.abc import Sequence

from oel_jax.distill.packing import Sample

# Prompt and response tokens of a micro-batch of one GPU in the released scripts.
RELEASED_BUDGET = 20_480


def sample_weights(
    samples: Sequence[Sample], aggregation: str, released_gpus: int = 0
) -> list[float]:
    """Weight of each response token of each sample.

    token_mean: 1 / (response tokens of the step). seq_mean: 1 / (N |y_i|).
    trajectory_mean: 1 / (G * tokens of the sample's game), G games: averaged within a trajectory,
    then over trajectories, so that a long game does not count more.
    micro_token_mean: (n_u / N) / (tokens of group u), for the groups of `released_groups`.

    Args:
      samples: all of a step, in the order of the batch.
      released_gpus: for 'micro_token_mean', at least 1.

    Raises:
      ValueError: another name.
    """
    count = len(samples)
    if aggregation == "token_mean":
        return [1.0 / sum(len(s.response) for s in samples)] * count
    if aggregation == "seq_mean":
        return [1.0 / (count * len(s.response)) for s in samples]
    if aggregation == "trajectory_mean":
        tokens = Counter()
        for sample in samples:
            tokens[sample.game] += len(sample.response)
        return [1.0 / (len(tokens) * tokens[sample.game]) for sample in samples]
    if aggregation == "micro_token_mean":
        weights = [0.0] * count
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
        for group in released_groups(lengths, released_gpus):
            tokens = sum(len(samples[index].response) for index in group)
            for index in group:
                weights[index] = len(group) / count / (tokens + 1e-8)
        return weights
    raise ValueError(f"config.loss.aggregation={aggregation!r} is unknown")


def released_groups(
    lengths: Sequence[int], gpus: int, budget: int = RELEASED_BUDGET
) -> list[list[int]]:
    """Which samples share a micro-batch in the released code, as sorted indices.

    Each GPU gets as many consecutive samples as the others (one more on the first ones, if they do
    not come out even: the released code drops such a remainder). It splits them into as many
    micro-batches as the fullest GPU needs for `budget` tokens each, of tokens as equal as the
    largest differencing method makes them.

    Args:
      lengths: prompt and response tokens of each sample, in the order of the batch.
    """
    each, more = divmod(len(lengths), gpus)
    parts, first = [], 0
    for gpu in range(gpus):
        last = first + each + (gpu < more)
        parts.append(range(first, last))
        first = last
    count = max(-(-sum(lengths[i] for i in part) // budget) for part in parts)
    groups = []
    for part in parts:
        if part:
            groups += _balanced([(lengths[i], i) for i in part], min(count, len(part)))
    return groups


def _balanced(items: list[tuple[int, int]], count: int) -> list[list[int]]:
    """(length, index) pairs in `count` groups of about equal sums (Karmarkar and Karp).

    Each state is `count` groups, largest first. The two states that are most uneven are joined,
    the largest groups of one with the smallest of the other, until one is left. Ties are broken as
    in the released code: by the sum of the largest group, then by its size and its members.
    """
    empty = (0, 0, ())  # sum, size, (index, length) of its members in the order of joining
    states = [[(length, 1, ((index, length),)), *[empty] * (count - 1)] for length, index in items]
    while len(states) > 1:
        states.sort(key=lambda state: (state[0][0] - state[-1][0], state[0]))
        one, other = states.pop(), states.pop()
        groups = [
            tuple(x + y for x, y in zip(a, b, strict=True))
            for a, b in zip(one, reversed(other), strict=True)
        ]
        states.append(sorted(groups, reverse=True))
    return [sorted(index for index, _ in group[2]) for group in states[0] if group[2]]
