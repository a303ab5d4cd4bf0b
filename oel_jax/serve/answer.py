"""An answer that is being written: read from asyncio or from a thread. Imports no JAX."""

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from oel_jax.sampler.requests import Request

if TYPE_CHECKING:
    from oel_jax.serve.engine import Engine

FINISHES = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Piece:
    """What one dispatch added to an answer.

    Attributes:
      ids: at least one; the stop token, if one ended the answer, is the last.
      log_probs: float32 [len(ids)], at the sampling temperature before top-k and top-p.
    """

    ids: list[int]
    log_probs: np.ndarray


class Answer:
    """One answer of an engine.

    `async for piece in answer` gives what each dispatch added, from the beginning, and ends when
    `finish` is set. Several readers may do so at once.

    Attributes:
      request: what was asked.
      policy: the name of the policy that answers.
      number: counts the answers of an engine.
      deadline: when it is given up, on the clock of `time.monotonic`; None: never.
      finish: None while it runs; then 'stop' (a stop token ended it), 'length' (its budget did),
        'cancelled' (`cancel`, the deadline or the end of the engine did) or 'error'.
      reason: with 'cancelled' and 'error', a word or a sentence that a user may read.
      queued, first, ended: when it was asked for, when its first token was there and when it was
        finished, on the clock of `time.monotonic`; None: not yet, or never.
    """

    def __init__(self, engine: "Engine", request: Request, number: int, deadline: float | None):
        self._engine = engine
        self.request, self.policy, self.number = request, engine.policy_name, number
        self.deadline = deadline
        self.finish: str | None = None
        self.reason = ""
        self.queued, self.first, self.ended = monotonic(), None, None
        self._pieces: list[Piece] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._waiters: list[asyncio.Future] = []

    # --- for those who read

    @property
    def pieces(self) -> list[Piece]:
        """What is there so far."""
        return list(self._pieces)

    @property
    def ids(self) -> list[int]:
        """Ids so far, the stop token included."""
        return list(itertools.chain.from_iterable(piece.ids for piece in self._pieces))

    @property
    def log_probs(self) -> np.ndarray:
        """Log-probabilities of `ids`, float32."""
        parts = [piece.log_probs for piece in self._pieces]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return sum(len(piece.ids) for piece in self._pieces)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    def cancel(self) -> None:
        """Give it up: its slot is free for others after the dispatch under way. Never blocks."""
        self._engine.cancel([self])

    def wait(self, seconds: float | None = None) -> bool:
        """Block until it is finished, from a thread; whether it is."""
        return self._over.wait(seconds)

    async def whole(self) -> "Answer":
        """Wait until it is finished."""
        async for _ in self:
            pass
        return self

    async def __aiter__(self) -> AsyncIterator[Piece]:
        seen = 0
        while True:
            with self._lock:
                new, over = self._pieces[seen:], self.finish is not None
                if not new and not over:
                    changed = asyncio.get_running_loop().create_future()
                    self._waiters.append(changed)
            for piece in new:
                yield piece
            seen += len(new)
            if over and not new:
                return
            if not new:
                await changed

    # --- for the engine

    def add(self, piece: Piece) -> list[asyncio.Future]:
        """Append a piece; returns who waits for it, to be given to `wake`."""
        with self._lock:
            if self.first is None:
                self.first = monotonic()
            self._pieces.append(piece)
            waiters, self._waiters = self._waiters, []
        return waiters

    def end(self, finish: str, reason: str = "") -> list[asyncio.Future]:
        """Finish it, if it is not; returns who waits for it, to be given to `wake`."""
        with self._lock:
            if self.finish is not None:
                return []
            self.finish, self.reason, self.ended = finish, reason, monotonic()
            waiters, self._waiters = self._waiters, []
        self._over.set()
        return waiters


def wake(waiters: Iterable[asyncio.Future]) -> None:
    """Tell those who wait that there is news: one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future]] = defaultdict(list)
    for waiter in waiters:
        by_loop[waiter.get_loop()].append(waiter)
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, some)
        except RuntimeError:  # the loop is closed: nobody reads any more
            continue


def _resolve(waiters: Sequence[asyncio.Future]) -> None:
    for waiter in waiters:
        if not waiter.done():  # its reader may have been cancelled
            waiter.set_result(None)
