"""The board-clustered interval: values by hand, edge cases, coverage by simulation."""

import math

import numpy as np
import pytest

from oel_jax.errors import UserError
from oel_jax.statistics import board_clustered_interval, student_t_quantile

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
