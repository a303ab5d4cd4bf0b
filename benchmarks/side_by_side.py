"""What all benchmarks share: interleaved repeats, ratios with their spread, bars, a JSON record.

Only ratios of things measured in turn, in one process, on one device, are claims; seconds are
printed next to them for orientation.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from oel_jax.base import paths
from oel_jax.runs.metrics import table

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Bar:
    """A number to reach: at least `target`, or at most where `most` is set; None: no bar here."""

    name: str
    value: float
    target: float | None
    most: bool = False

    @property
    def verdict(self) -> str:
        """The bar, and whether it is met, in words."""
        if self.target is None:
            return "(no bar at this setting)"
        sign = "<=" if self.most else ">="
        return f"(bar {sign} {self.target:g}): {'met' if self.met else 'MISSED'}"

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value <= self.target if self.most else self.value >= self.target


def parser(doc: str) -> argparse.ArgumentParser:
    """Arguments every benchmark takes."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--repeats", type=int, default=3, help="measured repeats of each side")
    found.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    found.add_argument(
        "--out", type=paths.argument, default=RESULTS, help="directory of the JSON record"
    )
    return found


def race(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, `repeats` times in turn, after one call each that is not counted.

    A side must not return before its work is done. One with a method `warm_up` (a peer that
    compiles nothing) does that in place of the call that is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            (side if number else getattr(side, "warm_up", side))()
            took = time.perf_counter() - began
            print(f"  {name}: {took:.2f} s{'' if number else ' (warm-up)'}", flush=True)
            if number:
                seconds[name].append(took)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of slow / fast, repeat by repeat."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(values: tuple[float, float, float]) -> str:
    """'8.1 (7.9 to 8.4)'."""
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def versions() -> dict[str, str]:
    """Versions of what was measured with."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "transformers", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def device() -> str:
    """Kind and number of the devices JAX uses."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"


def finish(
    name: str,
    settings: Mapping[str, Any],
    rows: Sequence[Sequence[object]],
    headers: Sequence[str],
    bars: Sequence[Bar],
    measured: Mapping[str, Any],
    options: argparse.Namespace,
) -> int:
    """Print table and bars, write the record; returns the exit status."""
    print()
    print(table(rows, headers))
    for bar in bars:
        print(f"{bar.name}: {bar.value:.2f} {bar.verdict}")
    record = {
        "benchmark": name,
        "device": device(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
        "versions": versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "settings": dict(settings),
        "bars": [
            {"name": b.name, "value": b.value, "target": b.target, "most": b.most, "met": b.met}
            for b in bars
        ],
        **measured,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    words = [name, *map(str, settings.values()), device()]
    stem = re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")
    path = options.out / f"{stem}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}")
    return 1 if options.check and not all(bar.met for bar in bars) else 0
