"""User side of a round, before consolidation: does the round's knowledge help at all?

P_r plays some boards without knowledge, and the same boards with each of the K texts in its prompt.
Consolidation draws the texts with equal chances and trains the student towards what the model does
with them (paper Eq. 2), so their mean gain in context is what there is to be learned. How much of
it is learned is another matter: `gains` compares both. The paper does not ask; a text that
misleads in context would be trained into the weights all the same.

The gain is made of wins and losses, which the method itself never reads. It changes nothing that is
trained; it only warns, or ends the run with `preflight.on_harm='stop'`. The presets 'paper' and
'released' turn the pre-flight off.

The boards follow those of the round's deployment in the same numbering: not the held-out ones, and
not those whose prefixes are trained on. (A game with as few boards as Frozen Lake repeats them.)
All games on a board share their random keys, so that texts are compared under the same chances.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from oel_jax import environments
from oel_jax.actor.play import Job, Played, make_player
from oel_jax.actor.recording import Format, GameFile, read_records, record_games, remove_records
from oel_jax.base.errors import UserError
from oel_jax.base.files import write_json
from oel_jax.data.messages import NOTHING
from oel_jax.learner.contexts import context_of, contexts_of_round, empty_on_purpose
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.report.gains import points
from oel_jax.report.intervals import board_clustered_interval, paired_difference
from oel_jax.runs.metrics import Metrics, NoMetrics, table
from oel_jax.runs.policies import load_player, policy_directory
from oel_jax.runs.samplers import prefix_count, sampling, slot_count
from oel_jax.runs.session import Run, finished


def preflight(run: Run, round_number: int) -> list[Path]:
    """Play with and without each text and write preflight.json; returns the file.

    Rates and gains are fractions; intervals cover 95 % and are clustered by board. They are about
    these K texts, not about others that might have been extracted. Finished games are kept next to
    the file while it runs, so nothing is played twice.

    Raises:
      UserError: all texts are empty although the config wants knowledge.
    """
    file = run.workdir.preflight(round_number)
    if processes.from_first(file.exists()):
        result = processes.json_from_first(file)
    else:
        directory = policy_directory(run.config, run.workdir, round_number)
        model = load_player(run.config, directory, run.host, today=run.today)
        texts = [
            context.text
            for context in contexts_of_round(run.config, run.workdir, round_number, model.tokenizer)
        ]
        log = file.with_suffix(".games.jsonl")
        read = list(dict.fromkeys(["", *texts]))  # an equal text would play the same games
        records = _games(run.config, run.host, round_number, model, read, log)
        result = _summarise(run.config.preflight.games, round_number, texts, read, records)
        if processes.is_first():
            write_json(file, result)
        remove_records(log)
    _log(run.metrics, round_number, result)
    print(_table(round_number, result))
    return [file]


def check_gain(run: Run, round_number: int) -> None:
    """Warn, or stop the run, if the knowledge that is about to be consolidated does not help.

    It warns where the mean gain is not above `preflight.least_gain`. It stops, with
    `preflight.on_harm='stop'`, where even the high end of the interval is below.

    Raises:
      UserError: with on_harm='stop': the knowledge harms, or nobody has measured whether it does.
    """
    config = run.config.preflight
    if not config.games or empty_on_purpose(run.config):
        return
    if not finished(run.workdir, round_number, "preflight"):
        if config.on_harm == "stop":
            raise UserError(
                f"round {round_number}: consolidate needs preflight first, since "
                "config.preflight.on_harm='stop'; add it to --stages and run the same command again"
            )
        print(
            f"note: round {round_number}: preflight is not among --stages and was not done before: "
            "the knowledge is consolidated without a measurement of its gain in context"
        )
        return
    result = processes.json_from_first(run.workdir.preflight(round_number))
    gain, (low, high), least = result["gain"], result["ci95"], config.least_gain
    if gain > least:
        return
    helps = "does not help" + (" enough" if gain > 0 else "")
    what = (
        f"round {round_number}: knowledge {helps} in context: the gain in context is "
        f"{points(gain, (low, high))}, not above config.preflight.least_gain={least:g} "
        f"({100 * least:+.1f} points)"
    )
    if run.config.negative_control != "none":
        print(f"note: {what}. This run is broken on purpose (config.negative_control)")
        return
    fixes = "another config.extract.n, extract.l_max or extractor (config.extract.model_path)"
    if high < least and config.on_harm == "stop":
        raise UserError(
            f"{what}, and neither is the interval's high end (config.preflight.on_harm='stop'). "
            f"Try {fixes} with a new --workdir, or resume this one with "
            "--config.preflight.on_harm=warn"
        )
    sure = "" if high < least else "; the interval leaves room for a gain"
    print(f"WARNING: {what}{sure}. It is consolidated all the same; {fixes} may help")


def preflight_boards(config: ml_collections.ConfigDict, round_number: int) -> list[int]:
    """Seeds of the boards: those after the round's last trained one, in the deploy numbering."""
    seeds: list[int] = []
    step = config.consolidate.steps
    while len(seeds) < config.preflight.games:
        step += 1
        seeds += environments.deploy_seeds(round_number, step, config.deploy.games_per_step)
    return seeds[: config.preflight.games]


