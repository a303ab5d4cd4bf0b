"""The tiers of the tests: what runs, what is said, and that a slow test fails the default one."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiers

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import tiers
tiers.LIMIT = 0.4
pytest_plugins = ["tiers"]
"""
TESTS = """
import subprocess, sys, time
import pytest

def work():
    end = time.process_time() + 0.6
    while time.process_time() < end: pass

def test_quick(): pass
def test_waits(): time.sleep(0.8)

@pytest.mark.slow
def test_large(): work()
"""
BUSY = """
import sys, subprocess
def test_busy(): subprocess.run([sys.executable, "-c", {code!r}], check=True)
"""
CODE = "import time\nwhile time.process_time() < 0.6: pass"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    slow: x\naddopts = --strict-markers"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


def ended(project, *flags):
    """(exit status, output) of pytest in a project of its own."""
    path = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *flags],
        cwd=project,
        env=os.environ | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def passed(output):
    return set(re.findall(r"^PASSED .*::(\w+)$", output, re.M))


@pytest.mark.parametrize("workers", [(), ("-n2", "--dist=loadfile")], ids=["one", "two"])
def test_what_runs_and_what_is_said(project, workers):
    if workers and find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed; tests/run.sh installs it")
    status, output = ended(project, *workers)
    assert status == 0 and passed(output) == {"test_quick", "test_waits"}, output
    assert "left out: 1 of slower tiers (slow 1)" in output
    for flags in (["--all"],) if workers else (["--all"], ["-m", "slow"], ["test_some.py"]):
        status, output = ended(project, *workers, *flags)
        assert status == 0 and "test_large" in passed(output), output
        assert "left out" not in output


@pytest.mark.parametrize("workers", [(), ("-n2", "--dist=loadfile")], ids=["one", "two"])
def test_a_slow_test_of_the_default_tier_fails_the_session(project, workers):
    """By processor time, that of children included: a sleep does not count, a busy child does."""
    if workers and find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed; tests/run.sh installs it")
    (project / "test_busy.py").write_text(BUSY.format(code=CODE))
    status, output = ended(project, *workers)
    assert status == 1 and "test_busy" in passed(output), output
    assert re.search(r"^test_busy.py::test_busy: \d+ s of processor time$", output, re.M), output
    assert "test_waits: " not in output


def test_all_tiers_are_registered():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert sorted(tiers.TIERS) == sorted(text.partition(":")[0] for text in options["markers"])
