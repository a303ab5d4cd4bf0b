"""Import of logs into the store of a workdir: what is new of them, redacted, exchange by exchange.

The same logs may be imported again and again, as when a directory grows: what is there already is
not written again. Imports no JAX.
"""

from collections.abc import Sequence

from oel_jax.data.conversations import ConversationStore
from oel_jax.data.joining import Joiner
from oel_jax.logs.forgetting import Forgotten
from oel_jax.logs.formats import FEEDBACK_FIELDS
from oel_jax.logs.reading import Report, collect, finish
from oel_jax.logs.redaction import Redactor
from oel_jax.runs.workdir import Workdir

_SYNC_EVERY = 1000  # a crash loses nothing that the same command does not import again


def import_logs(
    patterns: str | Sequence[str],
    workdir: Workdir,
    *,
    redact: Redactor | None,
    feedback_fields: Sequence[str] = FEEDBACK_FIELDS,
) -> tuple[Report, int]:
    """Append what is new to the workdir's store of conversations.

    Args:
      patterns: files, directories, globs.
      workdir: its directory is created if need be.
      redact: applied to all texts; None leaves them as they are.
      feedback_fields: names of the fields whose text is feedback.

    Returns:
      (what the logs hold, number of exchanges that were new).

    Raises:
      UserError: a pattern matches nothing, a hook fails, or the disk refuses a line; what was
        written stays, and the same command imports the rest.
    """
    joiner, report, new = Joiner(), Report(), 0
    directory = workdir.conversations
    ConversationStore(directory).collect(joiner)
    mark = joiner.mark()
    before = joiner.users()
    joiner.change = None if redact is None else redact.change
    joiner.forgotten = Forgotten.of(workdir)
    collect(patterns, joiner, report, feedback_fields)
    with ConversationStore(directory, sync_every=_SYNC_EVERY) as store:
        for line, answers in joiner.lines(mark):
            store.append_line(line)
            new += answers
        for key, text in joiner.comments(mark):
            store.append_feedback(key, text)
    finish(report, joiner, redact)
    report.turns, report.users = new, report.users - before
    report.conversations, report.followed, report.with_feedback = joiner.counts(mark)
    return report, new
