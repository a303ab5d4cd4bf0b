"""What came out of a study: numbers with intervals, table, CSV, JSON, verdicts on expectations."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oel_jax import environments
from oel_jax.base.files import read_json
from oel_jax.report.intervals import mean_over_seeds, paired_difference, seeds_and_boards_interval
from oel_jax.runs.metrics import read_metrics, table
from oel_jax.runs.workdir import Workdir
from oel_jax.study.definitions import Expectation, Measure, Planned, Point, Study

RATES = ("pass_rate", "skill")  # shown in percent


@dataclass(frozen=True)
class Number:
    """A mean with its 95 % interval; low and high are None where one seed leaves no interval."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cell:
    """One measure of one variant.

    Attributes:
      seeds: loop seeds that have it, in the order of `per_seed`.
      number: over these seeds (and over boards, for pass rates).
      to_start, to_baseline: paired difference to the starting models and to the baseline variant
        on the same seeds and boards; None where there is nothing to compare.
      paper: the paper's number.
    """

    variant: str
    measure: str
    value: str
    seeds: list[int]
    per_seed: list[float]
    number: Number
    to_start: Number | None
    to_baseline: Number | None
    paper: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether an expectation held, with the numbers."""

    name: str
    held: bool
    numbers: str


@dataclass(frozen=True)
class _Values:
    """A measure of one run: its value, and for a pass rate every game."""

    value: float
    passes: np.ndarray | None = None  # [evaluation seeds, maps]
    boards: tuple[str, ...] = ()


class Results:
    """All cells of a study, for tables, plots and the tests of expectations.

    Attributes:
      cells: (variant, measure) -> `Cell`; what was not measured is missing.
      failed: run 'variant/seed_0' -> message.
    """

    def __init__(self, study: Study, planned: Sequence[Planned], failed: dict[str, str]):
        self.study, self.failed = study, failed
        self._values: dict[tuple[str, str, int], _Values] = {}
        for run in planned:
            for measure in study.measures:
                found = _read(run, measure)
                if found:
                    self._values[run.variant.name, measure.name, run.seed] = found
                start = _read(run, _start_of(measure))
                if start:
                    self._values[run.variant.name, f"start {measure.value}", run.seed] = start
        self.cells: dict[Point, Cell] = {}
        for variant in study.variants:
            for measure in study.measures:
                cell = self._cell(variant.name, measure)
                if cell:
                    self.cells[variant.name, measure.name] = cell
        self.verdicts = [self._judge(expected) for expected in study.expectations]

    def mean(self, variant: str, measure: str) -> float:
        """The mean of a cell; NaN if it was not measured, so that no comparison holds."""
        cell = self.cells.get((variant, measure))
        return cell.number.mean if cell else math.nan

    # --- cells ------------------------------------------------------------------------------------

    def _cell(self, variant: str, measure: Measure) -> Cell | None:
        mine = self._of(variant, measure.name)
        if not mine:
            return None
        baseline = self.study.baseline
        to_start = to_baseline = None
        if measure.evaluation not in ("", "start", "start_skills") and not measure.per_start:
            to_start = _difference(mine, self._of(variant, f"start {measure.value}"))
        if baseline and variant != baseline:
            to_baseline = _difference(mine, self._of(baseline, measure.name))
        return Cell(
            variant,
            measure.name,
            measure.value,
            list(mine),
            [values.value for values in mine.values()],
            _number(list(mine.values())),
            to_start,
            to_baseline,
            self.study.paper.get((variant, measure.name)),
        )

    def _of(self, variant: str, measure: str) -> dict[int, _Values]:
        """Seed -> values, in the order of the study's seeds."""
        keys = [(variant, measure, seed) for seed in self.study.seeds]
        return {key[2]: self._values[key] for key in keys if key in self._values}

    # --- expectations -----------------------------------------------------------------------------

    def _judge(self, expected: Expectation) -> Verdict:
        if expected.test:
            held, numbers = expected.test(self)
            return Verdict(expected.name, bool(held), numbers)
        sides = [self.cells.get(side) for side in (expected.higher, expected.lower)]
        shown = [
            f"{', '.join(side)} {show(cell.number, cell.value) if cell else 'not measured'}"
            for side, cell in zip((expected.higher, expected.lower), sides, strict=True)
        ]
        above, below = sides
        held = bool(above and below) and above.number.mean > below.number.mean
        if held and expected.apart:
            low, high = above.number.low, below.number.high
            held = low is not None and high is not None and low > high
        return Verdict(expected.name, held, " against ".join(shown))

    # --- what is written --------------------------------------------------------------------------

    def text(self) -> str:
        """The tables and the verdicts, for the console."""
        study, blocks = self.study, []
        for measure in study.measures:
            cells = [self.cells.get((v.name, measure.name)) for v in study.variants]
            rows = [_row(cell) for cell in cells if cell]
            heads = ["mean [95 % interval]", "to start", f"to {study.baseline or '-'}"]
            if rows:
                blocks.append(table(rows, [measure.name, *heads, "paper"]))
        seeds = len(study.seeds)
        blocks.append(
            f"{seeds} loop seed(s). Intervals of pass rates: over loop seeds and boards; of other "
            "numbers: over loop seeds. Differences are paired on the same seeds and boards."
            + (" With one seed nothing is said about other seeds." if seeds == 1 else "")
        )
        for verdict in self.verdicts:
            held = "held" if verdict.held else "DID NOT HOLD"
            blocks.append(f"expected: {verdict.name}\n  {held}: {verdict.numbers}")
        for name, message in self.failed.items():
            blocks.append(f"FAILED: {name}: {message}")
        return "\n\n".join(blocks)

    def csv(self) -> str:
        """One line per cell; empty where there is no number."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        numbers = ("", "to_start_", "to_baseline_")
        columns = [f"{part}{end}" for part in numbers for end in ("mean", "low", "high")]
        writer.writerow(["variant", "measure", "value", "seeds", *columns, "paper"])
        for cell in self.cells.values():
            parts = (cell.number, cell.to_start, cell.to_baseline)
            cells = [v for p in parts for v in ((p.mean, p.low, p.high) if p else ("", "", ""))]
            cells = ["" if v is None else v for v in (*cells, cell.paper)]
            head = [cell.variant, cell.measure, cell.value, " ".join(map(str, cell.seeds))]
            writer.writerow([*head, *cells])
        return out.getvalue()

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON types."""
        study = self.study
        return {
            "study": study.name,
            "preset": study.preset,
            "about": study.about,
            "seeds": list(study.seeds),
            "baseline": study.baseline,
            "cells": [asdict(cell) for cell in self.cells.values()],
            "expectations": [asdict(verdict) for verdict in self.verdicts],
            "failed": self.failed,
        }


