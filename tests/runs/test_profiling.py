"""Compile time, traces and the memory of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.config.rules import traced_steps
from oel_jax.runs.profiling import StepTrace, compile_seconds


def test_compile_seconds_grow_with_compilation_only():
    compile_seconds()

    @jax.jit
    def work(x):
        return jnp.sin(x) @ jnp.cos(x)

    x = np.ones((8, 8), np.float32)
    before = compile_seconds()
    jax.block_until_ready(work(x))
    compiled = compile_seconds()
    assert compiled > before
    jax.block_until_ready(work(x))
    assert compile_seconds() == compiled


def test_chosen_steps_are_traced(tmp_path):
    work = jax.jit(lambda x: x @ x)
    x = np.ones((64, 64), np.float32)
    with StepTrace("step:2..3", tmp_path / "run") as trace:
        for step in range(1, 6):
            trace.before(step)
            jax.block_until_ready(work(x))
            trace.after(step)
    (file,) = (tmp_path / "run").glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    assert [plane.name for plane in data.planes]


def test_a_trace_that_reaches_past_the_last_step_is_written(tmp_path):
    with StepTrace("step:1..9", tmp_path) as trace:
        trace.before(1)
        trace.after(1)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_no_trace_without_a_wish(tmp_path):
    with StepTrace(None, tmp_path / "run") as trace:
        trace.before(1)
        trace.after(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["step:0..2", "step:3..2", "step:3", "10..12", 3])
def test_a_wrong_wish_is_refused(text):
    with pytest.raises(ValueError):
        traced_steps(text)
