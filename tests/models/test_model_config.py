"""ModelConfig: both spellings of config.json, and a clear refusal of everything else."""

import importlib
import json
import math

import jax
import numpy as np
import pytest

from oel_jax.base.errors import UserError
from oel_jax.models.config import ModelConfig, RopeScaling
from oel_jax.models.decoder import abstract_params

QWEN3 = {  # as on the hub (transformers 4), Qwen3-0.6B
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = QWEN3 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": None,
    "sliding_window": 32768,
    "max_window_layers": 21,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def in_new_spelling(config: dict) -> dict:
    """What transformers 5 writes for the same model."""
    rope = (config.get("rope_scaling") or {"rope_type": "default"}) | {
        "rope_theta": config["rope_theta"]
    }
    return without(config, "rope_scaling", "rope_theta", "torch_dtype") | {
        "rope_parameters": rope,
        "dtype": config.get("torch_dtype"),
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
    }


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "width", "tied", "parameters"),
    [
        (1024, 28, 16, 3072, True, 596_049_920),
        (2048, 28, 16, 6144, True, 1_720_574_976),
        (2560, 36, 32, 9728, True, 4_022_468_096),
        (4096, 36, 32, 12288, False, 8_190_735_360),
        (5120, 40, 40, 17408, False, 14_768_307_200),
        (5120, 64, 64, 25600, False, 32_762_123_264),
    ],
)
def test_qwen3_sizes_have_the_published_number_of_parameters(
    hidden, layers, heads, width, tied, parameters
):
    cfg = ModelConfig.from_hf(
        QWEN3
        | {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": width,
            "tie_word_embeddings": tied,
        }
    )
    assert (cfg.head_dim, cfg.qk_norm, cfg.attention_bias) == (128, True, False)
    leaves = jax.tree.leaves(abstract_params(cfg))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize("config", [QWEN3, QWEN2, LLAMA])
def test_both_spellings_mean_the_same(config):
    assert ModelConfig.from_hf(in_new_spelling(config)) == ModelConfig.from_hf(config)


def test_fields_of_the_three_families():
    qwen2, llama = ModelConfig.from_hf(QWEN2), ModelConfig.from_hf(LLAMA)
    assert (qwen2.family, qwen2.attention_bias, qwen2.qk_norm) == ("qwen2", True, False)
    assert qwen2.head_dim == 64  # hidden_size / heads where the file has none
    assert (llama.family, llama.attention_bias, llama.qk_norm) == ("llama", False, False)
    assert llama.rope_theta == 500_000.0 and llama.rms_norm_eps == 1e-5
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert llama.max_positions == 131072
    assert hash(llama) == hash(ModelConfig.from_hf(LLAMA))  # a static argument of jit


