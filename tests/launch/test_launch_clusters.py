"""Slurm and TPU slices, as far as a machine without them can check.

The programs of the clusters are stand-ins (fake_tools.py); one test runs the real training under
the Slurm script, stops it by a notice and lets it be queued again.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
import tiny_run
from fake_tools import ROOT, Tools, give_venv, make_project, real_project

NANO = "configs/nano_frozen_lake.py"


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def tools(tmp_path) -> Tools:
    return Tools(tmp_path / "tools")


# --- Slurm ----------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
JOB |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16", "JAX": ""}

# srun's own options, then the command: started once, as task 0, its output where --output says.
START = """
while [[ $1 = --* ]]; do
  [[ $1 = --output=* ]] && log=${1#--output=}
  shift
done
log=${log//%t/0}
SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 "$@" >>"${log//%%/%}" 2>&1
"""


def submit(tools: Tools, project: Path, *arguments: str, **env: str):
    """What Slurm does on the first node: it starts a copy of the script in the project."""
    copy = tools.bin / "slurm_script"
    copy.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    return tools.bash(f"bash '{copy}' {shlex.join(arguments)}", project, **{**JOB, **env})


def test_the_job_asks_slurm_for_what_the_processes_need():
    lines = re.findall(r"^#SBATCH --(\S+)", (ROOT / "launch/slurm.sbatch").read_text(), re.M)
    asked = dict(line.partition("=")[::2] for line in lines)
    assert asked["ntasks-per-node"] == "1" and int(asked["nodes"]) > 1
    # Without B: the signal goes to the processes, not to the batch shell.
    name, seconds = asked["signal"].split("@")
    assert name == "TERM" and int(seconds) >= 120
    assert "requeue" in asked and asked["open-mode"] == "append"


def test_the_job_starts_a_process_on_each_node_with_all_its_gpus(project, tools):
    give_venv(project)
    tools.answer("srun", START + 'echo "gpus $JAX_LOCAL_DEVICE_IDS"')
    ended = submit(tools, project, NANO, "--config.rounds=5", WORKDIR="runs/50% x", MAIN_EXIT="0")
    assert ended.returncode == 0, ended.stderr
    assert "gpus 0,1,2,3" in ended.stdout
    assert tools.calls() == [
        [
            "srun",
            "--kill-on-bad-exit=0",
            "--wait=300",
            "--open-mode=append",
            "--output=runs/50%% x/logs/process-%t.log",
            "--cpus-per-task=16",
            ".venv/bin/python",
            "-m",
            "oel_jax.main",
            f"--config={NANO}",
            "--workdir=runs/50% x",
            "--config.rounds=5",
        ]
    ]
    log = (project / "runs" / "50% x" / "logs" / "process-0.log").read_text()
    assert log == f"main --config={NANO} --workdir=runs/50% x --config.rounds=5 {project}\n"


def test_with_a_task_for_each_gpu_jax_is_told_nothing(project, tools):
    give_venv(project)
    tools.answer("srun", 'echo "gpus ${JAX_LOCAL_DEVICE_IDS-not set}"')
    assert "gpus not set" in submit(tools, project, NANO, SLURM_NTASKS="8").stdout


@pytest.mark.parametrize(
    "code, state, requeued",
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (0, "RUNNING", False),
        (2, "RUNNING", False),
    ],
)
def test_only_a_saved_job_that_still_runs_is_queued_again(code, state, requeued, project, tools):
    give_venv(project)
    tools.answer("srun", f"exit {code}")
    tools.answer("squeue", f"echo {state}")
    ended = submit(tools, project, NANO)
    assert ended.returncode == code
    assert tools.calls("scontrol") == ([["scontrol", "requeue", "7"]] if requeued else [])
    if code == 75:
        assert tools.calls("squeue") == [
            ["squeue", "--noheader", "--jobs=7", "--format=%T"],
        ]


def test_a_slurm_dry_run_prints_what_the_job_does(project, tools):
    found = tools.bash(f"bash launch/slurm.sbatch --dry_run {NANO} --config.rounds=5", project)
    assert found.returncode == 0 and tools.calls() == []
    runs = "runs/nano_frozen_lake"
    assert found.stdout.splitlines() == [
        "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        "export PYTHONUNBUFFERED=1",
        f"mkdir -p {runs}/logs",
        "srun --kill-on-bad-exit=0 --wait=300 --open-mode=append "
        f"--output={runs}/logs/process-%t.log .venv/bin/python -m oel_jax.main --config={NANO} "
        f"--workdir={runs} --config.rounds=5",
        "# if that exits with 75 while the job is still RUNNING:",
        "scontrol requeue JOB_ID",
    ]
    assert not (project / "runs").exists()


@pytest.mark.e2e
@pytest.mark.signals
def test_a_real_run_under_slurm_stops_by_a_notice_and_is_finished_when_queued_again(
    tmp_path, tools
):
    project = real_project(tmp_path / "a project")
    # The first time the notice comes while consolidation is at work.
    notice = """
if [ ! -e noticed ]; then
  for _ in $(seq 2000); do
    compgen -G 'runs/*/round_001/consolidate/*' && touch noticed && break
    sleep 0.2
  done >/dev/null 2>&1 && kill -TERM "$(cat main.pid)" &
fi
"""
    start = START.replace('"$@"', """bash -c 'echo $$ >main.pid; exec "$@"' x "$@\"""")
    tools.answer("srun", notice + start)
    tools.answer("squeue", "echo RUNNING")
    _, *flags = tiny_run.as_flags(evaluate__maps=2, evaluate__in_context=False)
    env = {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": ""}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "", "WORKDIR": "runs/tiny"}

    log = project / "runs" / "tiny" / "logs" / "process-0.log"
    first = submit(tools, project, NANO, *flags, **env)
    assert first.returncode == 75, (first.stderr, log.read_text())
    assert tools.calls("scontrol") == [["scontrol", "requeue", "7"]]
    assert not (project / "runs" / "tiny" / "report.html").exists()

    second = submit(tools, project, NANO, *flags, **env)
    assert second.returncode == 0, (second.stderr, log.read_text())
    assert tools.calls("scontrol") == [["scontrol", "requeue", "7"]]
    assert (project / "runs" / "tiny" / "report.html").exists()
    assert "preemption notice" in log.read_text() and "starting model" in log.read_text()


# Two tasks, each on its own "node", with what Slurm tells them; the highest exit code.
START_TWO = """
while [[ $1 = --* ]]; do shift; done
for task in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=localhost \\
    SLURM_PROCID=$task SLURM_LOCALID=0 "$@" >"task-$task.log" 2>&1 &
  pids[task]=$!
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""

MEET = """
import jax
from oel_jax.parallel import processes
processes.join(processes.find_cluster(None, None, None))
print(processes.index(), processes.count(), processes.exchange(processes.index()))
"""


def test_the_processes_of_a_job_find_each_other(tmp_path, tools):
    project = real_project(tmp_path / "project")
    (project / "oel_jax" / "main.py").write_text(MEET)
    tools.answer("srun", START_TWO)
    env = {"SLURM_JOB_ID": str(os.getpid()), "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    ended = submit(tools, project, NANO, **env)
    logs = [(project / f"task-{task}.log").read_text() for task in (0, 1)]
    assert ended.returncode == 0, logs
    assert [log.splitlines()[-1] for log in logs] == ["0 2 [0, 1]", "1 2 [0, 1]"]


# --- TPU slices -----------------------------------------------------------------------------------

TPU = {"ZONE": "us-east5-a", "TYPE": "v5p-16", "VERSION": "v2-alpha-tpuv5", "PAUSE": "0"}
TPU |= {"NFS": "10.0.0.2:/oel", "WORKDIR": "", "SPOT": "", "KEEP": "", "PROJECT": "", "JAX": ""}

# The slice's state is in a file; the run's exit codes, one a start, in another.
GCLOUD = """
cd "$STATE"
case $4 in
  describe) [ -e slice ] || exit 1; cat slice ;;
  create)
    if [ -s refusals ]; then
      head -1 refusals >&2; sed -i 1d refusals; exit 1
    fi
    echo READY >slice ;;
  delete) rm slice ;;
  ssh)
    if [[ "$*" = *tpu_worker.sh\\ run* ]]; then
      read -r code then <codes; sed -i 1d codes
      [ -z "$then" ] || echo "$then" >slice
      exit "$code"
    fi ;;
