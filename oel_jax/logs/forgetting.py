"""Removes what a user said, or one conversation, from the stores of a workdir.

What was learned from it stays in knowledge texts and weights; `forget` says in which. What is
forgotten is remembered by hash only, so that a later import does not bring it back. Imports no JAX.
"""

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.data.conversations import ConversationStore, decode_feedback, take_lock
from oel_jax.data.joining import Joiner
from oel_jax.data.line_files import BadLine, NotJSON, numbered, open_lines
from oel_jax.data.texts import hidden
from oel_jax.data.trajectories import Trajectory
from oel_jax.data.trajectory_schema import decode_line
from oel_jax.runs.workdir import Workdir, lock_directory, sha256

SCHEMA = "oel.forgotten/1"
_FILE = "forgotten.json"
_CHAIN = re.compile(r"extract_([0-9]{4,})\.jsonl")


class Forgotten:
    """What was forgotten in a workdir, as salted hashes: they tell an id only to who has it.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path, salt: str, hashes: set[str]) -> None:
        self.path, self._salt, self._hashes = path, salt, hashes

    @classmethod
    def of(cls, workdir: Workdir) -> "Forgotten":
        """That of a workdir; UserError if the file is damaged."""
        path = workdir.conversations / _FILE
        if not path.exists():
            return cls(path, secrets.token_hex(16), set())
        record = read_json(path)
        try:
            if record["schema"] != SCHEMA:
                raise KeyError("schema")
            return cls(path, str(record["salt"]), set(record["hashes"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it from a copy") from error

    def __call__(self, piece: Trajectory, key: str) -> bool:
        """Whether an exchange is forgotten; see `oel_jax.data.joining.Forgotten`."""
        if not self._hashes:
            return False
        names = (("user", piece.user), ("conversation", piece.conversation), ("exchange", key))
        return any(value is not None and self._hash(*name) in self._hashes
                   for name in names for value in name[1:])  # fmt: skip

    def add(self, kind: str, name: str) -> None:
        """Remember the id of a 'user', 'conversation' or 'exchange'."""
        self._hashes.add(self._hash(kind, name))

    def save(self) -> None:
        """Write the file, at once or not at all."""
        record = {"schema": SCHEMA, "salt": self._salt, "hashes": sorted(self._hashes)}
        write_json(self.path, record)

    def _hash(self, kind: str, name: str) -> str:
        text = json.dumps([self._salt, kind, name])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


@dataclass
class Removed:
    """What was removed, and what was made with it.

    Attributes:
      conversations, exchanges, comments: removed from the store of conversations.
      trajectories: removed from the rounds' stores.
      knowledge: files of knowledge texts that were drawn from what was removed.
      policies: directories of policies that were trained on it or come after such a one.
      texts: files that may quote it, such as reports.
      bad_lines: places of lines that cannot be read and were kept.
    """

    conversations: int = 0
    exchanges: int = 0
    comments: int = 0
    trajectories: int = 0
    knowledge: list[Path] = field(default_factory=list)
    policies: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    bad_lines: list[str] = field(default_factory=list)


class _Request:
    """Whose exchanges go."""

    def __init__(self, user: str | None, conversation: str | None) -> None:
        self.users = set() if user is None else {user, hidden(user)}
        self.names = set() if conversation is None else {conversation, hidden(conversation)}
        self.keys: set[str] = set()  # ids of exchanges
        self.conversations: set[str] = set()

    def asks_for(self, one: Trajectory, key: str | None = None) -> bool:
        """Whether a trajectory is named by itself."""
        names = {one.id, one.conversation, key, *(turn.id for turn in one.turns)} - {None}
        return one.user in self.users or not self.names.isdisjoint(names)

    def holds(self, one: Trajectory) -> bool:
        """Whether a trajectory is named, or is of a conversation that is."""
        keys = {one.id, one.parent, *(turn.id for turn in one.turns)} - {None}
        return (
            self.asks_for(one)
            or not self.keys.isdisjoint(keys)
            or one.conversation in self.conversations
        )


def forget(
    workdir: Workdir, *, user: str | None = None, conversation: str | None = None
) -> Removed:
    """Remove a user's conversations, or one, from a workdir; see the top of this file.

    Args:
      workdir: of a run; no process may be using it.
      user: id of a user, as in the logs or as it is stored.
      conversation: id of a conversation, or of one of its exchanges.

    Raises:
      UserError: neither or both are given; the workdir or its store is in use; nothing is known
        under this id (it is then not remembered either, since it may be mistyped).
    """
    if (user is None) == (conversation is None) or "" in (user, conversation):
        raise UserError("give either --user=ID or --conversation=ID")
    if not workdir.root.is_dir():
        raise UserError(f"--workdir={workdir.root} does not exist")
    lock = lock_directory(workdir.root)
    locks: list[int] = []
    try:
        store = ConversationStore(workdir.conversations)
        _lock_store(store, locks)
        return _forget(workdir, store, _Request(user, conversation), user, conversation)
    finally:
        for one in (*locks, lock):
            os.close(one)


def _lock_store(store: ConversationStore, locks: list[int]) -> None:
    for path in store.files("exchanges"):
        number = path.stem.removeprefix("exchanges_")
        lock = take_lock(store.directory / f".lock_{number}")
        if lock is None:
            raise UserError(
                f"{path} is being written by a running server or import; stop it and run the same "
                "command again"
            )
        locks.append(lock)


def _forget(
    workdir: Workdir,
    store: ConversationStore,
    request: _Request,
    user: str | None,
    conversation: str | None,
) -> Removed:
    removed = Removed()
    removed.conversations = _gather(store, request)
    rounds = list(_round_files(workdir))
    for _, path in rounds:  # a conversation that only a round holds, as after `logs.path`
        for one, _ in _lines(path, decode_line):
            if one is not None and request.asks_for(one):
                request.keys |= {one.id, *(turn.id for turn in one.turns)} - {None}
                request.conversations |= {one.conversation} - {None}
    if not request.keys and not _comments_of(store, request):
        what = (
            f"the user {user!r}" if conversation is None else f"the conversation {conversation!r}"
        )
        raise UserError(f"--workdir={workdir.root} holds nothing of {what}; check the id")
    _remember(workdir, request, user, conversation)
    for path in store.files("exchanges"):
        removed.exchanges += len(_rewrite(path, decode_line, request.holds, removed))
    for path in store.files("feedback"):
        mine = lambda one: one.id in request.keys or one.user in request.users  # noqa: E731
        removed.comments += len(_rewrite(path, decode_feedback, mine, removed))
    first = None
    for number, path in rounds:
        gone = _rewrite(path, decode_line, request.holds, removed)
        if not gone:
            continue
        removed.trajectories += len(gone)
        first = number if first is None else min(first, number)
        removed.knowledge += _knowledge(workdir, number, path, min(gone))
        _record_change(workdir, number, path, request)
    if first is not None:
        _name_what_was_made(workdir, first, removed)
    return removed


def _gather(store: ConversationStore, request: _Request) -> int:
    """Find the exchanges of the store that are asked for; returns the number of families."""
    joiner = Joiner()
    store.collect(joiner)
    families = {family for family, key, piece in joiner.families() if request.asks_for(piece, key)}
    for family, key, piece in joiner.families():
        if family in families:
            request.keys.add(key)
            request.conversations |= {piece.conversation} - {None}
    return len(families)


def _comments_of(store: ConversationStore, request: _Request) -> bool:
    return any(
        one is not None and one.user in request.users
        for path in store.files("feedback")
        for one, _ in _lines(path, decode_feedback)
    )


def _remember(
    workdir: Workdir, request: _Request, user: str | None, conversation: str | None
) -> None:
    """Before anything is removed: whatever happens then, it is not imported again."""
    forgotten = Forgotten.of(workdir)
    for name in request.users:
        forgotten.add("user", name)
    for name in request.conversations | (request.names if user is None else set()):
        forgotten.add("conversation", name)
    for name in request.keys:
        forgotten.add("exchange", name)
    forgotten.save()


def _lines(path: Path, read_line: Callable[[bytes], Any]) -> Iterator[tuple[Any, bytes]]:
    """(value or None for a bad line, its bytes) of a file."""
    with open_lines(path) as file:
        for _, line in numbered(file):
            try:
                yield read_line(line), line
            except (NotJSON, BadLine):
                yield None, line


def _rewrite(
    path: Path,
    read_line: Callable[[bytes], Any],
    goes: Callable[[Any], bool],
    removed: Removed,
) -> list[int]:
    """Replace a file by one without some lines; returns their numbers, from 0.

    The old or the new file is there at any instant. A file that loses all its lines is deleted.
    """
    gone, kept = [], 0
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            for number, (one, line) in enumerate(_lines(path, read_line)):
                if one is None:
                    removed.bad_lines.append(f"{path}:{number + 1}")
                elif goes(one):
                    gone.append(number)
                    continue
                file.write(line)
                kept += 1
            file.flush()
            os.fsync(file.fileno())
        if gone and kept:
            os.replace(name, path)
        elif gone:
            path.unlink()
    finally:
        Path(name).unlink(missing_ok=True)
    return gone


def _round_files(workdir: Workdir) -> Iterator[tuple[int, Path]]:
    """(number of the round, file of its trajectories), in order."""
    for directory in sorted(workdir.root.glob("round_*/trajectories")):
        number = directory.parent.name.removeprefix("round_")
        if number.isdecimal():
            for path in sorted(directory.glob("*.jsonl")):
                yield int(number), path


def _knowledge(workdir: Workdir, number: int, path: Path, first: int) -> list[Path]:
    """Knowledge files of a round that were made with trajectory `first` (from 0) of a file."""
    match = _CHAIN.fullmatch(path.name)
    if match is None:
        return []
    found = []
    for chain in sorted(workdir.knowledge(number).parent.glob("chain_*")):
        # One shared file of trajectories serves all chains.
        shared = not (path.parent / "extract_0001.jsonl").exists() and int(match[1]) == 0
        if shared or int(chain.name.removeprefix("chain_")) == int(match[1]):
            steps = sorted(chain.glob("step_*.json"))
            found += [s for s in steps if int(s.stem.removeprefix("step_")) > first]
    return found + [p for p in [workdir.knowledge(number)] if p.exists() and found]


def _record_change(workdir: Workdir, number: int, path: Path, request: _Request) -> None:
    """Have the manifest and the round's snapshot say what the file is now."""
    snapshot = workdir.round(number) / "trajectories" / "snapshot.json"
    if not snapshot.exists():
        snapshot = workdir.round(number) / "snapshot.json"
    if snapshot.exists():
        made = read_json(snapshot)
        if path.exists():
            made["files"][path.name] = sha256(path)
        else:
            made["files"].pop(path.name, None)
        made["conversations"] = {
            name: one
            for name, one in made["conversations"].items()
            if name not in request.keys | request.conversations | request.names
        }
        write_json(snapshot, made)
        workdir.record_change(snapshot)
    workdir.record_change(path)


def _name_what_was_made(workdir: Workdir, first: int, removed: Removed) -> None:
    """Policies from round `first` on, later knowledge that continues it, files that may quote."""
    for directory in sorted(workdir.root.glob("round_*")):
        if not directory.name[6:].isdecimal() or int(directory.name[6:]) < first:
            continue
        number = int(directory.name[6:])
        removed.policies += sorted(
            path
            for path in directory.iterdir()
            if path.is_dir() and re.fullmatch(r"policy(_step_\d+)?|adapter", path.name)
        )
        if number > first and workdir.knowledge(number).exists():
            if workdir.knowledge(number) not in removed.knowledge:
                removed.knowledge.append(workdir.knowledge(number))
        removed.texts += sorted((directory / "evaluate").glob("*.samples.json"))
        removed.texts += sorted(directory.glob("review*"))
    if workdir.report_file.exists():
        removed.texts.append(workdir.report_file)
