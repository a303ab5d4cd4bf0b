"""Conversations from logs of any supported format, and the report of what was found.

Imports no JAX. Memory is bounded whatever the size of the logs, see `oel_jax.data.joining`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oel_jax.data.joining import Forgotten, Joiner
from oel_jax.data.trajectories import Trajectory
from oel_jax.logs.files import Unusable, find, records
from oel_jax.logs.formats import FEEDBACK_FIELDS, parse
from oel_jax.logs.redaction import Redactor

_PLACES = 3  # of each reason that are named


@dataclass
class Report:
    """What logs hold. Counts only, so its size does not grow with the logs.

    Attributes:
        files: files that were read.
        records: records in them, bad ones too.
        formats: name of a format -> records.
        conversations, turns, users: after pieces were put together, as far as they were taken.
        with_feedback: answers with a text of feedback of their own.
        followed: answers that the user wrote something after: feedback, too.
        repeated: answers that came again, as part of a later request or in another file.
        forgotten: answers left out since somebody asked for it.
        redacted: kind -> replacements.
        notes: what was left out of conversations that were used -> how often.
        scores: name of a number that judges -> how often it was not read.
        skipped: reason -> records.
        places: reason -> the first few places, 'FILE:LINE' and what was found there.
    """

    files: int = 0
    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    conversations: int = 0
    turns: int = 0
    users: int = 0
    with_feedback: int = 0
    followed: int = 0
    repeated: int = 0
    forgotten: int = 0
    redacted: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def skip(self, path: Path, line: int, fault: Unusable) -> None:
        """Count a record that cannot be used."""
        self.skipped[fault.reason] += 1
        known = self.places[fault.reason]
        if len(known) < _PLACES:
            known.append(f"{path}:{line}" + (f" ({fault.detail})" if fault.detail else ""))

    def count(self, one: Trajectory) -> None:
        """Count a conversation that is used."""
        self.conversations += 1
        self.turns += len(one.turns)
        self.with_feedback += sum(turn.feedback is not None for turn in one.turns)
        self.followed += len(one.turns) - 1

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }


def collect(
    patterns: str | Sequence[str],
    joiner: Joiner,
    report: Report,
    feedback_fields: Sequence[str] = FEEDBACK_FIELDS,
) -> None:
    """Give the conversations of all files to a joiner.

    Raises:
      UserError: a pattern matches nothing.
    """
    for path in find(patterns):
        report.files += 1
        for record in records(path):
            report.records += 1
            try:
                found = parse(record, feedback_fields)
            except Unusable as fault:
                report.skip(record.path, record.line, fault)
                continue
            except RecursionError:
                report.skip(record.path, record.line, Unusable("nested too deep"))
                continue
            report.formats[found.format] += 1
            report.notes.update(found.notes)
            report.scores.update(found.scores)
            if found.comment is not None:
                joiner.comment(found.comment.id, found.comment.text)
            if found.trajectory is not None:
                joiner.add(found.trajectory)


def read_conversations(
    patterns: str | Sequence[str],
    *,
    redact: Redactor | None = None,
    feedback_fields: Sequence[str] = FEEDBACK_FIELDS,
    forgotten: Forgotten | None = None,
    report: Report | None = None,
) -> Iterator[Trajectory]:
    """Whole conversations of logs, ordered by where each began.

    All files are read before the first conversation is given, since pieces of it may be anywhere.

    Args:
      patterns: files, directories, globs.
      redact: applied to all texts; None leaves them as they are.
      feedback_fields: names of the fields whose text is feedback; a dot leads into an object.
      forgotten: what is left out, see `Joiner`.
      report: filled while reading; complete when the last conversation was taken.

    Raises:
      UserError: a pattern matches nothing, or the hook of `redact` fails.
    """
    report = Report() if report is None else report
    joiner = Joiner(None if redact is None else redact.change, forgotten)
    collect(patterns, joiner, report, feedback_fields)
    for one in joiner.conversations():
        report.count(one)
        yield one
    finish(report, joiner, redact)


def finish(report: Report, joiner: Joiner, redact: Redactor | None) -> None:
    """What is known at the end only."""
    report.users, report.repeated, report.forgotten = joiner.users(), joiner.repeated, joiner.left
    if redact is not None:
        report.redacted = Counter(redact.total)
    for reason, number in (
        ("an exchange whose parent is not there", joiner.alone),
        ("feedback on an answer that is not there", joiner.unknown),
    ):
        if number:
            report.skipped[reason] += number
