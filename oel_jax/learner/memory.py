"""What an optimizer step will need in memory, known before it runs, and what was used.

What lives through the step is counted from the shardings; the temporaries of a micro-batch are the
compiler's own number, since the step is compiled ahead for each of its shapes.
"""

import resource
import sys
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import ml_collections

from oel_jax.distill.packing import MicroBatch
from oel_jax.distill.step import StepConfig, accumulate
from oel_jax.learner.student import TrainState
from oel_jax.learner.teacher import Teacher
from oel_jax.models.decoder import Params
from oel_jax.parallel.mesh import device_bytes
from oel_jax.parallel.offload import offloaded_parts
from oel_jax.runs.metrics import table
from oel_jax.sampler.sampler import Sampler


def peak_memory() -> str:
    """The most that was in use so far, as a phrase; not every device tells."""
    devices = jax.local_devices()
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if all(peaks):
        return f"{max(peaks) / 1e9:.2f} GB in use at most on a device so far"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"this device does not report its memory; the process held {most / 1e9:.2f} GB at most"


def held_bytes(
    config: ml_collections.ConfigDict, state: TrainState, teacher: Teacher, sampler: Sampler
) -> dict[str, int]:
    """Bytes of one device that live through an optimizer step, by name."""
    name = "adapter, float32" if config.lora.rank else "student, float32"
    away = offloaded_parts(config.consolidate)
    held = {
        name: device_bytes(state.params),
        "AdamW's moments": 0 if "optimizer" in away else device_bytes(state.optimizer),
        "gradients, float32": device_bytes(state.params),
        "teacher": device_bytes(teacher.model.params),
        "knowledge, encoded": device_bytes([prefix.cache for prefix in teacher.encoded]),
        "rollout cache": sampler.bytes,
    }
    if state.average is not None:
        held["teacher's average, float32"] = device_bytes(state.average)
    return held


def signature(arrays: Any) -> Hashable:
    """What a compiled program depends on: shapes, dtypes and places of its arrays."""
    leaves, structure = jax.tree.flatten(arrays)
    return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def compile_step(
    step: StepConfig, gradients: Params, *inputs: Any
) -> tuple[jax.stages.Compiled, int]:
    """`accumulate` for arrays like these, and the bytes of its temporaries on one device.

    Args:
      gradients, inputs: as `accumulate` takes them; nothing is computed.

    Returns:
      the program, which takes the same arguments without `step`; and the compiler's number.
    """
    program = accumulate.lower(gradients, *inputs, step=step).compile()
    return program, int(program.memory_analysis().temp_size_in_bytes)


def memory_table(held: Mapping[str, int], temporaries: int, batch: MicroBatch) -> str:
    """What a step on micro-batches like `batch` needs on a device: by name, and together."""
    rows = [[name, f"{size / 1e6:,.1f}"] for name, size in held.items()]
    rows.append(["temporaries of a micro-batch", f"{temporaries / 1e6:,.1f}"])
    rows.append(["predicted", f"{(sum(held.values()) + temporaries) / 1e6:,.1f}"])
    count, tokens = batch.student.tokens.shape
    shape = f"{count} rows of {tokens} tokens, {batch.sampled.shape[1]} of them answers at most"
    return f"micro-batches of {shape}\n" + table(rows, ["memory of a step", "MB per device"])
