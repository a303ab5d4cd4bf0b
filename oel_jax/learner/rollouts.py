"""The answers a consolidation step learns from: the student's own, or a demonstrator's.

`on_policy` is the method (spec 8.1): the student answers all prefixes of a step without knowledge.
`demonstrated` is the off-policy baseline (spec 10.2): P_r has already played with knowledge in its
prompt, and those answers are read from files. Either way the teacher reads the same answers behind
its own prompt, which carries the knowledge text that was drawn. Nothing here touches a game.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.data import prompts
from oel_jax.data.trajectories import Prefix, prefixes, read
from oel_jax.distill.packing import Sample
from oel_jax.errors import UserError
from oel_jax.learner.contexts import drawn_texts, own_contexts
from oel_jax.learner.teacher import Teacher
from oel_jax.machine import preemption
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.shared_prefix import SHARED_FROM, shared_start
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import on_host
from oel_jax.runs.session import Run
from oel_jax.sampler.requests import Completion, Request
from oel_jax.sampler.sampler import Sampler


def header(first: Sequence[Prefix]) -> tuple[int, ...]:
    """Ids that the prompts of the first step begin with: read once a step for all rollouts."""
    ids = shared_start([prefix.prompt_ids for prefix in first])
    return ids if len(ids) >= SHARED_FROM else ()


def on_policy(
    run: Run,
    round_number: int,
    number: int,
    weights: Any,
    teacher: Teacher,
    head: tuple[int, ...],
    sampler: Sampler,
) -> tuple[list[Sample], int]:
    """The student's answers to all prefixes of step `number`; and how many stopped by themselves.

    There may be none, see `_kept`.

    Args:
      weights: the student's, in the compute dtype.
      head: `header` of the first step's prefixes.
    """
    path = run.workdir.deploy_games(round_number, number)
    games = read(path)
    batch = _kept(run, prefixes(games))
    if not batch:
        return [], 0
    _check_ids(path, batch, teacher.model)
    requests = [
        Request(
            prefix.prompt_ids,
            run.key("consolidate", round_number, number, index),
            run.config.sampler.max_response,
            prefix=head,
        )
        for index, prefix in enumerate(batch)
    ]
    weights = run.played_with(on_host(weights, run.mesh, run.host))
    sampler.forget()  # the weights have changed
    answers = _all_answers(_own_answers(sampler, weights, processes.share(requests)))
    drawn = drawn_texts(round_number, number, len(batch), len(teacher.texts))
    own = own_contexts(run, games, teacher.model.tokenizer)
    samples = []
    for prefix, text, answer in zip(batch, drawn, answers, strict=True):
        shared, suffix = teacher.split(text, prefix.prompt, own[prefix.game])
        samples.append(
            Sample(
                prefix.prompt_ids, suffix, shared, answer.ids, answer.log_probs, text, prefix.game
            )
        )
    return samples, sum(answer.stopped for answer in answers)


def _kept(run: Run, batch: list[Prefix]) -> list[Prefix]:
    """The batch of a step without its last N mod `drop_remainder`: nothing, where it is shorter."""
    return batch[: len(batch) - len(batch) % max(run.config.consolidate.drop_remainder, 1)]


def _own_answers(
    sampler: Sampler, weights: Any, requests: Sequence[Request]
) -> list[Completion] | None:
    """This process's answers; None if it was told to stop."""
    try:
        return sampler.generate(weights, requests, preemption.stop_if_noticed)
    except preemption.Preempted:
        return None


def _all_answers(mine: Sequence[Completion] | None) -> list[Completion]:
    """The answers of all processes, in the order of all requests.

    Raises:
      preemption.Preempted: one of the processes has stopped before it had all; on all of them.
    """
    if processes.count() == 1 and mine is not None:
        return list(mine)
    plain = mine and [[c.ids, c.log_probs.tolist(), c.stopped] for c in mine]
    said = processes.exchange(plain)
    if None in said:
        raise preemption.Preempted
    return [
        Completion(None, ids, np.array(log_probs, np.float32), stopped)
        for ids, log_probs, stopped in processes.together(said)
    ]


def demonstrated(
    run: Run, round_number: int, number: int, teacher: Teacher
) -> tuple[list[Sample], int]:
    """What P_r answered with knowledge in its prompt, as answers to the prompts without it.

    An empty answer has no token to learn from and is left out.

    Raises:
      UserError: a prompt does not begin with the text that was drawn for its game.
    """
    path = run.workdir.demonstrations(round_number, number)
    games = read(path)
    answered = [p for p in prefixes(games) if games[p.game].turns[p.turn].response_ids]
    batch = _kept(run, answered)
    _check_ids(path, batch, teacher.model)
    drawn = drawn_texts(round_number, number, len(games), len(teacher.texts))
    tokenizer, thinking = teacher.model.tokenizer, run.config.model.thinking
    samples, stopped = [], 0
    for prefix in batch:
        text = drawn[prefix.game]
        try:
            plain = prompts.without_knowledge(prefix.prompt, teacher.texts[text])
        except UserError as error:
            raise UserError(f"{path}: game {prefix.game + 1}: {error}") from error
        response = games[prefix.game].turns[prefix.turn].response_ids
        shared, suffix = teacher.split(text, plain)
        # The sampler's log-probabilities are those of another prompt: there is nothing to compare.
        none = np.zeros(len(response), np.float32)
        ids = tokenizer.chat(plain, thinking=thinking)
        samples.append(Sample(ids, suffix, shared, response, none, text, prefix.game))
        stopped += response[-1] in tokenizer.stop_ids
    return samples, stopped


def _check_ids(path: Path, batch: Sequence[Prefix], model: LanguageModel) -> None:
    """Ids come from a file: refuse what this model cannot have read."""
    highest = max((max(prefix.prompt_ids) for prefix in batch), default=0)
    if highest >= model.cfg.vocab_size:
        raise UserError(
            f"{path}: prompt id {highest} does not exist in {model.directory} (vocabulary "
            f"{model.cfg.vocab_size}); the trajectories come from another model: deploy this one"
        )
