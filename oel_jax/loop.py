"""Online Experiential Learning, paper Algorithm 1: read this first.

    P_1 = the model you start from
    for each round r:
        deploy       P_r plays; games become trajectories          (user side)
        extract      K knowledge texts are drawn from them         (server side, no games)
        preflight    P_r plays with each text: is it worth it?     (user side, may be off)
        consolidate  the texts are distilled into P_r's weights    (server side, no games)
        evaluate     P_r, P_r with knowledge, and P_{r+1} play     (user side)
        P_{r+1} goes back to the user side

A chat round has no game: deploy freezes conversations that users have had, and evaluate asks those
that were held out (`oel_jax/actor/snapshot.py`, `oel_jax/actor/chat_evaluation.py`).

Every stage reads files and writes files and is done when its files are there; running the same
command again does what is missing. `runs/stages.py` says for each stage which function does it.
"""

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.config import negative_control
from oel_jax.config.checks import validate
from oel_jax.config.defaults import as_json
from oel_jax.parallel import processes
from oel_jax.parallel.mesh import make_mesh
from oel_jax.plan.auto import settle
from oel_jax.report import page, summary
from oel_jax.runs.compilation import keep_compiled
from oel_jax.runs.metrics import duration
from oel_jax.runs.policies import check_model, start_directory
from oel_jax.runs.profiling import compile_seconds
from oel_jax.runs.session import Run, Shelf, do_stage, finished, open_run
from oel_jax.runs.stages import NAMES, Stage, check_stages, function, known_games, stages_of


def learn(run: Run, stages: Sequence[str] = NAMES) -> None:
    """Algorithm 1. Round 0 is what is measured before training; finished stages are skipped.

    Args:
      stages: the names of those to do.

    Raises:
      UserError: a stage needs another one, or the knowledge harms and the config wants a stop.
    """
    began, compiled = time.monotonic(), compile_seconds()
    for number in range(run.config.rounds + 1):
        if number:
            print(f"\n=== round {number} of {run.config.rounds} ===")
        for stage in stages_of(run.config, number):
            if stage.name in stages and not finished(run.workdir, number, stage.name):
                try:
                    check_needs(run, number, stage)
                except UserError:
                    summarise(run)
                    raise
                do_stage(run, number, stage)
        if number:
            summarise(run, number)
    compiled = compile_seconds() - compiled
    print(f"\nall: {duration(time.monotonic() - began)}, {compiled:.1f} s of it compiling")


def check_needs(run: Run, number: int, stage: Stage) -> None:
    """UserError if `stage` of this round cannot be done now."""
    there = [other.name for other in stages_of(run.config, number)]
    needs = [(number, need) for need in stage.needs if need in there]
    missing = [need for round_number, need in needs if not finished(run.workdir, number, need)]
    if number > 1 and not finished(run.workdir, number - 1, "consolidate"):
        missing.append(f"consolidate of round {number - 1}")
    if missing:
        raise UserError(
            f"round {number}: {stage.name} needs {' and '.join(missing)} first; add it to "
            "--stages and run the same command again. What --stages asked for before that is done"
        )
    if stage.before:
        function(stage.before)(run, number)


def summarise(run: Run, ended: int = 0) -> None:
    """Write summary.json and report.html; print the table of the round that has ended, if any."""
    if not processes.is_first():
        return
    if ended and run.workdir.finished(ended, "consolidate"):
        run.workdir.drop_checkpoints(ended)
    summary.write_summary(run.config, run.workdir)
    page.write(run.workdir)
    if ended and run.workdir.finished(ended, "evaluate"):
        print(summary.round_table(run.config, run.workdir, ended))


def run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    stages: Sequence[str] = NAMES,
    *,
    name: str = "config",
    allow_config_change: bool = False,
    devices: Sequence[Any] | None = None,
    today: datetime.datetime | None = None,
    shelf: Shelf | None = None,
) -> None:
    """Run OEL in `workdir`, or resume it there: what is finished is not done again.

    Args:
      stages: the names of the stages to do; all of them, unless given.
      name: what the console calls the config.
      allow_config_change: resume although the config differs from the workdir's.
      devices: JAX devices to use; all of all processes, unless given.
      today, shelf: what the runs of a study share, see `open_run`.

    Raises:
      UserError: anything the user can mend, naming the file or field.
    """
    remarks = validate(config, games=known_games(config))
    if not stages or not set(stages) <= set(NAMES):
        raise UserError(f"--stages={','.join(stages)}: choose from {', '.join(NAMES)}")
    keep_compiled(config.compilation_cache)
    config, decided = settle(config, devices)
    mesh = make_mesh(config.mesh.fsdp, config.mesh.tp, devices)
    processes.check_equal(as_json(config))
    # Before the workdir exists: it would remember a config that cannot run.
    check_model(config, start_directory(config), mesh)
    if any(stage.plays and stage.name in stages for stage in stages_of(config)):
        first_prompts = function("oel_jax.actor.play:check_first_prompts")  # imports the game
        first_prompts(config, load_tokenizer(start_directory(config)))
    check_stages(config)
    with open_run(
        config,
        workdir,
        mesh,
        allow_config_change=allow_config_change,
        today=today,
        shelf=shelf,
    ) as opened:
        root = opened.workdir.root
        kind = f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} device(s)"
        several = f" of {processes.count()} processes" if processes.count() > 1 else ""
        header = f"oel_jax: {kind}{several}, config {name}, workdir {root}"
        control = negative_control.announcement(config).rstrip()
        notes = [f"note: {remark}" for remark in remarks]
        kept = summary.rounds_note(opened.workdir, config.rounds)
        print("\n".join(line for line in (*notes, decided, header, control, kept) if line))
        learn(opened, stages)
        print(f"\nfiles: {root}   curves: tensorboard --logdir {root.parent}")
