"""Models of known shape with random weights, as Hugging Face directories both sides can load."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from oel_jax.errors import UserError
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.huggingface import save_model
from oel_jax.lm.model import init_params

# hidden, layers, heads, kv heads, head size, mlp, vocabulary, tied
SHAPES = {
    "25m": (384, 6, 6, 2, 64, 1152, 36_864, True),
    "qwen3_0p6b": (1024, 28, 16, 8, 128, 3072, 151_936, True),
    "qwen3_1p7b": (2048, 28, 16, 8, 128, 6144, 151_936, True),
    "qwen3_4b": (2560, 36, 32, 8, 128, 9728, 151_936, True),
    "qwen3_8b": (4096, 36, 32, 8, 128, 12_288, 151_936, False),
}


def hf_config(shape: str) -> dict[str, object]:
    """The `config.json` of a shape.

    Raises:
      UserError: there is no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--model={shape}: give a model directory or one of {', '.join(SHAPES)}")
    hidden, layers, heads, kv_heads, size, mlp, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


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
