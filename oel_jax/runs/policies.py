"""The policies of a run: where P_r is, how it is loaded, and how the sampler reads it."""

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_collections

from oel_jax.config.fit import validate_against_model
from oel_jax.models.agreement import fitting_tokenizer
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params
from oel_jax.models.huggingface import resolve
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.models.weight_files import open_weights
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import replicate
from oel_jax.parallel.offload import check_offload
from oel_jax.runs.console import waiting
from oel_jax.runs.workdir import Workdir


def start_directory(config: ml_collections.ConfigDict) -> Path:
    """Hugging Face directory of P_1, downloaded if `config.model.path` is a hub id."""
    return resolve(resolve_bundled(config.model.path))


def policy_directory(config: ml_collections.ConfigDict, workdir: Workdir, number: int) -> Path:
    """Hugging Face directory of P_r, the policy at the start of round `number` (from 1)."""
    return start_directory(config) if number == 1 else workdir.policy(number - 1)


def check_model(
    config: ml_collections.ConfigDict, directory: Path, mesh: jax.sharding.Mesh
) -> None:
    """Check a model's files against each other and the run's config, before weights are read.

    Args:
      mesh: of the run, or the part of it in this process (each process then has an equal part).

    Raises:
      UserError: the directory is no model that this package runs, or the config does not fit it.
    """
    cfg = ModelConfig.from_directory(directory)
    open_weights(directory, cfg)  # headers only
    tokenizer = fitting_tokenizer(directory, cfg)
    tokenizer.opens_thought(thinking=config.model.thinking)  # the template can be used
    check_offload(config.consolidate, mesh)
    devices = mesh.devices.size * (1 if mesh.is_multi_process else processes.count())
    validate_against_model(config, cfg, tokenizer.vocab_size, devices, processes.count())


def load_policy(
    config: ml_collections.ConfigDict,
    directory: Path,
    mesh: jax.sharding.Mesh,
    *,
    today: datetime.datetime | None,
    dtype: str | None = None,
) -> LanguageModel:
    """Load a model onto a mesh, its weights split over all devices, after `check_model`.

    Args:
      today: the date in prompts whose template shows one.
      dtype: of the weights; the compute dtype, `config.model.dtype`, if not given.
    """
    check_model(config, directory, mesh)
    with waiting(f"loading {directory}"):
        return load_model(
            directory,
            dtype=dtype or config.model.dtype,
            mesh=mesh,
            today=today,
            check_weights=config.model.check_weights,
        )


def load_player(
    config: ml_collections.ConfigDict,
    directory: Path,
    host: jax.sharding.Mesh,
    *,
    today: datetime.datetime | None,
) -> LanguageModel:
    """Load a model to sample from, on this process's devices, in the compute dtype."""
    model = load_policy(config, directory, host, today=today)
    return replace(model, params=sampler_params(config, model.params))


def load_player_of_round(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    number: int,
    host: jax.sharding.Mesh,
    *,
    today: datetime.datetime | None,
) -> LanguageModel:
    """P_r, to sample from, see `load_player`."""
    return load_player(config, policy_directory(config, workdir, number), host, today=today)


def load_extractor(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    number: int,
    host: jax.sharding.Mesh,
    *,
    today: datetime.datetime | None,
) -> LanguageModel:
    """The model that writes a round's texts: `extract.model_path`, or P_r; see `load_player`."""
    path = config.extract.model_path
    if not path:
        return load_player_of_round(config, workdir, number, host, today=today)
    return load_player(config, resolve(resolve_bundled(path)), host, today=today)


def sampler_params(
    config: ml_collections.ConfigDict, params: Params, gather: Callable[[Any], Any] = replicate
) -> Params:
    """Weights in the form in which the sampler reads them (`config.sampler.weights`).

    The vocabulary matrices stay split: only a slice of them is ever needed on a device.

    Args:
      gather: arrays -> the same, held whole by every device of 'fsdp'. The planner, which has
        shapes only, brings its version of it.
    """
    if config.sampler.weights == "split":
        return params
    return params | {"layers": gather(params["layers"])}
