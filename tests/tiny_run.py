"""A very small OEL run with the bundled nano model, for the tests of the stages and of the loop."""

import atexit
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_collections
import pytest

import oel_jax
from oel_jax.base.files import read_json, write_json
from oel_jax.learner import consolidate
from oel_jax.models import bundled
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.policies import load_player_of_round
from oel_jax.runs.session import Run, open_run
from oel_jax.runs.stages import NAMES
from oel_jax.testing import tiny

ROOT = Path(__file__).resolve().parent.parent
NANO_CONFIG = ROOT / "configs" / "nano_frozen_lake.py"

# Compiled programs, shared with the processes that tests start; set the variable to keep them.
if "OEL_TEST_XLA_CACHE" not in os.environ:
    os.environ["OEL_TEST_XLA_CACHE"] = tempfile.mkdtemp(prefix="oel_xla_")
    atexit.register(shutil.rmtree, os.environ["OEL_TEST_XLA_CACHE"], ignore_errors=True)
XLA_CACHE = os.environ["OEL_TEST_XLA_CACHE"]
jax.config.update("jax_compilation_cache_dir", XLA_CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# One set of shapes for all tests, so that each program is compiled once.
FIELDS = tiny.FIELDS | {
    "compilation_cache": XLA_CACHE,
    "model.thinking": True,
    "mesh.fsdp": 1,
    "extract.max_prompt": 256,
    "consolidate.learning_rate": 3e-4,
}


def tiny_config(**changes) -> ml_collections.ConfigDict:
    """The nano config made small; changes with '__' for the dot: `extract__n=1`."""
    spec = importlib.util.spec_from_file_location("nano_config", NANO_CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    fields = FIELDS | {"model.path": str(bundled.MODEL_DIR)}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return config


def as_flags(**changes) -> list[str]:
    """The same config as arguments of `python -m oel_jax.main`."""
    fields = FIELDS | {"model.path": str(bundled.MODEL_DIR)}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={NANO_CONFIG}", *(f"--config.{name}={fields[name]}" for name in fields)]


@contextmanager
def opened(workdir: Path, config: ml_collections.ConfigDict, change: bool = False) -> Iterator[Run]:
    """The record of a run on one device, for tests of one stage."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    with open_run(config, workdir, mesh, allow_config_change=change) as run:
        yield run


def policy_of(run: Run, number: int) -> LanguageModel:
    """P_r of a run, to play with."""
    return load_player_of_round(run.config, run.workdir, number, run.host, today=run.today)


def go(
    workdir: Path,
    config: ml_collections.ConfigDict,
    stages: Sequence[str] = NAMES,
    change: bool = False,
) -> None:
    """Run the loop on one device, or resume it."""
    oel_jax.run(config, workdir, stages, allow_config_change=change, devices=jax.devices()[:1])


def interrupt_consolidation(
    monkeypatch: pytest.MonkeyPatch, workdir: Path, config: ml_collections.ConfigDict, steps: int
) -> None:
    """Consolidate until `steps` optimizer steps are done; then the process is interrupted."""
    step = consolidate._step

    def interrupted(this, state):
        if state.step == steps:
            raise KeyboardInterrupt
        return step(this, state)

    with monkeypatch.context() as patch:
        patch.setattr(consolidate, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(workdir, config, ["consolidate"], change=True)


def contents(workdir: Path, *patterns: str) -> dict[str, bytes]:
    """Relative name -> bytes of all files that match."""
    files = (path for pattern in patterns for path in workdir.glob(pattern))
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files if path.is_file()}


def results(workdir: Path) -> dict[str, object]:
    """All that a run computed and that does not depend on the clock."""
    found: dict[str, object] = dict(
        contents(
            workdir,
            "evaluate/*",
            "round_*/trajectories/*",
            "round_*/knowledge/**/*",
            "round_*/policy/*",
            "round_*/evaluate/*",
            "round_*/preflight.json",
        )
    )
    rows = read_metrics(workdir / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    return found


def undo(workdir: Path, *stages: str) -> Path:
    """Make the workdir of a one-round run as it was before these stages."""
    manifest = read_json(workdir / "manifest.json")
    gone = [one for one in manifest["stages"] if one["round"] and one["stage"] in stages]
    manifest["stages"] = [one for one in manifest["stages"] if one not in gone]
    for path in [workdir / file["path"] for one in gone for file in one["files"]]:
        path.unlink(missing_ok=True)
        while not any(path.parent.iterdir()):
            path = path.parent
            path.rmdir()
    write_json(workdir / "manifest.json", manifest)
    kept = [
        row
        for row in read_metrics(workdir / "metrics.jsonl")
        if not row["round"] or row["stage"].partition("_")[0] not in stages
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return workdir


def copy_of(workdir: Path, target: Path, *without: str) -> Path:
    """A copy of a finished one-round run, without some of its stages."""
    shutil.copytree(workdir, target)
    return undo(target, *without)
