"""Rows of packed examples: the batch of a pre-training step, made from the step's number alone."""

import dataclasses
import random
from collections.abc import Sequence

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
    encoder: Encoder, seed: int, step: int, packs: Sequence[tuple[int, int]], phase: str = "main"
) -> tuple[Batch, ...]:
    """The batch of `step`: fresh examples in one `Batch` for each (rows, length) of `packs`.

    Few long rows and many short ones cost less attention than equal ones. Examples are placed
    longest first into the first row with room; what finds none is left out. The same (seed, step)
    always gives the same batch, so an interrupted run resumes bit for bit.
    """
    rng = random.Random(f"nano pretraining {seed} {step}")
    capacity = sum(rows * length for rows, length in packs)
    longest = max(length for _, length in packs)
    drawn: list[tuple[int, list[int], list[int]]] = []
    total = 0
    while total < 0.97 * capacity:
        example = draw_example(rng, phase)
        prompt = encoder.prompt(example.prompt, example.thinking)
        reply = encoder.reply(example.reply)
        if len(prompt) + len(reply) > longest:
            continue
        drawn.append((TASK_NAMES.index(example.task), prompt, reply))
        total += len(prompt) + len(reply)
    drawn.sort(key=lambda item: -len(item[1]) - len(item[2]))
    batches = [_empty(rows, length) for rows, length in packs]
    # Shortest rows first: long ones are kept for what fits nowhere else.
    places = sorted(
        (length, index, row) for index, (rows, length) in enumerate(packs) for row in range(rows)
    )
    used = dict.fromkeys(places, 0)
    for task, prompt, reply in drawn:
        size = len(prompt) + len(reply)
        place = next((p for p in places if used[p] + size <= p[0]), None)
        if place is None:
            continue
        _, index, row = place
        _put(batches[index], row, used[place], prompt, reply, task)
        used[place] += size
    return tuple(batches)


def _empty(rows: int, length: int) -> Batch:
    shape = (rows, length)
    return Batch(
        *(np.zeros(shape, np.int32) for _ in range(4)),
        np.zeros(shape, np.float32),
        np.full(shape, len(TASK_NAMES), np.int32),
    )


def _put(
    batch: Batch, row: int, start: int, prompt: list[int], reply: list[int], task: int
) -> None:
    """Write one example into columns start.. of a row."""
    size = len(prompt) + len(reply)
    end = start + size
    answer = start + len(prompt) - 1  # the column whose target is the reply's first token
    batch.tokens[row, start:end] = prompt + reply
    batch.targets[row, start : end - 1] = batch.tokens[row, start + 1 : end]
    batch.positions[row, start:end] = np.arange(size)
    batch.segments[row, start:end] = batch.segments[row].max() + 1
    batch.weights[row, start:answer] = PROMPT_WEIGHT
    batch.weights[row, answer : end - 1] = 1.0
    batch.tasks[row, answer : end - 1] = task
