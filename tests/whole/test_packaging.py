"""What `pip install .` brings, the command `oel`, and configs that are found by their names."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import oel_jax
from launch import requirements
from oel_jax.__main__ import COMMANDS, main
from oel_jax.base.errors import UserError
from oel_jax.config.file import existing
from oel_jax.study.definitions import load

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("file", requirements.FILES)
def test_requirements_files_are_made_from_pyproject(file):
    text = (ROOT / file).read_text()
    assert text == requirements.text_of(file), "run: python launch/requirements.py"
    assert len(text.splitlines()) > 2


def test_extras_and_version():
    assert set(PROJECT["optional-dependencies"]) == {"gpu", "tpu", "eval", "plan", "serve", "dev"}
    assert PROJECT["dynamic"] == ["version"] and oel_jax.__version__.count(".") == 2
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {oel_jax.__version__}\n" in citation


def test_what_is_built_holds_the_package_its_files_and_the_configs(tmp_path):
    """As setuptools builds it, from a copy, since it leaves files in the source."""
    source = tmp_path / "source"
    for name in ("oel_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    done = subprocess.run([sys.executable, *build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = {path.relative_to(ROOT) for path in (ROOT / "oel_jax").rglob("*") if path.is_file()}
    wanted |= {Path("oel_jax") / path.relative_to(ROOT) for path in ROOT.glob("configs/**/*.py")}
    missing = {str(path) for path in wanted if not (tmp_path / "built" / path).exists()}
    assert {path for path in missing if not path.endswith((".pyc", "README.md"))} == set()


def test_configs_and_studies_are_found_by_name():
    config = oel_jax.load_config("nano_frozen_lake:paper")
    assert (config.model.path, config.preset) == ("nano", "paper")
    assert oel_jax.load_config("nano_frozen_lake").preset == "default"
    assert existing("nano_sokoban")[0] == str(ROOT / "configs" / "nano_sokoban.py")
    assert load("table1").name == load(str(ROOT / "configs/studies/table1.py")).name
    with pytest.raises(UserError, match=r"--config=nano_lake: there is none .* nano_frozen_lake"):
        oel_jax.load_config("nano_lake")
    with pytest.raises(UserError, match=r"--study=tab: there is none of this name.* table1"):
        load("tab")


def test_oel_lists_its_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2 and main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"oel_jax {oel_jax.__version__}"
    assert main(["play"]) == 2
    assert "error: 'play' is no command of oel" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["run", "--config=nano_frozen_lake", "--print_config"], 0, "* rounds "),
        (["run", "--config=nano_frozen_lake"], 2, "give --config=FILE and --workdir=DIR"),
        (["study", "--study=table99", "--workdir=W"], 2, "--study=table99: there is none"),
        (["report", "--workdir=W"], 2, "holds no run"),
        (["export", "--workdir=W", "--round=1", "--out=O"], 2, "error: "),
        (["plan", "--config=nano_frozen_lake", "--target=v99:1"], 2, "no such target"),
        (["evaluate", "--help"], 0, "--lm_eval_tasks"),
    ],
)
def test_oel_hands_over_to_each_command(arguments, status, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    )
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
