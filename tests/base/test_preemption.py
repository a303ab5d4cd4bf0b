"""Notices to stop: what they end, when, and with which status. Real signals to real processes."""

import signal
import subprocess
import sys

import pytest
from tiers import HANG
from tiny_run import ROOT

# Nothing that Python could interrupt: as where the compiler works, or a library waits.
STUCK = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
CHILD = """
import hashlib, signal, sys, time
from oel_jax.base import preemption
{before}
preemption.listen()
def up():
    print("up", flush=True)
try:
    {work}
except preemption.Preempted as error:
    print(preemption.last_words(error.kept))
    sys.exit(preemption.status())
"""


def start(work, before=""):
    return started(CHILD.format(work=work.replace("\n", "\n    "), before=before))


def started(code):
    """A Python process that runs this, once it has said that it is up."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


def ended(process):
    out, errors = process.communicate(timeout=HANG)
    return process.returncode, out, errors


NOTICES = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize("number, status", NOTICES)
def test_where_nothing_is_unsaved_the_process_ends_at_once(number, status):
    process = start(f"up(); {STUCK}")
    process.send_signal(number)
    found, _, errors = ended(process)
    assert found == status, errors
    what = "Ctrl-C" if number == signal.SIGINT else "a preemption notice"
    assert f"stopped by {what}; all finished work is kept. The same command" in errors


@pytest.mark.parametrize("number, status", NOTICES)
def test_a_safe_place_ends_it_otherwise(number, status):
    work = "with preemption.holding():\n    up()\n    while True:"
    work += " preemption.stop_if_noticed('games are kept')"
    process = start(work)
    process.send_signal(number)
    found, out, errors = ended(process)
    assert found == status, errors
    assert "games are kept. The same command resumes from there." in out
    assert "stopping at the next safe place" in errors


def test_a_safe_place_that_does_not_come_is_not_waited_for():
    process = start(f"with preemption.holding(0.5): up(); {STUCK}")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75


def test_unsaved_work_is_waited_for_and_may_end_slowly():
    """Also a second SIGTERM does not hurry it, nor that the place itself takes its time."""
    work = (
        "with preemption.holding(0):\n"
        "    preemption.hold_until_saved()\n"
        "    up()\n"
        "    while not preemption.noticed(): time.sleep(0.01)\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(1)\n"
        "    print('saved', flush=True)\n"
        "    preemption.stop_if_noticed('it is saved')"
    )
    process = start(f"try:\n    {work.replace(chr(10), chr(10) + '    ')}\nfinally: time.sleep(1)")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    found, out, errors = ended(process)
    assert found == 75, errors
    assert out.startswith("saved\n") and "it is saved" in out


def test_a_second_ctrl_c_stops_at_once():
    process = start(f"with preemption.holding(0): preemption.hold_until_saved(); up(); {STUCK}")
    process.send_signal(signal.SIGINT)
    while "a second Ctrl-C stops at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    found, _, errors = ended(process)
    assert found == 130 and "stopped at once" in errors


def test_a_background_job_goes_on_ignoring_ctrl_c():
    process = start("up(); time.sleep(60)", "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75  # and not 130


def test_a_notice_from_another_process_counts_too():
    process = start(f"up(); preemption.notice(signal.SIGTERM); {STUCK}")
    assert ended(process)[0] == 75


def test_a_command_that_only_begins_ends_with_75():
    """From the first handler on: while it imports, and before there is a workdir."""
    code = (
        "import sys, time, runpy\n"
        "class Slow:\n"  # whatever is imported after the handlers are there takes a minute
        "    def find_spec(self, name, *_):\n"
        "        if name == 'ml_collections': print('up', flush=True); time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.argv = ['main', '--config=configs/nano_frozen_lake.py', '--workdir=/nonexistent/x']\n"
        "runpy.run_module('oel_jax.main', run_name='__main__')\n"
    )
    process = started(code)
    process.send_signal(signal.SIGTERM)
    found, _, errors = ended(process)
    assert found == 75 and "preemption notice" in errors
