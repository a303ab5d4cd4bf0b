"""A notice that the machine will be taken away: save, and end with a status that says 'again'.

Slurm, Kubernetes and cloud machines send SIGTERM some time before they kill a process (Slurm also
SIGUSR1, if the script asks for that). The run goes on until its next safe place, saves there and
ends with `STATUS`; a launcher that sees it starts the same command again. Imports no JAX.
"""

import signal
import threading
from types import FrameType

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later

_noticed = threading.Event()


class Preempted(Exception):
    """Raised at a safe place after a notice: everything finished is on disk."""


def listen() -> None:
    """Take notices from now on; to be called from the main thread."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _notice)


def _notice(_number: int, _frame: FrameType | None) -> None:
    _noticed.set()


def noticed() -> bool:
    """Whether the machine will be taken away."""
    return _noticed.is_set()


def stop_if_noticed() -> None:
    """For places where nothing is half done.

    Raises:
      Preempted: there was a notice.
    """
    if noticed():
        raise Preempted
