"""User side of a round: the deployed policy plays, and its games become trajectories.

Two disjoint collections are made with the same frozen policy (paper Algorithm 1): games for
knowledge (T, one file per chain, evaluation sampling) and games whose prefixes are trained on
(T', one file per optimizer step, plain temperature). Every game is played without knowledge, but
for the demonstrations that the off-policy baselines train on.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from oel_jax import environments
from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.config import negative_control
from oel_jax.config.defaults import play_budget
from oel_jax.data.prompts import play_prompt
from oel_jax.data.trajectories import Trajectory, TrajectoryWriter, Turn, read, write_line
from oel_jax.errors import UserError
from oel_jax.files import write_bytes
from oel_jax.learner.contexts import drawn_texts, texts_of_round
from oel_jax.machine import preemption
from oel_jax.models.language_model import LanguageModel
from oel_jax.models.shared_prefix import SHARED_FROM, common_prefix
from oel_jax.parallel import processes
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.metrics import table
from oel_jax.runs.samplers import sampling
from oel_jax.runs.session import Run
from oel_jax.sampler.requests import Completion, Request
from oel_jax.sampler.sampler import Sampler
from oel_jax.sampler.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """One game to be played.

    Attributes:
      seed: board.
      knowledge: text for the prompt; '' plays without.
      key: (purpose, parts...) the randomness of the game depends on.
      chain: chain seed index for evaluation and extraction games, None for deploy games.
      tag: for the caller.
      game: name of the game; '' is the config's.
    """

    seed: int
    key: tuple[object, ...]
    knowledge: str = ""
    chain: int | None = None
    tag: object = None
    game: str = ""


@dataclass
class Played:
    """A finished game.

    Attributes:
      tokens: response tokens per turn, the stop token not counted (spec 9.1).
    """

    job: Job
    game: environments.Game
    turns: list[Turn]
    tokens: list[int]


class _Seat:
    """A game in progress: makes the next request, takes the response."""

    def __init__(self, run: Run, model: LanguageModel, job: Job, prefix: tuple[int, ...]):
        self._run, self._model, self._prefix = run, model, prefix
        game = environments.make(job.game or run.config.game.name, job.seed, run.config.game.layout)
        self.played = Played(job, game, [], [])

    def request(self) -> Request:
        """The prompt of the current turn."""
        played, run = self.played, self._run
        self._prompt = play_prompt(
            played.game.situation(), played.job.knowledge, run.config.game.wrapper
        )
        self._observation = played.game.observation()
        thinking = run.config.model.thinking
        self._ids = self._model.tokenizer.chat(self._prompt, thinking=thinking)
        job = played.job
        parts = (*job.key, job.seed, played.game.turns)
        key = run.key(*parts) if job.chain is None else run.chain_key(job.chain, *parts)
        limit = run.config.sampler.max_response
        return Request(self._ids, key, limit, self, prefix=self._prefix, session=self)

    def respond(self, done: Completion) -> None:
        """Let the model's response act on the game and record the turn."""
        text = self._model.tokenizer.decode(done.ids)
        action = self.played.game.step(text)
        self.played.turns.append(
            Turn(self._prompt, self._ids, text, done.ids, action, self._observation)
        )
        self.played.tokens.append(len(done.ids) - done.stopped)


