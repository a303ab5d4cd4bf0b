"""Kill a run with SIGKILL at random instants, start it again, and compare with one left alone.

    python tests/kill_anywhere.py --kills=100 [--config=configs/nano_frozen_lake.py] [--seed=0]

A short run of the config is made once without interruption. Then the same command is run in fresh
workdirs and killed at random instants, up to `--kills_per_run` times each, until it ends by itself;
nothing else is done to the workdir. A kill comes at a random instant within `--within` seconds of a
start: few seconds make many kills a run. Each such run must leave the same bytes: trajectories,
knowledge, policies, evaluations, and metrics but for what the clock says. Exits with 1 where one
does not, and keeps that workdir.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# A short run that has every stage: two rounds, checkpoints inside them, texts, skills, pre-flight.
SHORT = {
    "rounds": 2,
    "consolidate.steps": 3,
    "consolidate.save_every": 1,
    "deploy.games_per_step": 8,
    "extract.chains": 2,
    "extract.n": 2,
    "extract.n_run": 2,
    "evaluate.maps": 8,
    "evaluate.seeds": 2,
    "evaluate.skills": True,
    "evaluate.steps": (2,),
    "preflight.games": 8,
    "log.console_every": 0.0,
}

# What the clock writes, or what is there for a resumption alone.
_OF_THE_CLOCK = ("seconds", "time", "at", "created_at", "finished_at", "today")
_NOT_COMPARED = ("report.html", ".lock", "tensorboard", "consolidate", "logs")


def command(config: Path, workdir: Path, settings: dict[str, Any]) -> list[str]:
    """The command line of a run."""
    fields = [f"--config.{name}={value}" for name, value in settings.items()]
    python = [sys.executable, "-m", "oel_jax.main"]
    return [*python, f"--config={config}", f"--workdir={workdir}", *fields]


def _timeless(value: Any) -> Any:
    """JSON without what the clock says."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _OF_THE_CLOCK}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _rows(path: Path) -> list[str]:
    """Metrics in their own order: a stage that was done again is further down."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [_timeless(json.loads(line)) for line in lines]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def content(workdir: Path) -> dict[str, str]:
    """File -> what must be the same in both runs, as a hash."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        if not path.is_file() or set(name.parts) & set(_NOT_COMPARED):
            continue
        data = path.read_bytes()
        if name.name == "metrics.jsonl":
            data = "\n".join(_rows(path)).encode()
        elif name.name in ("manifest.json", "summary.json") or name.parts[0] == "evaluate":
            data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same in two workdirs, or only in one of them."""
    left, right = content(one), content(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def where(output: str) -> str:
    """The stage a run was in, by its last words."""
    stages = ("deploy for knowledge", "deploy for prefixes", "extract", "preflight")
    stages += ("consolidate", "evaluate", "starting model")
    for line in reversed(output.splitlines()):
        for stage in stages:
            if f" {stage}" in line:
                return stage
    return "starting up"


class Interrupted:
    """Runs of one command that are killed at random instants."""

    def __init__(self, config: Path, settings: dict[str, Any], longest: float, seed: int):
        self.config, self.settings, self.longest = config, settings, longest
        self.random = random.Random(seed)
        self.hit: Counter[str] = Counter()

    def finish(self, workdir: Path, kills: int) -> int:
        """Run to the end with at most `kills` kills; returns how many there were.

        Raises:
          RuntimeError: the command failed by itself.
        """
        killed = 0
        while True:
            delay = self.random.uniform(0.0, self.longest) if killed < kills else None
            output, status = run(command(self.config, workdir, self.settings), delay)
            if status == 0:
                return killed
            if status != -signal.SIGKILL:
                raise RuntimeError(f"exit status {status} after {killed} kills:\n{output[-3000:]}")
            killed += 1
            self.hit[where(output)] += 1


def run(words: Sequence[str], kill_after: float | None = None) -> tuple[str, int]:
    """Run a command, perhaps with a SIGKILL to its process group; (output, exit status)."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return log.read(), process.returncode


def trials(interrupted: Interrupted, reference: Path, scratch: Path, kills: int, each: int):
    """Yield (run number, kills, differing files) until `kills` were made."""
    made = number = 0
    while made < kills:
        number += 1
        workdir = scratch / f"killed_{number:03d}"
        killed = interrupted.finish(workdir, min(each, kills - made))
        made += killed
        differ = differences(reference, workdir)
        yield number, killed, differ
        if not differ:
            shutil.rmtree(workdir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills_per_run", type=int, default=10)
    parser.add_argument("--within", type=float, help="seconds; default: those of a whole run")
    parser.add_argument("--config", type=Path, default=Path("configs/nano_frozen_lake.py"))
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--workdir", type=Path, help="where runs are made; default: temporary")
    options = parser.parse_args(arguments)
    scratch = Path(options.workdir or tempfile.mkdtemp(prefix="kill_anywhere_")).absolute()
    reference = scratch / "left_alone"
    words = command(options.config, reference, SHORT)
    output, status = run(words)  # the first time programs are compiled: not the length of a run
    if status:
        print(output)
        return 1
    again = scratch / "left_alone_again"
    began = time.monotonic()
    run(command(options.config, again, SHORT))
    seconds = time.monotonic() - began
    repeated = differences(reference, again)
    print(f"left alone: {seconds:.0f} s; run twice: {repeated or 'the same'}", flush=True)
    interrupted = Interrupted(options.config, SHORT, options.within or seconds, options.seed)
    made, wrong = 0, []
    results: Iterator[tuple[int, int, list[str]]] = trials(
        interrupted, reference, scratch, options.kills, options.kills_per_run
    )
    for number, killed, differ in results:
        made += killed
        wrong += [number] if differ else []
        print(f"run {number}: {killed} kills, {differ or 'the same'}", flush=True)
    print(f"{made} kills, {len(wrong)} runs that ended otherwise {wrong or ''}")
    for stage, count in interrupted.hit.most_common():
        print(f"  {count:4d} in {stage}")
    if wrong or repeated:
        print(f"files: {scratch}")
        return 1
    if options.workdir is None:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
