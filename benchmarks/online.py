"""The closed loop over HTTP: by how much do the players' own results rise, is a request dropped?

    python -m benchmarks.online [--seeds=0,1,2] [--config=nano_frozen_lake_online]

For each seed the ordinary command `oel online` runs to its end: a server, a learner that knows no
game, and players as processes. The pass rates are the players' own counts of the games that one
policy alone played.
"""

import argparse
import json
import re
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

ROOT = Path(__file__).resolve().parent.parent
_REQUESTS = re.compile(r"players: (\d+) requests, (\d+) never answered, (\d+) sent again")


def one_seed(config: str, seed: int, workdir: Path, fields: Sequence[str]) -> dict[str, Any]:
    """Run one loop; what the players saw.

    Raises:
      UserError: the command failed; with the end of what it printed.
    """
    command = [sys.executable, "-m", "oel_jax", "online", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}"]
    command += [field if field.startswith("--") else f"--config.{field}" for field in fields]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    requests, dropped, repeated = map(int, _REQUESTS.search(done.stdout).groups())
    summary = read_json(workdir / "online" / "summary.json")
    return {
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "requests": requests,
        "dropped": dropped,
        "repeated": repeated,
        "policies": summary["policies"],
        "rise": summary["rise"],
    }


def report(config: str, runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    """Table, bars (the worst seed counts) and record; returns the exit status."""
    rows = [
        [
            one["seed"],
            " -> ".join(f"{policy['pass_rate']:.1%}" for policy in one["policies"].values()),
            f"{100 * one['rise']:+.1f}",
            one["requests"],
            one["dropped"],
            f"{one['seconds'] / 60:.1f}",
        ]
        for one in runs
    ]
    bars = [
        Bar("rise of the players' pass rate, points", 100 * min(one["rise"] for one in runs), 60),
        Bar("requests never answered", sum(one["dropped"] for one in runs), 0, most=True),
    ]
    headers = ["seed", "games won, policy by policy", "rise", "requests", "dropped", "minutes"]
    settings = {"config": Path(config).stem, "seeds": len(runs)}
    return finish("online", settings, rows, headers, bars, {"runs": list(runs)}, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--config", default="nano_frozen_lake_online")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--workdir", type=paths.argument, help="where runs are kept; default: temporary"
    )
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, or flags of oel online")
    given = parser.parse_args(arguments)
    scratch = given.workdir or Path(tempfile.mkdtemp(prefix="online_"))
    runs = []
    try:
        for seed in map(int, given.seeds.split(",")):
            runs.append(one_seed(given.config, seed, scratch / f"seed_{seed}", given.set))
            print(json.dumps(runs[-1], indent=1), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(given.config, runs, given)


if __name__ == "__main__":
    sys.exit(main())
