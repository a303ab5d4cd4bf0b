"""The answers a consolidation step learns from: the student's own, or a demonstrator's.

`student_samples` is the method (spec 8.1): the student answers at all decision points of a step
without a context. `demonstrator_samples` is the off-policy baseline (spec 10.2): P_r has already
played with a context, and those answers are read from the store. Either way the teacher reads the
same answers after its own prompt, which has the context that was drawn. Nothing here touches a
game.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.config.chat_checks import is_chat
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import DecisionPoint, decision_points
from oel_jax.data.trajectory_files import Stored, TrajectoryStore
from oel_jax.distill.packing import Sample
from oel_jax.learner.contexts import draw_texts
from oel_jax.learner.teacher import Teacher
from oel_jax.learner.turn_contexts import points_to_learn
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.lengths import SHARED_FROM, shared_start
from oel_jax.parallel import processes
from oel_jax.runs.keys import generation_key
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.requests import Completion, Request
from oel_jax.sampler.sampler import Sampler


class Step(NamedTuple):
    """Which optimizer step of which round, both from 1."""

    round: int
    number: int


def episodes_of_step(
    config: ml_collections.ConfigDict, store: TrajectoryStore, purpose: str, number: int
) -> list[Stored]:
    """The trajectories that optimizer step `number` (from 1) learns from.

    Each step takes the next `deploy.games_per_step` of the store, in its order, whatever files they
    are in. Conversations that have all been used come again, in another order: there may be fewer
    than the steps ask for.
    """
    size = config.deploy.games_per_step
    first, end = (number - 1) * size, number * size
    if not is_chat(config):
        return store.read(purpose, first, end)
    count = store.count(purpose)
    places = [_place(config.seed, count, position) for position in range(first, end)]
    return [store.read(purpose, place, place + 1)[0] for place in places]


def _place(seed: int, count: int, position: int) -> int:
    """Which of `count` conversations comes at a position of the round, both from 0.

    First all of them in the order of the store, then again and again in an order of the seed.
    """
    if not count:
        return position  # the store says that there is none
    epoch, index = divmod(position, count)
    if not epoch:
        return index
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order[index]


def common_beginning(points: Sequence[DecisionPoint]) -> tuple[int, ...]:
    """Ids that the prompts of the first step begin with: read once a step for all rollouts.

    () if they are too few to matter, if there are no points, or if some have no ids:
    `student_samples` refuses them.
    """
    if not points or any(point.prompt_ids is None for point in points):
        return ()
    ids = shared_start([point.prompt_ids for point in points])
    return ids if len(ids) >= SHARED_FROM else ()


def student_samples(
    config: ml_collections.ConfigDict,
    step: Step,
    episodes: Sequence[Stored],
    weights: Any,
    teacher: Teacher,
    beginning: tuple[int, ...],
    sampler: Sampler,
    workdir: Workdir,
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[list[Sample], int]:
    """The student's answers at all decision points; and how many stopped by themselves.

    There may be none, see `_drop_remainder`.

    Args:
      weights: the student's, as the sampler reads them.
      beginning: `common_beginning` of the first step.
      workdir: where contexts of single answers are.
      meanwhile: called now and then while the device samples, first when its work is dispatched.
    """
    tokenizer = teacher.model.tokenizer
    points, own = points_to_learn(config, workdir, step.round, episodes, tokenizer)
    points = _drop_remainder(config, points)
    if not points:
        return [], 0
    _check_ids(episodes, points, teacher.model)
    requests = [
        Request(
            point.prompt_ids,
            generation_key(config, "consolidate", step.round, step.number, index),
            config.sampler.max_response,
            prefix=beginning,
        )
        for index, point in enumerate(points)
    ]
    sampler.forget()  # the weights have changed
    answers = all_answers(sampler, weights, requests, meanwhile)
    drawn = draw_texts(step.round, step.number, len(points), len(teacher.contexts))
    samples = [
        sample_of(teacher, point, number, answer, context)
        for point, context, number, answer in zip(
            points, own[: len(points)], drawn, answers, strict=True
        )
    ]
    return samples, sum(answer.stopped for answer in answers)


def sample_of(
    teacher: Teacher,
    point: DecisionPoint,
    number: int,
    answer: Completion,
    own: Context | None = None,
) -> Sample:
    """An answer to a decision point, as the teacher reads it with shared context `number`.

    Args:
      own: a context of this point alone, in place of the shared one.
    """
    shared, suffix = teacher.split(number, point.dialogue, own)
    ids, log_probs = answer.ids, answer.log_probs
    return Sample(point.prompt_ids, suffix, shared, ids, log_probs, number, point.episode)


def _drop_remainder(
    config: ml_collections.ConfigDict, points: list[DecisionPoint]
) -> list[DecisionPoint]:
    """A step's points without the last N mod `drop_remainder`: nothing, where there are fewer."""
    return points[: len(points) - len(points) % max(config.consolidate.drop_remainder, 1)]


