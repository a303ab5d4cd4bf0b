"""Guards: a round that leaves a declared band is stopped, and its last good state is kept.

Answers that shrink or swell and a policy that becomes certain or random are early signs of a
collapse that the loss does not show. What is measured in a step belongs to the weights before its
update, so a checkpoint is good once the step after it was within the bands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oel_jax.parallel import processes
from oel_jax.runs.metrics import read_metrics

# Guarded metric of consolidation -> field of config.guard with its band, as factors of the start.
BANDS = {"response_tokens": "response_tokens", "student_entropy": "entropy"}


@dataclass(frozen=True)
class Broken:
    """What left its band.

    Attributes:
      step: the optimizer step in which it was seen.
      measure, value: what was seen.
      low, high: the band.
    """

    step: int
    measure: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.measure} is {self.value:.4g}, outside "
            f"[{self.low:.4g}, {self.high:.4g}]"
        )


def watches(config: Any) -> bool:
    """Whether a step of consolidation is watched at all."""
    return any(config.guard[field] for field in BANDS.values())


class Guard:
    """Judges the steps of a round; to be made once its rows in `metrics.jsonl` are rewound.

    Bands are factors of the same number in the very first step of the run, so that a slow drift
    over many rounds is seen as well. Process 0 has those numbers: it reads them once, keeps them in
    memory, decides, and tells the others.
    """

    def __init__(self, config: Any, metrics_file: Path):
        self._bands = {
            measure: config.guard[field] for measure, field in BANDS.items() if config.guard[field]
        }
        self._first: dict[str, float] = {}
        if self._bands and processes.is_first():
            for row in read_metrics(metrics_file):
                if row["stage"] == "consolidate":
                    self._remember(row["values"])

    def _remember(self, values: Mapping[str, Any]) -> None:
        for measure in self._bands.keys() & values.keys():
            self._first.setdefault(measure, float(values[measure]))  # "NaN" is a text in the file

    def broken(self, step: int, values: Mapping[str, float]) -> Broken | None:
        """The first measure of a step that is out of its band, or None; the same on all processes.

        Args:
          values: the step's numbers by name, as they are logged; those of process 0 count. A step
            that had nothing to learn from lacks some.
        """
        if not self._bands:
            return None
        found = processes.from_first(self._judge(values) if processes.is_first() else None)
        return Broken(step, *found) if found else None

    def _judge(self, values: Mapping[str, float]) -> tuple[str, float, float, float] | None:
        self._remember(values)
        for measure, band in self._bands.items():
            if measure not in values:
                continue
            low, high = (factor * self._first[measure] for factor in band)
            if not low <= values[measure] <= high:
                return measure, values[measure], low, high
        return None
