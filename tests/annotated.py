"""Runs Python with the annotations of the learner's rooms checked: shapes, dtypes and types.

    PYTHONPATH=tests python -c "import annotated; annotated.check_annotations(); ..."

To be called before anything of those rooms is imported.
"""

from collections.abc import Callable

import jaxtyping

ROOMS = ("chat", "distill", "learner", "models", "parallel", "sampler")


def check_call(function: Callable) -> Callable:
    """What jaxtyping applies to each function: beartype, but for the making of records.

    JAX makes our registered dataclasses with whatever it has in place of arrays: None, shardings,
    shapes. What is in them is checked where functions take their fields.
    """
    from beartype import beartype

    return function if function.__name__ == "__init__" else beartype(function)


def check_annotations() -> None:
    """From now on, a call that contradicts the annotations of a function raises TypeCheckError."""
    jaxtyping.install_import_hook([f"oel_jax.{room}" for room in ROOMS], "annotated.check_call")
