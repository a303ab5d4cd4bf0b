"""How good a policy is at the game: pass rate with an interval, response length, floor and ceiling.

Each held-out board is played once per evaluation seed with a key of its own. The interval clusters
by board, since Frozen Lake's 128 maps are only 19 boards (spec 3.3 and 9.1). A second rate covers
the boards that no deploy game of any round so far has shown.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oel_jax import games
from oel_jax.config import play_budget
from oel_jax.deploy import Job, Played, in_order, play, shared_beginning
from oel_jax.lm.language_model import LanguageModel
from oel_jax.lm.prefix import SHARED_FROM
from oel_jax.run import Run, sampling
from oel_jax.statistics import board_clustered_interval
from oel_jax.workdir import read_json, write_bytes, write_json


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

    Args:
      name: what is evaluated; together with the round it separates the random streams.
      texts: knowledge in context; seed i plays with text i mod K. Empty: without knowledge.

    Finished games are kept beside the result while it runs, so nothing is played twice.
    """
    if file.exists():
        return read_json(file)
    config = run.config.evaluate
    boards = games.heldout_seeds(config.maps)
    slots = run.slots(config.seeds * config.maps)
    lanes = run.lanes(len(set(texts)), slots)
    jobs = [
        Job(
            boards[column],
            ("evaluate", round_number, name, index),
            knowledge=texts[index % len(texts)] if texts else "",
            chain=index,
            tag=(index, column),
        )
        for first in range(0, config.seeds, lanes)  # as many texts side by side as are shared
        for column in range(config.maps)
        for index in range(first, min(first + lanes, config.seeds))
    ]
    log = file.with_suffix(".games.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    records = _recover(log, jobs)
    left = jobs[len(records) :]
    with run.progress(len(jobs), "games", label, done=len(records)) as progress:
        if left:
            prompt, response = play_budget(run.config, False)
            prefixes = {text: shared_beginning(run, model, text) for text in texts or [""]}
            sampler = run.sampler(
                model,
                sampling(config),
                # room for a text that is too short to be shared, and for merges at its ends
                prompt=prompt + (SHARED_FROM + 16 if texts else 0),
                response=response,
                slots=slots,
                prefixes=prefixes.values(),
            )
            games_played = play(run, model, sampler, left, slots, progress, prefixes)
            with log.open("a", encoding="utf-8") as out:
                for played in in_order(games_played, left):
                    records.append(_record(played))
                    out.write(json.dumps(records[-1]) + "\n")
                    out.flush()
    result = _summarise(run, records, round_number)
    write_json(file, result)
    log.unlink(missing_ok=True)
    return result


def _record(played: Played) -> dict[str, Any]:
    index, column = played.job.tag
    return {
        "seed_index": index,
        "map": column,
        "board": played.game.board_id(),
        "passed": played.game.passed,
        "tokens": played.tokens,
    }


def _recover(log: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Games of an interrupted evaluation, in the order of `jobs`.

    Kept up to the first line that is torn or is not the game of `jobs` (the config was changed).
    """
    if not log.exists():
        return []
    lines = log.read_bytes().splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    for line, job in zip(lines, jobs, strict=False):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or (record["seed_index"], record["map"]) != job.tag:
            break
        records.append(record)
    if len(records) < len(lines):
        write_bytes(log, b"".join(lines[: len(records)]))
    return records


def _seen_boards(run: Run, round_number: int) -> set[str]:
    """Boards of all deploy games up to and including this round."""
    seen: set[str] = set()
    for number in range(1, round_number + 1):
        for step in range(1, run.config.consolidate.steps + 1):
            seeds = games.deploy_seeds(number, step, run.config.deploy.games_per_step)
            seen.update(games.board_ids(run.config.game.name, seeds))
    return seen


def _summarise(run: Run, records: list[dict[str, Any]], round_number: int) -> dict[str, Any]:
    """Pass rates as fractions, intervals, lengths, and which games were won."""
    config = run.config.evaluate
    records = sorted(records, key=lambda record: (record["seed_index"], record["map"]))
    shape = (config.seeds, config.maps)
    passes = np.array([record["passed"] for record in records]).reshape(shape)
    boards = [record["board"] for record in records[: config.maps]]
    mean, low, high = board_clustered_interval(passes, boards)
    turns = [len(record["tokens"]) for record in records]
    result: dict[str, Any] = {
        "pass_rate": mean,
        "ci95": [low, high],
        "response_tokens": float(sum(sum(r["tokens"]) for r in records) / sum(turns)),
        "turns": float(np.mean(turns)),
        "games": len(records),
        "boards": len(set(boards)),
        "per_seed": passes.mean(axis=1).tolist(),
        "passed": ["".join("01"[won] for won in row) for row in passes.astype(int)],
    }
    limits = games.bounds(run.config.game.name)
    if limits is not None:
        result |= {"random_policy": limits.floor, "perfect_play": limits.ceiling}
    if config.unseen_split:
        seen = _seen_boards(run, round_number)
        unseen = [column for column, board in enumerate(boards) if board not in seen]
        result["unseen"] = {"maps": len(unseen)}
        if unseen:
            mean, low, high = board_clustered_interval(
                passes[:, unseen], [boards[column] for column in unseen]
            )
            result["unseen"] |= {"pass_rate": mean, "ci95": [low, high]}
    return result
