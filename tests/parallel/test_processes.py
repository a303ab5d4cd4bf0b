"""Several processes on one machine: the same run as one process, and all stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiers import HANG
from tiny_run import ROOT, as_flags, copy_of

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.data.trajectory_files import read
from oel_jax.parallel import processes
from oel_jax.runs.metrics import read_metrics

DEVICES = 4  # in all


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(workdir, count, devices, *extra, last=(), code=None, **changes):
    """The processes of one run, each with its part of the virtual devices.

    `last`: flags of the last process alone; `code`: Python that runs the command.
    """
    flags = as_flags(mesh__fsdp=-1, **changes)
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
        "JAX_PLATFORMS": "cpu",
    }
    program = ["-c", code] if code else ["-m", "oel_jax.main"]
    command = [sys.executable, *program, *flags, f"--workdir={workdir}", *extra]
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count):
        own = [f"--coordinator={address}", f"--processes={count}", f"--process_id={index}"]
        own += last if index == count - 1 else []
        log = open(f"{workdir}.{index}.log", "w+")
        process = subprocess.Popen(
            [*command, *(own if count > 1 else [])],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append((process, log))
    return started


def end(started, timeout=HANG):
    """(exit status, output) of each."""
    results = []
    for process, log in started:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        results.append((process.returncode, log.read()))
        log.close()
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with all devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((status, output),) = end(start(workdir, 1, DEVICES))
    assert status == 0, output
    return workdir


def games(path):
    return [(g.seed, g.outcome, [t.response_ids for t in g.turns]) for g in read(path)]


def policy(workdir):
    from safetensors.numpy import load_file

    return load_file(workdir / "round_001" / "policy" / "model.safetensors")


@pytest.mark.processes
def test_two_processes_make_the_run_of_one(alone, tmp_path):
    workdir, count = tmp_path / "run", 2
    results = end(start(workdir, count, DEVICES))
    assert [status for status, _ in results] == [0] * count, results
    assert "consolidate: done" in results[0][1]
    assert not any("round 1" in output for _, output in results[1:])  # only the first one talks
    for path in sorted(alone.glob("round_001/trajectories/*.jsonl")):
        assert games(workdir / path.relative_to(alone)) == games(path), path.name
    knowledge = "round_001/knowledge/knowledge.json"
    assert read_json(workdir / knowledge) == read_json(alone / knowledge)
    assert not list(workdir.rglob("*process_*")) and not list(workdir.rglob("*.games*"))
    for name in ("evaluate/start", "round_001/evaluate/in_context"):
        assert read_json(workdir / f"{name}.json") == read_json(alone / f"{name}.json")
    rows = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (workdir, alone)
    ]
    losses = [
        [row["values"]["loss"] for row in some if row["stage"] == "consolidate"] for some in rows
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.processes
def test_updated_parameters_are_those_of_one_process(tmp_path):
    found = []
    for count in (1, 4):
        workdir = tmp_path / f"of_{count}"
        results = end(
            start(
                workdir,
                count,
                DEVICES,
                "--stages=deploy,extract,consolidate",
                consolidate__keep_fp32_master=True,
                consolidate__steps=1,
                consolidate__learning_rate=5e-6,
            )
        )
        assert [status for status, _ in results] == [0] * count, results
        found.append(policy(workdir))
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], atol=1e-5, err_msg=name)


@pytest.mark.processes
def test_a_mistake_stops_all_with_its_message(tmp_path):
    """Only process 0 sees that the workdir holds another run."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "manifest.json").write_text("{}")
    results = end(start(workdir, 2, 2))
    assert [status for status, _ in results] == [2, 2], results
    for _, output in results:
        assert "manifest.json exists but" in output and "Traceback" not in output


@pytest.mark.processes
def test_processes_with_other_configs_do_not_start(tmp_path):
    results = end(start(tmp_path / "run", 2, 2, last=["--config.seed=8"]))
    assert [status for status, _ in results] == [2, 2], results
    for _, output in results:
        assert "process 1 on " in output and "does not run what process 0" in output
        assert "config" in output and "Traceback" not in output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.processes
