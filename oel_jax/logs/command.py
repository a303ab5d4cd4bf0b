"""Logs of conversations: what is in them, into a workdir with them, out of it again.

    oel logs check  PATTERN...                     say what is there; write nothing
    oel logs import PATTERN... --workdir=DIR       append what is new to the workdir's store
    oel logs forget --user=ID --workdir=DIR        remove a user's conversations from a workdir
    oel logs forget --conversation=ID --workdir=DIR

A PATTERN is a file, a directory or a glob ('logs/*.jsonl'). Read are OpenAI messages, pairs of
request and response, ShareGPT, rows with a conversation, and our own files; plain or gzip.

    --feedback_fields=feedback,review.text   fields whose text is feedback; numbers are never read
    --redact=false                           keep addresses, numbers and keys as they are
    --redact_hook=FILE.py:function           text -> text, for what you know to be private
    --json                                   the report as JSON

Exit status: 0; 1 when `check` or `import` found nothing that can be used; 2 for what you can
mend.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.logs.forgetting import Removed, forget
from oel_jax.logs.formats import FEEDBACK_FIELDS
from oel_jax.logs.importing import import_logs
from oel_jax.logs.reading import Report, read_conversations
from oel_jax.logs.redaction import Redactor, load_hook
from oel_jax.runs.workdir import Workdir


def report_text(report: Report, *, redacted: bool) -> str:
    """The report as people read it.

    Args:
      redacted: whether texts were redacted; if not, the report says so.
    """
    rows = [
        ("files", report.files),
        ("records", report.records),
        *((f"  as {name}", number) for name, number in sorted(report.formats.items())),
        ("conversations", report.conversations),
        ("answers", report.turns),
        ("  followed by a message of the user", report.followed),
        ("  with feedback of their own", report.with_feedback),
        ("  that came again, taken once", report.repeated),
        ("users that are named", report.users),
    ]
    if report.forgotten:
        rows.append(("answers left out: forgotten on request", report.forgotten))
    if redacted:
        total = sum(report.redacted.values())
        rows.append(("texts replaced by redaction", total))
        rows += [(f"  {kind}", number) for kind, number in sorted(report.redacted.items())]
    else:
        rows.append(("texts replaced by redaction", "off"))
    rows += [(note, number) for note, number in sorted(report.notes.items())]
    rows += [(f"numbers not read: {name}", count) for name, count in sorted(report.scores.items())]
    lines = _aligned(rows)
    if report.skipped:
        lines += ["", "records that were skipped"]
        lines += _aligned((f"  {why}", n) for why, n in report.skipped.most_common())
        for why, _ in report.skipped.most_common():
            lines += [f"  {why}: {place}" for place in report.places.get(why, ())]
    return "\n".join(_printable(line) for line in lines)


def _aligned(rows: Iterable[tuple[str, Any]]) -> list[str]:
    rows = [(name, f"{n:,}" if isinstance(n, int) else n) for name, n in rows]
    width = max((len(name) for name, _ in rows), default=0)
    most = max((len(number) for _, number in rows), default=0)
    return [f"{name:{width}}  {number:>{most}}" for name, number in rows]


def _printable(line: str) -> str:
    """A line without control characters: names and places come from outside."""
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def _redactor(given: argparse.Namespace) -> Redactor | None:
    if given.redact == "false":
        if given.redact_hook:
            raise UserError("--redact_hook needs --redact=true")
        return None
    return Redactor(load_hook(given.redact_hook) if given.redact_hook else None)


def _fields(text: str) -> tuple[str, ...]:
    fields = tuple(part.strip() for part in text.split(",") if part.strip())
    if not fields:
        raise UserError("--feedback_fields: give names of fields, such as feedback,review.text")
    return fields


def _check(given: argparse.Namespace) -> int:
    redactor, report = _redactor(given), Report()
    fields = _fields(given.feedback_fields)
    for _ in read_conversations(
        given.patterns, redact=redactor, feedback_fields=fields, report=report
    ):
        pass
    _show(given, report, redactor, {})
    return 0 if report.conversations else 1


def _import(given: argparse.Namespace) -> int:
    redactor, workdir = _redactor(given), Workdir(given.workdir)
    report, new = import_logs(
        given.patterns, workdir, redact=redactor, feedback_fields=_fields(given.feedback_fields)
    )
    _show(given, report, redactor, {"new_exchanges": new})
    if not given.json:
        print(f"\n{new:,} new answers in {workdir.conversations}")
    return 0 if new or report.repeated else 1


def _show(
    given: argparse.Namespace,
    report: Report,
    redactor: Redactor | None,
    more: Mapping[str, Any],
) -> None:
    if given.json:
        print(json.dumps(report.as_json() | more, indent=2))
    else:
        print(report_text(report, redacted=redactor is not None))


def _forget(given: argparse.Namespace) -> int:
    workdir = Workdir(given.workdir)
    removed = forget(workdir, user=given.user, conversation=given.conversation)
    if given.json:
        as_json = {
            name: list(map(str, value)) if isinstance(value, list) else value
            for name, value in vars(removed).items()
        }
        print(json.dumps(as_json, indent=2))
        return 0
    print(removed_text(removed))
    return 0


def removed_text(removed: Removed) -> str:
    """What `oel logs forget` says."""
    lines = _aligned(
        [
            ("conversations removed from the store", removed.conversations),
            ("  their answers", removed.exchanges),
            ("  lines of feedback", removed.comments),
            ("trajectories removed from rounds", removed.trajectories),
        ]
    )
    parts = [
        ("knowledge texts that were drawn from them or continue such a text", removed.knowledge),
        ("policies that were trained with them or come after such a one", removed.policies),
        ("files that may quote them", removed.texts),
        ("bad lines that were kept, since nobody can say whose they are", removed.bad_lines),
    ]
    for title, found in parts:
        if found:
            lines += ["", f"{title}:", *(f"  {one}" for one in found)]
    if removed.knowledge or removed.policies:
        lines += [
            "",
            "These were not changed. To unlearn, run again without the conversations: in a new",
            "workdir with the same config, or after removing the rounds from the first one on.",
        ]
    return "\n".join(_printable(line) for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.logs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run in (("check", _check), ("import", _import)):
        one = actions.add_parser(name, allow_abbrev=False)
        one.add_argument("patterns", nargs="+", metavar="PATTERN")
        one.add_argument("--feedback_fields", default=",".join(FEEDBACK_FIELDS))
        one.add_argument("--redact", choices=("true", "false"), default="true")
        one.add_argument("--redact_hook", default="", metavar="FILE.py:function")
        one.set_defaults(run=run)
        if name == "import":
            one.add_argument("--workdir", required=True)
    one = actions.add_parser("forget", allow_abbrev=False)
    one.add_argument("--workdir", required=True)
    one.add_argument("--user")
    one.add_argument("--conversation")
    one.set_defaults(run=_forget)
    for one in actions.choices.values():
        one.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return error.status
