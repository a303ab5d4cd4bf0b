"""The shell scripts: what they run, what they install, how they fail. No network is used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bash(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with the real launch scripts, no requirements, and a main that tells its call."""
    project = tmp_path / "repo"
    for directory in ("launch", "tests", ".ci"):
        (project / directory).mkdir(parents=True)
    for file in ("launch/venv.sh", "launch/local.sh", "tests/run.sh", ".ci/run"):
        shutil.copy(ROOT / file, project / file)
    (project / "requirements.txt").write_text("# none\n")
    (project / "oel_jax").mkdir()
    (project / "oel_jax" / "__init__.py").write_text("")
    (project / "oel_jax" / "main.py").write_text(
        "import os, sys\nprint('main', *sys.argv[1:], os.getcwd())\nsys.exit(3)\n"
    )
    return project


def test_local_sh_makes_the_environment_and_runs_main(project, tmp_path):
    command = f"bash {project}/launch/local.sh --config.rounds=1 '--config.model.path=a b'"
    first = bash(command, tmp_path, PYTHON=sys.executable, PYTHONPATH="")
    assert first.returncode == 3, first.stderr
    assert "Making .venv with Python 3" in first.stdout
    assert "Installing requirements.txt" in first.stdout
    arguments = "--config=configs/nano_frozen_lake.py --workdir=runs/nano --config.rounds=1"
    assert f"main {arguments} --config.model.path=a b {project}" in first.stdout

    env = {"CONFIG": "other.py:paper", "WORKDIR": "elsewhere"}
    second = bash(command, tmp_path, **env)
    assert second.returncode == 3
    assert "Making" not in second.stdout and "Installing" not in second.stdout
    assert "main --config=other.py:paper --workdir=elsewhere" in second.stdout


def test_requirements_are_installed_again_only_when_changed(project):
    (project / ".venv").mkdir()
    install = f"set -eu; source launch/venv.sh; python={sys.executable}; install requirements.txt"
    assert "Installing requirements.txt" in bash(install, project).stdout
    assert bash(install, project).stdout == ""
    (project / "requirements.txt").write_text("# changed\n")
    assert "Installing" in bash(install, project).stdout
    (project / "requirements.txt").write_text("./no_such_directory\n")
    for _ in range(2):  # a failed installation is tried again
        failed = bash(install + "; echo went on", project)
        assert failed.returncode == 1 and "went on" not in failed.stdout
        assert "Installing requirements.txt failed" in failed.stderr


def test_without_a_new_enough_python_the_message_says_so(project, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"  # what an old Python answers to the version question
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    found = bash("bash launch/local.sh", project, PATH=str(tools), PYTHON="")
    assert found.returncode == 1
    assert "needs Python 3.11 or newer" in found.stderr and "PYTHON=" in found.stderr
    assert not (project / ".venv").exists()


def test_ci_run_passes_on_the_tests_exit_code_and_tokenizer(project, tmp_path):
    (project / "tests" / "run.sh").write_text('echo "tokenizer $OEL_QWEN3_TOKENIZER $*"; exit 7\n')
    missing = bash(".ci/run", project)
    assert missing.returncode == 1 and "tokenizer.json is missing" in missing.stderr
    tokenizer = tmp_path / "shared" / "models" / "qwen3-tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    found = bash(f"{project}/.ci/run -k x", tmp_path)
    assert found.returncode == 7
    path = found.stdout.split()[1]
    assert Path(path).resolve() == tokenizer.resolve() and found.stdout.endswith("-k x\n")


def test_scripts_are_executable_and_name_no_machine():
    scripts = [ROOT / p for p in ("launch/local.sh", "launch/venv.sh", "tests/run.sh", ".ci/run")]
    for script in scripts:
        text = script.read_text()
        assert "/work" not in text and "http" not in text
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert script.name == "venv.sh" or os.access(script, os.X_OK)
