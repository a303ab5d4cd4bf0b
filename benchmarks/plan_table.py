"""Which Qwen3 fits which devices, and what a step should take: the planner's word, cell by cell.

    python -m benchmarks.plan_table [--models=Qwen/Qwen3-8B] [--targets=v5p:4x4x4]

For each model and target: the mesh that the planner recommends for the Frozen Lake recipe, compiled
for that target (TPUs need libtpu, GPUs JAX's CUDA plugin), and whether it fits. A cell is a JSON
record in `benchmarks/results/`; one that is there already is not made again (`--again` does). The
table in docs/speed.md is made from the records by `python -m benchmarks.tables`.

The programs that decide memory and time are compiled, the others are counted by hand. Seconds are
estimates from peaks and assumed shares of them; nothing was run.
"""

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

import jax
import ml_collections

from benchmarks.side_by_side import RESULTS, versions
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.config.file import load_config
from oel_jax.plan import report
from oel_jax.plan.command import recommended
from oel_jax.plan.estimate import Plan
from oel_jax.plan.search import candidates
from oel_jax.plan.shapes import KNOWN, model_shape
from oel_jax.plan.targets import Target, find
from oel_jax.plan.workload import Assumptions

CONFIG = RESULTS.parent.parent / "configs" / "frozen_lake_qwen3_8b.py"
MODELS = ("1.7B", "4B", "8B", "14B", "32B")
TARGETS = ("v5e:4x4", "v5p:4x4x4", "v6e:16x16", "h200:8")
COMPILED = (
    "decode, play with knowledge",
    "read a text, play with knowledge",
    "decode, rollouts",
    "read a text, rollouts",
    "micro-batch",
    "update",
)


def best(config: ml_collections.ConfigDict, target: Target) -> Plan:
    """The quickest plan that fits, compiled; if none does, the smallest by hand.

    Raises:
      UserError: no mesh of the target suits the model at all.
    """
    shapes = (model_shape(config.model.path), target, Assumptions.of(config))
    found = recommended(config, *shapes, compiling=bool(target.devices), only=COMPILED)
    return found or min(candidates(config, *shapes), key=lambda plan: plan.most.total)


def record(path: str, text: str, out: Path) -> None:
    """Make one cell and write it."""
    config = load_config(CONFIG)
    config.model.path = path
    plan = best(config, find(text))
    hours, steps = plan.hours, config.consolidate.steps
    step = hours["consolidate: answers"] + hours["consolidate: updates"]
    numbers = report.as_json(plan) | {
        "benchmark": "plan",
        "config": CONFIG.name,
        "step_seconds": step * 3600 / steps,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(numbers, indent=1) + "\n")
    part.rename(out)
    print(f"{path} on {text}: {report.verdict(plan)}\nwrote {out}", flush=True)


def file_of(directory: Path, path: str, text: str) -> Path:
    """The record of a cell."""
    words = f"plan {path.rpartition('/')[2]} {text}".lower().replace(".", "p")
    return directory / (re.sub(r"[^a-z0-9]+", "_", words) + ".json")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ",".join(f"Qwen/Qwen3-{size}" for size in MODELS)
    parser.add_argument("--models", default=models, help="hub ids, with commas between them")
    parser.add_argument("--targets", default=",".join(TARGETS), help="as --target of oel_jax.plan")
    parser.add_argument("--again", action="store_true", help="make cells again that are there")
    parser.add_argument(
        "--out", type=paths.argument, default=RESULTS, help="directory of the records"
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    unknown = set(options.models.split(",")) - set(KNOWN)
    if unknown:
        raise UserError(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(KNOWN)}")
    for path in options.models.split(","):
        for text in options.targets.split(","):
            out = file_of(options.out, path, text)
            if options.again or not out.exists():
                record(path, text, out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
