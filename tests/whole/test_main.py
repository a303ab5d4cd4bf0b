"""The command: what a user gets wrong ends in one message; nothing is lost or left over."""

import json
import logging
import os
import shutil
import subprocess
import sys

import jax
import pytest
from conftest import write_model
from tiers import HANG
from tiny_run import NANO_CONFIG, as_flags, contents, copy_of, tiny_config

import oel_jax
from oel_jax import run
from oel_jax.base.errors import UserError
from oel_jax.models import bundled
from oel_jax.parallel.mesh import all_devices, make_mesh


def command(*arguments):
    """(exit status, what it printed, what it complained) of `python -m oel_jax.main`."""
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stdout, done.stderr


GIVEN = f"--config={NANO_CONFIG}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --config=FILE and --workdir=DIR, for example"),
        ([GIVEN, "--workdir=W", "--config.sedd=1"], "config.sedd is not a field; did you mean con"),
        ([GIVEN, "--workdir=W", "--noconfig.model.thinkin"], "config.model.thinkin is not a field"),
        (
            [GIVEN, "--workdir=W", "--config.rounds=two"],
            "config.rounds is 'two'; it must be",
        ),
        ([GIVEN, "--workdir=W", "--config.rounds", "2.5"], "config.rounds is '2.5'; it must be an"),
        (
            [GIVEN, "--workdir=W", "--config.loss.temperature=x"],
            "config.loss.temperature is 'x'",
        ),
        ([GIVEN, "--workdir=W", "--config.rounds=0"], "config.rounds is 0; it must be an integer"),
        ([GIVEN, "--workdir=W", "--process_id=x"], "flag --process_id=x: it must be an integer"),
        ([GIVEN + ":foo", "--workdir=W"], "preset 'foo' is unknown; choose one of default, paper"),
        (["--config=no/such.py", "--workdir=W"], "--config=no/such.py: there is no such Python"),
        (["--config", "README.md", "--workdir=W"], "--config=README.md: there is no such Python"),
        ([GIVEN, "--wokdir=W"], "Unknown command line flag 'wokdir'. Did you mean: workdir"),
        ([GIVEN, "--workdir=W", "rounds=3"], "'rounds=3' is no flag; config fields are set by"),
        ([GIVEN, "--workdir=W", "--stages=deploy,play"], "--stages=deploy,play: choose from"),
    ],
)
def test_a_wrong_argument_is_one_message_and_status_2(tmp_path, arguments, message):
    arguments = [a.replace("--workdir=W", f"--workdir={tmp_path / 'W'}") for a in arguments]
    status, _, errors = command(*arguments)
    assert status == 2
    assert errors.startswith(f"error: {message}")
    assert "Traceback" not in errors and errors.count("\n") <= 2
    assert not (tmp_path / "W").exists()


def test_a_platform_that_does_not_start_is_one_message(tmp_path):
    """The commonest failure on a GPU machine, here with a platform that no machine has."""
    done = subprocess.run(
        [sys.executable, "-m", "oel_jax.main", *as_flags(), f"--workdir={tmp_path / 'W'}"],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("WARN", "INFO"))]
    assert line.startswith("error: JAX cannot start on JAX_PLATFORMS=no_such_platform (")
    assert "JAX_PLATFORMS=cpu" in line and not (tmp_path / "W").exists()


def test_a_plugin_that_fails_is_one_line_not_its_traceback(monkeypatch, capfd):
    """As JAX with CUDA's plugin but no driver: it logs a traceback, then asserts without a word."""
    log = logging.getLogger("jax._src.xla_bridge")
    found = jax.devices()

    def broken(end):
        try:
            raise RuntimeError("cuInit(0) failed: error 303\nmore of it")
        except RuntimeError:
            log.exception("Jax plugin configuration error")
        if end:
            raise AssertionError
        return found

    monkeypatch.setattr(jax, "devices", lambda: broken(True))
    with pytest.raises(
        UserError, match=r"cannot start on .* \(cuInit\(0\) failed: error 303\)\. See"
    ):
        all_devices()
    monkeypatch.setattr(jax, "devices", lambda: broken(False))
    assert all_devices() == found  # JAX took another platform, and the user is told so
    assert capfd.readouterr().err == "note: JAX: cuInit(0) failed: error 303\n"
    assert log.propagate and not log.handlers


@pytest.mark.parametrize("module", ["main", "study", "report", "nano.card"])
def test_without_the_environment_there_is_one_line(module):
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"oel_jax.{module}"],  # -S: a Python without packages
        cwd=NANO_CONFIG.parent.parent,
        capture_output=True,
        text=True,
        timeout=HANG,
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not the environment of oel_jax" in done.stderr
    assert ".venv/bin/activate" in done.stderr and "launch/local.sh" in done.stderr


