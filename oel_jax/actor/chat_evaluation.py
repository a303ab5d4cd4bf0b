"""What is measured after a chat round, on the conversations that it held out.

Three policies answer at every held-out turn: P_r ("before"), P_r with the round's knowledge in its
prompt ("in_context"), and P_{r+1} ("consolidated"). There is no game to win, so what is measured is
how long the answers are and how many end by themselves, how far they are from the teacher, how
likely answers are that users have approved, and how likely a general text is that has nothing to do
with the conversations. A scorer of the user's own is reported, and never learned from. Nothing of
it is read by a later stage. Imports no game.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import write_json
from oel_jax.chat.render import render
from oel_jax.config.file import explain, load_module
from oel_jax.data.general_text import TEXT
from oel_jax.data.messages import NOTHING, Context, place_context
from oel_jax.data.trajectories import DecisionPoint, Trajectory, decision_points
from oel_jax.data.trajectory_files import Stored, read
from oel_jax.evaluate.likelihood import score
from oel_jax.learner.contexts import contexts_of_round
from oel_jax.learner.heldout import heldout_divergence
from oel_jax.learner.rollouts import all_answers, sample_of
from oel_jax.learner.teacher import Teacher
from oel_jax.learner.turn_contexts import points_to_learn
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.report.conversations import numbers_of
from oel_jax.runs.console import waiting
from oel_jax.runs.keys import generation_key
from oel_jax.runs.policies import load_player_of_round
from oel_jax.runs.samplers import build_sampler, layout, sampling
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import samples_of
from oel_jax.sampler.requests import Completion, Request

Scorer = Callable[[list[dict[str, Any]], str], float]
_PIECE = 512  # tokens of the general text that are read at once


def evaluate_round(run: Run, number: int) -> list[Path]:
    """All evaluations of chat round `number`; returns the files."""
    heldout = _Heldout(run, number)
    wanted = ["before", "in_context", "consolidated"]
    if not run.config.evaluate.in_context or not heldout.points:
        wanted.remove("in_context")
    files = [heldout.measure(name) for name in wanted]
    return files + [samples_of(file) for file in files]


def check_files(config: ml_collections.ConfigDict) -> None:
    """UserError if `evaluate.text_file` or `evaluate.scorer` cannot be used."""
    general_text(config)
    load_scorer(config.evaluate.scorer)


def general_text(config: ml_collections.ConfigDict) -> str:
    """The text whose likelihood is measured: the config's, or the one of the package."""
    path = config.evaluate.text_file
    if path is None:
        return TEXT
    where = f"config.evaluate.text_file={path}"
    try:
        text = paths.local(path, "config.evaluate.text_file").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if len(text.split()) < 2:
        raise UserError(f"{where} has hardly any text; give one of a few hundred words")
    return text


def load_scorer(name: str | None) -> Scorer | None:
    """The function that `evaluate.scorer` names as FILE.py:FUNCTION; None = none."""
    if name is None:
        return None
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"config.evaluate.scorer={name}: there is no file {file}")
    try:
        found = getattr(load_module(Path(file)), function, None)
    except Exception as error:
        raise explain(file, error) from None
    if not callable(found):
        raise UserError(f"config.evaluate.scorer={name}: {file} has no function {function}")
    return found


