"""Several processes, one run: who is who, what they tell each other, and how they stop together.

Each process runs the same command and the same code. What touches all devices (consolidation) they
do together; what one device group can do alone (games, extraction) they share out among themselves:
process i takes every N-th piece of work from the i-th on. Process 0 writes what is written once and
is the only one that talks. Decisions that depend on files or clocks are made by process 0 and told
to the others, so that all take the same way. One process is the case N = 1 of the same code.
"""

import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from oel_jax.base import preemption
from oel_jax.base.errors import TryAgain, UserError
from oel_jax.base.files import read_json
from oel_jax.parallel import meeting

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cluster:
    """Where the processes of a run meet; None = JAX finds it out by itself.

    Attributes:
      coordinator: host:port of process 0.
      count: number of processes.
      index: this process, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def find_cluster(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    env: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster this process belongs to, or None if it is alone.

    Asked in this order: the arguments (flags); OEL_COORDINATOR, OEL_PROCESSES and OEL_PROCESS_ID;
    Slurm, within `srun`; a TPU pod, as its runtime describes it. Of the last two only the fact that
    there are several processes is read here, since JAX knows the rest.

    Raises:
      UserError: only some of the three are given, or they contradict each other.
    """
    flags = {"--coordinator": coordinator, "--processes": count, "--process_id": index}
    if any(value is not None for value in flags.values()):
        return _cluster(flags)
    names = ("OEL_COORDINATOR", "OEL_PROCESSES", "OEL_PROCESS_ID")
    if any(env.get(name) for name in names):
        return _cluster({name: env.get(name) or None for name in names})
    in_srun = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env
    if in_srun and int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1) > 1:
        return Cluster()
    if env.get("TPU_WORKER_HOSTNAMES", "").count(",") or env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Cluster()
    return None


def _cluster(given: Mapping[str, Any]) -> Cluster | None:
    """Three values by name (address, count, index), checked."""
    missing = [name for name, value in given.items() if value is None]
    if missing:
        present = [name for name in given if name not in missing]
        raise UserError(
            f"{', '.join(present)} without {', '.join(missing)}: give all three, or none on a "
            "single host, under Slurm or on a TPU pod"
        )
    (address_name, address), (count_name, count), (index_name, index) = given.items()
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{address_name}={address} is no HOST:PORT, such as 10.0.0.1:1234")
    try:
        count, index = int(count), int(index)
    except ValueError as error:
        what = f"{count_name}={count} and {index_name}={index}"
        raise UserError(f"{what} must be integers") from error
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"{index_name}={index} does not exist: with {count_name}={count} it is 0 to {count - 1}"
        )
    return Cluster(str(address), count, index) if count > 1 else None


def join(cluster: Cluster | None, patience: int = 300) -> None:
    """Meet the other processes; before any device is touched.

    Args:
      patience: seconds to wait for them (`--join_timeout`).

    Raises:
      UserError: they contradict each other, or the coordinator's name does not resolve.
      TryAgain: they do not all come in time.
    """
    if cluster is None:
        return
    # JAX ends a process without a word of ours when one does not come: they meet by themselves
    # first, at the same address.
    host = meeting.meet(*_described(cluster, patience), patience)
    meeting.without_proxy(host)
    jax.config.update("jax_check_proxy_envs", False)  # its advice to unset proxies is not needed
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=60,
        )
    except Exception as error:  # of the runtime's own kinds
        raise TryAgain(
            f"the processes of this run met at {host}, but JAX could not join them: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _described(cluster: Cluster, patience: int) -> tuple[str, int, int]:
    """Address, count and index, which JAX finds out under Slurm and on a TPU pod."""
    if cluster.coordinator is not None:
        return cluster.coordinator, cluster.count, cluster.index
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, patience)
    address, count_, index_, _ = found
    if None in (address, count_, index_):
        raise UserError(
            "there are several processes, but JAX does not find out where they meet; give "
            "--coordinator, --processes and --process_id"
        )
    return address, count_, index_


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def index() -> int:
    """This process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes and talks."""
    return jax.process_index() == 0


def share(work: Sequence[_T]) -> list[_T]:
    """This process's part of some work; all of it where there is one process."""
    return list(work[index() :: count()])


