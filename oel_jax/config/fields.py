"""The table of all config fields, in the order in which configs show them."""

import difflib
from typing import Any, NoReturn

from oel_jax.base.errors import UserError
from oel_jax.config.field import PARTS, Field
from oel_jax.config.fields_round import DEPLOY, EVALUATE, EXTRACT, PREFLIGHT
from oel_jax.config.fields_run import GAME, LOG, LOGS, MESH, MODEL, RUN, SAMPLER
from oel_jax.config.fields_training import CONSOLIDATE, GUARD, LORA, LOSS

_BEFORE = (*RUN, *MODEL, *MESH, *GAME, *LOGS, *SAMPLER, *DEPLOY, *EXTRACT, *PREFLIGHT)
_TRAINING = (*CONSOLIDATE, *LORA, *GUARD, *LOSS)
FIELDS: dict[str, Field] = {field.path: field for field in (*_BEFORE, *_TRAINING, *EVALUATE, *LOG)}


def find_field(path: str) -> Field:
    """The field of this path; UserError with the nearest name if there is none."""
    if path not in FIELDS:
        close = difflib.get_close_matches(path, FIELDS, n=1)
        hint = f"; did you mean config.{close[0]}?" if close else "; see docs/configuration.md"
        raise UserError(f"config.{path} is not a field{hint}")
    return FIELDS[path]


def refuse(path: str, value: Any, must: str) -> NoReturn:
    """Say which field is wrong and what it must be."""
    raise UserError(f"config.{path} is {value!r}; it must be {must}")


def is_free(path: str) -> bool:
    """Whether a field may have another value when a run is resumed (`Field.free`).

    Fields of older versions that are no longer there are judged by their group.
    """
    if path in FIELDS:
        return bool(FIELDS[path].free)
    group = [field for field in FIELDS.values() if field.path.startswith(path.split(".")[0] + ".")]
    return bool(group) and all(field.free for field in group)


def unaffected(part: str) -> frozenset[str]:
    """The fields that cannot change the files of a part of a stage (`Field.affects`)."""
    assert part in PARTS, part
    return frozenset(
        path
        for path, field in FIELDS.items()
        if field.affects is not None and part not in field.affects
    )


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every field of a nested dict."""
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found
