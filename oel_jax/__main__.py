"""`oel COMMAND ...`: all commands under one name; each is also `python -m oel_jax.COMMAND`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from oel_jax.base import preemption

# Command -> the module whose `main` is called with its arguments, and one line for --help.
COMMANDS = {
    "run": ("oel_jax.main", "run Online Experiential Learning in a workdir, or resume it"),
    "study": ("oel_jax.study.command", "compare variants of a config, each with several seeds"),
    "logs": ("oel_jax.logs.command", "check, import or forget logs of conversations"),
    "report": ("oel_jax.report.page", "write the page of a run or of a study"),
    "plan": ("oel_jax.plan.command", "say whether a run fits devices that are not at hand"),
    "export": ("oel_jax.export.command", "write the policy of a round to a directory"),
    "serve": ("oel_jax.serve.command", "answer over HTTP as OpenAI's API does, and record it"),
    "online": ("oel_jax.online.command", "run server, learner and players of a game together"),
    "review": ("oel_jax.review.command", "show and approve knowledge texts that wait for it"),
    "evaluate": ("oel_jax.evaluate.command", "run lm-evaluation-harness on the policies of a run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"oel_jax {import_module('oel_jax').__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(_usage())
        return 0 if arguments else 2
    if name not in COMMANDS:
        print(f"error: {name!r} is no command of oel\n\n{_usage()}", file=sys.stderr)
        return 2
    if name in ("run", "study"):
        preemption.listen()  # before what takes time to import: a notice may come at once
    module = import_module(COMMANDS[name][0])
    if name == "run":
        return module.command(arguments[1:])
    return module.main(arguments[1:])


def _usage() -> str:
    lines = [f"  {name:9} {line}" for name, (_, line) in COMMANDS.items()]
    return (
        "usage: oel COMMAND ...\n\n" + "\n".join(lines) + "\n\n"
        "oel COMMAND --help explains a command; oel --version prints the version. For example:\n"
        "  oel run --config=nano_frozen_lake --workdir=runs/nano"
    )


if __name__ == "__main__":
    sys.exit(main())
