"""Online Experiential Learning in pure JAX/Flax.

`load_model` and `load_config` are here for notebooks; the loop is `python -m oel_jax.main` (start
reading at `oel_jax/loop.py`). Nothing heavy is imported until it is used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LanguageModel": "oel_jax.models.language_model",
    "load_config": "oel_jax.config.file",
    "load_model": "oel_jax.models.language_model",
    "run": "oel_jax.loop",
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
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'oel_jax' has no attribute {name!r}")
