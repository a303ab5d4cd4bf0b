"""The board-clustered interval: values by hand, edge cases, coverage by simulation."""

import math

import numpy as np
import pytest

from oel_jax.base.errors import UserError
from oel_jax.report.intervals import (
    board_clustered_interval,
    mean_over_seeds,
    paired_difference,
    seeds_and_boards_interval,
    student_t_quantile,
)

# Multiplicities of the 19 boards among the 128 held-out maps (spec 3.3).
MULTIPLICITIES = [3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9, 13, 13]
BOARDS = [f"b{g}" for g, count in enumerate(MULTIPLICITIES) for _ in range(count)]


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.706205, 2: 4.302653, 5: 2.570582, 15: 2.131450, 127: 1.978820}
    for df, value in table.items():
        assert student_t_quantile(0.975, df) == pytest.approx(value, abs=2e-6)
    assert student_t_quantile(0.95, 10) == pytest.approx(1.812461, abs=2e-6)
    assert student_t_quantile(0.5, 3.3) == pytest.approx(0, abs=1e-9)


def test_a_case_worked_by_hand():
    # Two seeds, boards a (maps 0, 1) and b, c: sums of 4 + 2 + 2 games; passes 3 + 1 + 0.
    passes = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    mean, low, high = board_clustered_interval(passes, ["a", "a", "b", "c"])
    assert mean == 0.5
    variance = 3 / 2 * ((3 - 2) ** 2 + 0**2 + (0 - 1) ** 2) / 8**2
    n = 0.25 / variance
    t = student_t_quantile(0.975, 64 / (16 + 4 + 4) - 1)
    middle = (0.5 + t * t / 2 / n) / (1 + t * t / n)
    half = t / (1 + t * t / n) * math.sqrt(0.25 / n + t * t / 4 / n / n)
    assert (low, high) == pytest.approx((middle - half, middle + half))


def test_order_of_maps_and_seeds_does_not_matter():
    rng = np.random.default_rng(0)
    passes = rng.random((10, 128)) < 0.3
    order = rng.permutation(128)
    first = board_clustered_interval(passes, BOARDS)
    second = board_clustered_interval(passes[::-1, order], [BOARDS[i] for i in order])
    assert first == pytest.approx(second)


def test_all_failed_and_all_passed_leave_room_for_doubt():
    none = board_clustered_interval(np.zeros((10, 128), bool), BOARDS)
    every = board_clustered_interval(np.ones((10, 128), bool), BOARDS)
    assert none[:2] == (0.0, 0.0) and every[0] == every[2] == 1.0
    effective = 128**2 / sum(m * m for m in MULTIPLICITIES)
    assert effective == pytest.approx(16.1, abs=0.05)
    t = student_t_quantile(0.975, effective - 1)
    assert none[2] == pytest.approx(t * t / (effective + t * t))
    assert every[1] == pytest.approx(1 - none[2])
    distinct = board_clustered_interval(np.zeros((10, 128), bool), [str(i) for i in range(128)])
    assert 0 < distinct[2] < none[2] / 5


def test_a_single_board_says_almost_nothing():
    passes = np.arange(40).reshape(10, 4) % 2 == 0
    mean, low, high = board_clustered_interval(passes, ["a"] * 4)
    assert mean == 0.5 and low < 0.05 and high > 0.95


def test_boards_that_agree_to_the_last_game():
    passes = np.tile([[1], [0]], (1, 4))
    mean, low, high = board_clustered_interval(passes, list("abcd"))
    assert mean == 0.5 and 0 < low < 0.5 < high < 1


def test_coverage_where_games_of_a_board_hang_together():
    rng = np.random.default_rng(1)
    runs, covered, naive, inside = 400, 0, 0, True
    for _ in range(runs):
        rates = np.repeat(rng.beta(2, 4, len(MULTIPLICITIES)), MULTIPLICITIES)
        passes = rng.random((10, 128)) < rates
        mean, low, high = board_clustered_interval(passes, BOARDS)
        inside &= 0 <= low <= mean <= high <= 1
        covered += low <= 2 / 6 <= high
        naive += abs(mean - 2 / 6) <= 1.96 * math.sqrt(mean * (1 - mean) / passes.size)
    assert inside
    # Binomial standard error of a 95 % coverage over 400 runs: 1.1 %.
    assert 0.92 <= covered / runs <= 0.985
    assert naive / runs < 0.6  # what an interval that ignores boards would do


