"""Policies under lm-evaluation-harness (`lm_eval`): skills that OEL never trains (paper 4.1).

`adapter` makes a policy a model of the harness, `likelihood` scores given text, `tasks` finds and
checks tasks before a model is loaded, `results` turns their scores into files, and `command` is
`python -m oel_jax.evaluate`. The harness is an optional extra; it runs without PyTorch.
"""

from importlib.util import find_spec

from oel_jax.base.errors import UserError

# The packages of requirements-eval.txt, as they are imported.
_NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk")


def require_lm_eval() -> None:
    """UserError naming what is not installed and the command that installs it."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--lm_eval_tasks needs {', '.join(missing)}, which is not installed: run "
            "pip install -r requirements-eval.txt (optional, no PyTorch)"
        )
