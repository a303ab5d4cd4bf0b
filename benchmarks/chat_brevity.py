"""Logs in, a briefer model out: configs/chat_brevity.py from synthetic logs, several seeds.

    python -m benchmarks.chat_brevity --model=DIR [--seeds=0,1,2] [--conversations=160]

For each seed the model itself answers synthetic users (`oel_jax.testing.synthetic_users`), and the
ordinary command learns one round from these logs. The held-out answers, the knowledge texts and
the seconds go into benchmarks/results/. The bars are those of the task: half the tokens, 90 % ended
by themselves, the general text as likely as before within 2 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.runs.workdir import Workdir

ROOT = Path(__file__).resolve().parent.parent


def run(words: Sequence[str]) -> float:
    """Run a module of ours; returns its seconds."""
    command = [sys.executable, "-m", *words]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began


def one_seed(
    model: str, seed: int, count: int, scratch: Path, logs: Path | None, fields: Sequence[str]
) -> dict[str, Any]:
    """Make logs (unless there are some), learn from them, and say what came out."""
    written = 0.0
    if logs is None:
        logs = scratch / f"chats_{seed}.jsonl"
        words = [f"--model={model}", f"--out={logs}", f"--conversations={count}", f"--seed={seed}"]
        written = run(["oel_jax.testing.synthetic_users", *words])
    work = scratch / f"run_{seed}"
    settings = [f"model.path={model}", f"logs.path={logs}", f"seed={seed}", *fields]
    command = [f"--config={ROOT / 'configs' / 'chat_brevity.py'}", f"--workdir={work}"]
    seconds = run(["oel_jax.main", *command, *(f"--config.{field}" for field in settings)])
    return found(Workdir(work)) | {"seed": seed, "seconds": seconds, "seconds_of_logs": written}


def found(workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished round."""
    results = {
        name: read_json(workdir.evaluation(1, f"conversations_{name}"))
        for name in ("before", "in_context", "consolidated")
    }
    before, after = results["before"], results["consolidated"]
    return {
        "answers": after["answers"],
        "tokens": {name: one["response_tokens"] for name, one in results.items()},
        "ended": {name: 1 - one["cut_off"] for name, one in results.items()},
        "kl": {name: results[name]["kl"]["kl"] for name in ("before", "consolidated")},
        "general": {
            name: results[name]["general"]["log_prob"] for name in ("before", "consolidated")
        },
        "length_ratio": after["response_tokens"] / before["response_tokens"],
        "general_change": after["general"]["log_prob"] / before["general"]["log_prob"] - 1,
        "knowledge": read_json(workdir.knowledge(1))["texts"],
        "stages": workdir.seconds(1),
    }


def report(model: str, runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    """Table, bars (the worst seed counts) and record; returns the exit status."""
    rows = [
        [
            one["seed"],
            *(f"{one['tokens'][name]:.1f}" for name in ("before", "in_context", "consolidated")),
            *(f"{one['ended'][name]:.0%}" for name in ("before", "in_context", "consolidated")),
            f"{one['general_change']:+.2%}",
            f"{one['seconds'] / 60:.1f}",
        ]
        for one in runs
    ]
    three = ("before", "with text", "after")
    headers = ["seed", *(f"tokens {name}" for name in three), *(f"ended {name}" for name in three)]
    bars = [
        Bar("tokens after / before", max(one["length_ratio"] for one in runs), 0.5, most=True),
        Bar("share ended by themselves", min(one["ended"]["consolidated"] for one in runs), 0.9),
        Bar(
            "change of a general text's likelihood",
            max(abs(one["general_change"]) for one in runs),
            0.02,
            most=True,
        ),
        Bar("minutes of a round", max(one["seconds"] for one in runs) / 60, 25, most=True),
    ]
    settings = {
        "model": Path(model).name,
        "answers": runs[0]["answers"],
        "seeds": len(runs),
    } | dict(field.split("=", 1) for field in options.set)
    return finish(
        "chat_brevity",
        settings,
        rows,
        [*headers, "general text", "minutes"],
        bars,
        {"runs": list(runs)},
        options,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--conversations", type=int, default=160)
    parser.add_argument("--logs", type=paths.argument, help="use these logs for all seeds")
    parser.add_argument(
        "--workdir", type=paths.argument, help="where runs are kept; default: temporary"
    )
    parser.add_argument("--set", nargs="*", default=[], help="further fields, NAME=VALUE")
    given = parser.parse_args(arguments)
    scratch = given.workdir or Path(tempfile.mkdtemp(prefix="chat_brevity_"))
    scratch.mkdir(parents=True, exist_ok=True)
    runs = []
    try:
        for seed in map(int, given.seeds.split(",")):
            runs.append(
                one_seed(given.model, seed, given.conversations, scratch, given.logs, given.set)
            )
            print(json.dumps(runs[-1], indent=1), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(given.model, runs, given)


if __name__ == "__main__":
    sys.exit(main())
