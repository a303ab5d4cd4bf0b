"""What annotations say of arrays is so: a stage in which they are all checked."""

import subprocess
import sys
from pathlib import Path

from tiny_run import copy_of

TESTS = Path(__file__).resolve().parents[1]

# One step with most options, so that few functions of the learner are not called.
RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import annotated
annotated.check_annotations()
from tiny_run import go, tiny_config
changes = dict(consolidate__steps=1, consolidate__turn_fraction=0.5)
changes |= dict(consolidate__retention="knowledge", consolidate__teacher="trust_region")
go(Path(sys.argv[1]), tiny_config(**changes), ["consolidate"], change=True)
"""

# The hook is there: a wrong shape is refused.
WRONG = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import annotated
annotated.check_annotations()
import jax.numpy as jnp
from oel_jax.models.rope import rotate
rotate(jnp.zeros((1, 3, 2, 8)), jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 2, 1, 4)))
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    code = code.format(root=str(TESTS.parent), tests=str(TESTS))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_stage_obeys_its_annotations(finished_run, tmp_path):
    """Rollouts, teacher and update: chat, models, sampler, distill, parallel and learner."""
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    done = run(RUN, str(work))
    assert done.returncode == 0, done.stderr[-5000:]
    assert (work / "round_001" / "policy" / "model.safetensors").exists()


def test_a_wrong_shape_is_refused():
    done = run(WRONG)
    assert done.returncode == 1 and "TypeCheckError" in done.stderr, done.stderr[-2000:]