def test_a_wrong_model_directory_is_one_error_in_a_notebook(tmp_path):
    for path in (tmp_path, "/no/such/model"):
        with pytest.raises(UserError) as caught:
            oel_jax.load_model(path)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_what_a_mesh_may_be_is_said_in_numbers():
    one, six = ([f"device {i}" for i in range(count)] for count in (1, 6))
    with pytest.raises(UserError, match=r"config.mesh.fsdp=-1 and config.mesh.tp=1$"):
        make_mesh(4, 2, one)
    with pytest.raises(UserError, match=r"config.mesh.fsdp=-1 and config.mesh.tp=1, 2, 3 or 6$"):
        make_mesh(4, 2, six)


def test_a_user_error_of_a_stage_is_one_message_and_status_2(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    (work / "round_001" / "trajectories" / "deploy_0001.jsonl").write_bytes(b"not json\n" * 2)
    before = contents(work, "round_001/**/*")
    status, out, errors = command(*as_flags(), f"--workdir={work}")
    assert (status, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("error: ") and "deploy_0001.jsonl:1: not JSON" in errors
    assert contents(work, "round_001/**/*") == before
    assert "=== round 1 of 1 ===" in out


def refused(workdir, **changes):
    """The message that `oel_jax.run` refuses a config with, on this process's eight devices."""
    fields = {"mesh__fsdp": -1} | changes
    with pytest.raises(UserError) as caught:
        run(tiny_config(**fields), workdir)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__path": "/no/such/model"}, ["no model directory /no/such/model"]),
        ({"loss__top_k": 100_000}, ["config.loss.top_k is 100000", "vocabulary"]),
        ({"evaluate__top_k": 100_000}, ["config.evaluate.top_k is 100000"]),
        ({"mesh__fsdp": 3}, ["config.mesh", "fsdp=3", "8 device(s)"]),
        ({"sampler__slots": 12}, ["config.mesh.fsdp=-1|config.mesh.fsdp=8", "slots = 12"]),
        ({"sampler__max_prompt": 100_000, "consolidate__token_budget": 200_000}, ["positions"]),
        ({"game__name": "chess"}, ["config.game.name is 'chess'", "frozen_lake"]),
    ],
)
def test_what_cannot_run_is_refused_before_the_workdir_exists(tmp_path, changes, words):
    message = refused(tmp_path / "W", **changes)
    for word in words:
        assert any(choice in message for choice in word.split("|")), message
    assert not (tmp_path / "W").exists()


def test_an_unknown_architecture_is_refused(tmp_path):
    model = shutil.copytree(bundled.MODEL_DIR, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path / "W", model__path=str(model))
    assert "config.json" in message and "mamba" in message.lower()
    assert not (tmp_path / "W").exists()


def test_a_model_without_tokenizer_says_what_is_missing(tmp_path):
    model = shutil.copytree(bundled.MODEL_DIR, tmp_path / "model")
    (model / "tokenizer.model").unlink()
    message = refused(tmp_path / "W", model__path=str(model))
    assert str(model) in message and "tokenizer" in message


def test_a_missing_shard_is_named(tmp_path):
    model = write_model(tmp_path / "model", "qwen3", shards=2)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(bundled.MODEL_DIR / name, model / name)
    (model / "model-00002-of-00002.safetensors").unlink()
    message = refused(tmp_path / "W", model__path=str(model), sampler__max_prompt=128)
    assert "model-00002-of-00002.safetensors" in message


def test_a_truncated_weights_file_is_named_and_the_same_command_goes_on(tmp_path):
    model = shutil.copytree(bundled.MODEL_DIR, tmp_path / "model")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    message = refused(tmp_path / "W", model__path=str(model))
    assert str(weights) in message
    assert not (tmp_path / "W").exists()  # what the file says of itself is read before anything


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(tmp_path / "file" / "W")
    assert f"--workdir={tmp_path / 'file' / 'W'} cannot be written" in message
    assert (tmp_path / "file").read_text() == ""


def test_a_prompt_longer_than_the_cache_is_named(tmp_path):
    message = refused(tmp_path / "W", sampler__max_len=51)
    assert "does not fit into the cache of 51" in message and "config.sampler.max_len" in message


def test_a_workdir_in_use_is_refused(finished_run, tmp_path):
    from tiny_run import opened

    work = copy_of(finished_run, tmp_path / "run")
    with opened(work, tiny_config()):
        assert f"in use by process {os.getpid()}" in refused(work, mesh__fsdp=-1)