def together(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """Undo `share`: the parts of all processes, in the order of the whole."""
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def wait(name: str) -> None:
    """Until all processes are here; files that they wrote before are complete then."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def exchange(value: Any) -> list[Any]:
    """What each process says, by process; plain JSON types."""
    if count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: _T) -> _T:
    """What process 0 says: for all that files or clocks decide."""
    return value if count() == 1 else exchange(value if is_first() else None)[0]


def json_from_first(path: Path) -> Any:
    """A JSON file that process 0 may just have written: what it reads there, on all processes."""
    return from_first(read_json(path) if is_first() else None)


def any_says(flag: bool) -> bool:
    """Whether any process says yes."""
    return any(exchange(bool(flag)))


def first_does(name: str, work: Callable[[], None]) -> None:
    """Let process 0 do it while the others wait."""
    if is_first():
        work()
    wait(name)


def to_numpy(array: jax.Array) -> np.ndarray:
    """An array as NumPy on every process, wherever it is."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    return multihost_utils.process_allgather(array, tiled=True)


# --- are we the same? -----------------------------------------------------------------------------


def _code() -> str:
    """A hash of the package's own source files."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_equal(settings: Mapping[str, Any]) -> None:
    """Refuse processes that would not compute the same run.

    Args:
      settings: the config, as plain JSON types.

    Raises:
      UserError: another config, code, Python or JAX on some process, or a clock that is far off.
    """
    if count() == 1:
        return
    text = json.dumps(settings, sort_keys=True)
    mine = {
        "oel_jax code": _code(),
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
        "jax": jax.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    wait("clocks")  # so that all read the clock at the same time
    said = exchange(mine | {"host": platform.node(), "clock": time.time()})
    first = said[0]
    for number, other in enumerate(said):
        differ = [name for name in mine if other[name] != first[name]]
        if differ:
            pairs = ", ".join(f"{name} {first[name]} and {other[name]}" for name in differ)
            raise UserError(
                f"process {number} on {other['host']} does not run what process 0 on "
                f"{first['host']} runs: {pairs}. Copy the same code, environment and command to "
                "all hosts"
            )
        off = other["clock"] - first["clock"]
        if abs(off) > 60:
            raise UserError(
                f"the clock of {other['host']} (process {number}) is {off:+.0f} s off that of "
                f"{first['host']}: times of files and curves would mislead; set it (chrony, ntpd)"
            )


# --- stopping together ----------------------------------------------------------------------------


class StopTogether:
    """Tells the other processes why this one fails or that it was told to stop, and hears them.

    Messages are lines of one file in the workdir, since a process that hangs in a collective hears
    nothing else. Everybody opens and reads it every second, which shows what is new on NFS too. A
    process that dies without a word is noticed by JAX's heartbeats within a minute.

    Process 0 ends last: JAX aborts the others as soon as it is gone. Each says that it goes.
    """

    def __init__(self, workdir: Path):
        self._file = workdir / ".messages"
        self._ending = threading.Lock()  # whoever takes it ends this process, with its status
        if count() > 1:
            workdir.mkdir(parents=True, exist_ok=True)
            first_does("no old messages", lambda: self._file.write_bytes(b""))
            threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, message: str, status: int) -> None:
        """Say why this process ends with `status`, and give the others time to hear it."""
        if count() == 1:
            return
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread ends this process meanwhile
            return
        self._write({"status": status, "message": message})
        self._go()

    def _go(self, seconds: float = 4.0) -> None:
        """Give the others time to hear the last message; process 0 waits until they are gone."""
        if not is_first():
            time.sleep(seconds)
            self._write({"gone": True})
            return
        end = time.monotonic() + 15
        while time.monotonic() < end:
            said = [self._read(line) for line in self._lines()]
            if len({each["process"] for each in said if "gone" in each}) >= count() - 1:
                time.sleep(2)  # they have said that they go, and do
                return
            time.sleep(0.2)

    def pass_on(self, number: int) -> None:
        """Say that this process was told to stop by signal `number`."""
        if count() > 1:
            self._write({"notice": number})

    def _write(self, said: Mapping[str, Any]) -> None:
        line = json.dumps({"process": index(), **said}).encode() + b"\n"
        for _ in range(5):  # on NFS a line that another host appends at the same time may win
            with self._file.open("ab") as file:
                file.write(b"\n" + line)  # on its own line, also after half of another
            if line in self._file.read_bytes():
                return

    def _watch(self) -> None:
        heard: set[bytes] = set()
        while True:
            time.sleep(1)
            for line in self._lines():
                if line not in heard:
                    heard.add(line)
                    self._obey(self._read(line))

    def _lines(self) -> list[bytes]:
        try:
            lines = self._file.read_bytes().split(b"\n")[:-1]  # the last one may be half there
        except OSError:
            return []
        return [line for line in lines if line]

    @staticmethod
    def _read(line: bytes) -> dict[str, Any]:
        try:
            said = json.loads(line)
        except ValueError:  # two hosts wrote at the same time; they say it again
            said = None
        return said if isinstance(said, dict) and "process" in said else {"process": None}

    def _obey(self, said: Mapping[str, Any]) -> None:
        if said["process"] in (index(), None):
            return
        if "notice" in said:
            preemption.notice(said["notice"])
        if "status" not in said or not self._ending.acquire(blocking=False):
            return
        message = f"stopped, since process {said['process']} did: {said['message']}"
        print(message, file=sys.stderr, flush=True)
        self._go(0.0)
        os._exit(int(said["status"]))  # the main thread may hang in a collective


def quiet() -> None:
    """Let only process 0 print; errors still go to every process's own stderr."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
