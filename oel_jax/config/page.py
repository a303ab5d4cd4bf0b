"""The fields as people read them: `--print_config` and docs/configuration.md.

python -m oel_jax.config > docs/configuration.md
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

from oel_jax.config.checks import validate
from oel_jax.config.field import PURPOSES
from oel_jax.config.fields import FIELDS, leaves

_INTRODUCTION = """\
# Configuration

A config file is Python: it starts from `oel_jax.config.default()`, changes what its recipe needs,
and returns the config. See `configs/` for examples, and `FILE.py:PRESET` for presets.

On the command line `--config.FIELD=VALUE` sets a field, for every command: e.g.
`--config.rounds=4`, `--config.extract.max_prompt=none`, `--config.evaluate.curve=1,5,25`.
`python -m oel_jax.main --config=FILE.py --print_config` prints the whole config of a run.

What a field is for:

{purposes}

"Resume" says whether an old workdir accepts another value. If it does not, use a new workdir, or
`--allow_config_change` to keep finished stages as they are.

This page is made from the table in `oel_jax/config/fields.py`: `python -m oel_jax.config`.
"""


def print_config(config: ml_collections.ConfigDict, games: Sequence[str]) -> None:
    """Print a config that is checked first, as `validate`; what is not the default is marked."""
    remarks = validate(config, games=games)
    print(config_text(config), end="")
    for remark in remarks:
        print(f"note: {remark}")


def config_text(config: ml_collections.ConfigDict) -> str:
    """All fields with their values, by purpose."""
    values = leaves(config.to_dict())
    width = max(map(len, FIELDS))
    lines = []
    for purpose, what in PURPOSES.items():
        lines += [f"# {purpose}: {what}"]
        for path, field in FIELDS.items():
            if field.purpose == purpose:
                differs = _differs(values[path], field.default)
                line = f"{'*' if differs else ' '} {path:{width}} = {values[path]!r}"
                lines.append(f"{line}  (default {field.default!r})" if differs else line)
        lines.append("")
    changed = sum(_differs(values[path], field.default) for path, field in FIELDS.items())
    return "\n".join(lines) + f"\n{changed} of {len(FIELDS)} fields differ from their default (*)\n"


def _differs(value: Any, default: Any) -> bool:
    plain = tuple(value) if isinstance(value, list) else value
    return plain != default


def page() -> str:
    """docs/configuration.md."""
    purposes = "\n".join(f"- **{purpose}**: {what}" for purpose, what in PURPOSES.items())
    parts, group = [_INTRODUCTION.format(purposes=purposes)], None
    for path, field in FIELDS.items():
        section = path.rpartition(".")[0]
        if section != group:
            group = section
            parts.append(
                f"\n## {f'config.{section}' if section else 'The run'}\n\n"
                "| field | default | for | may be | what it does | resume |\n"
                f"|{'---|' * 6}\n"
            )
        cells = (
            f"`{path}`",
            f"`{field.default!r}`",
            field.purpose,
            field.rule.words,
            field.doc,
            f"yes: {field.free}" if field.free else "no",
        )
        parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)