esac
"""


@pytest.fixture
def tpu(project, tools, tmp_path):
    """`tpu(codes, ...)`: call the script; each code is how the run ends, and the slice's state."""
    place = tmp_path / "slice state"
    place.mkdir()
    tools.answer("gcloud", GCLOUD)

    def call(*codes: str, refusals: str = "", arguments: str = "", **env: str):
        (place / "codes").write_text("\n".join(codes) + "\n")
        (place / "refusals").write_text(refusals)
        command = f"bash launch/tpu_pod.sh oel-1 {NANO} {arguments}"
        return tools.bash(command, project, **{**TPU, "STATE": str(place), **env})

    call.state = place / "slice"
    return call


def verbs(tools: Tools) -> list[str]:
    return [words[4] for words in tools.calls("gcloud") if words[4] != "describe"]


ONE_START = ["scp", "ssh", "ssh"]  # code, unpack, run


def test_a_slice_is_created_used_and_deleted(tpu, tools, project):
    ended = tpu("0", SPOT="1", PROJECT="p", arguments="--config.rounds=5 '--config.model.path=a b'")
    assert ended.returncode == 0, ended.stderr
    assert verbs(tools) == ["create", *ONE_START, "scp", "delete"]
    calls = [words for words in tools.calls("gcloud") if words[4] != "describe"]
    where = ["--zone=us-east5-a", "--quiet", "--project=p"]
    assert all(words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for words in calls)
    assert all(words[-3:] == where for words in calls)
    create, copy, unpack, run, bring, delete = (words[5:-3] for words in calls)
    assert create == ["oel-1", "--accelerator-type=v5p-16", "--version=v2-alpha-tpuv5", "--spot"]
    assert copy[1:] == ["oel-1:oel.tgz", "--worker=all"] and delete == ["oel-1"]
    assert unpack[:2] == run[:2] == ["oel-1", "--worker=all"]
    # What a shell on the worker makes of the command.
    assert shlex.split(run[2].removeprefix("--command=")) == [
        *["env", "NFS=10.0.0.2:/oel", "MOUNT=/mnt/oel", "bash", "oel/launch/tpu_worker.sh", "run"],
        "/mnt/oel/runs/nano_frozen_lake",
        f"--config={NANO}",
        "--config.rounds=5",
        "--config.model.path=a b",
    ]
    assert bring[:2] == ["--recurse", "--worker=0"] and bring[-1] == "runs/nano_frozen_lake/"
    assert "oel-1:/mnt/oel/runs/nano_frozen_lake/report.html" in bring


