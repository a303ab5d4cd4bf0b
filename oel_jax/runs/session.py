"""The record of a run, which the stages take; how it is opened, and how a stage is done."""

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import ml_collections

from oel_jax.base import preemption
from oel_jax.config.defaults import as_json
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import host_mesh
from oel_jax.runs.metrics import Metrics, NoMetrics, duration
from oel_jax.runs.profiling import compile_seconds
from oel_jax.runs.stages import Stage, function
from oel_jax.runs.tensorboard import Axis
from oel_jax.runs.workdir import Workdir


class Shelf(Protocol):
    """Finished work of other runs, see `oel_jax/study/shelf.py`."""

    def take(
        self,
        config: ml_collections.ConfigDict,
        workdir: Workdir,
        metrics: Metrics | NoMetrics,
        round_number: int,
        stage: str,
    ) -> list[Path] | None:
        """Put what is there of a stage into the workdir; its files if that is all of it."""

    def put(
        self, config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, stage: str
    ) -> None:
        """Offer a finished stage."""


@dataclass(frozen=True, repr=False)
class Run:
    """One run in its workdir: what a stage is given. `open_run` makes it.

    Attributes:
      config: validated; see docs/configuration.md for every field.
      workdir: names of all files, record of finished stages.
      metrics: TensorBoard and metrics.jsonl.
      mesh: axes ('fsdp', 'tp'), over the devices of all processes: where is trained.
      host: the part of it in this process, where games are played and texts written.
      today: the date in all prompts whose template shows one; the same on all processes.
      shelf: in a study, where runs find stages that another run has finished with equal inputs.
    """

    config: ml_collections.ConfigDict
    workdir: Workdir
    metrics: Metrics | NoMetrics
    mesh: jax.sharding.Mesh
    host: jax.sharding.Mesh
    today: datetime.datetime
    shelf: Shelf | None = None

    def __repr__(self) -> str:
        """One line for notebooks; `config` prints all fields."""
        game, model = self.config.game.name or "conversations", self.config.model.path
        return f"Run({game}, {model}, {self.config.rounds} rounds, {self.workdir.root})"


@contextmanager
def open_run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    *,
    allow_config_change: bool = False,
    today: datetime.datetime | None = None,
    shelf: Shelf | None = None,
) -> Iterator[Run]:
    """Open a workdir, new or old, and hold its lock until the end of the with-block.

    Args:
      config: validated.
      mesh: over the devices of all processes.
      allow_config_change: accept a config that differs from the workdir's.
      today: the date that a new run has; now, if not given.

    Raises:
      UserError: see `Workdir.open`.
    """
    first, directory = processes.is_first(), Workdir(workdir)
    with (
        directory.open(as_json(config), allow_change=allow_config_change, today=today)
        if first
        else nullcontext()
    ):
        processes.wait("workdir is open")
        text = processes.from_first(directory.today.isoformat() if first else "")
        host = host_mesh(mesh) if processes.count() > 1 else mesh
        drawn, axis = config.log.tensorboard, Axis.of(config)
        with Metrics(directory, drawn, axis) if first else NoMetrics() as metrics:
            yield Run(
                config, directory, metrics, mesh, host, datetime.datetime.fromisoformat(text), shelf
            )


def finished(workdir: Workdir, round_number: int, stage: str) -> bool:
    """Whether a stage is recorded as finished, the same answer on all processes."""
    return processes.from_first(processes.is_first() and workdir.finished(round_number, stage))


def do_stage(run: Run, round_number: int, stage: Stage) -> None:
    """Do one stage of a round (0: before round 1); record its files and its time."""
    name = stage.name
    began, compiled = time.monotonic(), compile_seconds()
    config, workdir, metrics = run.config, run.workdir, run.metrics
    taken = run.shelf.take(config, workdir, metrics, round_number, name) if run.shelf else None
    with preemption.holding(0):  # what the stage holds, it holds until it is recorded
        files = taken or _work(run, round_number, stage)
        seconds, compiled = time.monotonic() - began, compile_seconds() - compiled
        record = partial(workdir.finish, round_number, name, files, seconds)
        processes.first_does(f"{round_number} {name} is finished", record)
    if run.shelf:
        run.shelf.put(config, workdir, round_number, name)
    timing = {f"{name}_seconds": seconds, f"{name}_compile_seconds": compiled}
    metrics.rewind(f"time_{name}", round_number, round_number - 1)
    metrics.scalars(f"time_{name}", round_number, {}, round=round_number, time_values=timing)
    share = f", {compiled:.1f} s of it compiling" if compiled >= 0.5 else ""
    share += ", made by another run" if taken else ""
    where = f"round {round_number}" if round_number else "start"
    print(f"{where} {name}: done in {duration(seconds)}{share}")


def _work(run: Run, round_number: int, stage: Stage) -> list[Path]:
    work = function(stage.work if round_number else stage.start)
    files = list(work(run, round_number))
    if stage.after and processes.is_first():
        files += function(stage.after)(run, round_number)
    return files
