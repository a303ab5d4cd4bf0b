"""Decides `mesh.fsdp`, `mesh.tp` and `sampler.slots` where the config says 'auto'.

By the planner's own arithmetic, without compiling: under two seconds. Of all meshes and slots that
agree with what the config fixes, the one whose round should take the least time and whose arrays
should fit. Devices that the planner does not know (a CPU, other GPUs) get a plain rule: all devices
on `fsdp`, `tp` 1, and `config.AUTO_SLOTS` slots, raised to a multiple of what a process's devices
need.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config.budgets import has_extractor
from oel_jax.config.defaults import auto_fields, with_fields
from oel_jax.config.fields_run import AUTO_SLOTS
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import resolve
from oel_jax.parallel import processes
from oel_jax.plan.search import ranked
from oel_jax.plan.targets import GPUS, TPUS, Device, Target
from oel_jax.plan.workload import Assumptions

# JAX's name of a device -> the planner's.
_KINDS = (
    (r"TPU v5 ?(lite|e)", TPUS["v5e"]),
    (r"TPU v5p?$", TPUS["v5p"]),
    (r"TPU v6 ?(lite|e)", TPUS["v6e"]),
    (r"H100.*80GB", GPUS["h100"]),
    (r"H200", GPUS["h200"]),
)


def settle(
    config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[ml_collections.ConfigDict, str]:
    """A validated config with numbers where it says 'auto', for the devices that JAX sees.

    The same on all processes. A local model's config.json is read, a hub id is downloaded.

    Args:
      devices: JAX devices; None = all.

    Returns:
      (the config itself where nothing is 'auto', else a copy; one line that says what was decided,
      or '').

    Raises:
      UserError: no mesh of these devices suits the model and what the config fixes.
    """
    if not auto_fields(config):
        return config, ""
    import jax

    devices = list(jax.devices() if devices is None else devices)
    each = len(devices) // processes.count()
    shape = ModelConfig.from_directory(resolve(resolve_bundled(config.model.path)))
    other = config.extract.model_path if has_extractor(config) else ""
    extractor = ModelConfig.from_directory(resolve(resolve_bundled(other))) if other else None
    known = _known(devices[0])
    target = Target(devices[0].device_kind, known, len(devices), each) if known else None
    if target:
        decided, line = settle_for(config, shape, target, extractor)
    else:
        decided, line = _by_rule(config, len(devices), each, devices[0].device_kind)
    # Free memory may differ by a little between hosts.
    values, line = processes.from_first((_values(decided), line))
    return with_fields(config, values), line


def settle_for(
    config: ml_collections.ConfigDict,
    cfg: ModelConfig,
    target: Target,
    extractor: ModelConfig | None = None,
) -> tuple[ml_collections.ConfigDict, str]:
    """The same for a target of the planner, on which nothing need be."""
    open_fields = auto_fields(config)
    if not open_fields:
        return config, ""
    abstract = replace(target, devices=(), host=())
    assumed = Assumptions.of(config)
    try:
        best = ranked(config, cfg, abstract, assumed, extractor, free=open_fields)
    except UserError as error:
        raise UserError(f"config.{open_fields[0]}='auto': {error}") from error
    if not best:
        decided, line = _by_rule(config, target.count, target.each, target.text)
        return (
            decided,
            f"{line}; by the planner's arithmetic nothing fits: lower the config's sizes",
        )
    hours, fits = sum(best[0].hours.values()), best[0].fits
    decided = with_fields(config, _values(best[0].arrays.config))
    more = f"about {hours:.3g} hours a round by arithmetic"
    if not fits:
        more += ", and it may not fit the memory"
    return decided, _line(decided, open_fields, more)


def _by_rule(
    config: ml_collections.ConfigDict, count: int, each: int, kind: str
) -> tuple[ml_collections.ConfigDict, str]:
    """All devices on fsdp; the usual number of slots."""
    open_fields, values = auto_fields(config), {}
    fsdp, tp = config.mesh.fsdp, config.mesh.tp
    if tp == "auto":
        tp = count // fsdp if type(fsdp) is int and fsdp > 0 and count % fsdp == 0 else 1
    fsdp = -1 if fsdp == "auto" else fsdp
    step = max(1, each // tp)
    values = {"mesh.fsdp": fsdp, "mesh.tp": tp}
    slots = config.sampler.slots
    if slots == "auto":
        values["sampler.slots"] = slots = -(-AUTO_SLOTS // step) * step
        values["sampler.prefill_rows"] = min(slots, -(-config.sampler.prefill_rows // step) * step)
    decided = with_fields(config, values)
    return decided, _line(decided, open_fields, f"by rule, {kind} is not known to the planner")


def _values(config: ml_collections.ConfigDict) -> dict[str, int]:
    s = config.sampler
    return {
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.tp": config.mesh.tp,
        "sampler.slots": s.slots,
        "sampler.prefill_rows": s.prefill_rows,
    }


def _line(config: ml_collections.ConfigDict, fields: Sequence[str], more: str) -> str:
    chosen = {name: value for name, value in _values(config).items() if name in fields}
    if "sampler.slots" in fields:
        chosen["sampler.prefill_rows"] = config.sampler.prefill_rows
    said = " ".join(f"--config.{name}={value}" for name, value in chosen.items())
    return f"auto: {said} ({more})"


def _known(device: Any) -> Device | None:
    """What the planner knows of a device, with the memory that JAX may use of it."""
    for pattern, known in _KINDS:
        if re.search(pattern, device.device_kind):
            stats = device.memory_stats() or {}
            return replace(known, memory=int(stats.get("bytes_limit", known.memory)))
    return None
