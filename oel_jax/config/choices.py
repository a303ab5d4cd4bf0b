"""What the loss can be, for whoever checks a config: imports no JAX."""

from typing import Any, NamedTuple

DIVERGENCES = ("reverse", "forward", "jsd", "nll")
SUPPORTS = ("student", "teacher", "union", "full")
CORRECTIONS = ("none", "renorm", "tail")

# Values of extract.experience whose contexts belong to single answers: there are no K texts.
PER_TURN = ("own_game", "hindsight", "coach")

# What consolidate.mode trains with, unless loss.divergence or loss.support say otherwise: the
# method (paper Eq. 2), its off-policy baseline (spec 10.2), and supervised training on the answers.
_OF_MODE = {
    "on_policy": ("reverse", "student"),
    "off_policy": ("forward", "teacher"),
    "sft": ("nll", "student"),
}


class Loss(NamedTuple):
    """The loss of a run, spelled out; see `topk_kl.KLConfig`."""

    divergence: str
    support: str
    correction: str


def chosen_loss(config: Any) -> Loss:
    """The loss that a config asks for: where a field is None, that of `consolidate.mode`."""
    divergence, support = _OF_MODE[config.consolidate.mode]
    chosen = config.loss
    return Loss(chosen.divergence or divergence, chosen.support or support, chosen.correction)


def unused(config: Any) -> str | None:
    """A field of `config.loss` that was set and that the mode has no use for."""
    if config.consolidate.mode != "sft":
        return None
    none = {"divergence": None, "support": None, "correction": "none"}
    return next((name for name, value in none.items() if config.loss[name] != value), None)


def nonsense(divergence: str, support: str, correction: str, top_k: int) -> str | None:
    """Why a combination has no use, or None if it has one."""
    if support == "full":
        if correction != "none":
            return (
                "the full vocabulary leaves nothing outside to correct: use loss.correction='none'"
            )
        return None
    if correction == "renorm" and top_k == 1 and support != "union":
        return (
            "one token normalised over itself is certain on both sides, so the loss is always "
            "zero: use loss.top_k=2 or more"
        )
    if (divergence, support, correction) == ("reverse", "teacher", "none"):
        return (
            "what the student puts outside the teacher's top-k would count nothing, so leaving "
            "it lowers the loss: use loss.correction='renorm' or 'tail', or loss.support='student' "
            "or 'union'"
        )
    return None
