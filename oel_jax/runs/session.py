"""What every stage of a run shares: config, files, metrics, devices, and how to load a policy."""

import datetime
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from oel_jax.machine import caches
from oel_jax.machine import compile_cache
from oel_jax.machine import paths
from oel_jax.config.fit import validate_against_model
from oel_jax.config.rules import BUCKETS
from oel_jax.parallel.offload import check_offload
from oel_jax.errors import UserError
from oel_jax.models.agreement import fitting_tokenizer
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import resolve
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.language_model import DTYPES, LanguageModel, load_model
from oel_jax.models.decoder import Params
from oel_jax.sampler.requests import request_key
from oel_jax.sampler.sampler import Sampler
from oel_jax.sampler.sampling import Sampling
from oel_jax.models.weight_files import open_weights
from oel_jax.runs.metrics import Metrics
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import whole
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.workdir import Workdir
from oel_jax.files import read_json

LANES = 4  # knowledge texts that are played with at the same time, at most


class Shelf(Protocol):
    """Finished work of other runs, see `oel_jax/study/shelf.py`."""

    def take(self, run: "Run", round_number: int, stage: str) -> list[Path] | None:
        """Put what is there of a stage into the run; its files if that is all of it."""

    def put(self, run: "Run", round_number: int, stage: str) -> None:
        """Offer a finished stage."""


