#!/usr/bin/env python3
"""Runs a command; what it prints is shown and also appended to a log file.

    python -S launch/logged.py LOGFILE COMMAND [ARGUMENT ...]

SIGTERM, Ctrl-C and other signals reach the command, which may take its time to save; the exit
status is the command's (128 + n where signal n ended it). A signal that comes before the command is
started ends this program with such a status, and the command is not started. It can be process 1 of
a container: the log is complete before it ends. Python's own library is all it needs.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence

# Blocked first of all: from here on none of them is lost, each waits until it is asked for.
FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
# A lost connection (SIGHUP) does not end the run: its log is kept.
BLOCKED = FORWARDED | {signal.SIGCHLD, signal.SIGHUP}
LAST_WORDS = 10.0  # seconds that the output of a signalled command may outlive it
if __name__ == "__main__":
    BEFORE = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started this may not want to hear it


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if len(arguments) < 2 or arguments[0] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    log, *command = arguments
    try:
        os.makedirs(os.path.dirname(log) or ".", exist_ok=True)
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        print(f"error: the log {log} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write(out, f"--- {began} {os.uname().nodename}: {' '.join(command)}\n".encode())
    reader, writer = os.pipe()
    early = signal.sigpending() & FORWARDED
    if early:
        return 128 + min(early)
    try:
        child = start(command, writer)
    except OSError as error:
        print(f"error: {command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    os.close(writer)
    copy = threading.Thread(target=copied, args=(reader, [out, 1]), daemon=True)
    copy.start()
    status, stopped = watched(child)
    # What the command has started may still print; who has asked for the end waits a little only.
    end = time.monotonic() + (LAST_WORDS if stopped else math.inf)
    while copy.is_alive() and time.monotonic() < end and not signal.sigpending() & FORWARDED:
        copy.join(0.05)
    return status


def start(command: Sequence[str], output: int) -> int:
    """The command in its own session, so that the terminal's Ctrl-C comes here alone.

    Returns its process number; it begins with the signals as they were before they were blocked.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    return os.posix_spawnp(
        command[0],
        command,
        os.environ | {"PYTHONUNBUFFERED": "1"},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        setsid=True,
        setsigmask=BEFORE,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these
    )


def watched(child: int) -> tuple[int, bool]:
    """Pass signals on, each as often as it comes, until the command has ended.

    Returns its status, and whether it was signalled.
    """
    signalled = False
    while True:
        number = signal.sigwait(BLOCKED)
        if number in FORWARDED:
            os.kill(child, number)  # not gone, since nobody has asked for its status yet
            signalled = True
        while number == signal.SIGCHLD:
            ended, status = os.waitpid(-1, os.WNOHANG)  # also orphans that process 1 is given
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code, signalled
            if not ended:
                break


def copied(source: int, places: list[int]) -> None:
    """Copy until the other end is closed; a place where nobody listens is left out."""
    while data := os.read(source, 1 << 16):
        for place in list(places):
            try:
                write(place, data)
            except OSError as error:  # a lost connection, a full disk
                places.remove(place)
                if place != 1 and 1 in places:
                    write(1, f"warning: the log ends here: {error.strerror}\n".encode())


def write(place: int, data: bytes) -> None:
    """All of it."""
    while data:
        try:
            data = data[os.write(place, data) :]
        except BlockingIOError:  # somebody else made the terminal so
            select.select([], [place], [])


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the copying thread may still wait