def test_coverage_at_a_low_pass_rate():
    rng = np.random.default_rng(2)
    runs, covered = 400, 0
    for _ in range(runs):
        rates = np.repeat(rng.beta(1, 13, len(MULTIPLICITIES)), MULTIPLICITIES)
        _, low, high = board_clustered_interval(rng.random((10, 128)) < rates, BOARDS)
        covered += low <= 1 / 14 <= high
    assert 0.91 <= covered / runs <= 0.985


def test_bad_shapes_are_refused():
    for passes in (np.zeros((0, 4)), np.zeros(4), np.zeros((2, 3))):
        with pytest.raises(UserError, match="expected"):
            board_clustered_interval(passes, list("abcd"))


# --- several loop seeds ---------------------------------------------------------------------------


def slow_variances(first, second, boards):
    """Covariance of two means, over runs and over boards: the definition, game by game."""
    runs, seeds, maps = first.shape
    games = [(r, s, m) for r in range(runs) for s in range(seeds) for m in range(maps)]
    mean_1 = sum(first[g] for g in games) / len(games)
    mean_2 = sum(second[g] for g in games) / len(games)
    found = []
    for groups, of in ((range(runs), lambda g: g[0]), (set(boards), lambda g: boards[g[2]])):
        total = 0.0
        for group in groups:
            inside = [g for g in games if of(g) == group]
            total += sum(first[g] - mean_1 for g in inside) * sum(
                second[g] - mean_2 for g in inside
            )
        count = len(groups)
        found.append(count / (count - 1) * total / len(games) ** 2 if count > 1 else 0.0)
    return found


def slow_interval(passes, boards):
    """Mean, low, high as the module's docstring has them, for rates away from 0 and 1."""
    between_runs, between_boards = slow_variances(passes, passes, boards)
    variance = between_runs + between_boards
    counts = [boards.count(board) for board in set(boards)]
    df = sum(counts) ** 2 / sum(count**2 for count in counts) - 1
    if len(passes) > 1:
        df = variance**2 / (between_runs**2 / (len(passes) - 1) + between_boards**2 / df)
    t, p = student_t_quantile(0.975, df), float(passes.mean())
    n = min(passes.size, p * (1 - p) / variance)
    half = t * math.sqrt(p * (1 - p) / n + t * t / 4 / n / n)
    return p, *((p + t * t / 2 / n + side * half) / (1 + t * t / n) for side in (-1, 1))


def simulated(rng, runs, spread_runs, spread_boards, level=-1.0, shift=1.0):
    """Two conditions on the same runs and boards; logits add a run, a board and the condition."""
    board = np.repeat(rng.normal(size=len(MULTIPLICITIES)), MULTIPLICITIES) * spread_boards
    logits = level + rng.normal(size=(runs, 1, 1)) * spread_runs + board
    chances = [1 / (1 + np.exp(-x)) for x in (logits + shift, logits)]
    return [(rng.random((runs, 4, 128)) < chance).astype(float) for chance in chances]


def test_intervals_over_seeds_and_boards_against_the_definition():
    rng = np.random.default_rng(3)
    for runs in (1, 2, 3, 5):
        first, second = (x[:, :2, :24] for x in simulated(rng, runs, 0.5, 1.0))
        boards = BOARDS[:24]
        p, q = slow_interval(first, boards), slow_interval(second, boards)
        assert seeds_and_boards_interval(first, boards) == pytest.approx(p)
        together = sum(slow_variances(first, second, boards))
        alone = [sum(slow_variances(x, x, boards)) for x in (first, second)]
        c = together / math.sqrt(alone[0] * alone[1])
        down, up = (p[0] - p[1], q[2] - q[0]), (p[2] - p[0], q[0] - q[1])
        low = p[0] - q[0] - math.sqrt(down[0] ** 2 - 2 * c * down[0] * down[1] + down[1] ** 2)
        high = p[0] - q[0] + math.sqrt(up[0] ** 2 - 2 * c * up[0] * up[1] + up[1] ** 2)
        expected = (p[0] - q[0], low, high)
        assert paired_difference(first, second, boards) == pytest.approx(expected)


