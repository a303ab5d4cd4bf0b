"""Confidence intervals for pass rates whose games share boards (spec 9.1).

The 128 held-out maps of Frozen Lake are only 19 boards, and all games on one board pass or fail
together to some degree. The interval therefore treats the *board* as the unit of replication.

With N games in G boards, y_i in {0, 1}, mean p, and board sums r_g = sum over i in g of (y_i - p):

    var   = G / (G - 1) * sum_g r_g^2 / N^2                (cluster-robust variance of the mean)
    n_eff = p (1 - p) / var, at most N                     (independent games worth as much)
    df    = (sum_g n_g)^2 / sum_g n_g^2 - 1, at least 1    (effective boards minus one)
    t     = 97.5 % quantile of Student's t with df degrees of freedom
    low, high = (p + t^2 / 2n -+ t sqrt(p (1 - p) / n + t^2 / 4n^2)) / (1 + t^2 / n),  n = n_eff

The last line is Wilson's interval with the effective sample size, which stays inside [0, 1] and is
not symmetric near its ends. If the games say nothing about how strongly boards differ (all passed,
all failed, or a single board), n is the effective number of boards: the cautious reading, in which
games on one board repeat each other.

With several loop seeds, each a separate training run that plays the same boards, the mean varies
with both. The variance is the sum of two cluster-robust ones, over seeds and over boards (the part
that is neither's alone is counted twice: cautious), and Welch-Satterthwaite's degrees of freedom
weigh those of the two. A paired difference of two runs on the same seeds and boards puts the two
intervals together (Newcombe's method for pairs), with the correlation that they show:

    low = d - sqrt((p - p_low)^2 - 2 c (p - p_low)(q_high - q) + (q_high - q)^2),  d = p - q
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from oel_jax.base.errors import UserError


def board_clustered_interval(
    passes: Bool[np.ndarray, "seeds maps"],
    boards: Sequence[str],
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean pass rate and its confidence interval, clustered by board.

    Args:
      passes: whether the game of (seed, map) passed; bool or 0/1.
      boards: board id of each map; maps with equal ids are one cluster, over all seeds.
      level: coverage of the interval.

    Returns:
      (mean, low, high) as fractions, 0 <= low <= mean <= high <= 1.

    Raises:
      UserError: no games, or shapes that do not fit.
    """
    passes = np.asarray(passes, dtype=np.float64)
    if passes.ndim != 2 or passes.size == 0 or passes.shape[1] != len(boards):
        raise UserError(
            f"pass rate: got results of shape {passes.shape} for {len(boards)} boards; expected "
            "[seeds, maps] with one board per map and at least one game"
        )
    return seeds_and_boards_interval(passes[None], boards, level)


