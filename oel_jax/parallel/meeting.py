"""Where the processes of a run meet, before JAX joins them, by plain sockets.

JAX aborts a process (a C++ stack trace, status 134) when another one does not come. So process 0
first listens at the coordinator's address by itself. Every other process says there who it is, and
waits for process 0 to say that all have come; JAX then uses the same address. Imports no JAX.
"""

import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oel_jax.base.errors import TryAgain, UserError

_HELLO = "oel_jax"  # another program at this port says something else
_LONGEST = 4096  # bytes of a message
_ADVICE = (
    "Check that every process was started with the same --coordinator (OEL_COORDINATOR) and that "
    "the port is open between the hosts; --join_timeout is the time to wait"
)


def meet(address: str, count: int, index: int, patience: float) -> str:
    """Wait until all processes of the run are there.

    Args:
      address: HOST:PORT of process 0.
      patience: seconds.

    Returns:
      the host of `address`.

    Raises:
      UserError: the name does not resolve, or the processes contradict each other.
      TryAgain: somebody has not come in time.
    """
    host, _, port = address.rpartition(":")
    at = _Place(address, host.strip("[]"), int(port), patience)
    at.resolve()
    if index == 0:
        _gather(at, count)
    else:
        _report(at, count, index)
    return at.host


def without_proxy(host: str) -> None:
    """Let gRPC, by which JAX's processes talk, reach `host` directly; the rest is as before."""
    before = next(
        (os.environ[n] for n in ("no_grpc_proxy", "no_proxy", "NO_PROXY") if n in os.environ), ""
    )
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [before, host]))


@dataclass
class _Place:
    """Where and until when to meet."""

    address: str
    host: str
    port: int
    patience: float
    end: float = field(init=False)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.patience
        self._next_word = time.monotonic() + min(10.0, self.patience / 2)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def word(self, waits_for: str) -> None:
        """From time to time: what this process waits for."""
        if time.monotonic() >= self._next_word:
            self._next_word = time.monotonic() + 60
            left = f"{max(0, self.left):.0f} s left, see --join_timeout"
            print(
                f"{self.address}: waiting, since {waits_for} ({left})", file=sys.stderr, flush=True
            )

    def resolve(self) -> None:
        """Until the host's name is known; in a cluster that may take a while after its start."""
        while True:
            try:
                socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                return
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", None) or str(error)
            if self.left <= 0:
                raise UserError(
                    f"--coordinator={self.address} (OEL_COORDINATOR): the name {self.host} does "
                    f"not resolve on this host ({why}; asked for {self.patience:g} s): give a name "
                    "or an address that every host of the run knows"
                )
            self.word(f"the name {self.host} does not resolve")
            time.sleep(min(1.0, max(self.left, 0)))

    def failed(self, why: str) -> TryAgain:
        """The error of somebody who has not come in time."""
        return TryAgain(
            f"the processes of this run did not meet at {self.address} within "
            f"{self.patience:g} s: {why}. {_ADVICE}"
        )


# --- process 0 ------------------------------------------------------------------------------------


def _listen(at: _Place) -> socket.socket:
    """A socket at the port, on all addresses of this host; an older process may still hold it."""
    while True:
        try:
            return _server(at.port)
        except OSError as error:
            why = error.strerror or str(error)
        if at.left <= 0:
            raise at.failed(f"process 0 cannot listen at port {at.port}: {why}")
        at.word(f"port {at.port} cannot be used: {why}")
        time.sleep(0.5)


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if isinstance(error.strerror, str) and "in use" in error.strerror:
                raise
    return socket.create_server(("", port))


