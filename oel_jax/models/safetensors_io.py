"""Reading and writing safetensors files without ever holding a whole file in memory.

The format is an 8-byte little-endian header length, a JSON header
(`{name: {"dtype", "shape", "data_offsets"}}`, an optional `__metadata__`), then the raw data
(https://github.com/huggingface/safetensors). It is read through a memory map, so that a sharded
load touches only the pages of its own slices, and written tensor by tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from oel_jax.base.errors import UserError

DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """A safetensors file opened for reading.

    Attributes:
        path: the file.
        entries: name -> (dtype name of the format, shape), in file order.

    Raises:
        UserError: naming the file, if it cannot be read, is cut off or is not in the format.
    """

    def __init__(self, path: Path):
        self.path = path
        again = "copy or download it again"
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise UserError(f"{path} is truncated or no safetensors file; {again}")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.entries = {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()}
            self._offsets = {n: tuple(e["data_offsets"]) for n, e in header.items()}
            end = max((stop for _, stop in self._offsets.values()), default=0)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a damaged safetensors header; {again}") from error
        self._start = 8 + length
        if self._start + end > size:
            raise UserError(
                f"{path} is truncated: it has {size} bytes, its header announces "
                f"{self._start + end}; {again}"
            )
        for name, (dtype, shape) in self.entries.items():
            start, stop = self._offsets[name]
            size_ok = dtype not in DTYPES or (
                stop - start == math.prod(shape) * DTYPES[dtype].itemsize
            )
            if start < 0 or stop < start or not size_ok:
                raise UserError(f"{path}: the header entry of {name} is damaged; {again}")

    def tensor(self, name: str) -> np.ndarray:
        """A read-only, memory-mapped view of a BF16, F16 or F32 tensor in its own shape."""
        dtype, shape = self.entries[name]
        start, stop = self._offsets[name]
        if stop == start:  # an empty range cannot be mapped
            return np.empty(shape, DTYPES[dtype])
        raw = np.memmap(self.path, np.uint8, "r", self._start + start, (stop - start,))
        return raw.view(DTYPES[dtype]).reshape(shape)


def write(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    values: Callable[[str], np.ndarray],
) -> None:
    """Writes `tensors` (name, shape) of one dtype, asking `values` for one array at a time.

    The data reaches the disk (fsync) before the function returns. OSError is left to the caller,
    who knows what the file belongs to.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned, as the reference writer does
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            value = np.asarray(values(name), dtype, order="C")
            if value.shape != shape:
                raise ValueError(f"{name}: shape {value.shape} was announced as {shape}")
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def split_by_size(
    tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int, limit: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Groups tensors in order into shards of at most `limit` bytes (a larger one is alone)."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in tensors:
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    return shards