def all_answers(
    sampler: Sampler,
    weights: Any,
    requests: Sequence[Request],
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Completion]:
    """The answers to all requests, in their order; each process makes its share of them.

    Args:
      meanwhile: called between dispatches.
    """
    return _gathered(_own_answers(sampler, weights, processes.share(requests), meanwhile))


def _own_answers(
    sampler: Sampler, weights: Any, requests: Sequence[Request], meanwhile: Callable[[], object]
) -> list[Completion] | None:
    """This process's answers; None if it was told to stop."""

    def safe_place() -> None:
        meanwhile()
        preemption.stop_if_noticed()

    try:
        return sampler.generate(weights, requests, safe_place)
    except preemption.Preempted:
        return None


def _gathered(mine: Sequence[Completion] | None) -> list[Completion]:
    """The answers of all processes, in the order of all requests.

    Raises:
      preemption.Preempted: one of the processes has stopped before it had all; on all of them.
    """
    if processes.count() == 1 and mine is not None:
        return list(mine)
    plain = mine and [[c.ids, c.log_probs.tolist(), c.stopped] for c in mine]
    received = processes.exchange(plain)
    if None in received:
        raise preemption.Preempted
    return [
        Completion(None, ids, np.array(log_probs, np.float32), stopped)
        for ids, log_probs, stopped in processes.together(received)
    ]


def demonstrator_samples(
    config: ml_collections.ConfigDict, step: Step, episodes: Sequence[Stored], teacher: Teacher
) -> tuple[list[Sample], int]:
    """What P_r answered with a context, as answers to the prompts without it.

    An empty answer has no token to learn from and is left out.

    Raises:
      UserError: a game was played with another context than was drawn for it.
    """
    games = [stored.trajectory for stored in episodes]
    answered = [
        point
        for point in decision_points(games)
        if games[point.episode].turns[point.turn].response_ids
    ]
    points = _drop_remainder(config, answered)
    _check_ids(episodes, points, teacher.model)
    drawn = draw_texts(step.round, step.number, len(games), len(teacher.contexts))
    tokenizer, thinking = teacher.model.tokenizer, config.model.thinking
    samples, stopped = [], 0
    for point in points:
        number, game = drawn[point.episode], games[point.episode]
        if _read(game.context) != _read(teacher.contexts[number]):
            raise UserError(
                f"{episodes[point.episode].path}: the game of seed {game.seed} was not played with "
                "the knowledge that was drawn for it, or with it in another place; the round's "
                "texts or config.extract.place have changed since: run the demonstrate stage again "
                "in a new --workdir"
            )
        response = game.turns[point.turn].response_ids
        shared, suffix = teacher.split(number, point.dialogue)
        # The sampler's log-probabilities are those of another prompt: there is nothing to compare.
        none = np.zeros(len(response), np.float32)
        ids = render(tokenizer, point.dialogue, thinking=thinking)
        samples.append(Sample(ids, suffix, shared, response, none, number, point.episode))
        stopped += response[-1] in tokenizer.stop_ids
    return samples, stopped


def _read(context: Context | None) -> tuple[str, str]:
    """(text, place) of what was read in addition; an empty text has no place."""
    return (context.text, context.place) if context and context.text else ("", "")


def _check_ids(
    episodes: Sequence[Stored], points: Sequence[DecisionPoint], model: LanguageModel
) -> None:
    """Ids come from a file: refuse what this model cannot have read."""
    for point in points:
        path = episodes[point.episode].path
        if point.prompt_ids is None:
            raise UserError(
                f"{path}: {episodes[point.episode].trajectory!r} has no ids: another model than "
                "ours answered, and such trajectories cannot be trained on"
            )
        highest = max(point.prompt_ids)
        if highest >= model.cfg.vocab_size:
            raise UserError(
                f"{path}: prompt id {highest} does not exist in {model.directory} (vocabulary "
                f"{model.cfg.vocab_size}); the trajectories come from another model: deploy this "
                "one"
            )