class _Heldout:
    """The held-out conversations of a round, and the policies that answer in them."""

    def __init__(self, run: Run, number: int):
        self._run, self._number = run, number
        file = run.workdir.heldout(number)
        # Another process may have written it: all ask the first.
        there = processes.from_first(file.exists())
        self._talks: list[Trajectory] = read(file) if there else []
        self.points: list[DecisionPoint] = decision_points(self._talks)

    @cached_property
    def _before(self) -> LanguageModel:
        return self._load(self._number)

    @cached_property
    def _after(self) -> LanguageModel:
        return self._load(self._number + 1)

    def _load(self, number: int) -> LanguageModel:
        run = self._run
        return load_player_of_round(run.config, run.workdir, number, run.host, today=run.today)

    @cached_property
    def _contexts(self) -> list[Context]:
        run = self._run
        return contexts_of_round(run.config, run.workdir, self._number, self._before.tokenizer)

    @cached_property
    def _teacher(self) -> Teacher:
        config = self._run.config
        teacher = Teacher(
            self._before,
            self._contexts,
            thinking=config.model.thinking,
            block=config.model.attention_block,
        )
        some = [self.points[index] for index in self._compared][:16]
        own = [self._compared[index] for index in self._compared][:16]
        teacher.prepare([point.dialogue for point in some], own)
        return teacher

    @cached_property
    def _compared(self) -> dict[int, Context | None]:
        """The points where policy and teacher are compared, and what that teacher reads alone.

        Contexts of single answers are those of the held-out answers themselves. A coach has not
        written any for them.
        """
        run = self._run
        if run.config.extract.experience == "coach":
            return {}
        file = run.workdir.heldout(self._number)
        episodes = [Stored(file, talk) for talk in self._talks]
        tokenizer = self._before.tokenizer
        found = points_to_learn(run.config, run.workdir, self._number, episodes, tokenizer)
        index_of = {(point.episode, point.turn): index for index, point in enumerate(self.points)}
        pairs = zip(*found, strict=True)
        return {index_of[point.episode, point.turn]: context for point, context in pairs}

    def measure(self, name: str) -> Path:
        """Measure one policy; returns the result's file. What is there is not done again."""
        run, number = self._run, self._number
        file = run.workdir.evaluation(number, f"conversations_{name}")
        if not processes.from_first(file.exists() and samples_of(file).exists()):
            model = self._after if name == "consolidated" else self._before
            with waiting(f"round {number} evaluate: {_TITLES[name]}"):
                answers = self._answers(name, model)
                work = partial(self._write, file, name, model, answers)
                processes.first_does(f"{name} is measured", work)
        result = processes.json_from_first(file)
        self._log(name, result)
        return file

    def _context(self, name: str, index: int) -> Context:
        """What a policy reads in addition at a point: the texts take turns."""
        return self._contexts[index % len(self._contexts)] if name == "in_context" else NOTHING

    def _prompt(self, name: str, index: int, model: LanguageModel) -> list[int]:
        point = self.points[index]
        if name != "in_context":
            return list(point.prompt_ids)
        thinking = self._run.config.model.thinking
        return render(
            model.tokenizer, point.dialogue, self._context(name, index), thinking=thinking
        )

    def _answers(self, name: str, model: LanguageModel) -> list[Completion]:
        """The policy's answers at all points, each with the same noise for all policies."""
        if not self.points:
            return []
        config, most = self._run.config, self._run.config.sampler.max_response
        requests = [
            Request(
                self._prompt(name, index, model),
                generation_key(config, "evaluate", self._number, "conversation", index),
                most,
            )
            for index in range(len(self.points))
        ]
        longest = max(len(request.prompt) for request in requests)
        fsdp = self._run.host.shape["fsdp"]
        sizes = layout(
            config,
            fsdp,
            prompt=longest,
            response=most,
            requests=-(-len(requests) // processes.count()),
        )
        sizes = replace(sizes, length=longest + most)
        sampler = build_sampler(config, model, self._run.host, sampling(config.evaluate), sizes)
        return all_answers(sampler, model.params, requests)

    def _write(
        self, file: Path, name: str, model: LanguageModel, answers: Sequence[Completion]
    ) -> None:
        """Measure what can be measured of a policy and its answers."""
        config, tokenizer = self._run.config, model.tokenizer
        texts = [tokenizer.decode(answer.ids) for answer in answers]
        lengths = [len(answer.ids) - answer.stopped for answer in answers]
        result: dict[str, Any] = {
            "conversations": len(self._talks),
            "answers": len(answers),
            "general": self._general(model) if name != "in_context" else None,
        }
        if answers:
            result |= {
                "response_tokens": float(np.mean(lengths)),
                "response_tokens_of": lengths,
                "cut_off": float(np.mean([not answer.stopped for answer in answers])),
                "kl": None if name == "in_context" else self._kl(model, answers),
                "approved": self._approved(model) if name != "in_context" else None,
            }
        scorer = load_scorer(config.evaluate.scorer)
        if scorer is not None and answers:
            result["score"] = self._score(scorer, texts)
        samples = [
            {
                "conversation": self._talks[point.episode].id,
                "turn": point.turn,
                "messages": [dict(message) for message in point.dialogue.messages],
                "knowledge": self._context(name, index).text,
                "answer": text,
                "tokens": length,
                "stopped": answer.stopped,
            }
            for index, (point, text, length, answer) in enumerate(
                zip(self.points, texts, lengths, answers, strict=True)
            )
        ]
        write_json(samples_of(file), {"answers": samples})
        write_json(file, result)

    def _kl(self, model: LanguageModel, answers: Sequence[Completion]) -> dict[str, float] | None:
        """KL(policy || teacher) over the policy's own answers; None if no teacher knows more."""
        samples = [
            sample_of(
                self._teacher, self.points[index], index % len(self._contexts), answers[index], own
            )
            for index, own in self._compared.items()
        ]
        if not samples:
            return None
        return heldout_divergence(self._run.config, model, self._teacher, samples)._asdict()

    def _approved(self, model: LanguageModel) -> dict[str, float] | None:
        """Mean log-probability of a token of the answers that users have approved."""
        pairs = [
            (point.prompt_ids, self._talks[point.episode].turns[point.turn].response_ids)
            for point in self.points
            if self._talks[point.episode].turns[point.turn].approved
        ]
        return _mean_log_prob(self._run.config, model, pairs)

    def _general(self, model: LanguageModel) -> dict[str, float]:
        """The same of the general text, which is read in pieces."""
        ids = model.tokenizer.encode(general_text(self._run.config))
        pieces = [ids[first : first + _PIECE] for first in range(0, len(ids), _PIECE)]
        pairs = [(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
        return _mean_log_prob(self._run.config, model, pairs)

    def _score(self, scorer: Scorer, texts: Sequence[str]) -> float:
        """Mean of what the user's own function says."""
        name, scores = self._run.config.evaluate.scorer, []
        for point, text in zip(self.points, texts, strict=True):
            messages = place_context(point.dialogue)
            try:
                scores.append(float(scorer(messages, text)))
            except Exception as error:
                raise explain(name.rpartition(":")[0], error) from None
        return float(np.mean(scores))

    def _log(self, name: str, result: dict[str, Any]) -> None:
        """In the metrics, TensorBoard and on the console."""
        run, number, stage = self._run, self._number, f"evaluate_conversations_{name}"
        values = numbers_of(result)
        run.metrics.rewind(stage, number, number - 1)
        run.metrics.scalars(stage, number, values, round=number)
        if result.get("response_tokens_of"):
            lengths = result["response_tokens_of"]
            run.metrics.histogram("response_tokens", number, lengths, stage, number)


_TITLES = {
    "before": "the policy before the round answers",
    "in_context": "the policy with knowledge in its prompt answers",
    "consolidated": "the consolidated policy answers",
}


def _mean_log_prob(
    config: ml_collections.ConfigDict, model: LanguageModel, pairs: Sequence[tuple[Any, Any]]
) -> dict[str, float] | None:
    """Mean log-probability of a token, natural logarithm, temperature 1; None without tokens."""
    tokens = sum(len(after) for _, after in pairs)
    if not tokens:
        return None
    block, budget = config.model.attention_block, config.consolidate.token_budget
    found = score(model, pairs, token_budget=budget, block=block)
    return {"log_prob": sum(one.total for one in found) / tokens, "tokens": tokens}
