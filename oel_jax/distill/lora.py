"""LoRA: the student is the frozen base plus a low-rank adapter, the teacher is the base without it.

For a weight W [in, out] the student computes with W + alpha / rank * A B, where A [in, rank] starts
random and B [rank, out] starts at zero: a fresh adapter changes nothing. Only A and B are trained
(float32); the base stays in the compute dtype and is one set of arrays for student, sampler and
teacher. Hu et al. 2021, arXiv 2106.09685; the paper itself trains all weights (`lora.rank` = 0).

An adapter belongs to the policy its round began with. At the end of a round it is merged into the
policy that is handed on, so that the next round's base, and so its teacher, is P_{r+1}.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from oel_jax.models import safetensors_io
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import ADAPTABLE, Params, abstract_params, adapter_axes
from oel_jax.models.huggingface import CompleteOrNothing
from oel_jax.models.weight_table import weights
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import shardings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """A config's `lora` section.

    Attributes:
      rank: columns of A and rows of B.
      alpha: the adapter's product is multiplied by alpha / rank.
      targets: names of the adapted weights, in the order of `ADAPTABLE`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def of(cls, section: Any) -> "Lora | None":
        """From `config.lora`; None where all weights are trained."""
        if not section.rank:
            return None
        asked = tuple(target for target in ADAPTABLE if target in section.targets)
        return cls(section.rank, section.alpha, asked)


# --- the adapter's tree: {target: {"a": [L, *input, R], "b": [L, R, *output]}} --------------------


def abstract_adapter(cfg: ModelConfig, lora: Lora) -> Params:
    """Shapes of an adapter, float32; nothing is allocated."""
    base, tree = abstract_params(cfg)["layers"], {}
    for name in lora.targets:
        inputs = 1 + len(ADAPTABLE[name][0])
        shape = base[name].shape
        shapes = {"a": (*shape[:inputs], lora.rank), "b": (shape[0], lora.rank, *shape[inputs:])}
        tree[name] = {
            side: jax.ShapeDtypeStruct(size, jnp.float32) for side, size in shapes.items()
        }
    return tree


def adapter_shardings(lora: Lora, mesh: jax.sharding.Mesh) -> Params:
    """NamedSharding of every factor: split where the weight is, whole along the rank."""
    axes = {
        name: {side: (None, *logical) for side, logical in adapter_axes(name).items()}
        for name in lora.targets
    }
    return shardings(mesh, axes)


def fresh_adapter(
    cfg: ModelConfig, lora: Lora, mesh: jax.sharding.Mesh, key: UInt32[np.ndarray, "2"]
) -> Params:
    """An adapter that changes nothing: A uniform in +-1 / sqrt(inputs), as PEFT's, and B zero.

    Args:
      key: raw key; the values depend on it alone, not on the mesh.
    """
    draw = np.random.Generator(np.random.Philox(key=int(key[0]) << 32 | int(key[1])))
    places, tree = adapter_shardings(lora, mesh), {}
    for name, sides in abstract_adapter(cfg, lora).items():
        a = draw.random(sides["a"].shape, np.float32)
        a = (2 * a - 1) / np.float32(math.sqrt(math.prod(a.shape[1:-1])))
        values = {"a": a, "b": np.zeros(sides["b"].shape, np.float32)}
        tree[name] = {
            side: jax.make_array_from_callback(value.shape, places[name][side], value.__getitem__)
            for side, value in values.items()
        }
    return tree


@partial(jax.jit, static_argnames=("scale", "dtype"))
def _scaled(adapter: Params, scale: float, dtype: Any) -> Params:
    return {
        name: {"a": (scale * sides["a"]).astype(dtype), "b": sides["b"].astype(dtype)}
        for name, sides in adapter.items()
    }


def adapted(base: Params, adapter: Params, scale: float, dtype: Any) -> Params:
    """The base's own arrays with the adapter next to them: what `forward` reads.

    Args:
      scale: alpha / rank.
      dtype: compute dtype, that of `base`.
    """
    return base | {"layers": base["layers"] | {"lora": _scaled(adapter, scale, dtype)}}


# --- out of the run: merged, or as PEFT's files ---------------------------------------------------


@partial(jax.jit, static_argnames=("name", "scale"))
def merged_layer(
    name: str, weight: Array, a: Array, b: Array, layer: int | Array, scale: float
) -> Float[Array, "*in_out"]:
    """W + scale * A B of one layer, float32; `weight`, `a`, `b` are stacked over layers."""
    into, out_of = ADAPTABLE[name]
    w, a, b = (
        jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False).astype(jnp.float32)
        for leaf in (weight, a, b)
    )
    product = jnp.einsum(
        f"{into}r,r{out_of}->{into}{out_of}", a, b, precision=jax.lax.Precision.HIGHEST
    )
    return w + scale * product


@dataclass(frozen=True)
class MergedLeaf:
    """A stacked weight with its adapter merged in, made layer by layer when it is read.

    So a merged model can be written without a second copy of it on the device.
    """

    name: str
    weight: Array
    a: Array
    b: Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, layer: int) -> Array:
        return merged_layer(self.name, self.weight, self.a, self.b, layer, self.scale)


def merged(base: Params, adapter: Params, lora: Lora) -> Params:
    """The policy as `lm.huggingface.save_model` takes it; adapted weights are `MergedLeaf`s."""
    layers = dict(base["layers"])
    for name, sides in adapter.items():
        layers[name] = MergedLeaf(name, layers[name], sides["a"], sides["b"], lora.scale)
    return base | {"layers": layers}


def save_adapter(
    directory: Path,
    cfg: ModelConfig,
    adapter: Params,
    lora: Lora,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write an adapter as a directory that `peft.PeftModel.from_pretrained` loads.

    All processes that hold parts of it call this; the first one writes.

    Args:
      directory: must not exist, or be empty; it gets its name when it is complete.
      base: the model it belongs to, as PEFT looks it up: an absolute path (a relative one would be
        taken for the name of a repository), or a hub id.
      revision: the commit of that hub id.

    Raises:
      UserError: the directory is in use or cannot be written.
    """
    names = {weight.path[-1]: weight.name for weight in weights(cfg)}
    modules = {name: re.sub(r"\.weight$", "", names[name]) for name in lora.targets}
    tensors: dict[str, np.ndarray] = {}
    for name, sides in adapter.items():
        a, b = processes.to_numpy(sides["a"]), processes.to_numpy(sides["b"])
        for layer in range(cfg.num_layers):
            prefix = "base_model.model." + modules[name].format(layer)
            tensors[f"{prefix}.lora_A.weight"] = a[layer].reshape(-1, lora.rank).T
            tensors[f"{prefix}.lora_B.weight"] = b[layer].reshape(lora.rank, -1).T
    settings: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
    if processes.is_first():
        with CompleteOrNothing(directory) as unnamed:
            text = json.dumps(settings, indent=2) + "\n"
            (unnamed / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
            path = unnamed / ADAPTER_WEIGHTS
            safetensors_io.write(path, shapes, np.dtype(np.float32), tensors.__getitem__)
    processes.wait(f"{directory.name} is written")