def _gather(at: _Place, count: int) -> None:
    """Process 0: hear all others, and tell them how it ended."""
    with _listen(at) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        heard: dict[socket.socket, bytes] = {}
        came: dict[int, socket.socket] = {}
        answer: dict[str, Any] = {"error": "process 0 has ended", "status": TryAgain.status}
        try:
            while len(came) < count - 1:
                missing = sorted(set(range(1, count)) - came.keys())
                names = f"process {', '.join(map(str, missing))} of {count}"
                if at.left <= 0:
                    raise at.failed(f"{names} did not come")
                at.word(f"{names} did not come yet")
                for key, _ in selector.select(min(1.0, max(at.left, 0))):
                    if key.fileobj is listener:
                        peer, _ = listener.accept()
                        peer.setblocking(False)
                        heard[peer] = b""
                        selector.register(peer, selectors.EVENT_READ)
                    else:
                        _hear(key.fileobj, selector, heard, came, count)
            answer = {"go": True}
        except UserError as error:
            answer = {"error": str(error), "status": error.status}
            raise
        finally:
            _answer(list(heard), answer)


def _hear(
    peer: socket.socket,
    selector: selectors.BaseSelector,
    heard: dict[socket.socket, bytes],
    came: dict[int, socket.socket],
    count: int,
) -> None:
    """Something came from `peer`: who it is, or its end."""
    try:
        data = peer.recv(_LONGEST)
    except OSError:
        data = b""
    heard[peer] += data
    said = _read(heard[peer])
    if not data or (said is None and (b"\n" in heard[peer] or len(heard[peer]) > _LONGEST)):
        selector.unregister(peer)  # it has ended, or is none of us
        del heard[peer]
        peer.close()
        for index in [index for index, other in came.items() if other is peer]:
            del came[index]
        return
    if said is None:
        return
    index, theirs = said["index"], said["count"]
    if theirs != count:
        raise UserError(
            f"process {index} was started for {theirs} processes and process 0 for {count}: give "
            "all of them the same --processes (OEL_PROCESSES)"
        )
    if index == 0 or came.setdefault(index, peer) is not peer:
        raise UserError(
            f"two processes say that they are process {index} of {count}: give each its own "
            "--process_id (OEL_PROCESS_ID)"
        )


def _answer(peers: list[socket.socket], answer: Mapping[str, Any]) -> None:
    """Tell all; they close first, so that the port is free at once."""
    for peer in peers:
        try:
            peer.settimeout(2.0)
            peer.sendall(json.dumps(answer).encode() + b"\n")
            peer.recv(1)
        except OSError:
            pass
        peer.close()


# --- the others -----------------------------------------------------------------------------------


def _report(at: _Place, count: int, index: int) -> None:
    """Another process: say who it is, and wait for the answer."""
    hello = json.dumps({"hello": _HELLO, "count": count, "index": index}).encode() + b"\n"
    while True:
        try:
            with socket.create_connection((at.host, at.port), max(0.1, min(5.0, at.left))) as peer:
                peer.sendall(hello)
                why = _hear_answer(peer, at)
            if why is None:
                return
        except OSError as error:
            why = f"process 0 does not answer there ({error.strerror or error})"
        if at.left <= 0:
            raise at.failed(why)
        at.word(why)
        time.sleep(min(0.5, max(at.left, 0)))


def _hear_answer(peer: socket.socket, at: _Place) -> str | None:
    """None: all have come; otherwise why this was no answer."""
    data = b""
    while b"\n" not in data and len(data) < _LONGEST:
        peer.settimeout(1.0)
        try:
            more = peer.recv(_LONGEST)
        except TimeoutError:
            at.word("not all processes have come yet")
            if at.left <= -5:  # process 0 may have begun to wait a little later
                return "process 0 is there, but not all others"
            continue
        if not more:
            break
        data += more
    try:
        said = json.loads(data)
        if said.get("go"):
            return None
        kind = TryAgain if said["status"] == TryAgain.status else UserError
        raise kind(str(said["error"]))
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        return "something else than process 0 answers there"


def _read(data: bytes) -> dict[str, Any] | None:
    """The greeting of another process; None: not whole yet, or something else."""
    try:
        said = json.loads(data.decode()) if data.endswith(b"\n") else None
    except ValueError:
        return None
    whole = isinstance(said, dict) and said.get("hello") == _HELLO
    numbers = whole and all(type(said.get(name)) is int for name in ("count", "index"))
    return said if numbers and said["index"] >= 0 else None
