"""The shape of a model without its weights: a local config.json, or a table of known hub ids."""

from collections.abc import Mapping
from typing import Any

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.config import ModelConfig

# hidden, layers, heads, kv heads, head size, mlp, vocabulary, tied
Sizes = tuple[int, int, int, int, int, int, int, bool]

# Public config.json files of the Hugging Face hub. The tests compare their parameter counts with
# the ones in the models' names.
KNOWN: dict[str, Sizes] = {
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen/Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-4B-Instruct-2507": (2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "Qwen/Qwen3-14B": (5120, 40, 40, 8, 128, 17_408, 151_936, False),
    "Qwen/Qwen3-32B": (5120, 64, 64, 8, 128, 25_600, 151_936, False),
}

# What differs from the other Qwen3 models.
_LONG = {"max_position_embeddings": 262_144, "rope_theta": 5_000_000.0}
_OTHER: dict[str, dict[str, Any]] = {"Qwen/Qwen3-4B-Instruct-2507": _LONG}


def hf_config(sizes: Sizes, other: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `config.json` of a Qwen3 model of these sizes."""
    hidden, layers, heads, kv_heads, size, mlp, vocabulary, tied = sizes
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
    } | dict(other or {})


def model_shape(path: str, field: str = "config.model.path") -> ModelConfig:
    """The shape of a bundled model, a local directory, or a hub id of `KNOWN`.

    Nothing is downloaded: only config.json would be needed, and the table has it.

    Raises:
      UserError: no such directory, and the table does not know the name; or a config.json that is
        not supported.
    """
    directory = paths.local(resolve_bundled(path), field)
    if directory.is_dir():
        return ModelConfig.from_directory(directory)
    if path in KNOWN:
        return ModelConfig.from_hf(hf_config(KNOWN[path], _OTHER.get(path)))
    raise UserError(
        f"{field}={path} is no directory here, and the planner knows the shape of these hub ids "
        f"only: {', '.join(KNOWN)}; put the model's config.json into a directory and give that"
    )
