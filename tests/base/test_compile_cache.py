"""The cache of compiled programs, in separate processes: what is damaged is replaced once."""

import os
import subprocess
import sys
import zlib

import pytest
from tiny_run import ROOT

CODE = """
import sys
import jax
from oel_jax.runs.compilation import keep_compiled
keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 2 + 1)(20))
"""
DAMAGES = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "not a program": lambda whole: zlib.compress(b"\0\0\0\0no program"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_compiled_and_replaced_once(damage, tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", CODE, tmp_path],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.endswith("41\n"), done.stderr
        return done

    run()
    before = {path: path.read_bytes() for path in tmp_path.glob("*-cache")}
    assert before
    for path, whole in before.items():
        path.write_bytes(DAMAGES[damage](whole))
    second, third = run(), run()
    assert second.stdout.count("was damaged") == second.stderr.count("Error reading") == len(before)
    assert "damaged" not in third.stdout and "Error reading" not in third.stderr
    assert before.keys() == set(tmp_path.glob("*-cache"))
