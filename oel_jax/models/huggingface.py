"""Weights in and out of Hugging Face model directories.

Loading, checking and saving all follow the table of `weight_table`. On loading, every device reads
just its own slices from memory-mapped files into the stacked `[L, ...]` leaves. Devices take turns,
so that in addition to the arrays themselves the host holds at most one device's slice of one leaf.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.models import hub, safetensors_io
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import param_shardings
from oel_jax.models.weight_files import (
    INDEX,
    SINGLE,
    StoredTensor,
    all_finite,
    check_tied,
    open_weights,
)
from oel_jax.models.weight_table import Layout, Weight, weights
from oel_jax.parallel import processes

# What is copied from the source model on export, and what is wanted from the hub with the weights.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
)
_SHARD_BYTES = 5_000_000_000


def load_params(
    directory: Path,
    cfg: ModelConfig,
    *,
    mesh: jax.sharding.Mesh,
    dtype: Any,
    check: bool = True,
) -> dict[str, Any]:
    """Loads the weights of a model directory, each device reading its own slices.

    Args:
        directory: holds `model.safetensors`, or an index and its shards, in bf16, f16 or f32.
        cfg: the config of that directory.
        mesh: where the parameters go, by `param_shardings(cfg, mesh)`.
        dtype: dtype of all leaves; rounding is to nearest even, on the host.
        check: refuse NaN and infinite values, naming the tensor.

    Returns:
        The parameter tree (see `oel_jax.models.decoder`), e.g. `layers/q` as [L, D, N, H].

    Raises:
        UserError: a file is missing or damaged; tensors are missing, unexpected, mis-shaped or of
            another dtype (all are named in one message); a value is NaN or infinite.
    """
    directory = Path(directory)
    shardings = param_shardings(cfg, mesh)
    stored = open_weights(directory, cfg)
    check_tied(directory, cfg, stored)
    dtype = np.dtype(dtype)
    params: dict[str, Any] = {}
    for weight, layout in _table(cfg):
        read = functools.partial(_read_slices, weight, layout, stored, dtype, check)
        _set(params, weight.path, _load_leaf(layout.leaf, _get(shardings, weight.path), read))
    return params


def _load_leaf(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[tuple], np.ndarray]
) -> jax.Array:
    """One leaf, device after device.

    A transfer is asynchronous and holds the host's slice; waiting keeps them from piling up.
    """
    parts = [
        jax.block_until_ready(jax.device_put(read(index), device))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_slices(
    weight: Weight,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
    check: bool,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a leaf as a new host array (called once per device)."""
    shape = [len(range(*part.indices(n))) for part, n in zip(index, layout.leaf, strict=True)]
    out = np.empty(shape, dtype)
    if weight.stacked:
        names, parts, index = layout.names(weight)[index[0]], list(out), index[1:]
    else:
        names, parts = layout.names(weight), [out]
    for name, part in zip(names, parts, strict=True):
        view = layout.to_ours(stored[name].read())[index]
        _copy(part, view)
        if check and not all_finite(part):
            raise _not_finite(stored[name], view, dtype)
    return out


def _not_finite(stored: StoredTensor, view: np.ndarray, dtype: np.dtype) -> UserError:
    """What to say about a tensor that has become NaN or infinite."""
    bad = int((~np.isfinite(view.astype(np.float32))).sum())
    where = f"{stored.file.path}: {stored.name}"
    if not bad:
        return UserError(f"{where} has values too large for {dtype}; load it as bfloat16")
    return UserError(
        f"{where} has NaN or infinite values ({bad} of the {view.size} read): the checkpoint is "
        "damaged; copy or download it again (config.model.check_weights=False loads it as it is)"
    )


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """`out[...] = view` with a cast, 2-4 times faster than that for a transposed view."""
    if view.flags.c_contiguous:
        out[...] = view
        return
    block = 64  # columns of `out` are rows of the file: few enough to stay in the cache
    for i in range(0, out.shape[-1], block):
        out[..., i : i + block] = view[..., i : i + block]


