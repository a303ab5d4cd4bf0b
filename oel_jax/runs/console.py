"""Progress of one long stage on the console: what is done, how fast, how long it will take.

No stage is silent: a thread shows the line again when nothing was finished for a while, with what
it can count in between (turns, tokens). Imports no JAX.
"""

import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from oel_jax.runs.metrics import duration

QUIET = 10.0  # seconds without a line after which one is shown although nothing was finished
LONGEST_QUIET = 60.0  # the wait doubles up to this while nothing at all changes
WINDOW = 30.0  # seconds over which tokens a second are measured


class Progress:
    """Progress of one long stage: count, rate, time left.

        with Progress(64, "games", "round 1 deploy") as progress:
            progress.follow(tokens=lambda: sampler.written)
            for game in games: ...; progress.update(note="loss 0.21")

    On a terminal one line is rewritten in place; in a file or pipe a new line appears at most every
    `every` seconds. The first and the last state are always shown.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        every: float = 5.0,
        done: int = 0,
        stream: TextIO | None = None,
    ):
        """`done` units were finished by an earlier run: they count, but not for the rate."""
        self.total, self.unit, self.label, self.every = total, unit, label, every
        self.done = self._first = done
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        self._start = time.monotonic()
        self._shown_at = -math.inf
        self._shown: tuple[object, ...] = ()
        self._quiet = QUIET
        self._width = 0
        self._note = self._doing = ""
        self._counts: dict[str, Callable[[], int]] = {}
        self._bases: dict[str, int] = {}  # counts of samplers that are gone
        self._most: Callable[[], float] | None = None
        self._seen: deque[tuple[float, int]] = deque([(self._start, 0)])  # (time, tokens)
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"progress {label}", daemon=True)

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` (e.g. the loss) comes after the numbers."""
        with self._lock:
            self.done += count
            self._note = note or self._note
            wait = min(self.every, 0.2) if self._tty else self.every
            if time.monotonic() - self._shown_at >= wait:
                self._show()

    def follow(self, most: Callable[[], float] | None = None, **counts: Callable[[], int]) -> None:
        """Count smaller things than units, e.g. `tokens`, whenever a line is shown.

        Args:
          most: how many tokens there will be at most, as far as can be said by now.
          counts: name -> how many so far, since this call counted from 0. A name that is followed
            again counts on: the next sampler follows the last. Called from another thread.
        """
        with self._lock:
            for name, count in counts.items():
                self._bases[name] = self._count(name)
                self._counts[name] = count
            self._most = most

    def say(self, doing: str) -> None:
        """What is being done inside a unit, e.g. 'the student answers'; '' = nothing to say."""
        self._doing = doing

    def line(self, last: bool = False) -> str:
        """The current state as one line."""
        with self._lock:
            seconds, made = time.monotonic() - self._start, self.done - self._first
            text = f"{self.label}: {self.done}/{self.total} {self.unit}"
            for name in self._counts:
                if count := self._count(name):
                    text += f", {count:,} {name}"
            tokens = self._tokens_per_second(last)
            text += f", {tokens:.3g} tokens/s" if tokens else ""
            # The first few units pay for compilation: a rate from them alone would mislead.
            if made >= 0.05 * (self.total - self._first) and made and seconds > 0:
                rate, done = made / seconds, self.done >= self.total
                text += f", {rate:.3g} {self.unit}/s" if rate >= 1 else f", {1 / rate:.3g} s each"
                left = (self.total - self.done) / rate
                text += f", in {duration(seconds)}" if done else f", ETA {duration(left)}"
            elif tokens and self._most is not None:
                left = max(0.0, self._most() - self._count("tokens")) / tokens
                text += f", {duration(seconds)} so far, at most {duration(left)} left"
            elif seconds >= QUIET:
                text += f", {duration(seconds)} so far"
                if "tokens" in self._counts and not self._count("tokens"):
                    text += ", no tokens yet (programs are compiled, prompts are read)"
            text += f", {self._doing}" if self._doing and not last else ""
            return f"{text} | {self._note}" if self._note else text

    def _count(self, name: str) -> int:
        now = self._counts.get(name)
        return self._bases.get(name, 0) + (now() if now else 0)

    def _tokens_per_second(self, last: bool) -> float:
        """Over the last half minute, so that compiling does not slow the number down for long."""
        if "tokens" not in self._counts:
            return 0.0
        now, count = time.monotonic(), self._count("tokens")
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        at, before = (self._start, 0) if last else self._seen[0]
        return (count - before) / (now - at) if now > at else 0.0

    def _state(self) -> tuple[object, ...]:
        return (self.done, self._doing, *(self._count(name) for name in self._counts))

    def _watch(self) -> None:
        """Show a line when `update` has not for a while; less and less often if nothing changes."""
        while not self._ended.wait(1.0):
            self._tick()

    def _tick(self) -> None:
        with self._lock:
            silent = time.monotonic() - self._shown_at
            changed = self._state() != self._shown
            if self._tty or silent >= max(self.every, QUIET / 2 if changed else self._quiet):
                self._quiet = QUIET if changed else min(2 * self._quiet, LONGEST_QUIET)
                self._show(again=True)

    def _show(self, last: bool = False, again: bool = False) -> None:
        state = self._state()
        if self._tty:
            text = self.line(last)[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = len(text)
        elif again or self._shown != state:
            self._stream.write(self.line(last) + "\n")
        self._stream.flush()
        self._shown, self._shown_at = state, time.monotonic()

    def __enter__(self) -> "Progress":
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._show(last=True)


@contextmanager
def waiting(label: str, stream: TextIO | None = None) -> Iterator[None]:
    """Say every now and then that something takes long; nothing for what is quick.

    For what has no parts to count: loading a model, compiling, other processes.
    """
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        wait = QUIET
        while not ended.wait(wait):
            text = f"{label}: {duration(time.monotonic() - began)} so far\n"
            out = sys.stdout if stream is None else stream
            out.write(text)
            out.flush()
            wait = min(2 * wait, LONGEST_QUIET)

    thread = threading.Thread(target=watch, name=f"waiting {label}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
