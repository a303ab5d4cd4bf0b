"""launch/logged.py: no signal is lost at any instant, the status is right, the log is complete."""

import os
import signal
import subprocess
import sys

import pytest
from fake_tools import ROOT
from tiers import HANG

LOGGED = [sys.executable, "-S", ROOT / "launch" / "logged.py"]
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def start(log, *command, **more):
    # Python gives its children SIGINT as it has it: by default, not ignored.
    return subprocess.Popen([*LOGGED, log, *command], stdout=subprocess.PIPE, text=True, **more)


SAVES = """
import signal, sys, time
signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("ready")
number = signal.sigwait(signals)
print("saving")
print("again" if signal.sigtimedwait(signals, 0) else "once")
for line in ("more", "saved"): print(line, signal.sigwait(signals).name if line == "more" else "")
sys.exit(75)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_reaches_the_command_once_and_its_end_is_waited_for(number, tmp_path):
    log = tmp_path / "a b" / "log"
    process = start(log, sys.executable, "-c", SAVES)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert [process.stdout.readline() for _ in range(2)] == ["saving\n", "once\n"]
    process.send_signal(number)  # some send it twice; it still waits
    rest = process.stdout.read()
    assert process.wait(HANG) == 75
    assert rest == f"more {number.name}\nsaved \n"
    assert log.read_text().startswith("--- ")
    assert log.read_text().endswith(f"ready\nsaving\nonce\n{rest}")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_the_command_starts_ends_it_and_none_is_started(number, tmp_path):
    """Sent before there is a program that could take it, as to process 1 right after its start."""
    log, mark = tmp_path / "log", tmp_path / "started"

    def blocked_and_sent():
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        os.kill(os.getpid(), number)

    process = start(log, "touch", mark, preexec_fn=blocked_and_sent)
    assert process.wait(HANG) == 128 + number
    assert not mark.exists()


@pytest.mark.parametrize("delay", range(40))
def test_a_signal_at_any_instant_of_the_start_is_told_or_ends_it(delay, tmp_path):
    """The command waits for ever, so that a lost signal hangs; it says whether it was started."""
    process = start(tmp_path / "log", "sh", "-c", "echo up; exec sleep 600")
    for _ in range(delay * 20_000):  # instants from before Python runs to after the command does
        pass
    process.send_signal(signal.SIGTERM)
    status = process.wait(HANG)
    assert status in (128 + signal.SIGTERM, -signal.SIGTERM)
    if status < 0:  # by itself, so the command was never started
        assert process.stdout.read() == ""


@pytest.mark.parametrize("command, status", [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_the_status_is_that_of_the_command(command, status, tmp_path):
    assert start(tmp_path / "log", "sh", "-c", command).wait(HANG) == status


def test_a_signal_that_meets_the_end_of_the_command(tmp_path):
    quick = "import os, signal; signal.signal(15, lambda *_: os._exit(75)); print('up', flush=True)"
    quick += "; signal.pause()"
    for _ in range(10):
        process = start(tmp_path / "log", sys.executable, "-S", "-c", quick)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 75


def test_the_command_begins_with_the_signals_of_whoever_started_it(tmp_path):
    """Neither blocked nor ignored, except for what was ignored before (a background job)."""
    asks = (
        "import signal as s; print(sorted(s.pthread_sigmask(s.SIG_BLOCK, [])),"
        "s.getsignal(s.SIGTERM), s.getsignal(s.SIGINT) == s.SIG_IGN, s.getsignal(s.SIGCHLD))"
    )
    for ignored in (False, True):
        before = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None
        process = start(tmp_path / "log", sys.executable, "-c", asks, preexec_fn=before)
        assert process.stdout.read() == f"[] 0 {ignored} 0\n"
        assert process.wait(HANG) == 0


def test_the_terminals_ctrl_c_comes_once(tmp_path):
    """The terminal signals the whole foreground group; the command is in another one."""
    process = start(tmp_path / "log", sys.executable, "-c", SAVES, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["saving\n", "once\n"]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(HANG) == 75


def test_a_lost_connection_does_not_end_the_run(tmp_path):
    process = start(
        tmp_path / "log", "sh", "-c", "echo up; read x <fifo; echo line; exit 9", cwd=tmp_path
    )
    os.mkfifo(tmp_path / "fifo")
    process.stdout.readline()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    (tmp_path / "fifo").write_text("go\n")
    assert process.wait(HANG) == 9
    assert (tmp_path / "log").read_text().endswith("up\nline\n")


def test_it_ends_after_its_log(tmp_path):
    """As process 1 of a container its end ends all: the last lines must be out before."""
    script = "print('x' * 1_000_000, flush=True)"
    process = start(tmp_path / "log", sys.executable, "-c", script)
    assert process.stdout.read(1) == "x"  # most of it is in pipes that nobody reads yet
    assert process.poll() is None
    assert len(process.stdout.read()) == 1_000_000 and process.wait(HANG) == 0
    assert (tmp_path / "log").read_text().endswith("x" * 1_000_000 + "\n")


def test_what_the_command_leaves_behind_may_still_print_and_can_be_stopped(tmp_path):
    process = start(
        tmp_path / "log", "sh", "-c", "(read x <fifo; echo late) & exit 3", cwd=tmp_path
    )
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").write_text("go\n")
    assert process.stdout.read() == "late\n" and process.wait(HANG) == 3
    for end, status in (("exec sleep 600", 143), ("exit 3", 3)):  # before the command ends, after
        process = start(tmp_path / "log", "sh", "-c", f"sleep 600 & echo $!; {end}")
        left = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) in (status, 143)
        os.kill(left, signal.SIGKILL)


def test_what_cannot_be_done_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for log, command, status, message in (
        (tmp_path / "log", "no_such_command", 127, "no_such_command cannot be started"),
        (tmp_path / "file" / "log", "true", 2, "cannot be written"),
    ):
        done = subprocess.run([*LOGGED, log, command], capture_output=True, text=True)
        assert done.returncode == status and message in done.stderr
        assert done.stderr.count("\n") == 1
    asked = subprocess.run([*LOGGED, "--help"], capture_output=True, text=True)
    assert asked.returncode == 2 and "LOGFILE COMMAND" in asked.stderr