def _start_of(measure: Measure) -> Measure:
    """The same number of the starting model."""
    skills = measure.evaluation.endswith("skills")
    return Measure("start", "start_skills" if skills else "start", value=measure.value)


def _read(run: Planned, measure: Measure) -> _Values | None:
    """A measure of one run, or None if the run has not made it."""
    workdir = Workdir(run.workdir)
    if measure.stage:
        rows = [
            row["values"][measure.value]
            for row in (read_metrics(workdir.metrics_file) if workdir.root.is_dir() else [])
            if (row["stage"], row["round"]) == (measure.stage, measure.round)
            and measure.value in row["values"]
        ]
        return _Values(float(rows[-1])) if rows else None
    if measure.evaluation == "start":
        file = workdir.start_evaluation
    elif measure.evaluation == "start_skills":
        file = workdir.start_skills
    else:
        file = workdir.evaluation(measure.round, measure.evaluation)
    result = read_json(file) if file.exists() else {}
    if measure.value not in result:
        return None
    value = float(result[measure.value])
    if measure.per_start:
        first = _read(run, _start_of(measure))
        return _Values(value / first.value) if first and first.value else None
    if measure.value != "pass_rate":
        return _Values(value)
    passes = np.array([[int(won) for won in row] for row in result["passed"]], np.float64)
    seeds = environments.heldout_seeds(passes.shape[1])
    return _Values(value, passes, tuple(environments.board_ids(run.config.game.name, seeds)))


def _number(values: Sequence[_Values]) -> Number:
    if values[0].passes is None:
        return Number(*mean_over_seeds([v.value for v in values]))
    passes = np.stack([v.passes for v in values])
    return Number(*seeds_and_boards_interval(passes, values[0].boards))


def _difference(mine: dict[int, _Values], theirs: dict[int, _Values]) -> Number | None:
    """Paired difference on common seeds; None without any, or on other boards."""
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    if not pairs or pairs[0][0].boards != pairs[0][1].boards:
        return None
    if pairs[0][0].passes is None:
        return Number(*mean_over_seeds([a.value - b.value for a, b in pairs]))
    first, second = (np.stack([pair[i].passes for pair in pairs]) for i in range(2))
    return Number(*paired_difference(first, second, pairs[0][0].boards))


def show(number: Number, value: str, signed: bool = False) -> str:
    """'34.5% [30.1%, 39.0%]' for a pass rate, '22.10 [21.90, 22.30]' for another number."""
    sign = "+" if signed else ""

    def one(x: float) -> str:
        return f"{100 * x:{sign}.1f}%" if value in RATES else f"{x:{sign}.2f}"

    if number.low is None:
        return one(number.mean)
    return f"{one(number.mean)} [{one(number.low)}, {one(number.high)}]"


def _row(cell: Cell) -> list[str]:
    differences = (
        show(number, cell.value, signed=True) if number else "-"
        for number in (cell.to_start, cell.to_baseline)
    )
    paper = "-" if cell.paper is None else show(Number(cell.paper, None, None), cell.value)
    return [cell.variant, show(cell.number, cell.value), *differences, paper]