def check_first_prompts(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> None:
    """UserError if the game's first prompt is longer than `sampler.max_prompt`.

    Asked before weights are loaded. What a whole game needs is read off a scripted one.
    """
    game = environments.make(config.game.name, environments.heldout_seeds(1)[0], config.game.layout)

    def tokens() -> int:
        prompt = play_prompt(game.situation(), wrapper=config.game.wrapper)
        return len(tokenizer.chat(prompt, thinking=config.model.thinking))

    first, most = tokens(), config.sampler.max_prompt
    if first <= most:
        return
    longest = first
    while not game.done:
        longest = max(longest, tokens())
        game.step(("[right]", "[left]")[game.turns % 2])
    raise UserError(
        f"config.sampler.max_prompt is {most}, but the first prompt of {config.game.name} has "
        f"{first} tokens with this model's tokenizer; a scripted game reaches {longest}: set "
        f"config.sampler.max_prompt to {-(-longest * 5 // 4 // 128) * 128} or more"
    )


def shared_beginning(run: Run, model: LanguageModel, text: str) -> tuple[int, ...]:
    """Ids that all play prompts with one knowledge text begin with; () if too few to matter.

    They follow from the text alone, not from the games at hand, so that a resumed run cuts its
    prompts at the same place.
    """
    first, second = (
        model.tokenizer.chat(
            play_prompt(situation, text, run.config.game.wrapper),
            thinking=run.config.model.thinking,
        )
        for situation in ("a", "1")
    )
    length = common_prefix(first, second)
    return tuple(first[:length]) if length >= SHARED_FROM else ()


def play(
    run: Run,
    model: LanguageModel,
    sampler: Sampler,
    jobs: Iterable[Job],
    seats: int,
    progress: Progress,
    prefixes: Mapping[str, tuple[int, ...]],
) -> Iterator[Played]:
    """Play games, `seats` at a time, and yield each as it ends (in no particular order).

    A game whose turn is answered takes its next turn at once; it does not wait for the others.

    Args:
      prefixes: `shared_beginning` of the prompts with each knowledge text.
    """
    waiting = iter(jobs)

    def sit() -> Iterator[Request]:
        for job in waiting:
            yield _Seat(run, model, job, prefixes[job.knowledge]).request()

    turns = answered = 0
    before, still = sampler.generated, progress.total - progress.done

    def most() -> float:
        """Tokens of all games if none ended early and answers stayed as long as so far."""
        each = answered / turns if turns else run.config.sampler.max_response
        return still * environments.MAX_TURNS * each

    progress.follow(most, turns=lambda: turns, tokens=lambda: sampler.written - before)
    newcomers = sit()
    sampler.submit(islice(newcomers, seats))
    with preemption.holding():
        while sampler.busy:
            preemption.stop_if_noticed("finished games are kept")
            for done in sampler.poll(model.params):
                seat = done.tag
                seat.respond(done)
                turns += 1
                answered += len(done.ids)
                if not seat.played.game.done:
                    sampler.submit([seat.request()])
                    continue
                progress.update()
                yield seat.played
                sampler.submit(islice(newcomers, 1))


def in_order(played: Iterable[Played], jobs: Iterable[Job]) -> Iterator[Played]:
    """The same games in the order of `jobs`, so that files do not depend on who finishes first."""
    waiting: dict[int, Played] = {}
    order = iter(jobs)
    following = next(order, None)
    for game in played:
        waiting[id(game.job)] = game
        while following is not None and id(following) in waiting:
            yield waiting.pop(id(following))
            following = next(order, None)


def recover(
    log: Path, jobs: Sequence[Job], fits: Callable[[dict[str, Any], Job], bool]
) -> list[dict[str, Any]]:
    """Records of an interrupted series of games, in the order of `jobs`, one JSON line each.

    Kept up to the first line that is torn or does not fit its job (the config was changed); the
    rest of the file is cut off.
    """
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    records: list[dict[str, Any]] = []
    for line, job in zip(lines, jobs, strict=False):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not fits(record, job):
            break
        records.append(record)
    if len(records) < len(lines):
        write_bytes(log, b"".join(lines[: len(records)]))
    return records


def play_recorded(
    run: Run,
    model: LanguageModel,
    jobs: Sequence[Job],
    log: Path,
    label: str,
    how: Sampling,
    slots: int,
    fits: Callable[[dict[str, Any], Job], bool],
    record: Callable[[Played], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Play games and keep a record of each; the records of all, in the order of `jobs`.

    Records are written beside the result as games end, so that nothing is played twice; each
    process has its part of the games and a log of its own. `forget_records` removes the logs.

    Args:
      slots: for all games; processes share them.
      fits: whether a record is this job's.
      record: what to keep of a game, plain JSON types.
    """
    mine, own = processes.share(jobs), _own(log)
    own.parent.mkdir(parents=True, exist_ok=True)
    records = recover(own, mine, fits)
    left = mine[len(records) :]
    with run.progress(len(mine), "games", label, done=len(records)) as progress:
        if left:
            texts = list(dict.fromkeys(job.knowledge for job in jobs))
            slots = run.slots(-(-slots // processes.count()))
            sampler, prefixes = _player(run, model, how, texts, slots)
            played = play(run, model, sampler, left, slots, progress, prefixes)
            with own.open("a", encoding="utf-8") as out:
                for game in in_order(played, left):
                    records.append(record(game))
                    out.write(json.dumps(records[-1]) + "\n")
                    out.flush()
    with waiting(f"{label}: other processes play"):
        return processes.together(processes.exchange(records))


def forget_records(log: Path) -> None:
    """Remove the logs of all processes, once the result that was made of them is written."""
    processes.wait(f"{log.name} is used")
    if processes.is_first():
        for path in log.parent.glob(f"{log.stem}*.jsonl"):
            path.unlink(missing_ok=True)


def _own(path: Path) -> Path:
    """The file of this process that will become a part of `path`; `path` itself if it is alone."""
    if processes.count() == 1:
        return path
    return path.with_name(f"{path.stem}.process_{processes.index():03d}.jsonl")


def _player(
    run: Run, model: LanguageModel, how: Sampling, texts: Sequence[str], slots: int
) -> tuple[Sampler, dict[str, tuple[int, ...]]]:
    """A sampler for games with these knowledge texts ('' = none), and what their prompts share."""
    prefixes = {text: shared_beginning(run, model, text) for text in texts}
    prompt, response = play_budget(run.config, False)
    sampler = run.sampler(
        model,
        how,
        # room for a text that is too short to be shared, and for merges at its ends
        prompt=prompt + (SHARED_FROM + 16 if any(texts) else 0),
        response=response,
        slots=slots,
        prefixes=prefixes.values(),
    )
    return sampler, prefixes


@dataclass(frozen=True)
class _File:
    """One trajectory file to be filled: which games belong into it."""

    path: Path
    seeds: list[int]
    chain: int | None = None
    step: int | None = None
    texts: list[str] | None = None  # knowledge of each game, in the order of `seeds`


def deploy(run: Run, round_number: int) -> list[Path]:
    """Collect T and T' of a round; returns the files. Finished games are not played again."""
    config, workdir = run.config, run.workdir
    model = run.policy(round_number)
    extraction = environments.extraction_seeds(round_number, config.extract.n_run)
    chains = 1 if config.extract.trajectories == "shared" else config.extract.chains
    knowledge_files = [
        _File(workdir.extract_games(round_number, chain), extraction, chain=chain)
        for chain in range(chains)
    ]
    prefix_files = [
        _File(
            workdir.deploy_games(round_number, step),
            environments.deploy_seeds(round_number, step, config.deploy.games_per_step),
            step=step,
        )
        for step in range(1, config.consolidate.steps + 1)
    ]
    rows, values = [], {}
    for purpose, files, how in (
        ("extract", knowledge_files, sampling(config.extract)),
        ("deploy", prefix_files, sampling(config.deploy)),
    ):
        stats = _collect(run, model, round_number, purpose, files, how)
        count, turns, tokens, cut = (int(value) for value in stats)
        values |= {
            f"{purpose}_turns": (turns, count),
            f"{purpose}_response_tokens": (tokens, turns),
            f"{purpose}_cut_off": (cut, turns),
        }
        shares = f"{turns / count:.2f}", f"{tokens / turns:.1f}", f"{cut / turns:.1%}"
        rows.append([_PURPOSE[purpose], count, turns, *shares])
    run.metrics.rewind("deploy", round_number, round_number - 1)
    run.metrics.scalars("deploy", round_number, values, round=round_number)
    print(table(rows, ["games for", "games", "answers", "turns/game", "tokens/answer", "cut off"]))
    return [file.path for file in knowledge_files + prefix_files]


def demonstrate(run: Run, round_number: int) -> list[Path]:
    """P_r plays the boards of T' again with knowledge in its prompt (spec 10.2); returns the files.

    For the off-policy baselines alone (`consolidate.mode`); one text is drawn for each game.
    """
    config, workdir = run.config, run.workdir
    model = run.policy(round_number)
    texts = texts_of_round(run, round_number, model)
    files = []
    for step in range(1, config.consolidate.steps + 1):
        seeds = environments.deploy_seeds(round_number, step, config.deploy.games_per_step)
        drawn = drawn_texts(round_number, step, len(seeds), len(texts))
        path = workdir.demonstrations(round_number, step)
        files.append(_File(path, seeds, step=step, texts=[texts[index] for index in drawn]))
    stats = _collect(run, model, round_number, "demonstrate", files, sampling(config.deploy))
    count, turns, tokens, cut = (int(value) for value in stats)
    values = {"turns": (turns, count), "response_tokens": (tokens, turns), "cut_off": (cut, turns)}
    run.metrics.rewind("demonstrate", round_number, round_number - 1)
    run.metrics.scalars("demonstrate", round_number, values, round=round_number)
    return [file.path for file in files]


def _collect(
    run: Run,
    model: LanguageModel,
    round_number: int,
    purpose: str,
    files: list[_File],
    how: Sampling,
) -> np.ndarray:
    """Play what is missing of one collection, file by file in order; returns sums as `_count`."""
    config = run.config
    game_name = negative_control.played_game(config, purpose)
    files[0].path.parent.mkdir(parents=True, exist_ok=True)
    processes.first_does("games so far", lambda: _merge(files))
    have = processes.from_first([_seeds_in(file) for file in files] if processes.is_first() else [])
    jobs: list[Job] = []
    for file, there in zip(files, have, strict=True):
        parts = (purpose, round_number) if file.chain is None else (purpose, round_number, "game")
        jobs += [
            Job(seed, parts, text, chain=file.chain, tag=file, game=game_name)
            for seed, text in zip(file.seeds, file.texts or [""] * len(file.seeds), strict=True)
            if seed not in there
        ]
    total, done = sum(len(file.seeds) for file in files), sum(map(len, have))
    mine = processes.share(jobs)
    label = f"round {round_number} deploy for {_PURPOSE[purpose]}"
    with run.progress(done + len(mine), "games", label, done=done) as progress:
        if mine:
            # not what is left: a resumed run is the same
            slots = run.slots(-(-total // processes.count()))
            texts = sorted({text for file in files for text in file.texts or [""]})
            sampler, prefixes = _player(run, model, how, texts, slots)
            played = play(run, model, sampler, mine, slots, progress, prefixes)
            _write(round_number, purpose, in_order(played, mine))
    with waiting(f"{label}: other processes play"):
        processes.wait(f"{label} is played")
    processes.first_does(f"{label} is merged", lambda: _merge(files))
    stats = np.zeros(4, np.int64)
    if processes.is_first():
        stop_ids = model.tokenizer.stop_ids
        stats = sum((_count(game.turns, stop_ids) for f in files for game in read(f.path)), stats)
    return np.asarray(processes.from_first(stats.tolist()))


def _seeds_in(file: _File) -> list[int]:
    """Seeds of the games that a file has already; a torn last line is cut off."""
    if not file.path.exists():
        return []
    with TrajectoryWriter(file.path) as writer:
        return [game.seed for game in writer.finished]


def _merge(files: Sequence[_File]) -> None:
    """Put the games that several processes wrote into the files they belong to, in their order."""
    for file in files:
        parts = sorted(file.path.parent.glob(f"{file.path.stem}.process_*.jsonl"))
        games: dict[int, Trajectory] = {}
        for path in (file.path, *parts) if parts else ():
            if path.exists():
                with TrajectoryWriter(path) as writer:
                    games |= {game.seed: game for game in writer.finished}
        if games:
            whole = io.BytesIO()
            for seed in file.seeds:
                if seed in games:
                    write_line(whole, games[seed])
            write_bytes(file.path, whole.getvalue())
        for path in parts:
            path.unlink()


_PURPOSE = {"extract": "knowledge", "deploy": "prefixes", "demonstrate": "demonstrations"}


def _write(round_number: int, purpose: str, games_played: Iterable[Played]) -> None:
    """Append games to their files as they come; one file is open at a time."""
    writer, current = None, None
    try:
        for played in games_played:
            file: _File = played.job.tag
            if file is not current:
                if writer is not None:
                    writer.close()
                writer, current = TrajectoryWriter(_own(file.path), sync_every=64), file
            writer.write(
                Trajectory(
                    game=played.job.game,
                    seed=played.job.seed,
                    policy=f"round_{round_number - 1:03d}",
                    round=round_number,
                    purpose=purpose,
                    chain=file.chain,
                    step=file.step,
                    turns=played.turns,
                    outcome=played.game.outcome(),
                )
            )
    finally:
        if writer is not None:
            writer.close()


def _count(turns: Iterable[Turn], stop_ids: tuple[int, ...]) -> np.ndarray:
    """[1, turns, response tokens without the stop token, responses cut off] of one game."""
    turns = list(turns)
    stopped = [turn.response_ids[-1] in stop_ids for turn in turns]
    tokens = sum(len(turn.response_ids) for turn in turns) - sum(stopped)
    return np.array([1, len(turns), tokens, len(turns) - sum(stopped)], np.int64)
