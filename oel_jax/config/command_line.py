"""Fields on a command line: `--config.rounds=2`, the same for every command.

Also read: `--config.rounds 2`, `--config.extract.previous` and `--noconfig.extract.previous` for a
field that is True or False, `none` where a field may be None, and `1,5` or `(1, 5)` for a tuple.
"""

from collections.abc import Sequence
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.config.fields import find_field, refuse
from oel_jax.config.rules import FLAG


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what is about fields, as `--config.FIELD=TEXT`, and the rest.

    Raises:
      UserError: a field that does not exist, or that lacks its value.
    """
    overrides, rest, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        flag, equals, text = argument.partition("=")
        name = flag.lstrip("-")
        negated = name.startswith("noconfig.")
        if not argument.startswith("-") or not (negated or name.startswith("config.")):
            rest.append(argument)
            continue
        path = name.removeprefix("no").removeprefix("config.")
        field = find_field(path)
        if negated and (equals or field.rule is not FLAG):
            raise UserError(f"{argument}: write --config.{path}=VALUE")
        if negated or (field.rule is FLAG and not equals):
            text = str(not negated)
        elif not equals:
            if not left:
                raise UserError(f"--config.{path} needs a value: --config.{path}=VALUE")
            text = left.pop(0)
        overrides.append(f"--config.{path}={text}")
    return overrides, rest


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """'--config.rounds=2' and the like -> dotted path -> value.

    Raises:
      UserError: an argument that is not about a field, or a text that is no value of its field.
    """
    overrides, rest = split_overrides(arguments)
    if rest:
        raise UserError(f"{rest[0]!r} is no flag; config fields are set by --config.FIELD=VALUE")
    changes: dict[str, Any] = {}
    for override in overrides:
        name, _, text = override.partition("=")
        path = name.removeprefix("--config.")
        rule = find_field(path).rule
        try:
            changes[path] = rule.read(text)
        except ValueError:
            refuse(path, text, rule.words)
    return changes
