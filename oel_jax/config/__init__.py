"""What a run may be told. Imports no JAX, but for `fit`.

`fields` is the table of all fields (docs/configuration.md is made from it); `checks` asks whether
values fit together, `old_values` reads those of older versions, `command_line` reads overrides.
"""

from oel_jax.config.checks import validate
from oel_jax.config.defaults import as_json, default, with_fields
from oel_jax.config.file import load_config
from oel_jax.config.presets import apply_preset

__all__ = ["apply_preset", "as_json", "default", "load_config", "validate", "with_fields"]