def test_a_notice_and_a_lost_slice_are_followed_by_another_start(tpu, tools):
    # Saved and still there; connection lost; taken away while running; finished.
    ended = tpu("75", "255", "143 PREEMPTED", "0")
    assert ended.returncode == 0, ended.stderr
    assert verbs(tools) == [
        *["create", *ONE_START, *ONE_START, *ONE_START],
        *["delete", "create", *ONE_START, "scp", "delete"],
    ]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_failed_run_is_not_started_again_and_its_slice_is_deleted(code, tpu, tools):
    assert tpu(str(code)).returncode == code
    assert verbs(tools) == ["create", *ONE_START, "scp", "delete"]


def test_a_mistake_ends_it_even_if_the_slice_goes_away(tpu, tools):
    assert tpu("2 PREEMPTED").returncode == 2
    assert verbs(tools) == ["create", *ONE_START, "delete"]


def test_a_slice_that_was_there_or_shall_be_kept_is_not_deleted(tpu, tools):
    tpu.state.write_text("READY")
    ended = tpu("0")
    assert ended.returncode == 0 and "costs money" in ended.stderr
    assert verbs(tools) == [*ONE_START, "scp"]
    tpu.state.unlink()
    assert tpu("0", KEEP="1").returncode == 0
    assert verbs(tools)[4:] == ["create", *ONE_START, "scp"]


def test_no_capacity_is_waited_for_and_other_refusals_are_not(tpu, tools):
    full = "ERROR: (gcloud) There is no more capacity in the zone\n"
    assert tpu("0", refusals=full * 2).returncode == 0
    assert verbs(tools)[:4] == ["create", "create", "create", "scp"]
    tools.record.write_text("")
    ended = tpu("0", refusals=full * 9, ATTEMPTS="2")
    assert ended.returncode == 1 and verbs(tools) == ["create"] * 2
    for refusal in ("ERROR: RESOURCE_EXHAUSTED: Quota exceeded\n", "ERROR: unknown type v9\n"):
        tools.record.write_text("")
        ended = tpu("0", refusals=refusal)
        assert ended.returncode == 2 and verbs(tools) == ["create"]
        assert refusal in ended.stderr


@pytest.mark.parametrize(
    "env, message",
    [
        ({"ZONE": ""}, "not set: ZONE; see"),
        ({"TYPE": "", "ZONE": "", "VERSION": "", "NFS": ""}, "not set: ZONE TYPE VERSION NFS; see"),
        ({"NFS": ""}, "not set: NFS; see"),
        ({"NFS": "10.0.0.2"}, "SERVER:/SHARE"),
        ({"WORKDIR": "runs/x"}, "begin with /mnt/oel/"),
        ({"MOUNT": "mnt"}, "absolute path"),
    ],
)
def test_settings_of_a_slice_are_checked_first(env, message, tpu, tools):
    ended = tpu("0", **env)
    assert ended.returncode == 2 and message in ended.stderr and tools.calls() == []


