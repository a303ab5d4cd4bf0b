"""Online Experiential Learning in pure JAX/Flax.

`load_model` is here for notebooks; the loop is `python -m oel_jax.main` (start reading at
`oel_jax/loop.py`). Nothing heavy is imported until it is used.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {"LanguageModel": "oel_jax.lm.language_model", "load_model": "oel_jax.lm.language_model"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'oel_jax' has no attribute {name!r}")
