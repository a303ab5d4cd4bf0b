"""Safe places inside of work that all processes do together, such as micro-batches."""

import time
from collections import deque
from typing import Any

import jax

from oel_jax.base import preemption
from oel_jax.parallel import processes

_AHEAD = 2  # pieces that the host starts before it waits for the device
_SECONDS = 5.0  # between two times that processes ask each other


class Lookout:
    """Lets all processes of a run stop after the same piece of work when one was told to.

    Pieces are started one after the other and run in the background. To know where the device is,
    the host waits for the piece before the last one, which leaves the device never without work.
    Several processes have to agree: they ask each other every few seconds, after a number of pieces
    that process 0 measures and tells. One process looks after each piece.
    """

    def __init__(self) -> None:
        self._running: deque[Any] = deque()
        self._left = self._asked_after = 1
        self._since = time.monotonic()

    def after(self, result: Any) -> None:
        """A piece of work was started; `result`: arrays that it makes and nobody gives away.

        Raises:
          preemption.Preempted: a process was told to stop; on all of them.
        """
        self._running.append(result)
        if len(self._running) > _AHEAD:
            jax.block_until_ready(self._running.popleft())
        if processes.count() == 1:
            preemption.stop_if_noticed()
            return
        self._left -= 1
        if self._left:
            return
        rate = self._asked_after / max(time.monotonic() - self._since, 1e-3)
        said = processes.exchange([preemption.noticed(), max(1, int(rate * _SECONDS))])
        self._left = self._asked_after = said[0][1]
        self._since = time.monotonic()
        if any(noticed for noticed, _ in said):
            raise preemption.Preempted