def save_model(
    directory: Path,
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    source: Path,
    dtype: Any,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory that transformers loads with equal logits.

    The config (with only its dtype field changed), generation config, tokenizer and chat template
    come from `source`. Everything is written next to `directory` and renamed at the end, so that a
    directory of that name is always complete.

    Args:
        directory: must not exist, or be empty.
        params: parameter tree of `cfg`, any float dtype, wherever it lives. All processes that
            hold parts of it call this; the first one writes.
        source: the model directory the parameters descend from.
        dtype: bfloat16, float16 or float32.
        shard_bytes: above this, the weights are split into several files with an index.

    Raises:
        UserError: the directory is in use or cannot be written, or the source has no config.json.
        ValueError: the parameters do not have the shapes of `cfg`.
    """
    directory, source, dtype = Path(directory), Path(source), _checked_dtype(dtype)
    config = _config_text(source, dtype)
    places = dict(_places(cfg, params))
    shapes = [(name, layout.theirs) for name, (_, _, layout) in places.items()]

    def value(name: str) -> np.ndarray:
        leaf, layer, layout = places[name]
        array = processes.to_numpy(leaf if layer is None else leaf[layer])
        return layout.to_theirs(np.asarray(array).astype(dtype))

    if processes.is_first():
        with CompleteOrNothing(directory) as partial:
            (partial / "config.json").write_text(config, encoding="utf-8")
            copy_carried_files(source, partial)
            _write_weights(partial, shapes, dtype, value, shard_bytes)
    else:  # parts of each tensor are here
        for name, _ in shapes:
            value(name)
    processes.wait(f"{directory.name} is written")


def copy_model(
    directory: Path, *, source: Path, dtype: Any = None, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Copies a checked model directory, tensor by tensor where `dtype` asks for a cast.

    Without `dtype` the weight files are copied byte for byte. Otherwise as `save_model`, for which
    no parameters have to be loaded.

    Raises:
        UserError: as `load_params` for the source and as `save_model` for the target.
    """
    directory, source = Path(directory), Path(source)
    cfg = ModelConfig.from_directory(source)
    stored = open_weights(source, cfg)
    check_tied(source, cfg, stored)
    wanted = None if dtype is None else _checked_dtype(dtype)
    config = source / "config.json"
    text = _config_text(source, wanted) if wanted else config.read_text(encoding="utf-8")
    with CompleteOrNothing(directory) as partial:
        (partial / "config.json").write_text(text, encoding="utf-8")
        copy_carried_files(source, partial)
        if wanted:
            names = {n: layout.theirs for w, layout in _table(cfg) for n in layout.names(w)}

            def value(name: str) -> np.ndarray:
                return stored[name].read().astype(wanted)

            _write_weights(partial, list(names.items()), wanted, value, shard_bytes)
            return
        for path in {one.file.path for one in stored.values()}:
            target = partial / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if not (source / SINGLE).exists():
            shutil.copyfile(source / INDEX, partial / INDEX)


def _checked_dtype(dtype: Any) -> np.dtype:
    if np.dtype(dtype) not in safetensors_io.DTYPES.values():
        raise UserError(f"a model can be saved as bfloat16, float16 or float32, not {dtype}")
    return np.dtype(dtype)


def copy_carried_files(source: Path, target: Path) -> None:
    """Copies generation config, tokenizer, chat template and licence, as far as there are any."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class CompleteOrNothing:
    """Gives a sibling directory to fill; renames it to `directory` on success, else removes it."""

    def __init__(self, directory: Path):
        # resolve() so that '.' and 'a/..' get a real name and parent
        self._directory = directory.resolve()
        self._partial = self._directory.with_name(f".{self._directory.name}.partial")

    def __enter__(self) -> Path:
        target = self._directory
        try:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise UserError(f"{target} exists and is not empty; choose another directory")
            shutil.rmtree(self._partial, ignore_errors=True)  # of an earlier, killed run
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {target}: {error.strerror or error}") from error
        return self._partial

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self._partial.rename(self._directory)
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"cannot write {self._directory}: {reason}") from error


def _config_text(source: Path, dtype: np.dtype) -> str:
    """The source's config.json, unchanged but for the dtype in the spelling it came in."""
    path = source / "config.json"
    config = read_object(path)
    fields = [name for name in ("dtype", "torch_dtype") if name in config]
    if not fields:
        fields = ["dtype" if "rope_parameters" in config else "torch_dtype"]
    if all(config.get(name) == dtype.name for name in fields):
        return path.read_text(encoding="utf-8")
    return json.dumps(config | dict.fromkeys(fields, dtype.name), indent=2) + "\n"


def _write_weights(
    directory: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    value: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """One file, or shards and their index."""
    shards = safetensors_io.split_by_size(tensors, dtype.itemsize, shard_bytes)
    if len(shards) == 1:
        safetensors_io.write(directory / SINGLE, shards[0], dtype, value)
        return
    placed = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors_io.write(directory / file, shard, dtype, value)
        placed |= {name: file for name, _ in shard}
    total = sum(math.prod(shape) for _, shape in tensors) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _places(
    cfg: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, int | None, Layout]]]:
    """(Hugging Face name, (leaf, layer or None, layout)), embedding first, then layer by layer."""
    table = _table(cfg)
    for weight, layout in table:
        shape = np.shape(_get(params, weight.path))
        if shape != layout.leaf:
            raise ValueError(f"parameter {'/'.join(weight.path)}: {shape} is not {layout.leaf}")
    single = [(w, layout) for w, layout in table if not w.stacked]
    for weight, layout in single[:1]:
        yield weight.name, (_get(params, weight.path), None, layout)
    for layer in range(cfg.num_layers):
        for weight, layout in table:
            if weight.stacked:
                yield weight.name.format(layer), (_get(params, weight.path), layer, layout)
    for weight, layout in single[1:]:
        yield weight.name, (_get(params, weight.path), None, layout)


def _table(cfg: ModelConfig) -> list[tuple[Weight, Layout]]:
    return [(weight, Layout(weight, cfg)) for weight in weights(cfg)]


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def resolve(path_or_hub_id: str) -> Path:
    """The model directory: a local one, or a hub id `owner/name` fetched into the usual cache.

    Raises:
        UserError: there is no such directory, or the hub cannot give the model.
    """
    text = str(path_or_hub_id)
    if paths.scheme(text) is None and hub.is_id(text) and not Path(text).exists():
        return hub.fetched(text, CARRIED_FILES)
    path = paths.local(text, "a model")
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{text} is a file; give the model directory that holds config.json")
    raise UserError(
        f"there is no model directory {text}; give an existing directory or a Hugging Face id of "
        "the form owner/name"
    )