def test_one_run_is_the_interval_over_boards():
    passes = np.random.default_rng(4).random((10, 128)) < 0.3
    single = seeds_and_boards_interval(passes[None], BOARDS)
    assert single == board_clustered_interval(passes, BOARDS)


def test_pairing_swaps_and_gains_from_what_runs_and_boards_share():
    first, second = simulated(np.random.default_rng(5), 3, 1.0, 1.0)
    d, low, high = paired_difference(first, second, BOARDS)
    swapped = paired_difference(second, first, BOARDS)
    assert swapped == pytest.approx((-d, -high, -low))
    p, q = (seeds_and_boards_interval(x, BOARDS) for x in (first, second))
    unpaired = math.hypot(p[0] - p[1], q[2] - q[0]) + math.hypot(p[2] - p[0], q[0] - q[1])
    assert high - low < 0.7 * unpaired
    # Evaluation seeds are not paired: other numbers of them are compared by their means.
    assert paired_difference(first[:, :2], second, BOARDS)[0] == pytest.approx(
        first[:, :2].mean() - second.mean()
    )


def test_differences_of_runs_that_all_passed_leave_room_for_doubt():
    ones, none = np.ones((3, 4, 128)), np.zeros((3, 4, 128))
    d, low, high = paired_difference(ones, ones, BOARDS)
    assert d == 0 and low == pytest.approx(-high) and 0.1 < high < 0.4
    d, low, high = paired_difference(ones, none, BOARDS)
    assert (d, high) == (1, 1) and 0.5 < low < 1


@pytest.mark.parametrize("spread_runs, spread_boards", [(0.0, 1.0), (0.4, 0.8), (1.0, 0.3)])
def test_coverage_over_seeds_and_boards(spread_runs, spread_boards):
    rng, trials, runs = np.random.default_rng(6), 300, 3
    spread = math.hypot(spread_runs, spread_boards)
    draws = rng.normal(size=400_000) * spread
    true = [float(np.mean(1 / (1 + np.exp(-(x + draws))))) for x in (0.0, -1.0)]
    covered = paired = naive = 0
    for _ in range(trials):
        first, second = simulated(rng, runs, spread_runs, spread_boards)
        _, low, high = seeds_and_boards_interval(second, BOARDS)
        covered += low <= true[1] <= high
        _, low, high = paired_difference(first, second, BOARDS)
        paired += low <= true[0] - true[1] <= high
        mean = second.mean()
        naive += abs(mean - true[1]) <= 1.96 * math.sqrt(mean * (1 - mean) / second.size)
    # Binomial standard error of a 95 % coverage over 300 trials: 1.3 %.
    assert 0.9 <= covered / trials <= 0.99
    assert 0.9 <= paired / trials
    assert naive / trials < 0.6  # what an interval that takes games for independent would do


def test_mean_over_seeds_is_students_interval():
    values = [3.0, 5.0, 4.0, 8.0]
    mean, low, high = mean_over_seeds(values)
    half = 3.182446 * math.sqrt((4 + 0 + 1 + 9) / 3) / 2
    assert (mean, low, high) == pytest.approx((5.0, 5.0 - half, 5.0 + half), abs=1e-5)
    assert mean_over_seeds([2.0]) == (2.0, None, None)
    with pytest.raises(UserError, match="no seed"):
        mean_over_seeds([])


def test_pairs_that_do_not_fit_are_refused():
    three, two = np.ones((3, 1, 4)), np.ones((2, 1, 4))
    with pytest.raises(UserError, match="pair them"):
        paired_difference(three, two, list("abcd"))
    with pytest.raises(UserError, match="expected"):
        seeds_and_boards_interval(np.ones((2, 4)), list("abcd"))
