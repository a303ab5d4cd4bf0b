"""Which mesh and how many slots would do? By rule of thumb first; the caller compiles the best."""

from collections.abc import Iterator, Sequence
from itertools import product

import jax
import ml_collections
from jax.sharding import AxisType

from oel_jax.base.errors import UserError
from oel_jax.config.defaults import with_fields
from oel_jax.config.fields_run import AUTO_SLOTS
from oel_jax.config.fit import validate_against_model
from oel_jax.models.config import ModelConfig
from oel_jax.parallel.mesh import make_mesh
from oel_jax.plan.estimate import Plan, planned
from oel_jax.plan.programs import Arrays
from oel_jax.plan.targets import Target
from oel_jax.plan.workload import Assumptions, Layout, workload

# A rule of thumb may be wrong both ways: shares of the memory that it may fill.
LIKELY, PERHAPS = 0.9, 1.5

# What `_variants` changes, if it is let.
SEARCHED = ("mesh.fsdp", "mesh.tp", "sampler.slots", "sampler.weights")


def layout(target: Target, fsdp: int, tp: int) -> Layout:
    """The meshes of a run on the target: of all devices and of one process's.

    Without devices (nothing can be compiled) they are abstract.

    Raises:
      UserError: fsdp x tp is not the number of devices, or tp does not divide those of a process.
    """
    if target.each % tp:
        fits = [d for d in range(1, target.each + 1) if target.each % d == 0]
        raise UserError(
            f"config.mesh.tp={tp} does not divide the {target.each} device(s) of one process of "
            f"{target.text}: each process samples on its own devices; set it to one of {fits}"
        )
    host = (target.each // tp, tp)
    if target.devices:
        mesh = make_mesh(fsdp, tp, target.devices)
        alone = target.processes == 1
        return Layout(mesh, mesh if alone else make_mesh(*host, target.host), target.processes)
    if fsdp == -1 and target.count % tp == 0:
        fsdp = target.count // tp
    make_mesh(fsdp, tp, range(target.count))  # refuses what does not fit
    kinds = (AxisType.Explicit, AxisType.Explicit)
    meshes = [jax.sharding.AbstractMesh(s, ("fsdp", "tp"), kinds) for s in ((fsdp, tp), host)]
    return Layout(*meshes, target.processes)


def on_target(
    config: ml_collections.ConfigDict,
    cfg: ModelConfig,
    target: Target,
    assumed: Assumptions,
    extractor: ModelConfig | None = None,
) -> Plan:
    """The plan of a config as it is, nothing compiled.

    Raises:
      UserError: the mesh does not fit the devices or the model.
    """
    validate_against_model(config, cfg, cfg.vocab_size, target.count, target.processes)
    where = layout(target, config.mesh.fsdp, config.mesh.tp)
    work = workload(config, where, assumed)
    return planned(target, Arrays(config, cfg, where, work, extractor), assumed)


def _variants(
    config: ml_collections.ConfigDict, target: Target, free: Sequence[str]
) -> Iterator[ml_collections.ConfigDict]:
    """The config with other meshes, with more and fewer slots, and with weights split or whole.

    Only fields in `free` (of `SEARCHED`) get other values. `prefill_rows` follows.
    """
    for tp in range(1, target.each + 1):
        if target.each % tp:
            continue
        fsdp = target.count // tp
        if "mesh.tp" not in free and tp != config.mesh.tp:
            continue
        if "mesh.fsdp" not in free and config.mesh.fsdp not in (-1, fsdp):
            continue
        step = target.each // tp  # a process's slots are split over these
        slots = config.sampler.slots
        most = max(AUTO_SLOTS if slots == "auto" else slots, step)
        sizes = {-(-most // step) * step >> half for half in range(8)}
        slots_of_mesh = sorted(size for size in sizes if size >= step and size % step == 0)
        if "sampler.slots" not in free:
            slots_of_mesh = [slots]
        ways = ("split", "whole") if step > 1 else ("split",)
        if "sampler.weights" not in free:
            ways = (config.sampler.weights,)
        for slots, weights in product(slots_of_mesh, ways):
            rows = -(-config.sampler.prefill_rows // step) * step
            yield with_fields(
                config,
                {
                    "mesh.fsdp": fsdp,
                    "mesh.tp": tp,
                    "sampler.slots": slots,
                    "sampler.prefill_rows": min(rows, slots),
                    "sampler.weights": weights,
                },
            )


def candidates(
    config: ml_collections.ConfigDict,
    cfg: ModelConfig,
    target: Target,
    assumed: Assumptions,
    extractor: ModelConfig | None = None,
    free: Sequence[str] = SEARCHED,
) -> list[Plan]:
    """Plans on all meshes that suit model and target, whether they fit or not; nothing compiled.

    Args:
      free: fields of `SEARCHED` that may get other values than the config's.

    Raises:
      UserError: there is none.
    """
    found, why = [], None
    for other in _variants(config, target, free):
        try:
            found.append(on_target(other, cfg, target, assumed, extractor))
        except UserError as error:  # this mesh is not for this model
            why = why or error
    if not found:
        raise UserError(f"{target.text}: no mesh of these devices suits the model: {why}") from why
    return found


def ranked(
    config: ml_collections.ConfigDict,
    cfg: ModelConfig,
    target: Target,
    assumed: Assumptions,
    extractor: ModelConfig | None = None,
    free: Sequence[str] = SEARCHED,
) -> list[Plan]:
    """Plans that are worth compiling, the best first: those that should fit by the time a round
    takes, then those that may, the smallest first. Nothing is compiled here.

    Raises:
      UserError: as `candidates`.
    """
    size = target.device.memory
    found = candidates(config, cfg, target, assumed, extractor, free)
    likely = [plan for plan in found if plan.most.total <= LIKELY * size]
    others = [plan for plan in found if LIKELY * size < plan.most.total <= PERHAPS * size]
    likely.sort(key=lambda plan: sum(plan.hours.values()))
    others.sort(key=lambda plan: plan.most.total)
    return likely + others


def flags(plan: Plan) -> str:
    """What to put on the command line for a plan's mesh, slots and weights."""
    config = plan.arrays.config
    return (
        f"--config.mesh.fsdp={config.mesh.fsdp} --config.mesh.tp={config.mesh.tp} "
        f"--config.sampler.slots={config.sampler.slots} "
        f"--config.sampler.prefill_rows={config.sampler.prefill_rows} "
        f"--config.sampler.weights={config.sampler.weights}"
    )
