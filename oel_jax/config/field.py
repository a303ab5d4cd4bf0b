"""What is said about a config field, all in one place: see `Field`.

A new field is one entry in `fields_run`, `fields_round` or `fields_training`, and its use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oel_jax.config.rules import Rule

# What a field is for.
METHOD = "method"  # defines what is computed: another value is another experiment
COMPUTE = "compute"  # speed, memory and devices
ABLATION = "ablation"  # off or plain in the paper's method: switches of studies and baselines
IO = "io"  # names, places, checks, and what is written or printed
PURPOSES = {
    METHOD: "defines what is computed: another value is another experiment",
    COMPUTE: "speed, memory and devices",
    ABLATION: "switches of studies and baselines",
    IO: "names, places, checks, and what is written or printed",
}

# Parts of stages whose files runs of a study share (oel_jax/study/shelf.py).
PARTS = (
    "chains",  # the games for knowledge
    "deploy",  # the games to train on
    "knowledge",  # the chains of texts
    "extract",  # the K texts that are used
    "demonstrate",
    "preflight",
    "consolidate",
    "start",  # the evaluations: of the starting model,
    "skills",  # of its other skills,
    "with_knowledge",  # of a policy with knowledge in its prompt,
    "consolidated",  # and of a consolidated policy
)

# The parts that a field can change. None: all of them, which is always right.
_LATER = ("demonstrate", "preflight", "consolidate", "with_knowledge")
WRITING = ("knowledge", "extract", *_LATER)  # how knowledge is written
PLACING = _LATER  # where a model reads it
USING = ("extract", *_LATER)  # which text of a chain is used
GAMES_FOR_KNOWLEDGE = ("chains", *WRITING)
DEPLOYING = ("deploy", "demonstrate", "consolidate")
TRAINING = ("consolidate",)
# A board that was deployed is not an unseen one, and the pre-flight takes those that follow.
STEP_COUNT = ("preflight", "consolidate", "with_knowledge", "consolidated")
GAME_COUNT = ("deploy", "demonstrate", *STEP_COUNT)
EVALUATING = ("start", "skills", "with_knowledge", "consolidated")
JUDGING = ("preflight", *EVALUATING)
SEEDING = ("chains", "knowledge", "extract", *JUDGING)
CHECKING = ("preflight",)
# What it says is in other fields or in the content of files, or it says which files are wanted.
NOTHING: tuple[str, ...] = ()


@dataclass(frozen=True)
class Field:
    """A config field.

    Attributes:
      path: dotted, e.g. 'loss.top_k'.
      default: its value where nobody sets it.
      rule: what it may be.
      purpose: METHOD, COMPUTE, ABLATION or IO.
      doc: what it does; the values that are not plain from their name, and the unit.
      affects: the `PARTS` whose files it can change; None = all.
      free: why another value is accepted in an old workdir; '' = it is not.
      convert: a value of an older version -> what it is now; any other value unchanged.
    """

    path: str
    default: Any
    rule: Rule
    purpose: str
    doc: str
    affects: tuple[str, ...] | None = None
    free: str = ""
    convert: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        assert self.purpose in PURPOSES and set(self.affects or ()) <= set(PARTS), self.path


def none_was(*old: Any) -> Callable[[Any], Any]:
    """For a field that is None now where it was one of these values."""

    def convert(value: Any) -> Any:
        plain = tuple(value) if isinstance(value, list) else value
        same = any(plain == one and isinstance(plain, bool) is isinstance(one, bool) for one in old)
        return None if same else value

    return convert


def names_were_text(value: Any) -> Any:
    """For a field that is a tuple of names now, where it was a text with commas, or 'none'."""
    if not isinstance(value, str):
        return value
    return () if value == "none" else tuple(value.split(","))