def test_a_tpu_dry_run_prints_all_commands(tpu, tools, project):
    ended = tpu(arguments="--dry_run --config.rounds=5")
    assert ended.returncode == 0 and tools.calls() == [] and not (project / "runs").exists()
    lines = [shlex.split(line) for line in ended.stdout.splitlines()]
    assert [line[4] for line in lines if line[0] == "gcloud"] == [
        "create",
        *ONE_START,
        "scp",
        "delete",
    ]


METADATA = """
case "$*" in
  *'Metadata-Flavor: Google metadata.google.internal/computeMetadata/v1/instance/attributes/'*) ;;
  *) exit 22 ;;
esac
case "$*" in
  */worker-network-endpoints) printf '%s' '{endpoints}' ;;
  */agent-worker-number) printf 3 ;;
esac
"""
WORKER = {"NFS": "10.0.0.2:/oel", "JAX": "jax", "PYTHON": ""}


TELL_CLUSTER = """
import os, sys
cluster = [os.environ.get("OEL_" + name) for name in ("COORDINATOR", "PROCESSES", "PROCESS_ID")]
print("cluster", *cluster)
print("main", *sys.argv[1:])
sys.exit(75)
"""


def test_a_worker_mounts_the_share_and_runs(project, tools, tmp_path):
    give_venv(project)
    (project / "oel_jax" / "main.py").write_text(TELL_CLUSTER)
    share = tmp_path / "share"
    workdir = share / "runs" / "x"
    workdir.mkdir(parents=True)
    tools.answer("mountpoint", "exit 1")
    tools.answer("mount.nfs", "exit 0")
    tools.answer("curl", METADATA.format(endpoints="10.1.0.1,10.1.0.2,10.1.0.3,10.1.0.4"))
    tools.answer("stat", "echo 1234")
    env = {**WORKER, "MOUNT": str(share)}
    command = f"bash '{project}/launch/tpu_worker.sh' run '{workdir}' --config={NANO}"
    ended = tools.bash(command, tmp_path, **env)
    assert ended.returncode == 75, ended.stderr
    assert [words[1:] for words in tools.calls("sudo")] == [
        ["mkdir", "-p", str(share)],
        ["mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/oel", str(share)],
        ["mkdir", "-p", str(workdir)],
    ]
    assert f"main --workdir={workdir} --config={NANO}" in ended.stdout
    assert "cluster 10.1.0.1:8482 4 3" in ended.stdout
    assert (workdir / "logs" / "process-3.log").exists()
    tools.answer("stat", "echo 0")  # a new share belongs to root
    assert tools.bash(command, tmp_path, **env).returncode == 75
    assert tools.calls("sudo")[-1] == ["sudo", "chown", str(os.getuid()), str(workdir)]


@pytest.mark.parametrize(
    "endpoints, told",
    [("a:1:10.1.0.1,b:2:10.1.0.2", "10.1.0.1:8482 2 3"), ("10.1.0.1", "None None None")],
)
def test_a_worker_knows_the_others(endpoints, told, project, tools, tmp_path):
    give_venv(project)
    (project / "oel_jax" / "main.py").write_text(TELL_CLUSTER)
    tools.answer("curl", METADATA.format(endpoints=endpoints))
    command = f"bash '{project}/launch/tpu_worker.sh' run '{tmp_path}' --config={NANO}"
    ended = tools.bash(command, tmp_path, **WORKER, MOUNT=str(tmp_path))
    assert ended.returncode == 75 and f"cluster {told}\n" in ended.stdout


def test_a_worker_stops_what_a_lost_connection_left(project, tools, tmp_path):
    give_venv(project)
    (tmp_path / "share").mkdir()
    (project / "oel_jax" / "main.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    worker, share = f"bash '{project}/launch/tpu_worker.sh'", tmp_path / "share"
    script = (
        f"{worker} run '{share}' --config={NANO} >out & pid=$!\n"
        f"until grep -q up out; do sleep 0.1; done; {worker} stop; wait $pid"
    )
    ended = tools.bash(script, tmp_path, **WORKER, MOUNT=str(share), STOP_SECONDS="30")
    assert ended.returncode == 75 and "stopping process" in ended.stdout, ended
    again = tools.bash(f"{worker} stop", tmp_path)  # nothing is left to stop
    assert again.returncode == 0 and again.stdout == ""
    # A process of somebody else that has got the number is left alone.
    (project / "running.pid").write_text(str(os.getpid()))
    assert tools.bash(f"{worker} stop", tmp_path).stdout == ""
