"""The fields of a decoder model, read from a Hugging Face `config.json`.

Three families share one decoder: Qwen3 (query/key norm), Qwen2.5 (query/key/value bias) and Llama-3
(rope scaling). `config.json` comes in two spellings: transformers 4 writes `rope_theta` and
`rope_scaling`, transformers 5 nests both in `rope_parameters`. Whatever the decoder cannot compute
exactly is refused here with a `UserError` that names the field, so that no checkpoint is ever run
with silently different mathematics.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object

# model_type (our family) -> the one architecture of it that is a causal language model
_FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: 'linear' (all frequencies divided by `factor`) or 'llama3' (only wavelengths above
            `original_max_positions / low_freq_factor` are; those below `.. / high_freq_factor` stay
            as they are, with a ramp in between).
        factor: the divisor.
        low_freq_factor, high_freq_factor, original_max_positions: 'llama3' only, else zero.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of one decoder; hashable, so it can be a static argument of jit.

    `head_dim` is independent of `hidden_size / num_heads`. `attention_bias` means a bias on query,
    key and value (never on the output projection). `rope_scaling` is None for plain rotary
    embeddings. `max_positions` is what the checkpoint was made for; nothing is cut off at it here.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    max_positions: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads the content of a `config.json` in either spelling.

        Raises:
            UserError: naming the field, when the architecture or an option of it is not supported,
                a field is missing or of the wrong type, or sizes contradict each other.
        """
        fields = _Fields(config)
        family = _family(fields)
        _refuse_unsupported(fields, family)
        heads = fields.integer("num_attention_heads")
        hidden = fields.integer("hidden_size")
        # Llama-2 files predate grouped queries and leave the field out; Qwen files always have it.
        kv_heads = fields.integer("num_key_value_heads", heads if family == "llama" else None)
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads ({heads}) is not a multiple of "
                f"num_key_value_heads ({kv_heads}); correct the one that does not match the weights"
            )
        max_positions = fields.integer("max_position_embeddings")
        rope_theta, rope_scaling = _rope(fields, family, max_positions)
        return cls(
            family=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(fields, family, hidden, heads),
            intermediate_size=fields.integer("intermediate_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=max_positions,
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Reads `directory/config.json`; `UserError` as `from_hf` or if it cannot be read."""
        return cls.from_hf(read_object(Path(directory) / "config.json"))

    def inverse_frequencies(self) -> Float[np.ndarray, " half"]:
        """Rotary angle per position of each half-dimension pair, float32 [head_dim / 2].

        At long positions a last-bit difference in a frequency is a visible difference in an angle.
        So every operation rounds to float32 in the order of transformers' `modeling_rope_utils`,
        where a number divided by a tensor is the tensor's reciprocal times the number. The power is
        the exact one, rounded once: PyTorch's own is that too but for about 1 value in 80, which is
        one unit in the last place off, and which value it is depends on the processor.
        """
        one = np.float32(1.0)
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = np.float64(np.float32(self.rope_theta))
        plain = one / np.power(base, exponent.astype(np.float64)).astype(np.float32)
        scaling = self.rope_scaling
        if scaling is None:
            return plain
        factor = np.float32(scaling.factor)
        if scaling.kind == "linear":
            return plain / factor
        wavelength = one / plain * np.float32(2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        length = scaling.original_max_positions
        # 0 at the longest wavelength of the ramp (slowed as a whole), 1 at the shortest.
        ramp = (one / wavelength * np.float32(length) - np.float32(low)) / np.float32(high - low)
        between = (one - ramp) * plain / factor + ramp * plain
        slow, fast = wavelength > np.float32(length / low), wavelength < np.float32(length / high)
        return np.where(slow, plain / factor, np.where(fast, plain, between))


class _Fields:
    """Typed access to a `config.json` with errors that name the field; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        if not isinstance(values, Mapping):
            raise UserError(f"{where} must hold a JSON object, not {type(values).__name__}")
        self.values = values
        self.where = where

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def _missing(self, name: str) -> UserError:
        return UserError(
            f"{self.where}: the field {name!r} is missing; take the file from the original model"
        )

    def _wrong(self, name: str, expected: str) -> UserError:
        value = self.values[name]
        return UserError(
            f"{self.where}: {name} must be {expected}, but is {value!r} ({type(value).__name__})"
        )

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not math.isfinite(value) or value <= 0:
            raise self._wrong(name, "positive and finite")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return dict(value)


def _family(fields: _Fields) -> str:
    """The family by `model_type` and `architectures`, which must agree if both are there."""
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    supported = ", ".join(_FAMILIES.values())
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError(f"config.json: architectures must be a list of names; known: {supported}")
    if model_type is None and not architectures:
        raise UserError(
            "config.json: neither model_type nor architectures says which model this is; "
            f"supported architectures: {supported}"
        )
    if architectures:
        families = [family for family, name in _FAMILIES.items() if name in architectures]
        if len(architectures) > 1 or not families:
            raise UserError(
                f"config.json: the architecture {', '.join(architectures)} is not supported; "
                f"use a model of one of {supported}"
            )
        if model_type not in (None, families[0]):
            raise UserError(
                f"config.json: model_type {model_type!r} contradicts architectures "
                f"{architectures}; correct one of the two fields"
            )
        return families[0]
    if model_type not in _FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported; use one of "
            f"{', '.join(_FAMILIES)} ({supported})"
        )
    return model_type


def _refuse_unsupported(fields: _Fields, family: str) -> None:
    """Stops at options of the three architectures that this decoder does not compute."""
    for name in ("quantization_config", "compression_config"):
        if fields.get(name):
            raise UserError(
                f"config.json: quantised weights ({name}) are not supported; use the bf16, f16 or "
                "f32 checkpoint of the same model"
            )
    sliding = fields.get("layer_types") or []
    if not isinstance(sliding, list) or any(kind != "full_attention" for kind in sliding):
        raise UserError(
            "config.json: layer_types may only list 'full_attention' (sliding windows are not "
            f"supported), but is {sliding!r}; use a model with full attention"
        )
    if sliding and len(sliding) != fields.integer("num_hidden_layers"):
        raise UserError(
            f"config.json: num_hidden_layers is {fields.integer('num_hidden_layers')}, but "
            f"layer_types lists {len(sliding)} layers; correct the one that does not match the "
            "weights"
        )
    # Qwen files keep a sliding_window length next to use_sliding_window: false; that is no window.
    if fields.boolean("use_sliding_window", False):
        raise UserError(
            "config.json: use_sliding_window is true, but sliding windows are not supported; set "
            "it to false if the context stays shorter than sliding_window"
        )
    activation = fields.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UserError(
            f"config.json: hidden_act {activation!r} is not supported; the decoder computes 'silu'"
        )
    if family != "qwen2" and fields.boolean("attention_bias", False):
        raise UserError(
            f"config.json: attention_bias is true, which in {_FAMILIES[family]} also puts a bias "
            "on the output projection; that is not supported, use a model without it"
        )
    if fields.boolean("mlp_bias", False):
        raise UserError("config.json: mlp_bias true is not supported; use a model without it")


def _head_dim(fields: _Fields, family: str, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif family == "qwen3":
        head_dim = 128  # the architecture's own default, independent of the hidden size
    elif hidden % heads:
        raise UserError(
            f"config.json: hidden_size ({hidden}) is not a multiple of num_attention_heads "
            f"({heads}) and head_dim is missing; add head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise UserError(f"config.json: head_dim must be even for rotary embeddings, is {head_dim}")
    return head_dim


def _rope(fields: _Fields, family: str, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either spelling."""
    # transformers 5 lets a non-empty rope_scaling replace rope_parameters; so do we.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = _Fields(fields.mapping(name), f"config.json: {name}")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise UserError(f"config.json: {name} per layer type is not supported; use a flat object")
    # An old Llama file may leave the base out; its value has always been 10000 then.
    default = 10_000.0 if family == "llama" else None
    holder = rope if rope.get("rope_theta") is not None else fields
    theta = holder.number("rope_theta", default)
    for holder in (rope, fields):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"{holder.where}: partial_rotary_factor other than 1 is not supported; use a model "
                "whose whole head is rotated"
            )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        raise UserError(
            f"config.json: {name} has rope_type {kind!r}, which is not supported; supported are "
            "'default', 'linear' and 'llama3' (for a long-context variant such as yarn, remove the "
            "scaling to use the model at its trained length)"
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise UserError(
            f"config.json: {name} needs low_freq_factor < high_freq_factor, has {low} and {high}"
        )
    original = fields.integer(
        "original_max_position_embeddings",
        rope.integer("original_max_position_embeddings", max_positions),
    )
    return theta, RopeScaling("llama3", rope.number("factor"), low, high, original)
