"""A notice to stop: save what is unsaved, and end with a status that says how it ended.

Slurm, Kubernetes and cloud machines send SIGTERM some time before they kill a process (Slurm also
SIGUSR1, if the script asks for that); a user presses Ctrl-C. What a notice does depends on what
would be lost, which the code at work says by `holding` and `hold_until_saved`:

- Nothing (models are fetched, loaded, compiled; all that is finished is on disk): the process ends
  at once, also where the main thread waits for the network or for the compiler.
- Work that a safe place is about to finish (games, texts): the main thread ends at its next safe
  place, which raises `Preempted`. If it does not come to one in time, the process ends.
- Work that only a safe place can save (optimizer steps since the last checkpoint): the process
  waits for that place.

A second Ctrl-C ends the process at once in any case. Imports no JAX.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended

_NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
_LONGEST = 20.0  # seconds to the next safe place, where all finished work is on disk
KEPT = "all finished work is kept"

_noticed = threading.Event()
_first: int | None = None  # the signal that came first
_patience = 0.0  # seconds that a notice waits for a safe place
_patience_after = 0.0  # until then a process that has reached its safe place may take to end
_others: tuple[Callable[[int], None], Callable[[str, int], None]] | None = None
_watched: socket.socket | None = None


class Preempted(BaseException):
    """Raised at a safe place after a notice: everything finished is on disk.

    As KeyboardInterrupt it is no error, and `except Exception` lets it pass.

    Args:
      kept: what is saved, as a part of a sentence.
    """

    def __init__(self, kept: str = KEPT):
        global _patience_after
        super().__init__(kept)
        self.kept = kept
        _patience_after = time.monotonic() + _LONGEST


# --- what would be lost ---------------------------------------------------------------------------


@contextmanager
def holding(seconds: float = _LONGEST) -> Iterator[None]:
    """Within it a notice waits for `stop_if_noticed`, but not longer than `seconds`."""
    global _patience
    before, _patience = _patience, max(_patience, seconds)
    try:
        yield
    finally:
        _patience = before


def hold_until_saved() -> None:
    """A notice waits for a safe place as long as it takes, until the `holding` around ends."""
    global _patience
    _patience = math.inf


# --- notices --------------------------------------------------------------------------------------


def noticed() -> bool:
    """Whether this process was told to stop."""
    return _noticed.is_set()


def notice(number: int = signal.SIGTERM) -> None:
    """Take a notice that came to this process or to another one of the run."""
    global _first
    if _first is None:
        _first = number
    _noticed.set()


def stop_if_noticed(kept: str = KEPT) -> None:
    """For places where nothing is half done.

    Raises:
      Preempted: there was a notice.
    """
    if noticed():
        raise Preempted(kept)


def status() -> int:
    """Exit status of a process that a notice has ended."""
    return INTERRUPTED if _first == signal.SIGINT else STATUS


def last_words(kept: str) -> str:
    """The sentence that ends such a process."""
    what = "Ctrl-C" if _first == signal.SIGINT else "a preemption notice"
    return f"stopped by {what}; {kept}. The same command resumes from there."


def tell_others(notice: Callable[[int], None], end: Callable[[str, int], None]) -> None:
    """How to reach the other processes of the run.

    Args:
      notice: called with the signal's number when a notice comes to this process.
      end: called with a message and the exit status when a notice ends it at once.
    """
    global _others
    _others = notice, end


# --- signals --------------------------------------------------------------------------------------


def listen() -> None:
    """Take notices from now on; to be called from the main thread.

    It may be called again, to put the handlers back after a library has taken the signals.
    """
    global _watched
    # Python runs handlers in the main thread alone, which may be inside of the compiler. What C
    # writes into this socket another thread sees at once.
    if _watched is None:
        _watched, there = socket.socketpair()
        there.setblocking(False)
        signal.set_wakeup_fd(there.detach(), warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(_watched,), daemon=True).start()
    for number in _NOTICES:
        if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
            continue  # a shell's background job: Ctrl-C is meant for others
        signal.signal(number, _seen)


def _seen(_number: int, _frame: FrameType | None) -> None:
    """Nothing: the watching thread acts."""


def _watch(socket_: socket.socket) -> None:
    """Act on each signal; ends the process if nothing would be lost or a notice waits too long."""
    came, interrupts = math.inf, 0
    socket_.settimeout(0.2)  # a notice may also come from another process
    while True:
        try:
            numbers = socket_.recv(64)
        except TimeoutError:
            numbers = b""
        for number in numbers:
            if number not in _NOTICES:
                continue
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                _end("stopped at once; what was finished before is kept. The same command resumes.")
            if not noticed():
                notice(number)
                if _patience:
                    _say(_heard(number))
                if _others:
                    with suppress(OSError):  # a full disk: the others are told at the next step
                        _others[0](number)
        if noticed():
            now = time.monotonic()
            came = min(came, now)
            if now >= max(came + _patience, _patience_after):
                _end(last_words(KEPT))


def _heard(number: int) -> str:
    """What is said at once, while the work continues to its next safe place."""
    again = "; a second Ctrl-C stops at once" if number == signal.SIGINT else ""
    return f"{_NAMES[signal.Signals(number)]}: stopping at the next safe place{again}"


def _say(text: str) -> None:
    # Not by sys.stderr: the main thread may hold its lock.
    with suppress(OSError):  # nobody listens any more
        os.write(2, f"\n{text}\n".encode())


def _end(text: str) -> None:
    """End the process from this thread, whatever the main thread does."""
    code = status()
    _say(text)
    try:
        if _others:
            _others[1](text, code)
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)  # not longer: the main thread may hold its lock
    finally:
        os._exit(code)
