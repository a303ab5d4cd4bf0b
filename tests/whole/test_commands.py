"""Whole commands whose sampler follows a script: a game by path, and Ctrl-C in a study."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oel_jax import testing
from oel_jax.base.files import read_json
from oel_jax.data.trajectory_files import read

ROOT = Path(__file__).resolve().parents[2]
GUESS = ROOT / "tests" / "guess_game.py"
CHILD = """
import os, runpy, signal, sys
from pathlib import Path
from oel_jax import testing

command, model, work, stop_at = sys.argv[1:5]
del sys.argv[1:5]
knowledge = Path(work) / "round_001" / "knowledge" / "knowledge.json"
sampled = []

def script(prompt):
    if "EXPERIENCE ITEM" in prompt:
        return "- EXPERIENCE ITEM: start in the middle"
    if knowledge.exists():  # so this is an answer that consolidation learns from
        sampled.append(prompt)
        if len(sampled) == int(stop_at):
            os.kill(os.getpid(), signal.SIGINT)
    return "[100]"

with testing.scripted(script, model):
    runpy.run_module(command, run_name="__main__", alter_sys=True)
"""
CONFIG = """
import os
from oel_jax.testing import tiny_config

def get_config():
    return tiny_config(
        model_path={model!r}, compilation_cache=os.environ["OEL_TEST_XLA_CACHE"],
        game__max_turns=8, game__wrapper="plain", game__name="guess",
        sampler__max_prompt=320, extract__max_prompt=900,
        mesh__fsdp=1, deploy__games_per_step=1, consolidate__steps=3, consolidate__save_every=1000
    )
"""
STUDY = '''"""A study of one run."""
import sys
sys.path.insert(0, {place!r})
from guess_config import get_config
from oel_jax.study.command import *

PRESETS = ("tiny",)

def get_study(preset):
    measures = (Measure("loss", stage="consolidate", round=1, value="loss"),)
    variants = (Variant("only", stages={stages!r}),)
    return Study(config=get_config(), variants=variants, seeds=(0,), measures=measures)
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return testing.write_dummy_model(tmp_path_factory.mktemp("dummy") / "model")


def command(name, model, work, *flags, stop_at=0):
    """`python -m NAME` with the script; it presses Ctrl-C at answer `stop_at` of consolidation."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, name, model, work, str(stop_at), *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def written(tmp_path, model, stages):
    """The files of a config and of a study with one run."""
    config, study = tmp_path / "guess_config.py", tmp_path / "guess_study.py"
    config.write_text(CONFIG.format(model=str(model)))
    study.write_text(STUDY.format(place=str(tmp_path), stages=stages))
    return config, study


@pytest.mark.parametrize("name", ["main", "study"])
def test_a_game_is_given_by_its_path(model, tmp_path, name):
    config, study = written(tmp_path, model, ("deploy",))
    root = tmp_path / "root"
    if name == "main":
        flags, work = (f"--config={config}", "--stages=deploy"), root
    else:
        flags, work = (f"--study={study}",), root / "only" / "seed_0"
    unknown = command(f"oel_jax.{name}", model, work, *flags, f"--workdir={root}")
    assert unknown.returncode == 2 and "--game_module=FILE.py" in unknown.stderr, unknown.stderr
    assert not work.exists()
    flags += (f"--game_module={GUESS}", f"--workdir={root}")
    done = command(f"oel_jax.{name}", model, work, *flags)
    assert done.returncode == 0, done.stderr
    games = [game for path in work.rglob("deploy_*.jsonl") for game in read(path)]
    assert {game.game for game in games} == {"guess"}
    assert {turn.action for game in games for turn in game.turns} == {"[100]"}
    assert read_json(work / "config.json")["game"]["module"] == str(GUESS)


@pytest.mark.signals
def test_ctrl_c_in_a_study_saves_the_step_and_the_same_command_resumes(model, tmp_path):
    _, study = written(tmp_path, model, ("deploy", "extract", "consolidate"))
    work = tmp_path / "root" / "only" / "seed_0"
    flags = [f"--study={study}", f"--workdir={tmp_path / 'root'}", f"--game_module={GUESS}"]
    # Each game has 8 turns and each step a game: answer 12 belongs to the second step.
    first = command("oel_jax.study", model, work, *flags, stop_at=12)
    assert first.returncode == 130, first.stdout + first.stderr
    last = first.stderr.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C; ") and "optimizer step 1 of 3 is kept" in last
    assert "Traceback" not in first.stderr
    second = command("oel_jax.study", model, work, *flags)
    assert second.returncode == 0, second.stderr
    assert "resuming from optimizer step 1" in second.stdout
    assert (work / "round_001" / "policy" / "model.safetensors").exists()