@dataclass(repr=False)
class Run:
    """One run in its workdir.

    Attributes:
      config: validated; see `oel_jax.config.defaults.default` for every field.
      workdir: names of all files, record of finished stages.
      metrics: TensorBoard and metrics.jsonl.
      mesh: axes ('fsdp', 'tp'), over the devices of all processes.
      host: the part of it that lies in this process, where games are played and texts written.
      shelf: in a study, where runs find stages that another run has finished with equal inputs.
      today: the date in all prompts whose template shows one; the same on all processes.
    """

    config: ml_collections.ConfigDict
    workdir: Workdir
    metrics: Metrics
    mesh: jax.sharding.Mesh
    host: jax.sharding.Mesh | None = None
    shelf: Shelf | None = None
    today: datetime.datetime | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.host = self.host or self.mesh
        if self.workdir:  # the planner has none
            shown = self.workdir.today.isoformat() if processes.is_first() else ""
            self.today = datetime.datetime.fromisoformat(processes.from_first(shown))

    def __repr__(self) -> str:
        """One line for notebooks; `config` prints all fields."""
        game, model = self.config.game.name, self.config.model.path
        return f"Run({game}, {model}, {self.config.rounds} rounds, {self.workdir.root})"

    def policy_directory(self, round_number: int) -> Path:
        """Hugging Face directory of P_r, the policy at the start of round `round_number`."""
        if round_number == 1:
            return start_directory(self.config)
        return self.workdir.policy(round_number - 1)

    def load(
        self, directory: Path, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
    ) -> LanguageModel:
        """Load a model and check the config against it.

        Args:
          dtype: of the weights; the compute dtype if not given.
          mesh: where they live; this process's own devices if not given.
        """
        check_model(self.config, directory, self.mesh)
        dtype = dtype or self.config.model.dtype
        check = self.config.model.check_weights
        with waiting(f"loading {directory}"):
            return load_model(
                directory,
                dtype=dtype,
                mesh=mesh or self.host,
                today=self.today,
                check_weights=check,
            )

    def policy(self, round_number: int, mesh: jax.sharding.Mesh | None = None) -> LanguageModel:
        """P_r in the compute dtype, on another mesh, or on this process's devices to play with."""
        model = self.load(self.policy_directory(round_number), mesh=mesh)
        return model if mesh else self.player(model)

    def player(self, model: LanguageModel) -> LanguageModel:
        """A model of this process's devices as the sampler is to read it."""
        return replace(model, params=self.played_with(model.params))

    def played_with(self, params: Params) -> Params:
        """Weights as the sampler is to read them (`sampler.weights`).

        The vocabulary matrices stay split: only a slice of them is ever needed on a device.
        """
        if self.config.sampler.weights == "split":
            return params
        return params | {"layers": whole(params["layers"])}

    def read_json(self, path: Path) -> Any:
        """A JSON file that another process may just have written; the same on all processes."""
        return processes.from_first(read_json(path) if processes.is_first() else None)

    def finished(self, round_number: int, stage: str) -> bool:
        """Whether a stage is recorded as finished, the same answer on all processes."""
        return processes.from_first(
            processes.is_first() and self.workdir.finished(round_number, stage)
        )

    def slots(self, wanted: int = 0) -> int:
        """Slots of a sampler: the config's, or as few as `wanted` needs on this mesh."""
        fsdp, most = self.host.shape["fsdp"], self.config.sampler.slots
        return min(most, -(-wanted // fsdp) * fsdp) if wanted else most

    def lanes(self, texts: int, slots: int) -> int:
        """How many of `texts` shared prefixes are read at once; their slots are equally many.

        With several, slots that one text no longer needs do not stand still until all its games
        have ended; with many, each is read for few slots.
        """
        each = slots // self.host.shape["fsdp"]
        return max(m for m in range(1, LANES + 1) if m == 1 or (m <= texts and each % m == 0))

    def sampler(
        self,
        model: LanguageModel,
        how: Sampling,
        *,
        prompt: int,
        response: int,
        slots: int = 0,
        prefixes: Iterable[tuple[int, ...]] = (),
        draft: int = 0,
    ) -> Sampler:
        """A sampler for prompts of up to `prompt` tokens and responses of up to `response`.

        Args:
          slots: use fewer than the config's when there is less to do at once.
          prefixes: beginnings that prompts share; `prompt` does not count them.
          draft: tokens to draft in each pass.
        """
        s = self.config.sampler
        prefixes = {prefix for prefix in prefixes if prefix}
        slots = self.slots(slots)
        rows = min(s.prefill_rows, slots)
        return Sampler(
            model.cfg,
            self.host,
            slots=slots,
            max_len=s.max_len or prompt + response,
            max_new=response,
            how=how,
            limit=model.vocab_limit,
            stop_ids=model.tokenizer.stop_ids,
            dtype=DTYPES[self.config.model.dtype],
            decode_steps=s.decode_steps,
            prefill_rows=rows,
            prefill_chunk=s.prefill_chunk,
            longest_prefix=max(map(len, prefixes), default=0),
            prefixes=self.lanes(len(prefixes), slots),
            block=self.config.model.attention_block,
            overlap=s.overlap,
            draft=draft,
        )

    def key(self, purpose: str, *parts: object) -> np.ndarray:
        """Random key of one generation; depends on the loop seed and on `parts` alone."""
        return request_key(self.config.seed, purpose, *parts)

    def chain_key(self, chain: int, purpose: str, *parts: object) -> np.ndarray:
        """Key of a generation that belongs to a chain seed (evaluation, extraction).

        With `evaluate.seed_mode='constant'` all requests of a chain share one noise stream, as the
        released code does (spec section 5).
        """
        if self.config.evaluate.seed_mode == "constant":
            return self.key("constant", 50 * (chain + 1))
        return self.key(purpose, 50 * (chain + 1), *parts)

    def progress(self, total: int, unit: str, label: str, done: int = 0) -> Progress:
        """Console progress with rate and ETA."""
        return Progress(total, unit, label, every=self.config.log.console_every, done=done)


def keep_compiled(setting: str) -> None:
    """Keep compiled programs between runs, so that only the first run pays for them.

    Args:
      setting: `config.compilation_cache`.
    """
    if setting == "off":
        return
    jax.config.update("jax_compilation_cache_dir", _cache_text(setting))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compile_cache.replace_damaged()


def _cache_text(setting: str) -> str:
    """The cache's place as JAX is to read it: a URL unchanged, for it can use a bucket itself.

    Raises:
      UserError: a package that JAX needs for this URL is not installed.
    """
    kind = paths.scheme(setting) if setting else None
    if kind is None:
        usual = caches.compiled_programs
        return str(paths.local(setting, "config.compilation_cache") if setting else usual())
    for package in ("etils", BUCKETS[kind]):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.compilation_cache is {setting!r}, for which JAX needs the package "
                f"{package}: install it, or give a directory of this machine, or 'off'"
            )
    return setting


def start_directory(config: ml_collections.ConfigDict) -> Path:
    """Hugging Face directory of P_1, downloaded if `config.model.path` is a hub id."""
    return resolve(resolve_bundled(config.model.path))


def check_model(
    config: ml_collections.ConfigDict, directory: Path, mesh: jax.sharding.Mesh
) -> None:
    """Check a model's files against each other and the run's config, before weights are read.

    Raises:
      UserError: the directory is no model that this package runs, or the config does not fit it.
    """
    cfg = ModelConfig.from_directory(directory)
    open_weights(directory, cfg)  # headers only
    tokenizer = fitting_tokenizer(directory, cfg)
    tokenizer.opens_thought(thinking=config.model.thinking)  # the template can be used
    tokens = tokenizer.vocab_size
    check_offload(config.consolidate, mesh)
    validate_against_model(config, cfg, tokens, mesh.devices.size, processes.count())


def sampling(section: ml_collections.ConfigDict) -> Sampling:
    """Sampling settings of a config section (`deploy`, `extract`, `evaluate`)."""
    return Sampling(section.temperature, section.top_k, section.top_p)
