"""summary.json, and the short table that ends a round on the console. Imports no JAX."""

from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base.files import read_json, write_json
from oel_jax.config import negative_control
from oel_jax.config.chat_checks import is_chat
from oel_jax.report import conversations
from oel_jax.report.gains import gains, mean_error, sentence
from oel_jax.runs.metrics import table
from oel_jax.runs.workdir import Workdir

_KEPT = ("pass_rate", "ci95", "response_tokens")


def write_summary(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Write summary.json: the start, and of each round both evaluations, gains, stage times.

    report.html shows the same and more.
    """
    if is_chat(config):
        numbers = range(1, workdir.rounds() + 1)
        rounds = [
            {"round": number, **conversations.summary_of(workdir, number)}
            | {"seconds": workdir.seconds(number)}
            for number in numbers
        ]
        write_json(workdir.summary_file, negative_control.mark(config) | {"rounds": rounds})
        return
    rounds = []
    found = gains(workdir, workdir.rounds())
    for number in range(1, workdir.rounds() + 1):
        entry: dict[str, Any] = {"round": number}
        for name in ("in_context", "consolidated"):
            entry[name] = _short(workdir.evaluation(number, name))
        gained = found[number - 1]
        entry["gain"] = {key: gained[key] for key in ("in_context", "after", "error")}
        rounds.append(entry | {"seconds": workdir.seconds(number)})
    start = _short(workdir.start_evaluation)
    summary = negative_control.mark(config) | {"start": start, "rounds": rounds}
    summary["gain_error"] = mean_error(found)
    write_json(workdir.summary_file, summary)


def _short(file: Path) -> dict[str, Any] | None:
    """The part of an evaluation that goes into the summary, or None if it was not made."""
    if not file.exists():
        return None
    result = read_json(file)
    return {name: result[name] for name in _KEPT}


def rate(result: dict[str, Any] | None) -> str:
    """'12.1% [8.0%, 17.6%]': the pass rate of an evaluation with its 95 % interval."""
    if result is None:
        return "not measured"
    low, high = result["ci95"]
    return f"{result['pass_rate']:.1%} [{low:.1%}, {high:.1%}]"


def round_table(config: ml_collections.ConfigDict, workdir: Workdir, number: int) -> str:
    """The table that ends round `number`, which is evaluated."""
    if is_chat(config):
        return negative_control.announcement(config) + conversations.round_table(workdir, number)
    before = (
        workdir.start_evaluation if number == 1 else workdir.evaluation(number - 1, "consolidated")
    )
    files = {
        "before, without knowledge": before,
        "before, knowledge in context": workdir.evaluation(number, "in_context"),
        "after consolidation": workdir.evaluation(number, "consolidated"),
    }
    last = read_json(workdir.evaluation(number, "consolidated"))
    unseen = last.get("unseen", {"maps": 0})["maps"]
    headers = [f"round {number}", "pass rate [95 % interval]", "tokens/answer"]
    if unseen:
        headers.append(f"{unseen} maps not met in deployment")
    rows = []
    for name, file in files.items():
        result = read_json(file) if file.exists() else None
        row = [name, rate(result), f"{result['response_tokens']:.1f}" if result else "-"]
        if unseen:  # earlier evaluations knew of fewer met boards: another set of maps
            part = (result or {}).get("unseen", {"maps": 0})
            row.append(rate(part) if part["maps"] == unseen else "-")
        rows.append(row)
    text = negative_control.announcement(config) + table(rows, headers)
    maps, seeds = len(last["passed"][0]), len(last["passed"])  # as measured, whatever the config
    text += f"\n{maps} held-out maps x {seeds} games each"
    if "random_policy" in last:
        text += (
            f"; a random policy passes {last['random_policy']:.2%}, "
            f"perfect play {last['perfect_play']:.1%}"
        )
    seconds = (f"{stage} {value:.0f}" for stage, value in workdir.seconds(number).items())
    gained = sentence(gains(workdir, number), number)
    text += f"\n{gained}" if gained else ""
    return f"{text}\nseconds per stage: {', '.join(seconds)}"


def rounds_note(workdir: Workdir, rounds: int) -> str:
    """A line for whoever asks for fewer rounds than the workdir has; '' for all others."""
    there = workdir.rounds()
    if there <= rounds:
        return ""
    return (
        f"note: config.rounds={rounds}, and this workdir has {there} rounds. What is there is "
        f"kept and shown; nothing is done after round {rounds}. For a run of {rounds} round(s) "
        "take a new --workdir"
    )
