"""Rows of packed examples: the batch of a pre-training step, made from the step's number alone."""

import dataclasses
import random

import numpy as np
from jaxtyping import Float, Int

from oel_jax.nano.examples import TASKS, draw_example
from oel_jax.nano.vocabulary import Encoder

PROMPT_WEIGHT = 0.1
TASK_NAMES = tuple(TASKS)


@dataclasses.dataclass(frozen=True)
class Batch:
    """R packed rows of T tokens.

    Attributes:
      tokens, targets: ids and the ids that follow them.
      positions: rotary positions, restarting with every example.
      segments: example number within the row, from 1; 0 is padding.
      weights: loss weight of each target (1 in replies, `PROMPT_WEIGHT` in prompts, 0 elsewhere).
      tasks: index into `TASK_NAMES` of each reply target, len(TASK_NAMES) elsewhere.
    """

    tokens: Int[np.ndarray, "R T"]
    targets: Int[np.ndarray, "R T"]
    positions: Int[np.ndarray, "R T"]
    segments: Int[np.ndarray, "R T"]
    weights: Float[np.ndarray, "R T"]
    tasks: Int[np.ndarray, "R T"]

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The six arrays in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_batch(
    encoder: Encoder, seed: int, step: int, rows: int, length: int, phase: str = "main"
) -> Batch:
    """The batch of `step`: fresh examples, longest first into the first row with room.

    The same (seed, step) always gives the same batch, so an interrupted run goes on bit for bit.
    """
    rng = random.Random(f"nano pretraining {seed} {step}")
    drawn, total = [], 0
    while total < 0.97 * rows * length:
        example = draw_example(rng, phase)
        prompt, reply = encoder.prompt(example.prompt), encoder.reply(example.reply)
        if len(prompt) + len(reply) > length:
            continue
        drawn.append((TASK_NAMES.index(example.task), prompt, reply))
        total += len(prompt) + len(reply)
    drawn.sort(key=lambda item: -len(item[1]) - len(item[2]))
    shape = (rows, length)
    batch = Batch(
        *(np.zeros(shape, np.int32) for _ in range(4)),
        np.zeros(shape, np.float32),
        np.full(shape, len(TASK_NAMES), np.int32),
    )
    used, count = [0] * rows, [0] * rows
    for task, prompt, reply in drawn:
        size = len(prompt) + len(reply)
        row = next((r for r in range(rows) if used[r] + size <= length), None)
        if row is None:
            continue
        start, end = used[row], used[row] + size
        answer = start + len(prompt) - 1  # the column whose target is the reply's first token
        count[row] += 1
        batch.tokens[row, start:end] = prompt + reply
        batch.targets[row, start : end - 1] = batch.tokens[row, start + 1 : end]
        batch.positions[row, start:end] = np.arange(size)
        batch.segments[row, start:end] = count[row]
        batch.weights[row, start:answer] = PROMPT_WEIGHT
        batch.weights[row, answer : end - 1] = 1.0
        batch.tasks[row, answer : end - 1] = task
        used[row] = end
    return batch
