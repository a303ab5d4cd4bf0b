"""What came after an answer in its own conversation or game, as a text for that answer's teacher.

Of the policy nothing is in it: neither the answer itself nor a later one. It is what others said,
in order: the user's replies, tools' results, a game's observations, feedback, and the outcome.
Nothing here imports JAX.
"""

from collections.abc import Callable, Sequence

from oel_jax.data.messages import Message
from oel_jax.data.prompts import shown_outcome
from oel_jax.data.trajectories import Trajectory, Turn

HEAD = """\
An answer was given in this situation before. This is what came after it, in order. Use it to \
judge what a good answer is; it is not part of the situation.
"""
_SPEAKERS = {"user": "User", "tool": "Tool"}


def later_parts(trajectory: Trajectory, turn: int, *, outcome_mode: str = "full") -> list[str]:
    """What came after answer number `turn` (from 0), in order, each with who said it.

    The messages of a later turn that begins anew count from its last answer on. Instructions
    (system, developer) are no reaction to an answer and are left out; so are blank texts.

    Args:
        outcome_mode: as in `prompts.extraction_history`.
    """
    parts = []
    for number in range(turn, len(trajectory.turns)):
        if number > turn:
            parts += _said(trajectory.turns[number])
        feedback = trajectory.turns[number].feedback
        if feedback is not None:
            parts.append(("Feedback", feedback))
    if outcome_mode != "none":
        parts.append(("Outcome", shown_outcome(trajectory.outcome or "", outcome_mode)))
    return [f"{who}: {text.strip()}" for who, text in parts if text.strip()]


def _said(turn: Turn) -> list[tuple[str, str]]:
    """(who, what) of what is new before a later answer."""
    if turn.observation is not None:
        return [("Observation", turn.observation)]
    new: list[Message] = []
    for message in reversed(turn.messages):
        if message["role"] == "assistant":
            break
        new.append(message)
    return [
        (_SPEAKERS[message["role"]], message.get("content") or "")
        for message in reversed(new)
        if message["role"] in _SPEAKERS
    ]


def hindsight(parts: Sequence[str], l_max: int, count: Callable[[str], int]) -> str:
    """The text for the teacher, at most `l_max` tokens; '' where nothing came after the answer.

    What came first is nearest to the answer: a text that is too long loses its end.

    Args:
        parts: from `later_parts`.
        count: number of tokens of a text.
    """
    return longest_part("\n\n".join([HEAD.strip(), *parts]), l_max, count) if parts else ""


def longest_part(text: str, limit: int, count: Callable[[str], int], keep: str = "head") -> str:
    """The longest beginning (keep='head') or end ('tail') of a text with at most `limit` tokens.

    A text that fits comes back unchanged. A cut is made at white space, if there is some within the
    half that is kept nearest to it; characters are never split.
    """
    if count(text) <= limit:
        return text
    low, high = 0, len(text)  # characters; `low` fits
    while high - low > 1:
        middle = (low + high) // 2
        part = text[:middle] if keep == "head" else text[-middle:]
        low, high = (middle, high) if count(part) <= limit else (low, middle)
    part = (text[:low] if keep == "head" else text[len(text) - low :]).strip()
    words = part.rsplit(None, 1) if keep == "head" else part.split(None, 1)
    if len(words) == 2:
        cut = words[0] if keep == "head" else words[1]
        if 2 * len(cut) >= len(part) and count(cut) <= limit:
            return cut
    return part
