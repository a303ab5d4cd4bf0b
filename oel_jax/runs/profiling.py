"""Where the time goes: seconds spent compiling, and traces of chosen optimizer steps."""

from functools import cache
from pathlib import Path

import jax

from oel_jax.config.rules import traced_steps

# What turns a Python function into a program: tracing, lowering, and XLA or its cache.
_COMPILING = "/jax/core/compile/"


@cache
def _spent() -> dict[str, float]:
    """Seconds per event of this process; the listener is registered once."""
    spent: dict[str, float] = {}

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.startswith(_COMPILING):
            spent[event] = spent.get(event, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    return spent


def compile_seconds() -> float:
    """Seconds this process has spent compiling, since the first call; read from the cache counts.

    Tracing of nested functions is reported for each of them, so this is slightly too much.
    """
    return sum(_spent().values())


class StepTrace:
    """Traces the optimizer steps that `config.profile` names; a context manager.

    The trace is written below `directory` where TensorBoard's profile plugin (XProf) finds it.
    """

    def __init__(self, profile: str | None, directory: Path):
        self._steps, self._directory, self._running = traced_steps(profile), directory, False

    @property
    def running(self) -> bool:
        """Whether the step under way is traced."""
        return self._running

    def before(self, step: int) -> None:
        """Step number `step` is about to begin."""
        if step in self._steps and not self._running:
            self._directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int) -> None:
        """Step number `step` has ended on the device."""
        if self._running and step + 1 not in self._steps:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        print(f"trace of steps {self._steps[0]} to {self._steps[-1]}: {self._directory}")

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
