"""A whole run: start to finish with a cold and a warm compilation cache, and its extraction.

    python -m benchmarks.loop [--preset=nano] [--set rounds=1 ...]

The run is the ordinary command in a separate process. Extraction, the games that the K chains
learn from and the extractor's calls, is then done again with the policy of round 1: all chains
together, as always, and with one sampler slot, which is one chain after another. Both write the
same texts. The extractor's calls alone are reported in addition.
"""

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_collections

import oel_jax
from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.command_line import read_overrides
from oel_jax.config.defaults import with_fields
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {"nano": "nano_frozen_lake", "nano_sokoban": "nano_sokoban"}


def whole_run(config: Path, fields: list[str], workdir: Path, cache: Path) -> dict[str, float]:
    """Seconds of the ordinary command, by stage, and what was spent compiling."""
    command = [sys.executable, "-m", "oel_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{field}" for field in (*fields, f"compilation_cache={cache}")]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = {"all": seconds, "compiling": 0.0}
    for row in read_metrics(workdir / "metrics.jsonl"):
        if not row["stage"].startswith("time_"):
            continue
        stage = row["stage"].removeprefix("time_")
        found[stage] = found.get(stage, 0.0) + row["time"][f"{stage}_seconds"]
        found["compiling"] += row["time"][f"{stage}_compile_seconds"]
    return found


class Extraction:
    """The games and the extractor's calls of round 1, done anew each time."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, slots: int):
        config = ml_collections.ConfigDict(config.to_dict())
        if slots:
            config.sampler.slots = config.sampler.prefill_rows = slots
        # Of the games whose prefixes are trained on, which are none of this, a single one.
        config.consolidate.steps = config.deploy.games_per_step = 1
        config.log.tensorboard = False
        self.config, self.workdir = config, workdir
        self.texts: list[str] = []
        self.calls: list[float] = []  # seconds of the extractor's calls alone

    def __call__(self) -> None:
        shutil.rmtree(self.workdir, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            oel_jax.run(self.config, self.workdir, ["deploy", "extract"], devices=jax.devices()[:1])
        workdir = Workdir(self.workdir)
        self.calls.append(workdir.seconds(1)["extract"])
        self.texts = read_json(workdir.knowledge(1))["texts"]


def load_config(path: Path, fields: list[str]) -> ml_collections.ConfigDict:
    """What a config file returns, with fields set as on the command line."""
    changes = read_overrides([f"--config.{field}" for field in fields])
    return with_fields(oel_jax.load_config(path), changes)


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--preset", default="nano", choices=PRESETS)
    parser.add_argument("--set", nargs="*", default=[], help="config fields, e.g. rounds=1")
    options = parser.parse_args()
    path = ROOT / "configs" / f"{PRESETS[options.preset]}.py"
    config = load_config(path, options.set)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        runs = {}
        for name in ("cold", "warm"):
            runs[name] = whole_run(path, options.set, place / name, place / "cache")
            took, compiling = runs[name]["all"], runs[name]["compiling"]
            print(f"  {name} cache: {took:.1f} s, {compiling:.1f} s of it compiling", flush=True)
        sides = {
            name: Extraction(config, place / f"extract_{slots}", slots)
            for name, slots in (("lock-step", 0), ("one after another", 1))
        }
        seconds = race(sides, options.repeats)
        if sides["lock-step"].texts != sides["one after another"].texts:
            raise UserError("the two ways wrote different texts: nothing is compared")
    found = ratio(seconds["one after another"], seconds["lock-step"])
    calls = ratio(*(sides[name].calls[1:] for name in ("one after another", "lock-step")))
    print(f"extraction, chains one after another / in lock-step: {spread(found)}")
    print(f"the extractor's calls alone: {spread(calls)}")
    warm = runs["warm"]
    bars = [
        Bar("whole run with a warm cache, seconds", warm["all"], 300, most=True),
        Bar("compile share of it", warm["compiling"] / warm["all"], 0.2, most=True),
        Bar("extraction, one after another / lock-step", found[0], 5.0),
    ]
    stages = [name for name in warm if name != "all"]
    rows = [[name, *(f"{runs[run].get(name, 0.0):.1f}" for run in runs)] for name in stages]
    rows.append(["all", *(f"{runs[run]['all']:.1f}" for run in runs)])
    settings = {"preset": options.preset} | dict(field.split("=", 1) for field in options.set)
    measured = {"runs": runs, "extraction_seconds": seconds, "extraction_ratio": found}
    measured |= {"extractor_calls_ratio": calls}
    headers = ["seconds", "cold cache", "warm cache"]
    return finish("loop", settings, rows, headers, bars, measured, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
