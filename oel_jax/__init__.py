"""Online Experiential Learning in pure JAX/Flax.

The loop is `python -m oel_jax.main` (start reading at `oel_jax/loop.py`). From Python:

    config = oel_jax.load_config("nano_frozen_lake")   # or a file, or oel_jax.default_config()
    oel_jax.run(config, "runs/nano")                   # the loop, or the rest of it
    results = oel_jax.read_run("runs/nano")            # what it has made, as objects
    model = oel_jax.load_model("nano")                 # or a directory, or a hub id
    model.generate("What is two plus three?", temperature=0)

Nothing heavy is imported until it is used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LanguageModel": "oel_jax.models.language_model:LanguageModel",
    "Trajectory": "oel_jax.data.trajectories:Trajectory",
    "UserError": "oel_jax.base.errors:UserError",
    "default_config": "oel_jax.config.defaults:default",
    "load_config": "oel_jax.config.file:load_config",
    "load_model": "oel_jax.sampler.generation:load",
    "read_run": "oel_jax.report.reading:read_run",
    "run": "oel_jax.loop:run",
}

if sys.argv[:1] == ["-m"]:  # a command, whose module is about to be imported
    _needed = ("absl", "flax", "jax", "ml_collections", "numpy", "optax", "tensorboard")
    if _missing := [name for name in _needed if find_spec(name) is None]:
        sys.stderr.write(
            f"error: {sys.executable} has no {', '.join(_missing)}: this is not the environment of "
            "oel_jax. Use `source .venv/bin/activate`; `bash launch/local.sh` makes .venv\n"
        )
        sys.exit(2)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'oel_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
