"""The tensors of a model directory: where each is, and whether they are those of its config.json.

Only headers are read here (but `check_tied` compares bytes). What config.json and the weights both
state must agree: rows of the vocabulary, layers, heads, widths, whether there is an `lm_head`. The
`dtype` in config.json need not be that of the tensors: `config.model.dtype` says what they become.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.models import safetensors_io
from oel_jax.models.config import ModelConfig
from oel_jax.models.safetensors_io import SafetensorsFile
from oel_jax.models.weight_table import Layout, weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old exporters saved although they are computed from the config.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its file, and its name there."""

    file: SafetensorsFile
    name: str

    @property
    def dtype(self) -> str:
        """As the format spells it, e.g. 'BF16'."""
        return self.file.entries[self.name][0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name][1]

    def read(self) -> np.ndarray:
        """A read-only, memory-mapped view of its values."""
        return self.file.tensor(self.name)


def open_weights(directory: Path, cfg: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that a model with this config has, by name, checked by the headers alone.

    A model that shares its embedding with `lm_head` is whole with either of the two; both names
    are then used for the one that is there.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit the config; one message
            says in what they differ and names the tensors.
    """
    stored = _find(directory)
    expected = {
        name: layout.theirs
        for weight in weights(cfg)
        for layout in [Layout(weight, cfg)]
        for name in layout.names(weight)
    }
    if cfg.tie_embeddings and EMBED not in stored and HEAD in stored:
        stored[EMBED] = stored[HEAD]
    problems = list(_problems(cfg, stored, expected))
    if problems:
        intro = f"{directory}: the tensors do not fit its config.json:"
        causes = [f"  {line}" for line in _contradictions(cfg, stored)]
        fix = "  Take config.json and weights from one model, or correct the field."
        raise UserError("\n".join([intro, *causes, *problems, *([fix] if causes else [])]))
    return stored


def _find(directory: Path) -> dict[str, StoredTensor]:
    """All tensors, from the single file or from the index (preferred as in transformers)."""
    if (directory / SINGLE).exists():
        file = SafetensorsFile(directory / SINGLE)
        return {name: StoredTensor(file, name) for name in file.entries}
    if not (directory / INDEX).exists():
        others = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        hint = f" ({', '.join(others[:3])} is not read; convert it)" if others else ""
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}")
    placed = read_object(directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
        raise UserError(f"{directory / INDEX} has no weight_map; download it again")
    shards = sorted(set(placed.values()))
    for shard in shards:
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise UserError(
                f"{directory / INDEX}: the shard {shard!r} is outside the model directory; "
                "such an index is not followed"
            )
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise UserError(
            f"{directory}: the shard {', '.join(absent)} listed in {INDEX} is missing; "
            "copy or download it"
        )
    stored = {}
    for shard in shards:
        file = SafetensorsFile(directory / shard)
        stored |= {n: StoredTensor(file, n) for n in file.entries if placed.get(n, shard) == shard}
    return stored


def incomplete(directory: Path) -> str | None:
    """Why a downloaded directory is no whole model, e.g. a shard is missing; None if it is one.

    Headers are read, and the sizes of the files compared with them.
    """
    if not (directory / "config.json").is_file():
        return f"{directory} has no config.json"
    try:
        _find(directory)
    except UserError as error:
        return str(error)
    return None


def _problems(
    cfg: ModelConfig, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """One line for each kind of tensor that does not fit, with names."""
    present = {name for name in stored if not _COMPUTED.search(name)}
    wanted = dict(expected)
    if cfg.tie_embeddings and HEAD in stored:  # allowed, as a copy
        wanted[HEAD] = expected[EMBED]
    there = [name for name in wanted if name in stored]
    kinds = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": sorted(present - wanted.keys()),
        "of the wrong shape": [
            f"{name} {list(stored[name].shape)} instead of {list(wanted[name])}"
            for name in there
            if stored[name].shape != wanted[name]
        ],
        "neither BF16, F16 nor F32": [
            f"{name} {stored[name].dtype}"
            for name in there
            if stored[name].dtype not in safetensors_io.DTYPES
        ],
    }
    for what, names in kinds.items():
        if names:
            more = ", ..." if len(names) > 20 else ""
            yield f"  {len(names)} {what}: {', '.join(names[:20])}{more}"


def _contradictions(cfg: ModelConfig, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """What config.json says and what the weights have, where these differ."""
    layers = {int(found[1]) for name in stored if (found := _LAYER.match(name))}
    if layers and len(layers) != cfg.num_layers:
        yield f"num_hidden_layers is {cfg.num_layers}, the weights have {len(layers)} layers"
    if not cfg.tie_embeddings and HEAD not in stored:
        yield (
            "tie_word_embeddings is false, but there is no lm_head.weight; if the model shares it "
            "with the embedding, set tie_word_embeddings to true"
        )
    first = f"model.layers.{min(layers, default=0)}."
    heads, kv_heads, size = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    attention = first + "self_attn."
    rows = {
        EMBED: ("vocab_size", cfg.vocab_size),
        HEAD: ("vocab_size", cfg.vocab_size),
        "model.norm.weight": ("hidden_size", cfg.hidden_size),
        attention + "q_proj.weight": (
            f"num_attention_heads ({heads}) x head_dim ({size})",
            heads * size,
        ),
        attention + "k_proj.weight": (
            f"num_key_value_heads ({kv_heads}) x head_dim ({size})",
            kv_heads * size,
        ),
        attention + "q_norm.weight": ("head_dim", size),
        first + "mlp.gate_proj.weight": ("intermediate_size", cfg.intermediate_size),
    }
    for name, (field, number) in rows.items():
        if name in stored and stored[name].shape[:1] != (number,):
            found = stored[name].shape[0] if stored[name].shape else "no"
            yield f"{field} is {number}, {name} has {found} rows"


def check_tied(directory: Path, cfg: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """A tied model may hold an `lm_head` too, but only a copy of the embedding; reads both.

    transformers would use both, although config.json says that they are one.

    Raises:
        UserError: they differ.
    """
    if not cfg.tie_embeddings or HEAD not in stored or stored[EMBED] == stored[HEAD]:
        return
    if stored[EMBED].dtype == stored[HEAD].dtype:
        embed, head = (stored[name].read().view(np.uint8) for name in (EMBED, HEAD))
        block = 4096  # rows; whole tables would be a gigabyte of temporary comparisons
        if all(
            np.array_equal(embed[i : i + block], head[i : i + block])
            for i in range(0, len(embed), block)
        ):
            return
    raise UserError(
        f"{directory}: config.json says tie_word_embeddings, but lm_head.weight differs from the "
        "embedding; set tie_word_embeddings to false (or remove the tensor)"
    )


# --- damaged values -------------------------------------------------------------------------------

_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_BLOCK = 1 << 15  # values; small enough for the cache, which makes the check nearly free


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: none has all bits of the exponent set.

    Args:
        values: C-contiguous, bfloat16, float16 or float32. Looking at the bits is many times faster
            than `np.isfinite` for bfloat16.
    """
    names = {dtype: name for name, dtype in safetensors_io.DTYPES.items()}
    kind = np.uint32 if values.dtype.itemsize == 4 else np.uint16
    mask, bits = kind(_EXPONENT[names[values.dtype]]), values.reshape(-1).view(kind)
    return all((bits[i : i + _BLOCK] & mask).max() != mask for i in range(0, len(bits), _BLOCK))
