"""What the loss can be, for whoever checks a config: imports no JAX."""

DIVERGENCES = ("reverse", "forward", "jsd", "nll")
SUPPORTS = ("student", "teacher", "union", "full")
CORRECTIONS = ("none", "renorm", "tail")


def nonsense(divergence: str, support: str, correction: str, top_k: int) -> str | None:
    """Why a combination has no use, or None if it has one."""
    if support == "full":
        if correction != "none":
            return "the full vocabulary leaves nothing outside to correct: use 'none'"
        return None
    if correction == "renorm" and top_k == 1 and support != "union":
        return "one token normalised over itself is certain on both sides: the loss is always zero"
    if (divergence, support, correction) == ("reverse", "teacher", "none"):
        return (
            "what the student puts outside the teacher's top-k would count nothing, so leaving "
            "it lowers the loss: use 'renorm' or 'tail', or loss.support='student' or 'union'"
        )
    return None
