"""Gain in context next to the gain after consolidation, and how far they are from each other."""

import numpy as np
import pytest

from oel_jax.base.files import write_json
from oel_jax.report.gains import gains, mean_error, sentence
from oel_jax.report.intervals import paired_difference
from oel_jax.runs.workdir import Workdir

BOARDS = [0, 1, 1, 2, 0, 3]


def measured(rate, seeds=2, **more):
    """An evaluation in which about this share of the games is won."""
    won = np.arange(seeds * len(BOARDS)) % 100 < rate * seeds * len(BOARDS)
    rows = won.reshape(seeds, len(BOARDS)).astype(int)
    return {
        "pass_rate": float(won.mean()),
        "passed": ["".join(map(str, row)) for row in rows],
        "board_of": BOARDS,
    } | more


def passes(result):
    return np.array([[game == "1" for game in row] for row in result["passed"]])[None]


@pytest.fixture
def workdir(tmp_path):
    """Three rounds: both gains, both again (the other way round), no pre-flight."""
    w = Workdir(tmp_path)
    write_json(w.start_evaluation, measured(0.0))
    for number, rate in enumerate((0.5, 0.25, 1.0), 1):
        write_json(w.evaluation(number, "consolidated"), measured(rate))
    write_json(w.preflight(1), {"gain": 0.75, "ci95": [0.5, 0.9]})
    write_json(w.preflight(2), {"gain": 0.0, "ci95": [-0.25, 0.25]})
    return w


def test_both_gains_of_every_round_and_their_difference(workdir):
    first, second, third = gains(workdir, 3)
    assert [one["round"] for one in (first, second, third)] == [1, 2, 3]
    assert first["in_context"] == {"gain": 0.75, "ci95": [0.5, 0.9]}
    assert first["after"]["gain"] == 0.5 and first["error"] == 0.25
    assert second["after"]["gain"] == -0.25 and second["error"] == 0.25  # each from the last model
    assert third["in_context"] is None and third["error"] is None
    assert third["after"]["gain"] == 0.75
    assert mean_error([first, second, third]) == 0.25
    boards = list(map(str, BOARDS))
    wanted = paired_difference(passes(measured(0.25)), passes(measured(0.5)), boards)
    assert [second["after"]["gain"], *second["after"]["ci95"]] == list(wanted)
    low, high = second["after"]["ci95"]
    assert -1 <= low < -0.25 < high <= 1


def test_the_mean_error_does_not_cancel(workdir):
    write_json(workdir.preflight(2), {"gain": -0.75, "ci95": [-0.9, -0.5]})
    found = gains(workdir, 2)
    assert [one["error"] for one in found] == [0.25, -0.5]
    assert mean_error(found) == 0.375
    assert mean_error([]) is None


def test_files_of_older_versions_have_a_gain_without_an_interval(workdir):
    old = measured(0.5)
    del old["board_of"]
    write_json(workdir.evaluation(1, "consolidated"), old)
    (one,) = gains(workdir, 1)
    assert one["after"] == {"gain": 0.5, "ci95": None}
    assert "after consolidation +50.0 points; difference +25.0" in sentence([one], 1)


def test_other_numbers_of_maps_and_seeds_are_compared_as_far_as_they_can(workdir):
    write_json(workdir.start_evaluation, measured(0.0, seeds=5))
    assert gains(workdir, 1)[0]["after"]["ci95"] is not None  # seeds may differ
    short = {"pass_rate": 0.0, "passed": ["000"], "board_of": BOARDS[:3]}
    write_json(workdir.start_evaluation, short)
    assert gains(workdir, 1)[0]["after"] == {"gain": 0.5, "ci95": None}


def test_what_the_console_says(workdir):
    found = gains(workdir, 3)
    start = "gain: in context (pre-flight) +75.0 points [+50.0, +90.0], after consolidation +50.0"
    assert sentence(found, 1).startswith(start)
    assert sentence(found, 1).endswith("difference +25.0, 25.0 on average over 2 round(s)")
    assert sentence(found, 3) == ""
    workdir.evaluation(1, "consolidated").unlink()
    assert sentence(gains(workdir, 1), 1) == (
        "gain: in context (pre-flight) +75.0 points [+50.0, +90.0]"
    )
