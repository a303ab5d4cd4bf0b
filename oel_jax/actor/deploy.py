"""User side of a round: the deployed policy plays, and its games become trajectories.

Two disjoint collections are made with the same frozen policy (paper Algorithm 1): games for
knowledge (T, one file per chain, evaluation sampling) and games whose answers are trained on (T',
plain temperature). Every game is played without knowledge, but for the demonstrations that the
off-policy baselines train on. All go into the round's store of trajectories.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np

from oel_jax import environments
from oel_jax.actor.play import Job, Played, make_player
from oel_jax.actor.recording import Format, GameFile, record_games
from oel_jax.config import negative_control
from oel_jax.data.trajectories import Trajectory, Turn
from oel_jax.data.trajectory_files import TrajectoryStore, read
from oel_jax.data.trajectory_schema import decode_line, encode
from oel_jax.learner.contexts import contexts_of_round, draw_texts
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.runs.metrics import table
from oel_jax.runs.policies import load_player, policy_directory
from oel_jax.runs.samplers import sampling
from oel_jax.runs.session import Run
from oel_jax.sampler.requests import Sampling


@dataclass(frozen=True)
class _Counts:
    """Games, turns, response tokens without the stop token, and responses cut off."""

    games: int
    turns: int
    tokens: int
    cut: int


def deploy(run: Run, round_number: int) -> list[Path]:
    """Collect T and T' of a round; returns the files. Finished games are not played again."""
    config = run.config
    directory = policy_directory(config, run.workdir, round_number)
    model = load_player(config, directory, run.host, today=run.today)
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    game = negative_control.played_game(config, "extract")
    extraction = environments.extraction_seeds(round_number, config.extract.n_run)
    chains = 1 if config.extract.trajectories == "shared" else config.extract.chains
    for_knowledge = [
        GameFile(
            store.path("extract", chain),
            [
                Job(seed, ("extract", round_number, "game"), chain=chain, game=game)
                for seed in extraction
            ],
        )
        for chain in range(chains)
    ]
    game = negative_control.played_game(config, "deploy")
    for_training = [
        GameFile(
            store.path("deploy", number),
            [Job(seed, ("deploy", round_number), game=game) for seed in seeds],
        )
        for number, seeds in enumerate(training_seeds(config, round_number))
    ]
    rows, values = [], {}
    for purpose, files, how in (
        ("extract", for_knowledge, sampling(config.extract)),
        ("deploy", for_training, sampling(config.deploy)),
    ):
        found = _collect(config, model, run.host, round_number, purpose, files, how)
        values |= {
            f"{purpose}_turns": (found.turns, found.games),
            f"{purpose}_response_tokens": (found.tokens, found.turns),
            f"{purpose}_cut_off": (found.cut, found.turns),
        }
        shares = (
            f"{found.turns / found.games:.2f}",
            f"{found.tokens / found.turns:.1f}",
            f"{found.cut / found.turns:.1%}",
        )
        rows.append([_PURPOSE[purpose], found.games, found.turns, *shares])
    run.metrics.rewind("deploy", round_number, round_number - 1)
    run.metrics.scalars("deploy", round_number, values, round=round_number)
    print(table(rows, ["games for", "games", "answers", "turns/game", "tokens/answer", "cut off"]))
    return [file.path for file in for_knowledge + for_training]


def training_seeds(config: ml_collections.ConfigDict, round_number: int) -> list[list[int]]:
    """Seeds of T', file by file: as many games as all optimizer steps will ask for.

    The spec numbers the games by optimizer step; a file has as many as a step so that runs with
    more steps can share files. Which games a step trains on is the learner's own affair.
    """
    size = config.deploy.games_per_step
    return [
        environments.deploy_seeds(round_number, part, size)
        for part in range(1, config.consolidate.steps + 1)
    ]


def demonstrate(run: Run, round_number: int) -> list[Path]:
    """P_r plays the boards of T' again with knowledge in its prompt (spec 10.2); returns the files.

    For the off-policy baselines alone (`consolidate.mode`); one context is drawn for each game.
    """
    config = run.config
    directory = policy_directory(config, run.workdir, round_number)
    model = load_player(config, directory, run.host, today=run.today)
    store = TrajectoryStore(run.workdir.trajectories(round_number))
    contexts = contexts_of_round(config, run.workdir, round_number, model.tokenizer)
    game = negative_control.played_game(config, "demonstrate")
    files = []
    for number, seeds in enumerate(training_seeds(config, round_number)):
        drawn = draw_texts(round_number, number + 1, len(seeds), len(contexts))
        jobs = [
            Job(seed, ("demonstrate", round_number), contexts[index], game=game)
            for seed, index in zip(seeds, drawn, strict=True)
        ]
        files.append(GameFile(store.path("demonstrate", number), jobs))
    how = sampling(config.deploy)
    found = _collect(config, model, run.host, round_number, "demonstrate", files, how)
    values = {
        "turns": (found.turns, found.games),
        "response_tokens": (found.tokens, found.turns),
        "cut_off": (found.cut, found.turns),
    }
    run.metrics.rewind("demonstrate", round_number, round_number - 1)
    run.metrics.scalars("demonstrate", round_number, values, round=round_number)
    return [file.path for file in files]


def _collect(
    config: ml_collections.ConfigDict,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    round_number: int,
    purpose: str,
    files: Sequence[GameFile],
    how: Sampling,
) -> _Counts:
    """Play what is missing of one collection, file by file in order."""
    contexts = sorted({job.context for f in files for job in f.jobs}, key=lambda one: one.text)
    form = Format(
        record=partial(_trajectory, config.game.wrapper, round_number, purpose),
        name=lambda trajectory: [trajectory.game, trajectory.seed],
        name_of_job=lambda job: [job.game, job.seed],
        decode=decode_line,
        encode=encode,
    )
    record_games(
        files,
        form,
        lambda games: make_player(config, model, mesh, how, contexts, games),
        f"round {round_number} deploy for {_PURPOSE[purpose]}",
        config.log.console_every,
    )
    counts = [0, 0, 0, 0]
    if processes.is_first():
        stop_ids = model.tokenizer.stop_ids
        each = [_count(one.turns, stop_ids) for file in files for one in read(file.path)]
        counts = np.sum(each, axis=0).tolist()
    return _Counts(*processes.from_first(counts))


_PURPOSE = {"extract": "knowledge", "deploy": "prefixes", "demonstrate": "demonstrations"}


def _trajectory(wrapper: str, round_number: int, purpose: str, played: Played) -> Trajectory:
    """A game as it is stored."""
    job = played.job
    return Trajectory(
        policy=f"round_{round_number - 1:03d}",
        purpose=purpose,
        turns=played.turns,
        game=job.game,
        seed=job.seed,
        round=round_number,
        chain=job.chain,
        wrapper=wrapper,
        context=job.context if purpose == "demonstrate" else None,
        outcome=played.game.outcome(),
    )


def _count(turns: Sequence[Turn], stop_ids: tuple[int, ...]) -> list[int]:
    """[1, turns, response tokens without the stop token, responses cut off] of one game."""
    stopped = [turn.response_ids[-1] in stop_ids for turn in turns]
    tokens = sum(len(turn.response_ids) for turn in turns) - sum(stopped)
    return [1, len(turns), tokens, len(turns) - sum(stopped)]
