"""What the players' games say: pass rate by policy and over time. User side only."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.base.files import write_json
from oel_jax.report.intervals import board_clustered_interval
from oel_jax.runs.metrics import table

WINDOW = 100  # games whose mean is a point of the curve


def played(file: Path) -> list[dict[str, Any]]:
    """The games of a file in the order in which they ended; a line that a kill cut is left out."""
    if not file.exists():
        return []
    games = []
    for line in file.read_bytes().splitlines():
        try:
            games.append(json.loads(line))
        except ValueError:
            continue
    return sorted(games, key=lambda game: game["ended"])


def by_policy(games: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per policy, over the games that it alone played: how many, the share won, its interval.

    The interval (95 %) clusters by board, as `evaluate` does.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for game in games:
        if len(game["policies"]) == 1:
            found.setdefault(game["policy"], []).append(game)
    result = {}
    for policy, own in sorted(found.items()):
        passed = np.array([[game["passed"] for game in own]])
        mean, low, high = board_clustered_interval(passed, [game["board"] for game in own])
        result[policy] = {
            "games": len(own),
            "pass_rate": mean,
            "ci95": [low, high],
            "boards": len({game["board"] for game in own}),
            "turns": float(np.mean([game["turns"] for game in own])),
        }
    return result


def summarise(file: Path, place: Path, *, rounds: int) -> str:
    """Write `summary.json` and `pass_rate.svg` to `place`; the table to print."""
    games = played(file)
    result = by_policy(games)
    first, last = result.get("round_000"), result.get(f"round_{rounds:03d}")
    rise = last["pass_rate"] - first["pass_rate"] if first and last else None
    mixed = sum(len(game["policies"]) > 1 for game in games)
    write_json(
        place / "summary.json",
        {"policies": result, "rise": rise, "games": len(games), "games_of_two_policies": mixed},
    )
    if games:
        _draw(games, place / "pass_rate.svg")
    rows = [
        [
            policy,
            one["games"],
            f"{one['pass_rate']:.1%}",
            f"{one['ci95'][0]:.1%} to {one['ci95'][1]:.1%}",
            f"{one['turns']:.2f}",
        ]
        for policy, one in result.items()
    ]
    text = table(rows, ["policy", "games", "won", "95 % interval", "turns/game"])
    more = (
        f"\n{mixed} games saw a new policy before they ended, and count for none" if mixed else ""
    )
    risen = "" if rise is None else f"\nfrom the first policy to the last: {rise:+.1%}"
    return f"what the players saw:\n{text}{more}{risen}\ncurve: {place / 'pass_rate.svg'}"


def _draw(games: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The players' pass rate over time, with a mark where a policy first answers."""
    from matplotlib.figure import Figure

    begin = games[0]["ended"]
    minutes = np.array([(game["ended"] - begin) / 60 for game in games])
    passed = np.array([game["passed"] for game in games], float)
    sums = np.concatenate([[0.0], np.cumsum(passed)])
    ends = np.arange(1, len(games) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, (sums[ends] - sums[starts]) / (ends - starts), color="tab:blue")
    seen: set[str] = set()
    for minute, game in zip(minutes, games, strict=True):
        if game["policy"] not in seen:
            seen.add(game["policy"])
            axes.axvline(minute, color="gray", linewidth=0.8, linestyle=":")
            axes.text(minute, 1.02, game["policy"], fontsize=8, ha="left", va="bottom")
    axes.set(xlabel="minutes", ylabel=f"games won, mean of the last {WINDOW}", ylim=(0, 1.0))
    figure.savefig(file)
