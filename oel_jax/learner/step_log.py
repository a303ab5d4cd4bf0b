"""What the steps of a round measured: metrics, console, TensorBoard, and the table at the end.

The numbers of a step are on the device when its update has been dispatched. To fetch them is to
wait for it, so they are fetched later, when the device has work of the next step.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from oel_jax.distill.step import PLACES, Sums, Update
from oel_jax.learner.teacher import KnowledgePrefix, cache_bytes
from oel_jax.runs.console import Progress
from oel_jax.runs.metrics import Metrics, NoMetrics, Value, mean_values, read_metrics, table


@dataclass(frozen=True)
class Trained:
    """What micro-batches and update of a step measured.

    Attributes:
      sums, update: still on the device.
      batches: number of micro-batches.
      tokens: that student and teacher read.
      capacity: tokens that the micro-batches had room for, padding counted.
    """

    sums: Sums
    update: Update
    batches: int
    tokens: int
    capacity: int


@dataclass(frozen=True)
class Measured:
    """What a step measured.

    Attributes:
      step: its number, from 1.
      values: name -> number, or (sum, count); all that is known on the host.
      lengths: tokens of each answer.
      began, answered: when its rollouts began and ended, `time.monotonic()`.
      trained: None where the step had nothing to learn from.
    """

    step: int
    values: Mapping[str, Value]
    lengths: Sequence[int]
    began: float
    answered: float
    trained: Trained | None


class StepLog:
    """Takes what each step measured and writes it down once the next step is under way.

    Whoever needs a step's numbers, or its row in `metrics.jsonl` (a checkpoint: a run that resumes
    from it does not make the row again), calls `flush` first.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        round_number: int,
        metrics: Metrics | NoMetrics,
        progress: Progress,
    ):
        self._config, self._round = config, round_number
        self._metrics, self._progress = metrics, progress
        self._waiting: Measured | None = None
        self._fetched = 0.0  # when the numbers of the last step came: the device was done with it

    def add(self, measured: Measured) -> None:
        """A step's update was dispatched, or it had none."""
        self.flush()
        self._waiting = measured

    def flush(self) -> dict[str, float]:
        """Wait for the numbers that are not written yet, and write them; {} if there are none."""
        measured, self._waiting = self._waiting, None
        if measured is None:
            return {}
        step, trained, values = measured.step, measured.trained, dict(measured.values)
        # The device does one thing after another: until then it was busy with the step before.
        began, answered = (max(at, self._fetched) for at in (measured.began, measured.answered))
        timing = {"rollout_seconds": answered - began}
        if trained is not None:
            sums, update = jax.device_get((trained.sums, trained.update))
            self._fetched = time.monotonic()
            if update.skipped:
                print(f"step {step}: the gradient norm is not finite; the update was skipped")
            self._show_places(step, sums)
            values |= self._of_training(sums, update, trained.batches)
            seconds = self._fetched - answered
            timing["update_seconds"] = seconds
            timing["trained_tokens_per_second"] = trained.tokens / max(seconds, 1e-9)
            timing["packing"] = trained.tokens / trained.capacity
        tokens = sum(measured.lengths)
        timing["response_tokens_per_second"] = tokens / max(timing["rollout_seconds"], 1e-9)
        place = {"stage": "consolidate", "round": self._round}
        if measured.lengths:
            self._metrics.histogram("response_tokens", step, measured.lengths, **place)
        self._metrics.scalars(step=step, values=values, time_values=timing, **place)
        means = mean_values(values)
        self._progress.update(note=_note(means))
        return means

    def _of_training(self, sums: Sums, update: Update, batches: int) -> dict[str, Value]:
        """The metrics of a step that changed weights (spec 8.6)."""
        settings, count = self._config.consolidate, float(sums.tokens)
        values: dict[str, Value] = {
            "loss": float(sums.loss),
            "kl": (float(sums.kl), count),
            "mass_topk": (float(sums.mass), count),
            "student_entropy": (float(sums.student_entropy), count),
            "teacher_entropy": (float(sums.teacher_entropy), count),
            "grad_norm": float(update.grad_norm),
            "skipped": float(update.skipped),
            "micro_batches": float(batches),
        }
        if settings.mode == "on_policy" and settings.temperature == self._config.loss.temperature:
            values["log_prob_gap"] = (float(sums.log_prob_gap), count)
        if settings.retention != "none":
            values["retention_kl"] = (float(sums.retention), count)
        return values

    def _show_places(self, step: int, sums: Sums) -> None:
        """In TensorBoard: where in the answers student and teacher differ."""
        width = self._config.sampler.max_response / PLACES
        ends = [width * (place + 1) for place in range(PLACES)]
        kl = sums.kl_by_place / np.maximum(sums.tokens_by_place, 1)
        self._metrics.bars("kl_by_place", step, ends, kl, "consolidate", self._round)


def _note(values: Mapping[str, float]) -> str:
    """What the progress line says of a step, which may have had nothing to learn from."""
    answers = values.get("response_tokens")
    words = [] if answers is None else [f"{answers:.1f} tokens/answer"]
    words.append(f"loss {values['loss']:.4f}" if "loss" in values else "nothing to learn")
    return ", ".join(words)


_COLUMNS = {  # shown name -> metric, digits after the point
    "loss": ("loss", 4),
    "top-k mass": ("mass_topk", 5),
    "entropy": ("student_entropy", 4),
    "tokens/answer": ("response_tokens", 1),
    "gradient norm": ("grad_norm", 3),
}


def print_round(
    config: ml_collections.ConfigDict,
    metrics_file: Path,
    round_number: int,
    prefixes: Sequence[KnowledgePrefix],
) -> None:
    """A short table: how the loss moved, and what the teacher's prefixes held."""
    rows: list[dict[str, Any]] = [
        row["values"] | {"step": row["step"]}
        for row in read_metrics(metrics_file)
        if (row["stage"], row["round"]) == ("consolidate", round_number)
    ]
    idle = sum("loss" not in row for row in rows)
    if idle:
        c = config.consolidate
        print(
            f"{idle} of {len(rows)} steps had nothing to learn from and changed no weight: "
            f"config.consolidate.drop_remainder={c.drop_remainder}, turn_floor={c.turn_floor:g}"
        )
    shown = [rows[0], rows[len(rows) // 2], rows[-1]] if len(rows) > 2 else rows
    cells = [
        [
            row["step"],
            *(
                f"{float(row[key]):.{digits}f}" if key in row else "-"
                for key, digits in _COLUMNS.values()
            ),
        ]
        for row in shown
    ]
    print(table(cells, ["step", *_COLUMNS]))
    if prefixes:
        print(
            f"the teacher read {len(prefixes)} knowledge text(s) once, "
            f"{sum(len(p.ids) for p in prefixes)} tokens kept as {cache_bytes(prefixes) / 1e6:.1f} "
            "MB"
        )
