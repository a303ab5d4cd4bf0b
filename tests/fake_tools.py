"""Stand-ins for the programs of clusters, which write down how they are called, for the tests.

What is tested is what our scripts ask of sbatch, gcloud or sudo, and what they do with the answers:
a stand-in's answer is given by the test. All of them come first in PATH, so that a real gcloud or
kubectl of this machine is never called.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("srun", "scontrol", "squeue", "gcloud", "sudo", "mountpoint", "curl", "kubectl", "docker")
SEPARATOR = "\x1f"


class Tools:
    """A directory of stand-ins and the record of their calls."""

    def __init__(self, directory: Path):
        self.bin = directory / "bin"
        self.record = directory / "calls"
        self.bin.mkdir(parents=True)
        self.record.write_text("")
        for name in TOOLS:
            self.answer(name, "exit 0")

    def answer(self, name: str, script: str) -> None:
        """What tool `name` does once its call is written down: a piece of bash."""
        path = self.bin / name
        path.write_text(
            "#!/usr/bin/env bash\n"
            f"{{ printf '%s' {name}; printf '\\x1f%s' \"$@\"; printf '\\n'; }} >>'{self.record}'\n"
            f"{script}\n"
        )
        path.chmod(0o755)

    def calls(self, name: str = "") -> list[list[str]]:
        """The calls so far in order, of all tools or of one, as lists of words."""
        lines = [line.split(SEPARATOR) for line in self.record.read_text().splitlines()]
        return [words for words in lines if not name or words[0] == name]

    def bash(self, command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        """Run a line of bash with the stand-ins first in PATH and nothing of Slurm's around."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OEL_"))}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=cwd,
            env={**outer, "PATH": path, **env},
            capture_output=True,
            text=True,
            timeout=1800,
        )


def make_project(directory: Path) -> Path:
    """A project with the real launch scripts, no requirements, and a main that tells its call.

    The main ends with $MAIN_EXIT, or 3. `.venv` is not there yet.
    """
    project = directory / "the repo"  # with a space: scripts must quote
    shutil.copytree(ROOT / "launch", project / "launch")
    for name in ("tests", ".ci", "configs", "oel_jax"):
        (project / name).mkdir()
    for file in ("tests/run.sh", ".ci/run"):
        shutil.copy(ROOT / file, project / file)
    (project / "requirements.txt").write_text("# none\n")
    for file in ("nano_frozen_lake.py", "frozen_lake_qwen3_8b.py"):
        (project / "configs" / file).write_text("")
    (project / "oel_jax" / "__init__.py").write_text("")
    (project / "oel_jax" / "main.py").write_text(
        "import os, sys\n"
        "print('main', *sys.argv[1:], os.getcwd())\n"
        "sys.exit(int(os.environ.get('MAIN_EXIT', '3')))\n"
    )
    return project


def give_venv(project: Path) -> None:
    """A `.venv/bin/python` that is this Python but installs nothing: it would go into this one."""
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    nothing = '[ "$1 $2 $3" != "-m pip install" ] || exit 0'
    python.write_text(f'#!/bin/sh\n{nothing}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def real_project(directory: Path) -> Path:
    """A copy of this project, with a `.venv` that is this Python."""
    directory.mkdir()
    for name in ("launch", "oel_jax", "configs"):
        shutil.copytree(ROOT / name, directory / name)
    shutil.copy(ROOT / "requirements.txt", directory)
    give_venv(directory)
    return directory
