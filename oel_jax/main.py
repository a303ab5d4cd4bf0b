"""Run OEL: `python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano`.

Single fields are overridden with `--config.rounds=2`; `--stages=deploy,extract` limits what is
done. The same command goes on where the last one stopped. On several hosts each runs this command
with a workdir that all of them see (launch/README.md).

Exit status: 0 finished; 2 a mistake that can be mended, or a stage that needs another one first; 75
run the same command again: saved and stopped before the machine is taken away, or other processes
did not come; 130 stopped by Ctrl-C (the first one saves, a second one stops at once).
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from oel_jax.machine import preemption

if __name__ == "__main__":
    preemption.listen()  # before what takes time to import: a notice may come at once

from absl import app, flags, logging
from ml_collections import config_flags

from oel_jax.config.file import check_config, existing, explain
from oel_jax.errors import UserError
from oel_jax.machine import paths
from oel_jax.runs.stages import NAMES

_FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", help_string="A python file in configs/.")
flags.DEFINE_string("workdir", None, "Where all files of the run are kept.")
flags.DEFINE_string("game_module", None, "Python file with a game of your own.")
flags.DEFINE_list("stages", list(NAMES), "Stages to do, in any subset.")
flags.DEFINE_bool(
    "allow_config_change", False, "Go on in an old workdir although the config has changed."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run of several processes.")
flags.DEFINE_integer("processes", None, "Number of processes.")
flags.DEFINE_integer("process_id", None, "This process, from 0.")
flags.DEFINE_integer(
    "join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
)


def _run_together() -> None:
    """Meet the other processes, if there are any; run; stop with them."""
    from oel_jax.parallel import processes
    from oel_jax.parallel.mesh import all_devices

    f = _FLAGS
    cluster = processes.find_cluster(f.coordinator, f.processes, f.process_id)
    processes.join(cluster, f.join_timeout)
    preemption.listen()  # again: JAX takes SIGTERM for itself when processes meet
    all_devices()  # a driver that does not work is named before anything asks for it
    processes.quiet()
    if f.game_module:
        f.config.game.module = f.game_module
    others = processes.StopTogether(paths.local(f.workdir, "--workdir"))
    preemption.tell_others(others.pass_on, others.tell)
    try:
        from oel_jax.loop import run

        run(
            f.config,
            f.workdir,
            [stage.strip() for stage in f.stages if stage.strip()],
            name=Path(f["config"].config_filename).name,
            allow_config_change=f.allow_config_change,
        )
    except BaseException as error:
        message, status = _last_words(error)
        others.tell(message, status)
        if processes.count() > 1:
            print(message, file=sys.stderr, flush=True)
            os._exit(status)  # JAX's own end would wait for processes that are gone
        raise


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to say about the end of a run, and its exit status."""
    if isinstance(error, UserError):
        return f"error: {error}", error.status
    if isinstance(error, preemption.Preempted):
        return preemption.last_words(error.kept), preemption.status()
    return "".join(traceback.format_exception(error)), 1


def _check_arguments(argv: Sequence[str]) -> str:
    """What absl would answer with a traceback: no such config file, no such config field.

    Returns:
      the config file, '' if none is given.
    """
    from oel_jax.config.defaults import check_field

    config_file = ""
    for argument, following in pairwise([*argv[1:], ""]):
        flag, equals, value = argument.partition("=")
        flag = flag.lstrip("-")
        if not argument.startswith("-"):
            continue
        if flag == "config":
            config_file = existing(value if equals else following)[0]
        elif flag.removeprefix("no").startswith("config."):
            path = flag.removeprefix("no").removeprefix("config.")
            check_field(path)
            _check_number(path, value if equals else following)
    return config_file


def _check_number(path: str, text: str) -> None:
    """Where absl's parser would speak of invalid literals and bases."""
    from oel_jax.config.defaults import refuse
    from oel_jax.config.rules import rules

    must = rules()[path](None) or ""
    kind = int if must.startswith("an integer") else float if must.startswith("a number") else str
    try:
        kind(text)
    except ValueError:
        refuse(path, text, must)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with one message and exit status 2 for every mistake."""
    file = ""
    logging.set_verbosity(logging.ERROR)  # what ml_collections warns of is said below
    try:
        file = _check_arguments(argv)
        rest = _FLAGS(argv)
        if file:
            check_config(file, _FLAGS.config)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; config fields are set by --config.NAME=VALUE")
        return rest
    except UserError as error:
        _fail(error)
    except flags.Error as error:
        # A ValueError of the config file arrives as one of these.
        inside = file and error.__context__ and str(error).startswith("flag --config=")
        words = re.sub(r"invalid literal for int\(\).*", "it must be an integer", str(error))
        _fail(explain(file, error.__context__) if inside else UserError(words))
    except Exception as error:
        if not file:
            raise
        _fail(explain(file, error))


def _fail(error: BaseException) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(getattr(error, "status", UserError.status))


def main(_: list[str]) -> None:
    """Run, and turn what a user can mend into one message and an exit status."""
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX report every file they touch
    try:
        if _FLAGS.config is None or not _FLAGS.workdir:
            raise UserError(
                "give --config=FILE and --workdir=DIR, for example\n"
                "  python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano"
            )
        paths.local(_FLAGS.workdir, "--workdir")  # before processes meet
        _run_together()
    except UserError as error:
        _fail(error)
    except preemption.Preempted as error:
        message, status = _last_words(error)
        print(f"\n{message}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
