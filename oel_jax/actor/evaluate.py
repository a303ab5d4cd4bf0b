"""How good a policy is at the game: pass rate with an interval, response length, floor and ceiling.

Each held-out board is played once per evaluation seed with its own key. The interval clusters
by board, since Frozen Lake's 128 maps are only 19 boards (spec 3.3 and 9.1). A second rate covers
the boards that no deploy game of any round so far has shown. A few games are kept word by word, for
the report page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from oel_jax import environments
from oel_jax.actor.play import Job, Played, make_player
from oel_jax.actor.recording import (
    Format,
    GameFile,
    read_records,
    record_games,
    remove_records,
)
from oel_jax.base.files import write_json
from oel_jax.data.messages import NOTHING
from oel_jax.learner.contexts import context_of
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.report.intervals import board_clustered_interval
from oel_jax.runs.metrics import Metrics, NoMetrics
from oel_jax.runs.samplers import prefix_count, sampling, slot_count
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import samples_of

SAMPLED = 6  # boards, from the first, whose game of the first seed is kept whole


def evaluate(
    run: Run,
    model: LanguageModel,
    file: Path,
    *,
    round_number: int,
    label: str,
    name: str,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Play maps x seeds games and write the result to `file`; returns it.

    The first seed's games of the first `SAMPLED` boards go to `samples_of(file)` word by word.

    Args:
      name: what is evaluated; together with the round it separates the random streams.
      texts: knowledge in context; seed i plays with text i mod K. Empty: without knowledge.

    Finished games are kept next to the result while it runs, so nothing is played twice.
    """
    if processes.from_first(file.exists() and samples_of(file).exists()):
        return processes.json_from_first(file)
    config = run.config.evaluate
    contexts = [context_of(run.config, text) for text in texts] or [NOTHING]
    boards = environments.heldout_seeds(config.maps)
    fsdp = run.host.shape["fsdp"]
    slots = slot_count(run.config, fsdp, config.seeds * config.maps)
    at_once = prefix_count(fsdp, len(set(texts)), slots)
    jobs = [
        Job(
            boards[column],
            ("evaluate", round_number, name, index),
            contexts[index % len(contexts)],
            chain=index,
            tag=(index, column),
        )
        for first in range(0, config.seeds, at_once)  # as many texts at once as the sampler shares
        for column in range(config.maps)
        for index in range(first, min(first + at_once, config.seeds))
    ]
    log, how = GameFile(file.with_suffix(".games.jsonl"), jobs), sampling(config)
    form = Format(record=_record, name=_name, name_of_job=lambda job: list(job.tag))
    record_games(
        [log],
        form,
        lambda games: make_player(run.config, model, run.host, how, contexts, games),
        label,
        run.config.log.console_every,
    )
    records = read_records(log, form)
    result = _summarise(run.config, records, round_number)
    _show(run.metrics, file.stem, round_number, records)
    if processes.is_first():
        write_json(samples_of(file), {"games": _samples(records)})
        write_json(file, result)
    remove_records(log.path)
    return result


def _record(played: Played) -> dict[str, Any]:
    """What the result needs of a game; of a sampled one also every word."""
    index, column = played.job.tag
    record = {
        "seed_index": index,
        "map": column,
        "board": played.game.board_id(),
        "passed": played.game.passed,
        "tokens": played.tokens,
    }
    if _is_sampled(index, column):
        record["text"] = {
            "knowledge": played.job.context.text,
            "turns": [
                {"observation": t.observation, "response": t.response, "action": t.action}
                for t in played.turns
            ],
            "outcome": played.game.outcome(),
        }
    return record


def _is_sampled(index: int, column: int) -> bool:
    return index == 0 and column < SAMPLED


def _samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The games that were kept whole, by board; texts are as they were played, not escaped."""
    kept = sorted((r for r in records if "text" in r), key=lambda record: record["map"])
    names = ("map", "board", "passed", "tokens")
    return [{name: record[name] for name in names} | record["text"] for record in kept]


def _show(
    metrics: Metrics | NoMetrics, name: str, round_number: int, records: list[dict[str, Any]]
) -> None:
    """In TensorBoard: how long the answers are, and one game to read."""
    stage = f"evaluate_{name}"
    lengths = [tokens for record in records for tokens in record["tokens"]]
    metrics.histogram("response_tokens", round_number, lengths, stage, round_number)
    game = _samples(records)[0]
    parts = [f"board {game['map'] + 1}, {'won' if game['passed'] else 'lost'}"]
    for number, turn in enumerate(game["turns"], 1):
        parts += [f"--- turn {number}: the game says", turn["observation"].strip()]
        parts += ["--- the policy answers", turn["response"]]
    parts += ["--- the end", game["outcome"].strip()]
    metrics.text("game", round_number, "\n".join(parts), stage, round_number)


def _name(record: dict[str, Any]) -> list[int] | None:
    """Whose game a record is; None if it is a sampled game without its words."""
    name = [record["seed_index"], record["map"]]
    return None if _is_sampled(*name) and "text" not in record else name


def _seen_boards(config: ml_collections.ConfigDict, round_number: int) -> set[str]:
    """Boards of all deploy games up to and including this round."""
    seen: set[str] = set()
    for number in range(1, round_number + 1):
        for step in range(1, config.consolidate.steps + 1):
            seeds = environments.deploy_seeds(number, step, config.deploy.games_per_step)
            seen.update(environments.board_ids(config.game.name, seeds))
    return seen


def _summarise(
    config: ml_collections.ConfigDict, records: list[dict[str, Any]], round_number: int
) -> dict[str, Any]:
    """Pass rates as fractions, intervals, lengths, and which games were won."""
    settings = config.evaluate
    records = sorted(records, key=lambda record: (record["seed_index"], record["map"]))
    shape = (settings.seeds, settings.maps)
    passes = np.array([record["passed"] for record in records]).reshape(shape)
    boards = [record["board"] for record in records[: settings.maps]]
    mean, low, high = board_clustered_interval(passes, boards)
    turns = [len(record["tokens"]) for record in records]
    result: dict[str, Any] = {
        "pass_rate": mean,
        "ci95": [low, high],
        "response_tokens": float(sum(sum(r["tokens"]) for r in records) / sum(turns)),
        "turns": float(np.mean(turns)),
        "games": len(records),
        "boards": len(set(boards)),
        "board_of": [list(dict.fromkeys(boards)).index(board) for board in boards],  # of each map
        "per_seed": passes.mean(axis=1).tolist(),
        "passed": ["".join("01"[won] for won in row) for row in passes.astype(int)],
    }
    limits = environments.bounds(config.game.name)
    if limits is not None:
        result |= {"random_policy": limits.floor, "perfect_play": limits.ceiling}
    if settings.unseen_split:
        seen = _seen_boards(config, round_number)
        unseen = [column for column, board in enumerate(boards) if board not in seen]
        result["unseen"] = {"maps": len(unseen)}
        if unseen:
            mean, low, high = board_clustered_interval(
                passes[:, unseen], [boards[column] for column in unseen]
            )
            result["unseen"] |= {"pass_rate": mean, "ci95": [low, high]}
    return result
