"""A model that is loaded and ready: config, parameters on a mesh, tokenizer."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oel_jax.base.errors import UserError
from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.models.agreement import check_ids, fitting_tokenizer
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params, forward, unembed
from oel_jax.models.huggingface import load_params, resolve
from oel_jax.parallel.mesh import all_devices, make_mesh, put_batch

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@partial(jax.jit, static_argnames=("cfg",))
def _logits(cfg: ModelConfig, params: Params, tokens, positions, segments):
    return unembed(cfg, params, forward(cfg, params, tokens, positions, segments))


@dataclass(repr=False)
class LanguageModel:
    """A decoder with its weights.

    Attributes:
      directory: the Hugging Face directory it came from.
      cfg: shape and mathematics.
      mesh: the devices it lives on, axes ('fsdp', 'tp').
      params: nested dict of arrays, in the layout of `oel_jax.models.decoder`.
      today: the date that the chat template shows, if it shows one; None: the day of loading.
    """

    directory: Path
    cfg: ModelConfig
    mesh: jax.sharding.Mesh
    params: Params
    today: datetime.datetime | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use; UserError if there is none, or if it does not fit the model."""
        return fitting_tokenizer(self.directory, self.cfg, self.today)

    def __repr__(self) -> str:
        """Two lines for notebooks; the weights of a model would fill hundreds."""
        leaves = jax.tree.leaves(self.params)
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        devices = f"{self.mesh.devices.size} {self.mesh.devices.flat[0].device_kind} device(s)"
        what = f"{self.cfg.family}, {count:,} parameters, {dtypes}, {devices}"
        return f"LanguageModel({what},\n  {self.directory})"

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are padding rows of the embedding and never sampled."""
        return min(self.tokenizer.vocab_size, self.cfg.vocab_size)

    def logits(self, tokens: Sequence[Sequence[int]]) -> Float[Array, "B T V"]:
        """Next-token logits, float32 [B, T, V].

        Rows may differ in length: they are padded on the right to T, and the logits of padding
        mean nothing.

        Raises:
          UserError: no tokens, or an id outside the vocabulary.
        """
        width = max((len(row) for row in tokens), default=0)
        ids = np.zeros((len(tokens), width), np.int32)
        segments = np.zeros_like(ids)
        for index, row in enumerate(tokens):
            ids[index, : len(row)] = row
            segments[index, : len(row)] = 1
        if not ids.size or ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
            raise UserError(
                f"logits: give at least one row of token ids between 0 and "
                f"{self.cfg.vocab_size - 1}, the vocabulary of {self.directory}"
            )
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)
        with jax.set_mesh(self.mesh):
            batch = put_batch(self.mesh, (ids, positions, segments))
            logits = _logits(self.cfg, self.params, *batch)
        # An ordinary array for notebooks: on one device, free of the mesh.
        first = self.mesh.devices.flat[0]
        return jax.device_put(logits, jax.sharding.SingleDeviceSharding(first))


def load_model(
    path: str | Path,
    *,
    dtype: Any = "float32",
    mesh: jax.sharding.Mesh | None = None,
    today: datetime.datetime | None = None,
    check_weights: bool = True,
) -> LanguageModel:
    """Load a Hugging Face directory, a hub id, 'nano' or 'nano:SIZE' (bundled models).

    Args:
      path: where the model is.
      dtype: 'float32', 'bfloat16' or 'float16' (or a dtype): what the weights become.
      mesh: where they live; the first device alone when not given.
      today: the date that the chat template shows, if it shows one (a run's: `Workdir.today`).
      check_weights: refuse NaN and infinite weights, naming the tensor.

    Raises:
      UserError: anything wrong with the directory, naming the file or field.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    mesh = make_mesh(1, 1, all_devices()[:1]) if mesh is None else mesh
    try:
        directory = resolve(resolve_bundled(str(path)))
        cfg = ModelConfig.from_directory(directory)
        check_ids(directory, cfg)
        params = load_params(directory, cfg, mesh=mesh, dtype=dtype, check=check_weights)
    except UserError as error:
        # The message says it all: a notebook need not show how libraries came to fail.
        raise error.with_traceback(None) from None
    return LanguageModel(directory, cfg, mesh, params, today)
