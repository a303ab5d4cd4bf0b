"""What knowledge gained in a round: in the prompt, and what of it was left after consolidation.

The gain in context is the pre-flight's (`preflight.json`): P_r with the round's texts less P_r
without, on boards of the pre-flight. The gain after consolidation is P_{r+1} less P_r, both without
knowledge, on the held-out boards. The first is no prediction of the second: consolidation can keep
less, or more. Both are shown, with how far they are from each other. Reads files only; imports no
JAX and no game.
"""

from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.base.files import read_json
from oel_jax.report.intervals import paired_difference
from oel_jax.runs.workdir import Workdir


def gains(workdir: Workdir, rounds: int) -> list[dict[str, Any]]:
    """Both gains of each round from 1 to `rounds`, as fractions.

    Returns:
      dicts {"round", "in_context": GAIN, "after": GAIN, "error"}; GAIN is {"gain", "ci95"} or None
      where it was not measured, its interval None where files do not tell the boards or the numbers
      of games differ. "error": the gain in context less the gain after, None without both.
    """
    return [_round(workdir, number) for number in range(1, rounds + 1)]


def mean_error(found: list[dict[str, Any]]) -> float | None:
    """Mean absolute error over the rounds that have both gains; None without any."""
    errors = [abs(one["error"]) for one in found if one["error"] is not None]
    return sum(errors) / len(errors) if errors else None


def points(gain: float, interval: list[float] | tuple[float, float] | None) -> str:
    """A fraction as '+6.3 points [-1.0, +13.5]'."""
    text = f"{100 * gain:+.1f} points"
    return f"{text} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else text


def sentence(found: list[dict[str, Any]], number: int) -> str:
    """Both gains of round `number` in a line, '' without the gain in context."""
    this = found[number - 1]
    if this["in_context"] is None:
        return ""
    text = "gain: in context (pre-flight) " + points(**_named(this["in_context"]))
    if this["after"] is not None:
        text += ", after consolidation " + points(**_named(this["after"]))
        text += f"; difference {100 * this['error']:+.1f}"
        text += f", {100 * mean_error(found):.1f} on average over {_count(found)} round(s)"
    return text


def _count(found: list[dict[str, Any]]) -> int:
    return sum(one["error"] is not None for one in found)


def _named(gain: dict[str, Any]) -> dict[str, Any]:
    return {"gain": gain["gain"], "interval": gain["ci95"]}


def _round(workdir: Workdir, number: int) -> dict[str, Any]:
    in_context, flight = None, workdir.preflight(number)
    if flight.exists():
        measured = read_json(flight)
        in_context = {"gain": measured["gain"], "ci95": measured["ci95"]}
    last = workdir.evaluation(number - 1, "consolidated") if number > 1 else None
    after = _after(last or workdir.start_evaluation, workdir.evaluation(number, "consolidated"))
    both = in_context is not None and after is not None
    error = in_context["gain"] - after["gain"] if both else None
    return {"round": number, "in_context": in_context, "after": after, "error": error}


def _after(before: Path, now: Path) -> dict[str, Any] | None:
    if not before.exists() or not now.exists():
        return None
    old, new = read_json(before), read_json(now)
    boards = new.get("board_of")  # not in workdirs of older versions
    if not boards or len(old["passed"][0]) != len(boards):
        return {"gain": new["pass_rate"] - old["pass_rate"], "ci95": None}
    first, second = (
        np.array([[game == "1" for game in row] for row in result["passed"]])[None]
        for result in (new, old)
    )
    gain, low, high = paired_difference(first, second, [str(board) for board in boards])
    return {"gain": gain, "ci95": [low, high]}
