"""Run a study: `python -m oel_jax.study --study=configs/studies/table1.py --workdir=runs/table1`.

A study compares variants of a config, each with several loop seeds. Every variant and seed is an
ordinary run in WORKDIR/VARIANT/seed_S; what runs have in common is done once. The same command goes
on where the last one stopped. It ends with tables, results.csv, results.json and plots/.

    --study=FILE.py:PRESET     another preset of the study, e.g. the paper's own model
    --seeds=1,2,3              other loop seeds; more of them extend a study
    --config.FIELD=VALUE       another value for every variant, e.g. --config.model.path=DIR
    --check                    exit status 1 when an expectation did not hold

Exit status: 0; 1 when a run failed or --check found something; 2 for what the user can mend; 75 or
130 when a notice (SIGTERM) or Ctrl-C has stopped it after saving.
"""

import argparse
import dataclasses
import datetime
import gc
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from oel_jax.base import paths, preemption
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_bytes, write_json
from oel_jax.config.command_line import read_overrides
from oel_jax.config.defaults import as_json
from oel_jax.config.file import load_config
from oel_jax.models.bundled import resolve_bundled
from oel_jax.runs.metrics import printable
from oel_jax.runs.workdir import Workdir, lock_directory
from oel_jax.study.definitions import (
    Expectation,
    Measure,
    Other,
    Planned,
    Plot,
    Study,
    Variant,
    load,
    runs,
)

__all__ = ["Expectation", "Measure", "Other", "Plot", "Study", "Variant", "load_config", "run"]

SCHEMA = "oel.study/1"
MANY_MAPS = 20_000  # memory maps of compiled programs; Linux allows a process 65,530


def run(study: Study, root: Path, devices: Sequence[Any] | None = None) -> tuple[bool, bool]:
    """Do what is missing of a study and write its results.

    Args:
      study: from `oel_jax.study.definitions.load`.
      root: workdir of the study.
      devices: JAX devices to use; None for all.

    Returns:
      (whether every run was finished, whether every expectation held).

    Raises:
      UserError: what is wrong before anything is run, naming study, variant and field.
    """
    planned = _settled(runs(study, root), devices)
    with _owned(root, study, planned) as today:
        _check_old_runs(planned)
        _check_models(planned, devices)
        study, whole = _with_earlier_seeds(study, planned, root)
        failed = _run_all(planned, root, devices, today)
        # Imported late: matplotlib takes a second, and bad input should answer at once.
        from oel_jax.report.page import write_study
        from oel_jax.study.plots import draw
        from oel_jax.study.results import Results

        results = Results(study, whole, failed)
        write_json(root / "results.json", results.as_json())
        write_bytes(root / "results.csv", results.csv().encode("utf-8"))
        plots = draw(results, root / "plots")
        page = write_study(root)
    print(f"\n=== study {study.name}:{study.preset} ===\n\n{results.text()}\n")
    print(f"files: {root / 'results.csv'}, {root / 'results.json'}, {len(plots)} plots in", end=" ")
    print(f"{root / 'plots'}, {page}   curves: tensorboard --logdir {root}")
    return not failed, all(verdict.held for verdict in results.verdicts)


def _settled(planned: Sequence[Planned], devices: Sequence[Any] | None) -> list[Planned]:
    """The runs with numbers where a config says 'auto', see `oel_jax/plan/auto.py`."""
    from oel_jax.plan.auto import settle

    done, said = [], set()
    for one in planned:
        try:
            config, line = settle(one.config, devices)
        except UserError as error:
            raise UserError(f"variant {one.variant.name}: {error}") from error
        if line and line not in said:
            print(f"variant {one.variant.name}, {line}")
            said.add(line)
        done.append(dataclasses.replace(one, config=config))
    return done


@contextmanager
def _owned(root: Path, study: Study, planned: Sequence[Planned]) -> Iterator[datetime.datetime]:
    """Hold the workdir of this study; UserError if it is another's or in use.

    Yields the date that all its runs show in prompts, since they share games.
    """
    mark, file = (
        {"schema": SCHEMA, "study": study.name, "preset": study.preset},
        root / "study.json",
    )
    today = None
    if file.exists():
        old = read_json(file)
        today = old.pop("today", None) if isinstance(old, dict) else None
        if old != mark:
            before = f"{old.get('study')}:{old.get('preset')}" if isinstance(old, dict) else "?"
            raise UserError(
                f"--workdir={root} holds the study {before}, not {study.name}:{study.preset}; it "
                "is not overwritten: use another --workdir"
            )
    elif root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
        raise UserError(f"--workdir={root} is not empty and holds no study; use another --workdir")
    lock = lock_directory(root)
    try:
        day = datetime.datetime.fromisoformat(today) if today else _first_day(planned)
        write_json(file, mark | {"today": day.isoformat(timespec="seconds")})
        yield day
    finally:
        os.close(lock)


def _first_day(planned: Sequence[Planned]) -> datetime.datetime:
    """The date of the first run that was begun (by an older version), else now."""
    old = [Workdir(one.workdir) for one in planned]
    days = [workdir.today for workdir in old if workdir.manifest_file.exists()]
    return min(days, default=datetime.datetime.now())