def _games(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    round_number: int,
    model: LanguageModel,
    texts: Sequence[str],
    log: Path,
) -> list[dict[str, Any]]:
    """One game for each text and board; those in `log` are not played again."""
    seeds = preflight_boards(config, round_number)
    contexts = [context_of(config, text) if text else NOTHING for text in texts]
    fsdp = mesh.shape["fsdp"]
    slots = slot_count(config, fsdp, len(texts) * len(seeds))
    at_once = prefix_count(fsdp, sum(map(bool, texts)), slots)
    jobs = [
        Job(seed, ("preflight", round_number), contexts[index], chain=0, tag=(index, column))
        for first in range(0, len(texts), at_once)  # as many texts at once as the sampler shares
        for column, seed in enumerate(seeds)
        for index in range(first, min(first + at_once, len(texts)))
    ]
    file, how = GameFile(log, jobs), sampling(config.evaluate)
    form = Format(record=_record, name=_name, name_of_job=lambda job: list(job.tag))
    record_games(
        [file],
        form,
        lambda games: make_player(config, model, mesh, how, contexts, games),
        f"round {round_number} preflight",
        config.log.console_every,
    )
    return read_records(file, form)


def _record(played: Played) -> dict[str, Any]:
    index, column = played.job.tag
    return {
        "context": index,
        "column": column,
        "board": played.game.board_id(),
        "passed": played.game.passed,
        "tokens": played.tokens,
    }


def _name(record: dict[str, Any]) -> list[int]:
    return [record["context"], record["column"]]


def _summarise(
    games: int,
    round_number: int,
    texts: Sequence[str],
    played: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Pass rates, gains with intervals, answer lengths, and which games were won."""
    columns = range(games)
    found = {(record["context"], record["column"]): record for record in records}
    rows = {text: [found[index, column] for column in columns] for index, text in enumerate(played)}
    ids = [record["board"] for record in rows[""]]
    passes = {text: np.array([record["passed"] for record in rows[text]]) for text in played}
    none = passes[""][None, None]

    def gain_of(some: Sequence[str]) -> tuple[float, list[float]]:
        if not any(some):  # not played twice: there can be no difference
            return 0.0, [0.0, 0.0]
        gain, low, high = paired_difference(np.stack([passes[t] for t in some])[None], none, ids)
        return gain, [low, high]

    def part(text: str) -> dict[str, Any]:
        return {
            "pass_rate": float(passes[text].mean()),
            "response_tokens": _tokens_per_answer(rows[text]),
            "passed": "".join("01"[won] for won in passes[text].astype(int)),
        }

    each = []
    for chain, text in enumerate(texts):
        gain, interval = gain_of([text])
        each.append({"chain": chain, "gain": gain, "ci95": interval, **part(text)})
    gain, interval = gain_of(texts)
    rate, low, high = board_clustered_interval(passes[""][None], ids)
    return {
        "round": round_number,
        "games": len(columns),
        "boards": len(set(ids)),
        "without": part("") | {"ci95": [low, high]},
        "texts": each,
        "gain": gain,
        "ci95": interval,
        "played": {
            "games": len(records),
            "turns": sum(len(record["tokens"]) for record in records) / len(records),
            "response_tokens": _tokens_per_answer(records),
        },
    }


def _tokens_per_answer(records: Sequence[dict[str, Any]]) -> float:
    tokens = [length for record in records for length in record["tokens"]]
    return sum(tokens) / len(tokens)


def _log(metrics: Metrics | NoMetrics, round_number: int, result: dict[str, Any]) -> None:
    gains = [text["gain"] for text in result["texts"]]
    rates = [text["pass_rate"] for text in result["texts"]]
    values = {
        "gain": result["gain"],
        "ci95_low": result["ci95"][0],
        "ci95_high": result["ci95"][1],
        "least_text_gain": min(gains),
        "greatest_text_gain": max(gains),
        "pass_rate_without": result["without"]["pass_rate"],
        "pass_rate_with": (sum(rates), len(rates)),
        **result["played"],
    }
    metrics.rewind("preflight", round_number, round_number - 1)
    metrics.scalars("preflight", round_number, values, round=round_number)


def _table(round_number: int, result: dict[str, Any]) -> str:
    """What the console shows: each text compared with none, and the mean gain."""
    without = result["without"]
    rows = [["without knowledge", f"{without['pass_rate']:.1%}", "", _length(without)]]
    for text in result["texts"]:
        gain = points(text["gain"], text["ci95"])
        row = [f"text of chain {text['chain']}", f"{text['pass_rate']:.1%}", gain, _length(text)]
        rows.append(row)
    headers = [f"round {round_number} pre-flight", "pass rate"]
    headers += ["gain [95 % interval]", "tokens/answer"]
    return (
        f"{table(rows, headers)}\ngain in context, the mean over the texts: "
        f"{points(result['gain'], result['ci95'])}, from {result['games']} games each on "
        f"{result['boards']} boards; what consolidation keeps of it is measured after it"
    )


def _length(part: dict[str, Any]) -> str:
    return f"{part['response_tokens']:.1f}"
