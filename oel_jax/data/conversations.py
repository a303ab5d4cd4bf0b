"""The store of what users and policies said to each other.

A directory, usually `WORKDIR/conversations`:

    exchanges_0000.jsonl  one trajectory of one turn (schema oel.trajectory/2) per finished answer;
                          its id is that of the answer, `parent` the id of the one it continues
    feedback_0000.jsonl   {"schema": "oel.feedback/1", "id": ID, "text": ..., "time": ..., "user"*}:
                          what a user said of the answer ID
    .lock_0000            held by the process that writes the files of this number

Several processes may write at the same time, each to files of its own number. Anybody may read at
any time. A line is there whole or not at all: after a kill at any instant the torn last line is cut
off by the next writer and passed over by readers; a full disk is an error, and the next write may
succeed. Imports no JAX.

    with ConversationStore(directory) as store:
        store.append_exchange(trajectory)
        store.append_feedback("chatcmpl-1", "Too long.")
    for trajectory in ConversationStore(directory).read(): ...
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import re
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

from oel_jax.base.errors import UserError
from oel_jax.data.joining import Chain, Joiner
from oel_jax.data.line_files import (
    BadLine,
    LineFile,
    NotJSON,
    complaint,
    decode_json,
    encode_json,
    numbered,
    open_lines,
)
from oel_jax.data.texts import change_trajectory, opaque
from oel_jax.data.trajectories import Trajectory
from oel_jax.data.trajectory_schema import NotATrajectory, decode_line, encode

logger = logging.getLogger(__name__)

FEEDBACK_SCHEMA = "oel.feedback/1"
_FILE_BYTES = 256 * 2**20  # a file that is longer is not added to
_TAIL_BYTES = 2**16
_REMEMBERED = 20_000  # exchanges that a later one may name as its parent
_REMEMBERED_IDS = 2**23  # their ids, 4 bytes each

Redact = Callable[[str], tuple[str, Mapping[str, int]]]


def now() -> str:
    """The time in UTC as the schema writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


class Feedback(NamedTuple):
    """What a user said of an answer."""

    id: str
    text: str
    time: str
    user: str | None = None


class NotFeedback(BadLine):
    """A JSON text that is no line of feedback."""


def encode_feedback(feedback: Feedback) -> bytes:
    """The line of some feedback. Raises ValueError if readers would refuse it."""
    record = {"schema": FEEDBACK_SCHEMA, **feedback._asdict()}
    record = {name: value for name, value in record.items() if value is not None}
    try:
        _check_feedback(record)
    except NotFeedback as error:
        raise ValueError(f"cannot write this feedback: {error}") from error
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def decode_feedback(line: bytes) -> Feedback:
    """One line of feedback. Raises `NotJSON` or `NotFeedback`."""
    try:
        record = decode_json(line)
    except RecursionError as error:
        raise NotFeedback("nested far deeper than feedback") from error
    _check_feedback(record)
    return Feedback(record["id"], record["text"], record["time"], record.get("user"))