def test_defaults_of_old_files():
    old = ModelConfig.from_hf(without(LLAMA, "rope_theta", "rope_scaling", "num_key_value_heads"))
    assert (old.rope_theta, old.num_kv_heads, old.rope_scaling) == (10_000.0, 32, None)
    assert ModelConfig.from_hf(without(QWEN3, "architectures")).family == "qwen3"
    assert ModelConfig.from_hf(without(QWEN3, "model_type")).family == "qwen3"
    assert ModelConfig.from_hf(without(QWEN3, "head_dim") | {"hidden_size": 4096}).head_dim == 128
    linear = ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    no_length = without(LLAMA3_ROPE, "original_max_position_embeddings")
    cfg = ModelConfig.from_hf(LLAMA | {"rope_scaling": no_length})
    assert cfg.rope_scaling.original_max_positions == 131072


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (QWEN3, {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*not supported"),
        (QWEN3, {"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClass"),
        (QWEN3, {"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
        (QWEN3, {"architectures": None, "model_type": None}, "neither model_type nor archi"),
        (QWEN3, {"architectures": ["LlamaForCausalLM"]}, "contradicts"),
        (QWEN3, {"architectures": "Qwen3ForCausalLM"}, "architectures must be a list"),
        (QWEN3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (QWEN3, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        (QWEN3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        (QWEN3, {"rope_scaling": [4.0]}, "rope_scaling must be an object"),
        (LLAMA, {"rope_scaling": without(LLAMA3_ROPE, "low_freq_factor")}, "'low_freq_factor'"),
        (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor <"),
        (QWEN3, {"rope_theta": None}, "'rope_theta' is missing"),
        (QWEN3, {"hidden_size": None}, "'hidden_size' is missing"),
        (QWEN3, {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        (QWEN3, {"hidden_size": "1024"}, "hidden_size must be a positive integer.*'1024'"),
        (QWEN3, {"vocab_size": 0}, "vocab_size must be a positive"),
        (QWEN3, {"num_hidden_layers": True}, "num_hidden_layers must be"),
        (QWEN3, {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        (QWEN3, {"rope_theta": float("nan")}, "rope_theta must be positive and finite"),
        (QWEN3, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (QWEN3, {"num_key_value_heads": 7}, "not a multiple of num_key_value_heads"),
        (QWEN2, {"num_attention_heads": 24}, "head_dim is missing"),
        (QWEN3, {"head_dim": 127}, "head_dim must be even"),
    ],
)
def test_refusals_name_the_field(base, change, said):
    with pytest.raises(UserError, match=said):
        ModelConfig.from_hf(base | change)


def test_from_directory_names_the_file(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        ModelConfig.from_directory(tmp_path)
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "qwen3"')
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)
    file.write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        ModelConfig.from_directory(tmp_path)
    file.write_text(json.dumps(QWEN3))
    assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_hf(QWEN3)


def their_frequencies(family, config):
    """What transformers computes, [head_dim / 2]."""
    classes = {
        "llama": ("LlamaConfig", "llama.modeling_llama", "LlamaRotaryEmbedding"),
        "qwen2": ("Qwen2Config", "qwen2.modeling_qwen2", "Qwen2RotaryEmbedding"),
        "qwen3": ("Qwen3Config", "qwen3.modeling_qwen3", "Qwen3RotaryEmbedding"),
    }
    transformers = pytest.importorskip("transformers")
    made, module, rotary = classes[family]
    module = importlib.import_module(f"transformers.models.{module}")
    return getattr(module, rotary)(getattr(transformers, made)(**config)).inv_freq.numpy()


@pytest.fixture(scope="module")
def rotary_cases():
    """(family, config.json) of random heads, bases and scalings, and the usual ones."""
    draw, found = np.random.default_rng(0), []
    for number in range(150):
        family = ("llama", "qwen2", "qwen3")[number % 3]
        base = float(draw.choice([1e4, 2e4, 5e5, 1e6, 1e7, 10 ** draw.uniform(1, 8)]))
        head = int(draw.choice([64, 80, 96, 128, 256, 2 * draw.integers(1, 129)]))
        low = float(draw.uniform(0.5, 4))
        scaling = [
            None,
            {"rope_type": "linear", "factor": float(draw.uniform(1, 40))},
            {
                "rope_type": "llama3",
                "factor": float(draw.choice([8.0, 32.0, draw.uniform(1, 40)])),
                "low_freq_factor": low,
                "high_freq_factor": low + float(draw.uniform(0.5, 8)),
                "original_max_position_embeddings": int(draw.integers(16, 20_000)),
            },
            LLAMA3_ROPE,
        ][number % 4]
        config = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}[family]
        rope = {"rope_theta": base, "rope_scaling": scaling}
        found.append((family, config | rope | {"head_dim": head}))
    return found


def test_frequencies_equal_those_of_transformers(rotary_cases):
    """Bit for bit but for PyTorch's power, which is not always rounded right."""
    pytest.importorskip("torch")
    equal = total = 0
    for family, config in rotary_cases:
        theirs = their_frequencies(family, config)
        ours = ModelConfig.from_hf(config).inverse_frequencies()
        assert ours.dtype == theirs.dtype == np.float32
        # The ramp of llama3 is a difference, which enlarges that last place.
        ramp = (config["rope_scaling"] or {}).get("rope_type") == "llama3"
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if ramp else 2.5e-7)
        equal, total = equal + int((ours == theirs).sum()), total + len(ours)
    assert equal > 0.97 * total


def test_frequencies_equal_transformers_with_an_exact_power_to_the_bit(rotary_cases, monkeypatch):
    torch = pytest.importorskip("torch")

    def power(exponent, base):
        base = torch.tensor(base, dtype=exponent.dtype).double()
        return torch.pow(base, exponent.double()).to(exponent.dtype)

    monkeypatch.setattr(torch.Tensor, "__rpow__", power)
    slowed = 0
    for family, config in rotary_cases:
        theirs = their_frequencies(family, config)
        ours = ModelConfig.from_hf(config).inverse_frequencies()
        np.testing.assert_array_equal(ours, theirs)
        plain = ModelConfig.from_hf(config | {"rope_scaling": None}).inverse_frequencies()
        slowed += int((ours < plain).sum())
    assert slowed > 1000  # the scalings do something
