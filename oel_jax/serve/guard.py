"""How a policy answers, counted; and when it answers worse than the one before. Imports no JAX."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GuardLimits:
    """When a new policy is rolled back: it is compared with the one before over their last answers.

    It is judged once, as soon as both have enough of them. An answer that was cancelled, by its
    client or at a stop text, is not one of them.

    Attributes:
      answers: of each that are compared; with fewer nothing is judged. 0: no guard.
      cut_off: the share of answers cut off by their budget may be so much larger (0.2: 20 points).
      length: the mean answer may be so many times longer.
      errors: the share of answers that ended with an error may be so much larger.
    """

    answers: int = 50
    cut_off: float = 0.2
    length: float = 2.0
    errors: float = 0.1


@dataclass
class Record:
    """What is known of the answers of one policy.

    Attributes:
      answers: finished by themselves or by their budget.
      cut_off: of them, by their budget.
      tokens: of them all.
      cancelled, errors: answers that ended so.
      feedback: texts that came to its answers.
    """

    window: int
    answers: int = 0
    cut_off: int = 0
    tokens: int = 0
    cancelled: int = 0
    errors: int = 0
    feedback: int = 0
    _last: deque[tuple[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._last = deque(maxlen=max(1, self.window))

    def add(self, finish: str, tokens: int) -> None:
        """Count a finished answer; a cancelled one says nothing of the policy."""
        if finish == "cancelled":
            self.cancelled += 1
            return
        self._last.append((finish, tokens))
        if finish == "error":
            self.errors += 1
            return
        self.answers += 1
        self.tokens += tokens
        self.cut_off += finish == "length"

    @property
    def mean_tokens(self) -> float:
        """Of an answer that was not cancelled and had no error; 0 without any."""
        return self.tokens / self.answers if self.answers else 0.0

    def shares(self) -> tuple[int, float, float, float]:
        """(answers, share cut off, mean tokens, share of errors) of the last answers."""
        last = list(self._last)
        good = [(finish, tokens) for finish, tokens in last if finish != "error"]
        cut_off = sum(finish == "length" for finish, _ in good) / max(1, len(good))
        mean = sum(tokens for _, tokens in good) / max(1, len(good))
        return len(last), cut_off, mean, (len(last) - len(good)) / max(1, len(last))

    def as_json(self) -> dict[str, float]:
        """The counts by name, for reports."""
        names = ("answers", "cut_off", "tokens", "cancelled", "errors", "feedback")
        counts: dict[str, float] = {name: getattr(self, name) for name in names}
        return counts | {"mean_tokens": round(self.mean_tokens, 2)}


def why_worse(new: Record, old: Record, limits: GuardLimits) -> str:
    """Why the new policy is to be rolled back; '' if it is not, or too little is known."""
    (count, cut, mean, errors), (old_count, old_cut, old_mean, old_errors) = (
        new.shares(),
        old.shares(),
    )
    if not limits.answers or min(count, old_count) < limits.answers:
        return ""
    of = f"of its last {count} answers"
    if errors > old_errors + limits.errors:
        return f"{errors:.0%} {of} ended with an error, {old_errors:.0%} before"
    if cut > old_cut + limits.cut_off:
        return f"{cut:.0%} {of} were cut off, {old_cut:.0%} before"
    if mean > old_mean * limits.length:
        return f"the mean {of} has {mean:.0f} tokens, {old_mean:.0f} before"
    return ""
