"""The student of a round: what is trained, where it begins, where it waits, how it is saved.

That is float32 masters of P_r, or with LoRA an adapter of it, and the optimizer's state.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from oel_jax.distill.lora import Lora, adapted, fresh_adapter, merged, save_adapter
from oel_jax.distill.step import StepConfig, cast
from oel_jax.learner import guards
from oel_jax.models import hub
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params
from oel_jax.models.huggingface import save_model
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.parallel.offload import offloaded_parts, to_device, to_host
from oel_jax.runs.checkpoints import RoundCheckpoints
from oel_jax.runs.keys import generation_key
from oel_jax.runs.policies import load_policy, policy_directory
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an optimizer step takes and returns; a pytree.

    Attributes:
      params: float32 masters in the layout of `oel_jax.models.decoder`, or an adapter's factors.
      optimizer: AdamW's state, see `distill.optimizer.Moments`.
      average: float32 weights of a teacher that follows the student; None: the teacher is frozen.
      step: updates done in this round.
    """

    params: Params
    optimizer: optax.OptState
    average: Params | None
    step: int

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds; the step is in its name."""
        kept = {"params": self.params, "state": self.optimizer}
        return kept if self.average is None else kept | {"teacher": self.average}


# --- where it begins ------------------------------------------------------------------------------


def round_checkpoints(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int
) -> RoundCheckpoints:
    """The checkpoints of a round; a context manager."""
    settings = config.consolidate
    return RoundCheckpoints(
        workdir.checkpoints(round_number),
        every=settings.save_every,
        minutes=settings.save_minutes,
        keep=2 if guards.watches(config) else 1,  # the newest may not be good
    )


def begin(
    run: Run,
    round_number: int,
    tx: optax.GradientTransformationExtraArgs,
    checkpoints: RoundCheckpoints,
) -> TrainState:
    """P_r (or an adapter that changes nothing yet) and a fresh optimizer, or the last checkpoint.

    Raises:
      UserError: the checkpoint cannot be restored, or P_r cannot be loaded.
    """
    config, lora, average = run.config, Lora.of(run.config.lora), None
    source = policy_directory(config, run.workdir, round_number)
    if lora:
        cfg = ModelConfig.from_directory(source)
        key = generation_key(config, "lora", round_number)
        params = fresh_adapter(cfg, lora, run.mesh, key)
    else:
        model = load_policy(config, source, run.mesh, today=run.today, dtype="float32")
        params = model.params
    if config.consolidate.teacher == "ema":
        average = jax.tree.map(jnp.copy, params)
    state = put_away(config, TrainState(params, jax.jit(tx.init)(params), average, 0))
    latest = processes.from_first(max(checkpoints.steps, default=0))
    if not latest:
        return state
    saved = checkpoints.restore(latest, state.saved())
    print(f"resuming from optimizer step {latest}")
    return TrainState(saved["params"], saved["state"], saved.get("teacher"), latest)


def last_good(
    run: Run,
    round_number: int,
    tx: optax.GradientTransformationExtraArgs,
    checkpoints: RoundCheckpoints,
    broken: guards.Broken,
) -> TrainState:
    """The newest checkpoint whose weights a step before the broken one has found good, or P_r."""
    checkpoints.drop_after(broken.step - 2)
    return begin(run, round_number, tx, checkpoints)


# --- where it waits -------------------------------------------------------------------------------


def put_away(config: ml_collections.ConfigDict, state: TrainState) -> TrainState:
    """Into host memory with what is not needed until the next micro-batches or update.

    That is what `config.consolidate.offload` names; the rest stays where it is.
    """
    away = offloaded_parts(config.consolidate)
    if "masters" in away:
        state = replace(state, params=to_host(state.params))
    if "optimizer" in away:
        state = replace(state, optimizer=to_host(state.optimizer))
    return state


def compute_weights(state: TrainState, base: Params, step: StepConfig) -> Params:
    """What the student computes with, in the compute dtype and in device memory.

    A copy of the masters where that is not float32; with LoRA `base` itself, and the adapter.

    Args:
      base: P_r's weights in the compute dtype: the teacher's.
    """
    if step.lora:
        return adapted(base, state.params, step.lora, step.dtype)
    return cast(state.params, step.dtype)


# --- how it is saved ------------------------------------------------------------------------------


def save_policy(run: Run, base: LanguageModel, state: TrainState, directory: Path) -> None:
    """Write the student as a model: rounded to bfloat16 as in the released code (spec 8.2).

    Args:
      base: P_r, whose shape and tokenizer files it has, and whose weights an adapter belongs to.
    """
    if processes.is_first() and directory.exists():  # by a run that was killed before it said so
        shutil.rmtree(directory)
    saved = jnp.float32 if run.config.consolidate.keep_fp32_master else jnp.bfloat16
    params, lora = to_device(state.params), Lora.of(run.config.lora)
    if lora:
        params = merged(base.params, params, lora)
    save_model(directory, base.cfg, params, source=base.directory, dtype=saved)


def save_round_adapter(run: Run, round_number: int, base: LanguageModel, state: TrainState) -> Path:
    """Write the adapter next to the policy that it is merged into, as PEFT reads it."""
    directory = run.workdir.adapter(round_number)
    if processes.is_first() and directory.exists():
        shutil.rmtree(directory)
    start = policy_directory(run.config, run.workdir, round_number)
    name, commit = hub.lasting_name(run.config.model.path, start)
    lora = Lora.of(run.config.lora)
    save_adapter(directory, base.cfg, state.params, lora, base=name, revision=commit)
    return directory
