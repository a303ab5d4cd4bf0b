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
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from oel_jax.errors import UserError


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
    seeds = passes.shape[0]
    _, cluster = np.unique(np.asarray(boards, dtype=str), return_inverse=True)
    games = np.bincount(cluster).astype(np.float64) * seeds
    mean = float(passes.mean())
    residuals = np.bincount(cluster, weights=(passes - mean).sum(axis=0))
    total, clusters = float(games.sum()), len(games)

    effective_boards = total**2 / float((games**2).sum())
    variance = 0.0
    if clusters > 1:
        variance = clusters / (clusters - 1) * float((residuals**2).sum()) / total**2
    if mean in (0.0, 1.0) or clusters == 1:
        size = effective_boards
    else:
        # Boards that agree by chance to the last game would make the size infinite.
        size = min(total, mean * (1 - mean) / variance) if variance > 0 else total
    t = student_t_quantile(0.5 + level / 2, max(effective_boards - 1, 1.0))
    low, high = _wilson(mean, size, t)
    return mean, min(low, mean), max(high, mean)


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
