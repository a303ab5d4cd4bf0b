"""Shows and decides on the knowledge texts that wait for approval (`config.extract.review`).

    oel review --workdir=W                       show the texts and their sources
    oel review --workdir=W --approve all         approve all that wait
    oel review --workdir=W --approve 0 2 --reject 1
    oel review --workdir=W --edit 0              open a text in $VISUAL or $EDITOR
    oel review --workdir=W --text 0:FILE         take a file's content for a text

Several of these may be given at once; edits come first. A text that is edited waits again unless
the same command approves it. The extractor's own texts are kept. Exit status 0, or 2 for a mistake.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import write_bytes
from oel_jax.config.old_values import saved_config
from oel_jax.review import decisions
from oel_jax.review.decisions import Decision
from oel_jax.review.sheet import sheet
from oel_jax.runs.workdir import Workdir, lock_directory


def review(
    root: Path,
    round_number: int | None = None,
    *,
    approve: Sequence[str] = (),
    reject: Sequence[str] = (),
    edit: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> str:
    """Decide on texts of a round; returns the page as it is then.

    Args:
      root: workdir of the run.
      round_number: None = the last round whose texts are extracted.
      approve, reject: numbers of texts, or 'all': those that wait.
      edit: numbers of texts to open in an editor.
      texts: NUMBER:FILE each.

    Raises:
      UserError: no such run, round, text or file; two decisions on one text; the texts of the
        round are in use; the run is going on.
    """
    workdir = Workdir(root)
    if not workdir.manifest_file.is_file():
        raise UserError(f"--workdir={root}: there is no run; give the --workdir of one")
    number = _round(workdir, round_number)
    config = ml_collections.ConfigDict(saved_config(workdir.config_file))
    if approve or reject or edit or texts:
        lock = lock_directory(workdir.root)
        try:
            _decide(workdir, number, approve, reject, edit, texts)
            page = _page(config, workdir, number)
            write_bytes(workdir.review_page(number), page.encode("utf-8", "replace"))
        finally:
            os.close(lock)
        return page
    return _page(config, workdir, number)


def _page(config: ml_collections.ConfigDict, workdir: Workdir, number: int) -> str:
    made = decisions.load(workdir, number)
    return sheet(config, workdir, number, decisions.written_texts(workdir, number), made)


def _round(workdir: Workdir, wanted: int | None) -> int:
    """The round that is asked for, or the last one whose texts are there."""
    rounds = [n for n in range(1, workdir.rounds() + 1) if workdir.finished(n, "extract")]
    if not rounds:
        raise UserError(f"--workdir={workdir.root}: no round has extracted its texts yet")
    if wanted is None:
        return rounds[-1]
    if wanted not in rounds:
        there = ", ".join(map(str, rounds))
        raise UserError(f"--round={wanted}: its texts are not extracted; there are rounds {there}")
    return wanted


def _decide(
    workdir: Workdir,
    number: int,
    approve: Sequence[str],
    reject: Sequence[str],
    edit: Sequence[str],
    texts: Sequence[str],
) -> None:
    if not saved_config(workdir.config_file)["extract"].get("review", False):
        raise UserError(
            f"--workdir={workdir.root}: this run does not wait for a review; it needs "
            "--config.extract.review=True from its start"
        )
    if workdir.finished(number, "review"):
        raise UserError(
            f"--workdir={workdir.root}: the review of round {number} is closed: its approved texts "
            "are in use"
        )
    made, written = decisions.load(workdir, number), decisions.written_texts(workdir, number)
    changed = [(each, *_named(each, len(made))) for each in texts]
    opened = [_number(each, len(made)) for each in edit]
    for given, chain, file in changed:
        made[chain] = _edited(made[chain], written[chain], _read(file), f"--text {given}")
    for chain in opened:
        now = written[chain] if made[chain].edited is None else made[chain].edited
        made[chain] = _edited(made[chain], written[chain], _in_editor(now), f"--edit {chain}")
    for chain, status in _statuses(approve, reject, made).items():
        made[chain].status = status
    for chain, decision in enumerate(made):
        text = written[chain] if decision.edited is None else decision.edited
        if decision.status == "approved" and not text.strip():
            raise UserError(f"text {chain} is empty and cannot be approved; reject or edit it")
    decisions.save(workdir, number, made)


def _edited(decision: Decision, written: str, text: str, what: str) -> Decision:
    """The decision on a text that was edited; what is as it was changes nothing."""
    text = text.strip("\n")
    if not text.strip():
        raise UserError(f"{what}: the text is empty; use --reject to leave a text out")
    before = written if decision.edited is None else decision.edited
    if text == before.strip("\n"):
        return decision
    return Decision(decision.original, "waiting", None if text == written.strip("\n") else text)


def _statuses(
    approve: Sequence[str], reject: Sequence[str], made: Sequence[Decision]
) -> dict[int, str]:
    """What becomes of which texts; 'all' are those that wait and are not named."""
    found: dict[int, str] = {}
    for given, status in ((approve, "approved"), (reject, "rejected")):
        for each in given:
            if each == "all":
                continue
            if found.setdefault(_number(each, len(made)), status) != status:
                raise UserError(f"text {each} cannot be both approved and rejected")
    if "all" in approve and "all" in reject:
        raise UserError("the texts cannot all be both approved and rejected")
    status = "approved" if "all" in approve else "rejected" if "all" in reject else ""
    for chain, decision in enumerate(made):
        if status and decision.status == "waiting":
            found.setdefault(chain, status)
    return found


def _number(given: str, count: int) -> int:
    if not given.isascii() or not given.isdigit() or int(given) >= count:
        raise UserError(f"{given!r} is no text of this round; there are 0 to {count - 1}")
    return int(given)


def _named(given: str, count: int) -> tuple[int, Path]:
    number, colon, file = given.partition(":")
    if not colon or not file:
        raise UserError(f"--text {given}: give NUMBER:FILE, for instance 0:better.txt")
    return _number(number, count), Path(file)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _in_editor(text: str) -> str:
    """The text after a person has changed it."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError("--edit needs an editor: set $EDITOR, or use --text NUMBER:FILE")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "text.md"
        file.write_text(text + "\n", encoding="utf-8")
        try:
            status = subprocess.run([*shlex.split(editor), str(file)], check=False).returncode
        except OSError as error:
            raise UserError(f"the editor {editor!r} cannot be started: {error.strerror}") from error
        if status:
            raise UserError(f"the editor {editor!r} ended with status {status}; nothing is changed")
        return _read(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.review",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=paths.argument, required=True, help="of the run")
    parser.add_argument("--round", type=int, help="default: the last one with texts")
    several = {"nargs": "+", "default": [], "action": "extend"}
    parser.add_argument("--approve", metavar="K", help="numbers of texts, or all", **several)
    parser.add_argument("--reject", metavar="K", help="numbers of texts, or all", **several)
    parser.add_argument("--edit", metavar="K", help="open in an editor", **several)
    parser.add_argument("--text", metavar="K:FILE", help="take a file's content", **several)
    given = parser.parse_args(arguments)
    try:
        page = review(
            given.workdir,
            given.round,
            approve=given.approve,
            reject=given.reject,
            edit=given.edit,
            texts=given.text,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page, end="")
    return 0
