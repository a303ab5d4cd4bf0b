"""Writes the model of a finished round as a separate Hugging Face directory.

    python -m oel_jax.export --workdir=runs/nano --round=2 --out=DIR [--dtype=bfloat16]

A round's policy already is such a directory, so this checks and copies it; with `--dtype` the
weights are cast on the way. The copy needs nothing else: `transformers.AutoModelForCausalLM` and
`oel_jax.load_model` read it, and it may be the start model of another run.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.models.huggingface import copy_model
from oel_jax.runs.workdir import Workdir


def policy_directory(workdir: Path, round_number: int) -> Path:
    """The Hugging Face directory that round `round_number` of a run produced.

    Raises:
        UserError: there is no such run, or the round has no policy yet; says which rounds have.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist; give the workdir of a run")
    names = Workdir(workdir)
    policy = names.policy(round_number)
    # A policy appears under its name only when it is complete.
    if policy.is_dir():
        return policy
    done = sorted(
        int(path.parent.name.removeprefix("round_")) for path in workdir.glob("round_*/policy")
    )
    if done:
        hint = f"choose a finished round ({', '.join(map(str, done))}) or run the loop further"
    else:
        hint = "no round of this run is finished; run `python -m oel_jax.main` with it first"
    raise UserError(f"--workdir={workdir}: round {round_number} has no policy; {hint}")


def export(workdir: Path, round_number: int, out: Path, dtype: str | None = None) -> None:
    """Copies the policy of a round to `out`, cast to `dtype` if that is given.

    Raises:
        UserError: the round has no policy, its files are damaged, or `out` cannot be written or
            already holds something.
    """
    copy_model(out, source=policy_directory(workdir, round_number), dtype=dtype)


def shows_date(directory: Path) -> bool:
    """Whether the prompts of a model depend on the day on which they are made."""
    try:
        days = [datetime.datetime(2000 + year, 1 + year, 3 + year) for year in (1, 2)]
        prompts = [load_tokenizer(directory, day).chat("x", thinking=True) for day in days]
    except UserError:  # no tokenizer, no template
        return False
    return prompts[0] != prompts[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.export", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--workdir", type=paths.argument, required=True, help="of the run, as for main"
    )
    parser.add_argument("--round", type=int, required=True, help="from 1")
    parser.add_argument("--out", type=paths.argument, required=True, help="new or empty directory")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored"
    )
    given = parser.parse_args(arguments)
    try:
        export(given.workdir, given.round, given.out, given.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}")
    if shows_date(given.out):
        date = f"{Workdir(given.workdir).today:%d %b %Y}"
        print(f"note: its chat template shows the date of the day; in this run it was {date}")
    return 0
