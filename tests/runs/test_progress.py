"""The progress line: counts, rates, time left, and that it is never silent for long."""

import io
import threading
import time

import pytest
from tiers import HANG

from oel_jax.runs import console as module
from oel_jax.runs.console import Progress, waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_pipe_prints_seldom_and_ends_with_the_last_state():
    stream = io.StringIO()
    with Progress(100, "games", "round 1 deploy", every=3600, stream=stream) as progress:
        for i in range(100):
            progress.update(note=f"loss {i}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "round 1 deploy: 0/100 games"
    assert len(lines) == 2
    assert lines[1].startswith("round 1 deploy: 100/100 games, ")
    assert " in 0:00 | loss 99" in lines[1]


def test_progress_in_a_pipe_prints_every_state_without_a_limit():
    stream = io.StringIO()
    with Progress(3, "steps", "x", every=0, stream=stream) as progress:
        for _ in range(3):
            progress.update()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "0/3",
        "1/3",
        "2/3",
        "3/3",
    ]
    assert "ETA" in stream.getvalue().splitlines()[1]


def test_progress_on_a_terminal_rewrites_one_line():
    stream = Terminal()
    with Progress(2, "steps", "x", every=0, stream=stream) as progress:
        progress.update(note="a note that is long")
        progress.update(note="b")
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") == 4
    # a shorter line must cover the longer one before it
    assert len(text.split("\r")[-2]) >= len(text.split("\r")[2].rstrip())


def test_resumed_progress_does_not_count_old_work_in_the_rate():
    progress = Progress(100, "steps", "x", done=90, stream=io.StringIO())
    assert progress.line() == "x: 90/100 steps"
    progress._start -= 10.0
    progress.update(5)
    assert progress.line().startswith("x: 95/100 steps, 2 s each, ETA 0:10")


# --- what is counted inside a unit ----------------------------------------------------------------


def late(progress, seconds):
    """The same progress `seconds` later."""
    progress._start -= seconds
    progress._shown_at -= seconds
    progress._seen = type(progress._seen)((at - seconds, count) for at, count in progress._seen)


def test_tokens_turns_and_their_rate_are_shown_before_a_game_is_finished():
    written = {"tokens": 0, "turns": 0}
    progress = Progress(3, "games", "deploy", stream=io.StringIO())
    progress.follow(lambda: 1000, tokens=lambda: written["tokens"], turns=lambda: written["turns"])
    assert progress.line() == "deploy: 0/3 games"
    late(progress, 20.0)
    assert "0/3 games, 0:20 so far, no tokens yet (programs are compiled" in progress.line()
    progress._seen.clear()
    progress._seen.append((time.monotonic() - 10.0, 0))
    written["tokens"] = 32  # one dispatch, no turn answered
    assert progress.line().startswith("deploy: 0/3 games, 32 tokens, 3.2 tokens/s, 0:20 so far, at")
    assert "most 5:0" in progress.line()  # (1000 - 32) / 3.2 = 302 s
    written.update(tokens=200, turns=2)
    assert "200 tokens, 2 turns, 20 tokens/s" in progress.line()
    progress.update()
    line = progress.line()
    assert "1/3 games, 200 tokens, 2 turns, 20 tokens/s, 20 s each, ETA 0:40" in line


def test_the_next_sampler_counts_on_and_old_dispatches_leave_the_rate():
    progress = Progress(9, "answers", "x", stream=io.StringIO())
    progress.follow(tokens=lambda: 50)
    progress.follow(tokens=lambda: 7)
    assert ", 57 tokens" in progress.line()
    progress._seen.clear()
    now = time.monotonic()
    progress._seen.extend([(now - 500, 0), (now - 40, 17), (now - 10, 47)])
    # 500 s of compiling are forgotten: what is left is the last sample before the window
    assert "57 tokens, 1 tokens/s" in progress.line()


def test_a_silent_stage_says_so_less_and_less_often_and_a_change_at_once():
    stream, state = io.StringIO(), {"tokens": 0}
    progress = Progress(3, "games", "x", stream=stream)
    progress.follow(tokens=lambda: state["tokens"])
    progress._show()
    waits = []
    for _ in range(5):
        shown, wait = stream.getvalue().count("\n"), 0
        while stream.getvalue().count("\n") == shown:
            late(progress, 1.0)
            wait += 1
            progress._tick()
        waits.append(wait)
    assert waits == [10, 20, 40, 60, 60]
    state["tokens"] = 5
    late(progress, 5.0)
    progress._tick()
    assert "5 tokens" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("tty", [False, True])
def test_a_thread_shows_the_line_while_a_unit_takes_long(monkeypatch, tty):
    monkeypatch.setattr(module, "QUIET", 0.01)
    seen = threading.Event()

    class Stream(io.StringIO):
        def isatty(self):
            return tty

        def write(self, text):
            if "the student answers" in text:
                seen.set()
            return super().write(text)

    stream = Stream()
    with Progress(2, "steps", "x", every=0, stream=stream) as progress:
        progress.say("the student answers")
        assert seen.wait(HANG)  # nothing is finished in here
        progress.say("")
        progress.update(2)
    assert "student" not in stream.getvalue().splitlines()[-1]
    assert not progress._thread.is_alive()


def test_what_has_no_parts_says_that_it_takes_long(monkeypatch):
    stream, said = io.StringIO(), threading.Event()
    stream.flush = said.set
    with waiting("loading x", stream):
        pass
    assert stream.getvalue() == ""  # quick things say nothing
    monkeypatch.setattr(module, "QUIET", 0.01)
    with waiting("loading x", stream):
        assert said.wait(HANG)
    assert stream.getvalue().startswith("loading x: 0:00 so far\n")
    assert not [t for t in threading.enumerate() if t.name == "waiting loading x"]
