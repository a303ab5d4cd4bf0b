"""Models of known shape with random weights, as Hugging Face directories both sides can load."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from oel_jax.base.errors import UserError
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import init_params
from oel_jax.models.huggingface import save_model
from oel_jax.plan import shapes
from oel_jax.plan.shapes import KNOWN, Sizes

# As `shapes.KNOWN`, by short names: 'qwen3_1p7b' and so on.
SHAPES: dict[str, Sizes] = {
    "25m": (384, 6, 6, 2, 64, 1152, 36_864, True),
    **{
        path.rpartition("/")[2].lower().replace("-", "_").replace(".", "p"): sizes
        for path, sizes in KNOWN.items()
    },
}


def hf_config(shape: str) -> dict[str, object]:
    """The `config.json` of a shape.

    Raises:
      UserError: there is no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--model={shape}: give a model directory or one of {', '.join(SHAPES)}")
    return shapes.hf_config(SHAPES[shape])


def random_model(shape: str, directory: Path) -> Path:
    """Write a model of `shape` with random float32 weights into `directory`."""
    source = directory / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(hf_config(shape)))
    cfg = ModelConfig.from_directory(source)
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    made = directory / "model"
    save_model(made, cfg, params, source=source, dtype=jnp.float32)
    return made