def _with_earlier_seeds(
    study: Study, planned: Sequence[Planned], root: Path
) -> tuple[Study, Sequence[Planned]]:
    """The study with the seeds that it was run with before, which a smaller --seeds leaves out."""
    last = read_json(root / "results.json") if (root / "results.json").exists() else {}
    before = last.get("seeds", []) if isinstance(last, dict) else []
    left_out = [seed for seed in before if seed not in study.seeds]
    if not left_out:
        return study, planned
    print(
        f"note: the seeds {', '.join(map(str, study.seeds))} were asked for; this workdir also has "
        f"{', '.join(map(str, left_out))}, which stay in tables and plots"
    )
    # In the order of before: a variant that is run with the first seeds only keeps them.
    new = [seed for seed in study.seeds if seed not in before]
    whole = replace(study, seeds=(*before, *new))
    return whole, runs(whole, root)


def _check_old_runs(planned: Sequence[Planned]) -> None:
    """UserError if a run of this workdir was begun with another config."""
    for one in planned:
        if Workdir(one.workdir).config_file.exists():
            with Workdir(one.workdir).open(as_json(one.config)):
                pass


def _check_models(planned: Sequence[Planned], devices: Sequence[Any] | None) -> None:
    """UserError if a model or a run to take knowledge from is missing or does not fit."""
    from oel_jax.learner.contexts import check_other_run
    from oel_jax.models.huggingface import resolve
    from oel_jax.nano.skills import check_skills
    from oel_jax.parallel.mesh import make_mesh
    from oel_jax.runs.policies import check_model, start_directory

    for one in {run.variant.name: run for run in planned}.values():
        config, name = one.config, one.variant.name
        try:
            mesh = make_mesh(config.mesh.fsdp, config.mesh.tp, devices)
        except UserError as error:
            raise UserError(f"variant {name}: {error}") from error
        try:
            check_model(config, start_directory(config), mesh)
            check_skills(config)
        except UserError as error:
            raise UserError(f"variant {name}, config.model.path: {error}") from error
        try:
            if config.extract.model_path:
                check_model(config, resolve(resolve_bundled(config.extract.model_path)), mesh)
        except UserError as error:
            raise UserError(f"variant {name}, config.extract.model_path: {error}") from error
        try:
            if not one.needs:  # what the study makes itself is there when it is wanted
                check_other_run(config)
        except UserError as error:
            raise UserError(f"variant {name}: {error}") from error


def _run_all(
    planned: Sequence[Planned],
    root: Path,
    devices: Sequence[Any] | None,
    today: datetime.datetime,
) -> dict[str, str]:
    """Make all runs, one after the other; returns failed run -> message."""
    from oel_jax.study.shelf import Shelf

    shelf, failed = Shelf(root), {}
    for number, one in enumerate(planned, 1):
        name = one.workdir.relative_to(root).as_posix()
        print(f"\n##### {name} (run {number} of {len(planned)})")
        record = one.workdir / "failure.txt"
        lacking = [need for need in one.needs if f"{need}/seed_{one.seed}" in failed]
        try:
            if lacking:
                raise UserError(f"it needs the run of {lacking[0]}, which failed")
            _run_one(one, shelf, devices, today)
            record.unlink(missing_ok=True)
        except Exception as error:  # whatever it is, the other variants continue
            failed[name] = printable(f"{type(error).__name__}: {error}")
            write_bytes(record, traceback.format_exc().encode("utf-8", "replace"))
            print(f"FAILED, the others continue: {failed[name]}\n(traceback: {record})")
        _drop_compiled()
    return failed


def _run_one(
    one: Planned, shelf: Any, devices: Sequence[Any] | None, today: datetime.datetime
) -> None:
    """An ordinary run, with a shelf."""
    from oel_jax.loop import run

    run(
        one.config,
        one.workdir,
        one.variant.stages,
        name=one.variant.name,
        devices=devices,
        today=today,
        shelf=shelf,
    )


def _drop_compiled() -> None:
    """Give compiled programs back before the process has more memory maps than Linux allows."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


# --- command --------------------------------------------------------------------------------------


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--seeds={text}: give integers such as --seeds=1,2,3") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--study", required=True, help="FILE.py or FILE.py:PRESET")
    parser.add_argument("--workdir", required=True, type=paths.argument, help="of the study")
    parser.add_argument("--game_module", help="Python file with a game of your own")
    parser.add_argument("--seeds", default="", help="loop seeds, instead of the study's own")
    parser.add_argument("--check", action="store_true", help="1 if an expectation did not hold")
    given, rest = parser.parse_known_args(arguments)
    try:
        changes = read_overrides(rest)
        if given.game_module:
            changes["game.module"] = given.game_module
        study = load(given.study, _seeds(given.seeds), changes)
        print(study.about.partition("\n")[0])
        finished, held = run(study, given.workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except preemption.Preempted as error:
        print(f"\n{preemption.last_words(error.kept)}", file=sys.stderr)
        return preemption.status()
    return 1 if not finished or (given.check and not held) else 0
