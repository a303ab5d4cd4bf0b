"""The default config, made from the table of fields, and what one does with a whole config.

A config file in `configs/` starts from `default()`, changes what its recipe needs and returns the
`ConfigDict`; single fields are overridden on the command line (`--config.rounds=2`). The defaults
are the recipe of Qwen3-4B on Frozen Lake (spec 2.1).
"""

import copy
from collections.abc import Mapping
from typing import Any

import ml_collections

from oel_jax.config.fields import FIELDS, find_field, leaves
from oel_jax.config.rules import AUTO


def default() -> ml_collections.ConfigDict:
    """All fields with their defaults; what a plain run does where paper and code differ."""
    config = ml_collections.ConfigDict()
    for path, field in FIELDS.items():
        group, _, name = path.rpartition(".")
        if group and group not in config:
            config[group] = ml_collections.ConfigDict()
        value = field.default
        if _takes_several_types(path):
            value = ml_collections.FieldReference(value, field_type=object)
        (config[group] if group else config)[name] = value
    return config


def _takes_several_types(path: str) -> bool:
    """Whether a value may have another type than the default: None, 'auto', or an old value."""
    field = FIELDS[path]
    auto = isinstance(field.default, int) and field.rule(AUTO) is None
    return field.default is None or field.convert is not None or auto


def auto_fields(config: ml_collections.ConfigDict) -> list[str]:
    """Fields that are 'auto': not decided yet."""
    values = leaves(config.to_dict())
    numbers = (path for path, field in FIELDS.items() if isinstance(field.default, int))
    return [path for path in numbers if values[path] == AUTO]


def with_fields(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy with these values; paths are dotted. UserError for a path that is no field."""
    for path in values:
        find_field(path)
    config = copy.deepcopy(config)  # with references from field to field, as a file may make them
    with config.ignore_type():
        config.update_from_flattened_dict(dict(values))
    return config


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types (tuples become lists), for `config.json`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(config.to_dict())
