"""Numbers of a step are fetched while the next one runs; whoever needs them earlier gets them."""

import importlib

import pytest
from tiny_run import copy_of, go, tiny_config

from oel_jax.runs.metrics import read_metrics

module = importlib.import_module("oel_jax.learner.consolidate")


def rows_of(work):
    """Rows of consolidation without what depends on the clock."""
    rows = read_metrics(work / "metrics.jsonl")
    return [
        {name: row[name] for name in ("step", "values")}
        for row in rows
        if row["stage"] == "consolidate"
    ]


@pytest.mark.parametrize(
    "changes, written",
    [
        (dict(consolidate__save_every=1000), [(0, 0), (0, 1), (1, 2)]),
        (dict(consolidate__save_every=2), [(0, 0), (0, 1), (2, 2)]),
        (
            dict(consolidate__save_every=1000, guard__entropy=(0.01, 100.0)),
            [(0, 0), (1, 1), (2, 2)],
        ),
    ],
    ids=["late", "checkpoint", "guard"],
)
def test_when_a_row_is_written(finished_run, tmp_path, monkeypatch, changes, written):
    """Rows before and after the rollouts of each step; the rows are the same in any case."""
    work, seen, real = tmp_path / "run", [], module.student_samples
    copy_of(finished_run, work, "consolidate", "evaluate")

    def watched(*arguments):
        before = len(rows_of(work))
        made = real(*arguments)
        seen.append((before, len(rows_of(work))))
        return made

    monkeypatch.setattr(module, "student_samples", watched)
    go(work, tiny_config(**changes), ["consolidate"], change=True)
    assert seen == written
    assert rows_of(work) == rows_of(finished_run)
    name = "round_001/policy/model.safetensors"
    assert (work / name).read_bytes() == (finished_run / name).read_bytes()
