"""A model that can do nothing, small enough for any test."""

import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from oel_jax.models.bundled import model_dir
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import init_params
from oel_jax.models.huggingface import save_model


def write_dummy_model(directory: str | Path, *, seed: int = 0, layers: int = 1) -> Path:
    """Write a random Qwen3 model of width 32 with the nano models' tokenizer and chat template.

    Args:
      directory: must not exist, or be empty.
      seed: of the weights, which are float32.
      layers: of the decoder; each has 1 head of 32.

    Returns: the directory, in Hugging Face's layout; `oel_jax.load_model` and transformers read it.

    Raises:
      UserError: the directory is in use or cannot be written.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        shutil.copytree(model_dir("tiny"), source, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (source / "config.json").write_text(json.dumps(config | sizes), encoding="utf-8")
        cfg = ModelConfig.from_directory(source)
        shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
        draw = np.random.default_rng(seed)  # in no need of a compiler
        values = jax.tree.map(lambda x: draw.normal(0.1, 0.1, x.shape).astype(x.dtype), shapes)
        params = jax.device_put(values)
        save_model(Path(directory), cfg, params, source=source, dtype="float32")
    return Path(directory)
