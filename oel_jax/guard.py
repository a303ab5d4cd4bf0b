"""Guards: a round that leaves a declared band is stopped, and its last good state is kept.

Answers that shrink or swell and a policy that becomes certain or random are early signs of a
collapse that the loss does not show. What is measured in a step belongs to the weights before its
update, so a checkpoint is good once the step after it was within the bands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oel_jax.metrics import read as read_metrics
from oel_jax.run import Run

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


def broken(run: Run, step: int, values: Mapping[str, float]) -> Broken | None:
    """The first measure of a step that is out of its band, or None.

    Bands are factors of the same number in the very first step of the run, so that a slow drift
    over many rounds is seen as well.
    """
    for measure, field in BANDS.items():
        band = run.config.guard[field]
        if not band or measure not in values:  # a step that had nothing to learn from
            continue
        low, high = (factor * _first_value(run, measure) for factor in band)
        if not low <= values[measure] <= high:
            return Broken(step, measure, values[measure], low, high)
    return None


def _first_value(run: Run, measure: str) -> float:
    """The measure in the first step of the run that has it."""
    for row in read_metrics(run.workdir.metrics_file):
        if row["stage"] == "consolidate" and measure in row["values"]:
            return row["values"][measure]
    raise AssertionError("a step is logged before it is judged")
