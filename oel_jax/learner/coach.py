"""Coach contexts: a text that the extractor writes for each single answer of a round.

The coach reads the situation, the answer that was given in it, and what came after; it says what
should have been done. All answers are independent, so that the slots of the sampler are never
empty. Every file of trajectories has a file of texts, one line an answer, which grows while answers
end: a kill loses those in progress and no other.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.config.budgets import extractor_budget
from oel_jax.data import answers
from oel_jax.data.coaching import fitted_prompt, transcript
from oel_jax.data.hindsight import later_parts, longest_part
from oel_jax.data.line_files import BadLine, LineWriter, decode_json, encode_json, numbered
from oel_jax.data.trajectories import DecisionPoint, Trajectory, decision_points
from oel_jax.data.trajectory_files import TrajectoryStore, read
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.keys import generation_key
from oel_jax.runs.policies import load_extractor
from oel_jax.runs.samplers import build_sampler, coach_layout, sampling
from oel_jax.runs.session import Run
from oel_jax.sampler.requests import Completion, Request

Name = tuple[tuple[Any, ...], int]  # what identifies a trajectory, number of the turn


@dataclass(frozen=True)
class _Call:
    """One answer to be coached, and the file that its text goes into."""

    trajectory: Trajectory
    point: DecisionPoint
    file: Path

    @property
    def name(self) -> Name:
        return self.trajectory.key, self.point.turn


def coach(run: Run, round_number: int) -> list[Path]:
    """Write a text for every deployed answer of a round; returns the files.

    Texts that are there are not written again.
    """
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    sources = store.files("deploy")
    files = [run.workdir.coach(round_number, source) for source in sources]
    pairs = processes.share(list(zip(sources, files, strict=True)))
    if pairs:
        _write(run, round_number, pairs)
    with waiting(f"round {round_number} coach: other processes write"):
        processes.wait("answers are coached")
    if processes.is_first():
        _log(run, round_number, files)
    return files


def written_texts(file: Path) -> dict[Name, str]:
    """The texts of a file by answer.

    Raises:
      UserError: it cannot be read, or a line is not of it (with its number).
    """
    found = {}
    try:
        with file.open("rb") as lines:
            for number, line in numbered(lines):
                try:
                    record = _decode(line)
                except ValueError as error:
                    raise UserError(
                        f"{file}:{number}: {error}; run the extract stage again"
                    ) from error
                found[_name(record)] = record["text"]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; run the extract stage again"
        ) from error
    return found


def _decode(line: bytes) -> dict[str, Any]:
    record = decode_json(line)
    kinds = {"trajectory": list, "turn": int, "text": str}
    if not isinstance(record, dict) or any(
        type(record.get(name)) is not kind for name, kind in kinds.items()
    ):
        raise BadLine("a coach's text needs trajectory, turn and text")
    return record


def _name(record: dict[str, Any]) -> Name:
    return tuple(record["trajectory"]), record["turn"]


def _open(file: Path) -> LineWriter[dict[str, Any]]:
    return LineWriter(file, _decode, encode_json, _name, sync_every=16)


def _write(run: Run, round_number: int, pairs: Sequence[tuple[Path, Path]]) -> None:
    """The texts of these (trajectories, texts) that are missing, in the order of the answers."""
    config = run.config
    for _, file in pairs:
        file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        writers = {file: opened.enter_context(_open(file)) for _, file in pairs}
        total, calls = 0, []
        for source, file in pairs:
            games = read(source)
            done = set(map(_name, writers[file].finished))
            found = [_Call(games[p.episode], p, file) for p in decision_points(games)]
            total += len(found)
            calls += [call for call in found if call.name not in done]
        if not calls:
            return
        model = load_extractor(config, run.workdir, round_number, run.host, today=run.today)
        opens = model.tokenizer.opens_thought(thinking=config.model.thinking)
        done = total - len(calls)
        label = f"round {round_number} coach"
        with Progress(
            total, "answers", label, every=config.log.console_every, done=done
        ) as progress:
            for call, answer in _in_order(calls, _answers(run, round_number, model, calls)):
                writers[call.file].write(_record(config, model, call, answer, opens))
                progress.update()


def _in_order(
    calls: Sequence[_Call], answered: Iterator[tuple[int, Completion]]
) -> Iterator[tuple[_Call, Completion]]:
    """In the order of the calls, so that files do not depend on which answer ended first."""
    early: dict[int, Completion] = {}
    following = 0
    for index, answer in answered:
        early[index] = answer
        while following in early:
            yield calls[following], early.pop(following)
            following += 1


def _answers(
    run: Run, round_number: int, model: LanguageModel, calls: Sequence[_Call]
) -> Iterator[tuple[int, Completion]]:
    """(number of the call, the coach's answer) as they end; as many at once as there are slots.

    Raises:
      preemption.Preempted: at a safe place after a notice.
    """
    config = run.config
    sizes = coach_layout(config, run.host.shape["fsdp"])
    sampler = build_sampler(config, model, run.host, sampling(config.extract), sizes)
    # Only those that are about to run are rendered: prompts of a whole round take much memory.
    waiting_calls = (
        _request(config, model, round_number, call, index) for index, call in enumerate(calls)
    )
    sampler.submit(islice(waiting_calls, sizes.slots))
    with preemption.holding():
        while sampler.busy:
            preemption.stop_if_noticed("finished texts are kept")
            for done in sampler.poll(model.params):
                yield done.tag, done
                sampler.submit(islice(waiting_calls, 1))


def _request(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    round_number: int,
    call: _Call,
    index: int,
) -> Request:
    tokenizer, thinking = model.tokenizer, config.model.thinking
    game, point = call.trajectory, call.point
    messages = point.dialogue.messages
    conversation = game.id is not None
    most, budget = extractor_budget(config)
    text = fitted_prompt(
        transcript(messages) if conversation else messages[-1]["content"].strip(),
        game.turns[point.turn].response.strip(),
        "\n\n".join(later_parts(game, point.turn, outcome_mode=config.extract.outcome)),
        conversation=conversation,
        most=most,
        count=lambda message: len(tokenizer.chat(message, thinking=thinking)),
    )
    ids = tokenizer.chat(text, thinking=thinking)
    key = generation_key(config, "coach", round_number, *game.key, point.turn)
    return Request(ids, key, budget, index)


def _record(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    call: _Call,
    answer: Completion,
    opens: bool,
) -> dict[str, Any]:
    """A text as it is saved.

    Args:
      opens: the prompt ends inside a thought.
    """
    response = model.tokenizer.decode(answer.ids)
    text, finished = answers.split_thought(
        response, config.extract.unfinished_thought, opened=opens
    )
    count = partial(_tokens, model)
    return {
        "trajectory": list(call.trajectory.key),
        "turn": call.point.turn,
        "text": longest_part((text or "").strip(), config.extract.l_max, count),
        "response": response,
        "thought_finished": finished,
        "stopped": answer.stopped,
        "response_tokens": len(answer.ids) - answer.stopped,
    }


def _tokens(model: LanguageModel, text: str) -> int:
    return len(model.tokenizer.encode(text))


def _log(run: Run, round_number: int, files: Sequence[Path]) -> None:
    """Metrics of a round's texts, and one line."""
    records = []
    for file in files:
        with file.open("rb") as lines:
            records += [_decode(line) for line in lines]
    count = len(records)
    empty = sum(not record["text"] for record in records)
    values = {
        "texts": float(count),
        "response_tokens": (sum(record["response_tokens"] for record in records), count),
        "unfinished_thoughts": (sum(not r["thought_finished"] for r in records), count),
        "empty": (empty, count),
    }
    run.metrics.rewind("coach", round_number, round_number - 1)
    run.metrics.scalars("coach", round_number, values, round=round_number)
    print(f"the coach wrote {count} text(s), one for each answer; {empty} of them are empty")
