"""How much the sampler sends to the device at once: no more than is done in a few seconds.

Otherwise a notice to stop would wait for minutes where the device is slow. Speed only: what is
computed does not depend on it.
"""

from time import monotonic


class Pace:
    """Measures what the device does in a few seconds.

    Attributes:
      steps: tokens to decode in the next dispatch.
    """

    def __init__(self, most_steps: int, seconds: float = 5.0):
        self._seconds = seconds
        self.steps = self._most_steps = most_steps
        self._most_tokens, self._queued = 1, 0  # prompt tokens, padding counted
        self._began = self._started = self._encode_began = monotonic()

    def begin(self) -> None:
        """A decode dispatch is about to start."""
        self._began = monotonic()

    def started(self) -> None:
        """It was given to the device, which may have done it meanwhile."""
        self._started = monotonic()

    def decoded(self, waited: bool) -> None:
        """It has ended; `waited`: the host had to wait for that."""
        # An answer that was there before the host asked has not taken longer than the host knows.
        seconds = (monotonic() if waited else self._started) - self._began
        if seconds > self._seconds:
            self.steps = max(1, int(self.steps * self._seconds / seconds))
        elif seconds < self._seconds / 3:
            self.steps = min(self._most_steps, 2 * self.steps)
        self._queued = 0

    def encode(self) -> None:
        """Prompts are about to be encoded."""
        if not self._queued:
            self._encode_began = monotonic()

    def encoding(self, tokens: int) -> bool:
        """So many more are on their way; whether to wait for them before more are sent."""
        self._queued += tokens
        return self._queued >= self._most_tokens

    def encoded(self) -> None:
        """All of them are done."""
        seconds = max(monotonic() - self._encode_began, 1e-3)
        self._most_tokens = max(1, int(self._queued * self._seconds / seconds))
        self._queued = 0
