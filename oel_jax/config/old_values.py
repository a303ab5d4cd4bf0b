"""Values of older versions: still accepted, in config files, on the command line and in workdirs.

`Field.convert` says what each of them is now.
"""

from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.fields import FIELDS, leaves


def convert(config: ml_collections.ConfigDict) -> str:
    """Convert old values in place; returns one line that names them, or ''."""
    changed = []
    with config.ignore_type():
        for path, value in leaves(config.to_dict()).items():
            now = _converted(path, value)
            if not _same(now, value):
                config.update_from_flattened_dict({path: now})
                changed.append(f"config.{path}={value!r} is now {now!r}")
    return f"values of an older version were converted: {'; '.join(changed)}" if changed else ""


def saved_config(file: Path) -> dict[str, Any]:
    """The config of a workdir, as plain JSON types, old values converted.

    Raises:
      UserError: the file is missing, damaged, or no config.
    """
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise UserError(f"{file} is not a config; restore it or delete it")
    return _convert_tree(stored, "")


def _convert_tree(tree: dict[str, Any], group: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in tree.items():
        path = group + name
        if isinstance(value, dict):
            made[name] = _convert_tree(value, f"{path}.")
        else:
            now = _converted(path, value)
            made[name] = list(now) if isinstance(now, tuple) else now
    return made


def _converted(path: str, value: Any) -> Any:
    field = FIELDS.get(path)
    return field.convert(value) if field and field.convert else value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