def _check_feedback(record: Any) -> None:
    if not isinstance(record, dict) or record.get("schema") != FEEDBACK_SCHEMA:
        raise NotFeedback(f"it must be an object with the schema {FEEDBACK_SCHEMA!r}")
    unknown = sorted(record.keys() - {"schema", *Feedback._fields})
    if unknown:
        raise NotFeedback(f"it has the unknown key {unknown[0][:60]!r}; feedback is text only")
    for name in ("id", "text", "time", *(["user"] if "user" in record else [])):
        value = record.get(name)
        if not isinstance(value, str) or not value:
            raise NotFeedback(f"{name} must be a string that is not empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NotFeedback(f"{name} holds half a surrogate pair, which is no text") from error


class _StoreFile(LineFile):
    """A file of the store. Only its end is read when it is opened, so it may be of any size."""

    advice = "make room on the disk; the store can be written to again at once"

    def __init__(self, path: Path, decode_line: Callable[[bytes], Any], sync_every: int) -> None:
        super().__init__(path, sync_every=sync_every)
        try:
            self._repair(decode_line)
        except BaseException:
            self._file.close()
            raise

    def _repair(self, decode_line: Callable[[bytes], Any]) -> None:
        """Cut off a torn last line; give a whole one its newline."""
        start, line = self._last_line()
        if not line:
            return
        try:
            decode_line(line)
        except NotJSON as error:
            if start == 0 and line[:1] not in (b"{", b"\0"):
                raise UserError(
                    f"{self.path} is no file of a store of conversations ({error}); move it away"
                ) from error
            logger.warning("%s: cut off a damaged last line (%s)", self.path, error)
            self._file.truncate(start)
        except BadLine:
            pass  # whole, and readers will complain of it
        if self.size and not self._last_line()[1].endswith(b"\n"):
            self._append(b"\n")
        self._sync()

    def _last_line(self) -> tuple[int, bytes]:
        """Where the last line begins, and its bytes."""
        handle, end = self._file.fileno(), self.size
        start, tail = end, b""
        while start > 0 and b"\n" not in tail[:-1]:
            length = min(_TAIL_BYTES, start)
            start -= length
            tail = os.pread(handle, length, start) + tail
        at = tail[:-1].rfind(b"\n") + 1
        return start + at, tail[at:]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size


class _Recent(NamedTuple):
    id: str
    ids: array | None  # all that the model read and answered


class _Parents:
    """Finds the exchange that a new one continues, among the last ones of this process."""

    def __init__(self) -> None:
        self._chain = Chain(os.urandom(32))
        self._known: OrderedDict[bytes, _Recent] = OrderedDict()
        self._held = 0

    def shorten(self, one: Trajectory) -> tuple[Trajectory, bytes]:
        """The exchange with what is new only, and the digest of all that was read and answered."""
        (turn,) = one.turns
        digest, found = self._chain.start(one), None
        for at, message in enumerate(turn.messages, 1):
            digest = self._chain.step(digest, message)
            if message["role"] == "assistant" and digest in self._known:
                found = digest, at
        digest = self._chain.step(digest, turn.shown)
        if found is None or found[1] == len(turn.messages):
            return one, digest
        self._known.move_to_end(found[0])
        parent, at, kept = self._known[found[0]], found[1], 0
        if turn.prompt_ids is not None and parent.ids is not None:
            pairs = enumerate(zip(parent.ids, turn.prompt_ids, strict=False))
            limit = min(len(parent.ids), len(turn.prompt_ids))
            kept = next((i for i, (old, new) in pairs if old != new), limit)
        prompt = None if turn.prompt_ids is None else turn.prompt_ids[kept:]
        new = replace(
            turn, messages=turn.messages[at:], continues=True, kept_ids=kept, prompt_ids=prompt
        )
        return replace(one, parent=parent.id, turns=(new,)), digest

    def remember(self, whole: Trajectory, digest: bytes, with_ids: bool) -> None:
        """A written exchange, as it was before it was shortened."""
        (turn,) = whole.turns
        ids = None
        if with_ids and turn.prompt_ids is not None:
            ids = array("i", (*turn.prompt_ids, *(turn.response_ids or ())))
        old = self._known.pop(digest, None)
        self._known[digest] = _Recent(whole.id, ids)
        self._held += _length(ids) - (0 if old is None else _length(old.ids))
        while len(self._known) > _REMEMBERED or self._held > _REMEMBERED_IDS:
            _, oldest = self._known.popitem(last=False)
            self._held -= _length(oldest.ids)


def _length(ids: array | None) -> int:
    return 0 if ids is None else len(ids)


class ConversationStore:
    """Appends exchanges and feedback, and reads whole conversations; see the top of this file.

    All methods may be called from several threads. Nothing is created or locked before the first
    line is appended.

    Args:
      directory: of the store.
      redactor: text -> (text to keep, what was replaced: kind -> number); applied to all texts
        before they are written. Ids of tokens are then left out, since they spell the text.
      sync_every: lines between two syncs to disk, see `LineFile`.

    Attributes:
      redacted: what the redactor replaced so far.
    """

    def __init__(
        self, directory: str | Path, *, redactor: Redact | None = None, sync_every: int = 1
    ) -> None:
        self.directory = Path(directory)
        self.redacted: Counter[str] = Counter()
        self._redactor, self._sync_every = redactor, sync_every
        self._mutex = threading.Lock()
        self._parents = _Parents()
        self._number: int | None = None
        self._lock: int | None = None
        self._exchanges: _StoreFile | None = None
        self._comments: _StoreFile | None = None

    # --- write ------------------------------------------------------------------------------------

    def append_exchange(self, trajectory: Trajectory) -> Trajectory:
        """Append one finished exchange; it is on disk when this returns.

        Args:
          trajectory: a conversation with an `id` that no other has. An exchange of one turn is
            given with all messages and prompt ids; only what is new is written where it continues
            an exchange that this object wrote. One with a `parent` is written as it is.

        Returns:
          what was written.

        Raises:
          ValueError: it breaks the schema or has no id.
          UserError: the disk refuses it, or another process writes here and there are no locks.
            Nothing of it is written then, and the next call may succeed.
        """
        if trajectory.id is None:
            raise ValueError("an exchange must have an id, that of its answer")
        with self._mutex:
            digest, one = None, trajectory
            if len(trajectory.turns) == 1 and trajectory.parent is None:
                one, digest = self._parents.shorten(trajectory)
            if self._redactor is not None:
                one = change_trajectory(one, self._redact)
            line = encode(one)
            self._open_exchanges().append(line)
            if digest is not None:
                self._parents.remember(trajectory, digest, self._redactor is None)
            return one

    def append_line(self, line: bytes) -> None:
        """Append a line that `Joiner.lines` gave.

        Raises:
          UserError: as for `append_exchange`.
        """
        with self._mutex:
            self._open_exchanges().append(line)

    def append_feedback(
        self, id: str, text: str, *, user: str | None = None, time: str | None = None
    ) -> None:
        """Append what a user said of the answer `id`; it is on disk when this returns.

        Args:
          id: of an exchange; it need not be in this store's own files.
          text: not empty; a number is no feedback.
          user: opaque id of who said it.
          time: ISO 8601 in UTC; now if not given.

        Raises:
          ValueError: a text is empty or cannot be encoded.
          UserError: as for `append_exchange`.
        """
        with self._mutex:
            if self._redactor is not None:
                text = self._redact(text)
                user = None if user is None else opaque(user, self._redact)
            line = encode_feedback(Feedback(id, text, time or now(), user))
            self._own_number()
            if self._comments is None:
                path = self._path("feedback", self._number)
                self._comments = _StoreFile(path, decode_feedback, self._sync_every)
            self._comments.append(line)

    def _redact(self, text: str) -> str:
        new, counts = self._redactor(text)
        self.redacted.update(counts)
        return new

    def _open_exchanges(self) -> _StoreFile:
        if self._exchanges is not None and self._exchanges.size >= _FILE_BYTES:
            self._close_files()
        self._own_number()
        if self._exchanges is None:
            path = self._path("exchanges", self._number)
            self._exchanges = _StoreFile(path, decode_line, self._sync_every)
        return self._exchanges

    def _own_number(self) -> None:
        """Lock the first number that nobody writes to and whose file is not full."""
        if self._lock is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the store {self.directory} cannot be made: {error.strerror}; choose a workdir "
                "that exists and is writable"
            ) from error
        for number in count():
            path = self._path("exchanges", number)
            if path.exists() and path.stat().st_size >= _FILE_BYTES:
                continue
            lock = take_lock(self.directory / f".lock_{number:04d}")
            if lock is not None:
                self._lock, self._number = lock, number
                return

    def _path(self, kind: str, number: int | None) -> Path:
        """The file of 'exchanges' or 'feedback' with this number."""
        return self.directory / f"{kind}_{number:04d}.jsonl"

    def _close_files(self) -> None:
        files = [file for file in (self._exchanges, self._comments) if file is not None]
        self._exchanges = self._comments = None
        try:
            for file in files:
                file.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = self._number = None

    def close(self) -> None:
        """Sync, close and give the lock back; a later append opens files again."""
        with self._mutex:
            self._close_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- read -------------------------------------------------------------------------------------

    def files(self, kind: str) -> list[Path]:
        """The files of 'exchanges' or 'feedback' that there are, in order."""
        pattern = re.compile(rf"{kind}_([0-9]{{4,}})\.jsonl")
        found = [(pattern.fullmatch(p.name), p) for p in self.directory.glob(f"{kind}_*.jsonl")]
        return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]

    def read(self, *, on_bad: str = "skip") -> Iterator[Trajectory]:
        """Whole conversations, ordered by where each began; memory is bounded, see `Joiner`.

        Each has an `id` (of its conversation or its first exchange), and each turn the `id` of its
        exchange and the `feedback` that was given to it. What the user said next is in the next
        turn; `Trajectory.feedback` gives the one or the other.

        Args:
          on_bad: 'error' stops at the first bad line; 'skip' leaves bad lines out and logs a
            warning with file and line for each. A torn last line is passed over in both cases.

        Raises:
          UserError: naming file and line, or a file that cannot be read.
        """
        joiner = Joiner()
        self.collect(joiner, on_bad=on_bad)
        yield from joiner.conversations()
        if joiner.alone:
            logger.warning(
                "%s: left out %d exchanges whose parents are not in the store",
                self.directory,
                joiner.alone,
            )
        if joiner.unknown:
            logger.warning(
                "%s: left out feedback on %d answers that are not in the store",
                self.directory,
                joiner.unknown,
            )

    def collect(self, joiner: Joiner, *, on_bad: str = "skip") -> None:
        """Give all exchanges and all feedback of the store to a joiner."""
        if on_bad not in ("error", "skip"):
            raise UserError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        for path in self.files("exchanges"):
            for one in _values(path, decode_line, on_bad):
                joiner.add(one)
        for path in self.files("feedback"):
            for one in _values(path, decode_feedback, on_bad):
                joiner.comment(one.id, one.text)


def take_lock(path: Path) -> int | None:
    """Lock a file, made if need be: the descriptor that holds the lock, or None if it is taken.

    Raises:
      UserError: the file cannot be made, or the file system has no locks.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose a workdir that is writable"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"{path} cannot be locked ({error.strerror}); use a workdir on a file system with "
            "file locks"
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the number only tells people who it is
        os.ftruncate(lock, 0)
        os.write(lock, encode_json(os.getpid()))
    return lock


def _values(path: Path, decode_line: Callable[[bytes], Any], on_bad: str) -> Iterator[Any]:
    """The values of a file's good lines."""
    with open_lines(path) as file:
        for number, line in numbered(file):
            try:
                value = decode_line(line)
            except NotJSON as error:
                if not line.endswith(b"\n"):
                    return  # torn, or being written just now
                _bad(path, number, line, error, on_bad)
            except (BadLine, NotATrajectory) as error:
                _bad(path, number, line, error, on_bad)
            else:
                yield value


def _bad(path: Path, number: int, line: bytes, error: Exception, on_bad: str) -> None:
    if on_bad == "error":
        raise UserError(complaint(path, number, line, error)) from error
    logger.warning("%s:%d: skipped: %s", path, number, error)