def seeds_and_boards_interval(
    passes: Float[np.ndarray, "runs seeds maps"],
    boards: Sequence[str],
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean pass rate over runs with different loop seeds, its interval over seeds and boards.

    Args:
      passes: whether the game of (run, evaluation seed, map) passed. With one run the interval is
        over boards alone and says nothing about other loop seeds.
      boards: board id of each map, the same for all runs.
      level: coverage of the interval.

    Returns:
      (mean, low, high) as fractions, 0 <= low <= mean <= high <= 1.

    Raises:
      UserError: no games, or shapes that do not fit.
    """
    passes = _checked(passes, boards)
    mean = float(passes.mean())
    games = _board_games(passes, boards)
    total, effective_boards = passes.size, float(games.sum() ** 2 / (games**2).sum())
    between_runs, between_boards = _covariances(passes, passes, boards)
    variance = between_runs + between_boards
    if mean in (0.0, 1.0) or len(games) == 1:
        size = effective_boards
    else:
        # Boards that agree by chance to the last game would make the size infinite.
        size = min(total, mean * (1 - mean) / variance) if variance > 0 else total
    df = max(effective_boards - 1, 1.0)
    if between_runs > 0:
        # A variance of 0 over boards has no degrees of freedom to give.
        parts = between_runs**2 / (len(passes) - 1) + between_boards**2 / df
        df = max(variance**2 / parts, 1.0)
    low, high = _wilson(mean, size, student_t_quantile(0.5 + level / 2, df))
    return mean, min(low, mean), max(high, mean)


def paired_difference(
    first: Float[np.ndarray, "runs seeds maps"],
    second: Float[np.ndarray, "runs seeds maps"],
    boards: Sequence[str],
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Difference of two pass rates on the same loop seeds and boards, with its interval.

    Args:
      first, second: as in `seeds_and_boards_interval`; run i of both has the same loop seed. The
        numbers of evaluation seeds may differ.
      boards: board id of each map.
      level: coverage of the interval.

    Returns:
      (difference, low, high), -1 <= low <= difference <= high <= 1.

    Raises:
      UserError: no games, or shapes that do not fit.
    """
    # Games of one run on one board are exchangeable: their mean is all that counts.
    p, p_low, p_high = seeds_and_boards_interval(first, boards, level)
    q, q_low, q_high = seeds_and_boards_interval(second, boards, level)
    first, second = (
        _checked(passes, boards).mean(axis=1, keepdims=True) for passes in (first, second)
    )
    if first.shape != second.shape:
        raise UserError(f"paired difference: {len(first)} runs against {len(second)}; pair them")
    spread = sum(_covariances(first, first, boards)) * sum(_covariances(second, second, boards))
    together = sum(_covariances(first, second, boards))
    c = float(np.clip(together / math.sqrt(spread), -1, 1)) if spread > 0 else 0.0

    def reach(own: float, other: float) -> float:
        return math.sqrt(max(0.0, own**2 - 2 * c * own * other + other**2))

    low = p - q - reach(p - p_low, q_high - q)
    high = p - q + reach(p_high - p, q - q_low)
    return p - q, max(low, -1.0), min(high, 1.0)


def mean_over_seeds(
    values: Sequence[float], level: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Mean of one number per loop seed and its interval by Student's t; None, None for one seed.

    Raises:
      UserError: there is no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        raise UserError("mean over seeds: there is no seed")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return mean, None, None
    t = student_t_quantile(0.5 + level / 2, numbers.size - 1)
    half = t * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    return mean, mean - half, mean + half


def _checked(passes: np.ndarray, boards: Sequence[str]) -> np.ndarray:
    passes = np.asarray(passes, dtype=np.float64)
    if passes.ndim != 3 or passes.size == 0 or passes.shape[2] != len(boards):
        raise UserError(
            f"pass rate: got results of shape {passes.shape} for {len(boards)} boards; expected "
            "[runs, seeds, maps] with one board per map and at least one game"
        )
    return passes


def _board_games(passes: np.ndarray, boards: Sequence[str]) -> np.ndarray:
    """Games on each distinct board."""
    _, cluster = np.unique(np.asarray(boards, dtype=str), return_inverse=True)
    return np.bincount(cluster).astype(np.float64) * passes.shape[0] * passes.shape[1]


def _covariances(
    first: np.ndarray, second: np.ndarray, boards: Sequence[str]
) -> tuple[float, float]:
    """Cluster-robust covariance of two means, over runs and over boards; 0 for a single cluster.

    Both are [runs, seeds, maps] of one shape; for a variance they are the same.
    """
    _, cluster = np.unique(np.asarray(boards, dtype=str), return_inverse=True)
    u, v = first - first.mean(), second - second.mean()
    by_run = u.sum(axis=(1, 2)), v.sum(axis=(1, 2))
    by_board = (
        np.bincount(cluster, weights=u.sum(axis=(0, 1))),
        np.bincount(cluster, weights=v.sum(axis=(0, 1))),
    )
    found = []
    for left, right in (by_run, by_board):
        count = len(left)
        scale = count / (count - 1) if count > 1 else 0.0
        found.append(scale * float(left @ right) / (u.size * v.size))
    return found[0], found[1]


def _wilson(mean: float, size: float, t: float) -> tuple[float, float]:
    scale = 1 + t**2 / size
    middle = (mean + t**2 / (2 * size)) / scale
    half = t * math.sqrt(mean * (1 - mean) / size + t**2 / (4 * size**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t with any real df >= 1, to about six digits.

    With x = sqrt(df) tan(a), the density of the angle a is proportional to cos(a)^(df - 1): smooth
    on a finite interval, so the trapezoid rule integrates it.
    """
    angle: Float[np.ndarray, " n"] = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angle).clip(0) ** (df - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(df) * math.tan(np.interp(probability, mass / mass[-1], angle)))
