"""What an optimizer step will need in memory, known before it runs, and what was used.

The parts that live through the step are counted from their shardings; the temporaries of a
micro-batch are the compiler's own number, since the step is compiled ahead for each of its shapes.
"""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from oel_jax.distill.step import StepConfig, Sums, accumulate
from oel_jax.runs.metrics import table


def used() -> str:
    """The most that was in use so far, as a phrase; not every device tells."""
    devices = jax.local_devices()
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if all(peaks):
        return f"{max(peaks) / 1e9:.2f} GB in use at most on a device so far"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"this device does not report its memory; the process held {most / 1e9:.2f} GB at most"


class Accumulator:
    """`accumulate`, compiled for each shape before it first runs.

    `held` are the bytes of one device that live through a step, by name. The prediction is printed
    when the first program is compiled, and again when one needs more.
    """

    def __init__(self, step: StepConfig, held: Mapping[str, int]):
        self._step, self._held = step, dict(held)
        self._programs: dict[Any, Any] = {}
        self.temporaries = 0  # bytes of the hungriest program so far

    @property
    def predicted(self) -> int:
        """Bytes of one device that a step needs."""
        return sum(self._held.values()) + self.temporaries

    def __call__(self, gradients: Any, *inputs: Any) -> tuple[Any, Sums]:
        """As `accumulate` without `step`; `inputs` in its order."""
        key = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(inputs))
        if key not in self._programs:
            program = accumulate.lower(gradients, *inputs, step=self._step).compile()
            self._programs[key] = program
            needs = int(program.memory_analysis().temp_size_in_bytes)
            if needs > self.temporaries:
                self.temporaries = needs
                batch = inputs[3]
                print(self._report(batch.sampled.shape, batch.student.tokens.shape))
        return self._programs[key](gradients, *inputs)

    def _report(self, responses: tuple[int, int], tokens: tuple[int, int]) -> str:
        rows = [[name, f"{size / 1e6:,.1f}"] for name, size in self._held.items()]
        rows.append(["temporaries of a micro-batch", f"{self.temporaries / 1e6:,.1f}"])
        rows.append(["predicted", f"{self.predicted / 1e6:,.1f}"])
        shape = f"{tokens[0]} rows of {tokens[1]} tokens, {responses[1]} of them answers at most"
        return f"micro-batches of {shape}\n" + table(rows, ["memory of a step", "MB per device"])
