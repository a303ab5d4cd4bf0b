"""Samples -> packed micro-batches of one shape.

A sample is a prefix with the student's response, and the teacher's prompt for it. Samples that
share a knowledge text are packed into rows, several to a row, kept apart by segment ids; a
micro-batch is a fixed number of rows of one text, so that the teacher can attend to that text's
cached prefix. Every sample carries its own weight, so the packing cannot change the result: the
denominator is that of the whole step (spec 8.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float, Int

from oel_jax.models.lengths import padded_length
from oel_jax.parallel.arrays import Leaf


@dataclass(frozen=True)
class Sample:
    """One prefix of a step.

    Attributes:
      prompt: student's prompt ids.
      suffix: teacher's prompt ids after the first `shared` ones, at least one.
      shared: how many positions of the knowledge prefix the teacher's prompt begins with.
      response: the student's response ids.
      log_probs: their log-probabilities when they were sampled.
      knowledge: index of the text the teacher sees.
      game: index of the game within the step; the prefixes of a game are one trajectory.
    """

    prompt: Sequence[int]
    suffix: Sequence[int]
    shared: int
    response: Sequence[int]
    log_probs: np.ndarray
    knowledge: int
    game: int = 0

    @property
    def student_length(self) -> int:
        """Input tokens: the last response token is predicted, never read."""
        return len(self.prompt) + len(self.response) - 1

    @property
    def teacher_length(self) -> int:
        return len(self.suffix) + len(self.response) - 1


@jax.tree_util.register_dataclass
@dataclass
class View:
    """What one model reads: B rows of T tokens, R predicting positions per row.

    `shared` counts the prefix positions each token may see (all 0 for the student); `predict` is
    the column whose hidden state predicts each response token.
    """

    tokens: Int[Leaf, "B T"]
    positions: Int[Leaf, "B T"]
    segments: Int[Leaf, "B T"]
    shared: Int[Leaf, "B T"]
    predict: Int[Leaf, "B R"]


@jax.tree_util.register_dataclass
@dataclass
class MicroBatch:
    """Student and teacher views of the same response tokens; weight 0 is padding.

    `place` says in which of `places` equal parts of the longest answer a token is.
    """

    student: View
    teacher: View
    sampled: Int[Leaf, "B R"]
    log_prob: Float[Leaf, "B R"]
    weight: Float[Leaf, "B R"]
    mask: Float[Leaf, "B R"]
    place: Int[Leaf, "B R"]


SHORTEST_ROW = 64  # tokens


@dataclass(frozen=True)
class Shape:
    """Rows, tokens per row and response tokens per row of a micro-batch."""

    rows: int
    tokens: int
    responses: int


@dataclass
class _Row:
    """A row being filled."""

    samples: list[int] = field(default_factory=list)
    student: int = 0
    teacher: int = 0
    responses: int = 0


def plan(
    samples: Sequence[Sample], token_budget: int, fsdp: int
) -> tuple[Shape, list[tuple[int, list[list[int]]]]]:
    """One shape for all micro-batches of a step, and which samples go into which row of which.

    A row holds about two of the longest samples; its response capacity is a whole number of eighths
    of it, enough for the step's mean share of response tokens. Rows are filled text by text, first
    fit by decreasing length. A micro-batch has as many rows as the fullest text needs, as long as
    that stays within `token_budget` tokens (a single row per device may exceed it).

    Returns:
      the shape, and (knowledge index, rows of sample indices) per micro-batch.
    """
    lengths = [max(s.student_length, s.teacher_length) for s in samples]
    longest = max(lengths)
    tokens = padded_length(longest, SHORTEST_ROW)
    if 2 * tokens * fsdp <= token_budget:
        tokens = padded_length(2 * longest, SHORTEST_ROW)
    share = sum(len(s.response) for s in samples) / sum(lengths)
    eighth = tokens // 8
    wanted = max(share * tokens * 1.1, max(len(s.response) for s in samples))
    responses = min(tokens, -(-int(np.ceil(wanted)) // eighth) * eighth)

    filled: dict[int, list[list[int]]] = {}
    for index in sorted(range(len(samples)), key=lambda i: (samples[i].knowledge, -lengths[i])):
        filled.setdefault(samples[index].knowledge, []).append(index)
    for text, indices in filled.items():
        rows: list[_Row] = []
        for index in indices:
            _place(rows, index, samples[index], tokens, responses)
        filled[text] = [row.samples for row in rows]
    most = max(len(rows) for rows in filled.values())
    allowed = max(1, token_budget // (tokens * fsdp)) * fsdp
    step = 4 * fsdp  # few different row counts, hence few compilations
    count = min(allowed, -(-most // step) * step)
    shape = Shape(count, tokens, responses)
    return shape, [
        (text, rows[start : start + count])
        for text, rows in filled.items()
        for start in range(0, len(rows), count)
    ]


def _place(rows: list[_Row], index: int, sample: Sample, tokens: int, capacity: int) -> None:
    """Put a sample into the first row with room, or a new one."""
    student, teacher, responses = (
        sample.student_length,
        sample.teacher_length,
        len(sample.response),
    )
    for row in rows:
        if (
            row.student + student <= tokens
            and row.teacher + teacher <= tokens
            and row.responses + responses <= capacity
        ):
            break
    else:
        row = _Row()
        rows.append(row)
    row.samples.append(index)
    row.student += student
    row.teacher += teacher
    row.responses += responses


def fill(
    samples: Sequence[Sample],
    weights: Sequence[float],
    rows: list[list[int]],
    shape: Shape,
    longest: int = 1,
    places: int = 1,
) -> MicroBatch:
    """The arrays of one micro-batch; `weights[i]` applies to every response token of sample i.

    longest, places: an answer of `longest` tokens goes through all `places` of `MicroBatch.place`.
    """
    student, teacher = _empty_view(shape), _empty_view(shape)
    flat = (shape.rows, shape.responses)
    sampled, place = (np.zeros(flat, np.int32) for _ in range(2))
    log_prob, weight, mask = (np.zeros(flat, np.float32) for _ in range(3))
    for r, row in enumerate(rows):
        at_student = at_teacher = at_response = 0
        for segment, index in enumerate(row, 1):
            s = samples[index]
            here = slice(at_response, at_response + len(s.response))
            _write(student, r, at_student, segment, s.prompt, s.response, 0, here)
            _write(teacher, r, at_teacher, segment, s.suffix, s.response, s.shared, here)
            sampled[r, here] = s.response
            log_prob[r, here] = s.log_probs
            weight[r, here] = weights[index]
            mask[r, here] = 1.0
            place[r, here] = np.minimum(np.arange(len(s.response)) * places // longest, places - 1)
            at_student += s.student_length
            at_teacher += s.teacher_length
            at_response = here.stop
    return MicroBatch(student, teacher, sampled, log_prob, weight, mask, place)


def _empty_view(shape: Shape) -> View:
    wide = [np.zeros((shape.rows, shape.tokens), np.int32) for _ in range(4)]
    return View(*wide, np.zeros((shape.rows, shape.responses), np.int32))


def _write(
    view: View,
    row: int,
    start: int,
    segment: int,
    prompt: Sequence[int],
    response: Sequence[int],
    shared: int,
    here: slice,
) -> None:
    """One sample into one row of a view; positions continue after the shared prefix."""
    length = len(prompt) + len(response) - 1
    columns = slice(start, start + length)
    view.tokens[row, columns] = [*prompt, *response[:-1]]
    view.positions[row, columns] = shared + np.arange(length)
    view.segments[row, columns] = segment
    view.shared[row, columns] = shared
    first = start + len(prompt) - 1
    view.predict[row, here] = first + np.arange(len(response))
