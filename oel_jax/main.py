"""Run OEL: `python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano`.

Single fields are overridden with `--config.rounds=2`; `--stages=deploy,extract` limits what is
done. The same command resumes where the last one stopped. On several hosts each runs this command
with a workdir that all of them see (launch/README.md).

Exit status: 0 finished; 2 a mistake that can be mended, or a stage that needs another one first; 75
run the same command again: saved and stopped before the machine is taken away, or other processes
did not come; 76 knowledge texts wait for approval (`oel review`); 130 stopped by Ctrl-C (the first
one saves, a second one stops at once).
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from oel_jax.base import preemption

if __name__ == "__main__":
    preemption.listen()  # before what takes time to import: a notice may come at once

import ml_collections
from absl import app, flags, logging

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.config.command_line import read_overrides, split_overrides
from oel_jax.config.defaults import with_fields
from oel_jax.config.file import load_config
from oel_jax.config.page import print_config
from oel_jax.runs.stages import NAMES

_FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "FILE.py, or a name in configs/; :PRESET after it.")
flags.DEFINE_string("workdir", None, "Where all files of the run are kept.")
flags.DEFINE_string("game_module", None, "Python file with a game of your own.")
flags.DEFINE_bool("print_config", False, "Print the whole config and run nothing.")
flags.DEFINE_list("stages", list(NAMES), "Stages to do, in any subset.")
flags.DEFINE_bool(
    "allow_config_change", False, "Resume an old workdir although the config has changed."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run of several processes.")
flags.DEFINE_integer("processes", None, "Number of processes.")
flags.DEFINE_integer("process_id", None, "This process, from 0.")
flags.DEFINE_integer(
    "join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
)


def _run_together(config: ml_collections.ConfigDict) -> None:
    """Meet the other processes, if there are any; run; stop with them."""
    from oel_jax.parallel import processes
    from oel_jax.parallel.mesh import all_devices

    f = _FLAGS
    cluster = processes.find_cluster(f.coordinator, f.processes, f.process_id)
    processes.join(cluster, f.join_timeout)
    preemption.listen()  # again: JAX sets its own SIGTERM handler when processes meet
    all_devices()  # a driver that does not work is named before anything asks for it
    processes.quiet()
    others = processes.StopTogether(paths.local(f.workdir, "--workdir"))
    preemption.tell_others(others.pass_on, others.tell)
    try:
        from oel_jax.loop import run

        run(
            config,
            f.workdir,
            [stage.strip() for stage in f.stages if stage.strip()],
            name=Path(f.config.partition(":")[0]).name,
            allow_config_change=f.allow_config_change,
        )
    except BaseException as error:
        message, status = _last_words(error)
        others.tell(message, status)
        if processes.count() > 1:
            print(message, file=sys.stderr, flush=True)
            os._exit(status)  # JAX's own exit would wait for processes that have ended
        raise


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to say about the end of a run, and its exit status."""
    if isinstance(error, UserError):
        return f"{error.heading}: {error}", error.status
    if isinstance(error, preemption.Preempted):
        return preemption.last_words(error.kept), preemption.status()
    return "".join(traceback.format_exception(error)), 1


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with one message and exit status 2 for every mistake.

    Returns:
      the program's name, and what is said about config fields.
    """
    try:
        overrides, rest = split_overrides(argv[1:])
        left = _FLAGS([argv[0], *rest])
        if len(left) > 1:
            raise UserError(f"{left[1]!r} is no flag; config fields are set by --config.NAME=VALUE")
        return [argv[0], *overrides]
    except UserError as error:
        _fail(error)
    except flags.Error as error:
        words = re.sub(r"invalid literal for int\(\).*", "it must be an integer", str(error))
        _fail(UserError(words))


def _fail(error: BaseException) -> None:
    print(f"{getattr(error, 'heading', 'error')}: {error}", file=sys.stderr)
    sys.exit(getattr(error, "status", UserError.status))


def _config(overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of the command line."""
    changes = read_overrides(overrides)
    if _FLAGS.game_module:
        changes["game.module"] = _FLAGS.game_module
    return with_fields(load_config(_FLAGS.config), changes)


def main(arguments: list[str]) -> None:
    """Run, and turn what a user can mend into one message and an exit status."""
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX report every file they touch
    try:
        if not _FLAGS.config or not (_FLAGS.workdir or _FLAGS.print_config):
            raise UserError(
                "give --config=FILE and --workdir=DIR, for example\n"
                "  python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano"
            )
        config = _config(arguments[1:])
        if _FLAGS.print_config:
            from oel_jax.runs.stages import known_games

            print_config(config, known_games(config))
            return
        paths.local(_FLAGS.workdir, "--workdir")  # before processes meet
        _run_together(config)
    except UserError as error:
        _fail(error)
    except preemption.Preempted as error:
        message, status = _last_words(error)
        print(f"\n{message}", file=sys.stderr)
        sys.exit(status)


def command(arguments: Sequence[str] | None = None) -> None:
    """The command with these arguments (None: those of the process); ends the process."""
    argv = None if arguments is None else [sys.argv[0], *arguments]
    app.run(main, argv=argv, flags_parser=_parse)


if __name__ == "__main__":
    command()