@pytest.mark.signals
def test_a_process_that_dies_stops_the_others(tmp_path):
    workdir = tmp_path / "run"
    started = start(workdir, 2, 2, rounds=50)
    deadline = time.monotonic() + HANG
    while not list(workdir.glob("round_001/trajectories/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    started[1][0].send_signal(signal.SIGKILL)
    (status, output), _ = end(started)
    assert status not in (0, None, -signal.SIGKILL), output


# Process 1 is told to stop in the second update.
NOTICED = """
import os, runpy, signal
import jax
from oel_jax.learner import consolidate
update, calls = consolidate.update, []
def noticed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(*args, **kwargs)
consolidate.update = noticed
runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.processes
@pytest.mark.signals
def test_notice_to_one_process_saves_and_stops_both(alone, tmp_path):
    workdir = copy_of(alone, tmp_path / "run", "consolidate", "evaluate")
    only = ("--stages=consolidate", "--allow_config_change")
    changes = {"consolidate__save_every": 1000}
    results = end(start(workdir, 2, DEVICES, *only, code=NOTICED, **changes))
    assert [status for status, _ in results] == [75, 75], results
    (saved,) = (workdir / "round_001" / "consolidate").iterdir()
    assert saved.name in ("2", "3")  # 3 only where the notice was heard late
    assert any(f"optimizer step {saved.name} of 3 is kept" in output for _, output in results)


# Only process 0 may read the metrics; both die in the third update.
GUARDED = """
import os, runpy, sys
import jax
from oel_jax.learner import consolidate
from oel_jax.learner import guards
real, update, calls = guards.read_metrics, consolidate.update, []
def read(path):
    assert jax.process_index() == 0, "another process reads what process 0 writes"
    return real(path)
def dying(*args, **kwargs):
    calls.append(1)
    if {dies} and len(calls) == 3:
        os._exit(9)
    return update(*args, **kwargs)
guards.read_metrics, consolidate.update = read, dying
runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.processes
def test_guards_of_two_processes_decide_by_the_first_step_also_after_a_kill(alone, tmp_path):
    def consolidate(work, band, dies):
        changes = {"guard__entropy": band, "guard__response_tokens": (0.01, 100.0)}
        only = ("--stages=consolidate", "--allow_config_change")
        return end(start(work, 2, DEVICES, *only, code=GUARDED.format(dies=dies), **changes))

    killed = copy_of(alone, tmp_path / "killed", "consolidate", "evaluate")
    results = consolidate(killed, (0.01, 100.0), dies=True)  # nothing leaves this band
    assert 9 in [status for status, _ in results], results
    rows = [row for row in read_metrics(killed / "metrics.jsonl") if row["stage"] == "consolidate"]
    assert [row["step"] for row in rows] == [1, 2]
    first = rows[0]["values"]["student_entropy"]

    band = 1 - 1e-6, 1 + 1e-6
    results = consolidate(killed, band, dies=False)
    assert [status for status, _ in results] == [0, 0], results
    assert "resuming from optimizer step 2" in results[0][1]
    assert "GUARD: round 1 is stopped" in results[0][1]
    broken = read_json(killed / "round_001" / "guard.json")
    assert (broken["step"], broken["measure"]) == (3, "student_entropy")
    np.testing.assert_allclose([broken["low"], broken["high"]], np.multiply(band, first))
    assert broken["kept_step"] == 1  # step 3 judged what step 2 made


# --- who is who -----------------------------------------------------------------------------------


def test_alone_by_default():
    assert processes.find_cluster(None, None, None, {}) is None
    assert processes.find_cluster(None, None, None, {"SLURM_NTASKS": "8"}) is None  # not in srun
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}
    assert processes.find_cluster(None, None, None, one) is None
    assert processes.find_cluster(None, None, None, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_flags_win_over_environment_and_that_over_slurm():
    env = {"OEL_COORDINATOR": "b:2", "OEL_PROCESSES": "3", "OEL_PROCESS_ID": "2"}
    env |= {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
    found = processes.find_cluster("a:1", 4, 3, env)
    assert found == processes.Cluster("a:1", 4, 3)
    assert processes.find_cluster(None, None, None, env) == processes.Cluster("b:2", 3, 2)
    slurm = {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
    assert processes.find_cluster(None, None, None, slurm) == processes.Cluster()
    assert processes.find_cluster(None, None, None, {"TPU_WORKER_HOSTNAMES": "a,b"}) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "--coordinator without --processes, --process_id"),
        (("a", 2, 0), "--coordinator=a is no HOST:PORT"),
        (("a:1", 2, 2), "--process_id=2 does not exist: with --processes=2 it is 0 to 1"),
    ],
)
def test_a_cluster_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        processes.find_cluster(*given, env={})


def test_shares_are_put_together_again():
    for count in (1, 2, 3, 5):
        work = list(range(11))
        assert processes.together([work[i::count] for i in range(count)]) == work
