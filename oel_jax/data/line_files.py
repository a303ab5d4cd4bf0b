"""Files of JSON lines that grow while games end; safe against a crash at any instant."""

import json
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

from oel_jax.base.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class NotJSON(ValueError):
    """The bytes are not a JSON text: a torn write, or not our file."""


class BadLine(ValueError):
    """A JSON text that is not what this file holds."""


def open_lines(path: Path) -> BinaryIO:
    """A file for reading. Raises UserError if it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"trajectory file {path} cannot be read: {error.strerror}; "
            "check the path, or run the deploy stage that writes it"
        ) from error


def numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its newline) of a file."""
    return enumerate(iter(file.readline, b""), start=1)


def complaint(path: Path, number: int, line: bytes, error: Exception) -> str:
    """What to say of a bad line: where it is, what is wrong, and what to do."""
    if isinstance(error, NotJSON) and not line.endswith(b"\n"):
        advice = "the last line was cut off; run the stage that writes this file again to redo it"
    else:
        advice = "correct or remove the line, or read the file with on_bad='skip'"
    return f"{path}:{number}: {error}; {advice}"


def decode_json(line: bytes) -> Any:
    """One line as plain JSON. Raises `NotJSON`."""
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise NotJSON(f"not JSON ({error})") from error


def encode_json(value: Any) -> bytes:
    """The line of plain JSON, with its newline."""
    return json.dumps(value).encode("utf-8") + b"\n"


class LineFile:
    """A file of lines that only grows: a line is there whole, or not at all.

    A line reaches the file by one append, is flushed at once, and is synced to disk every
    `sync_every` lines and on `close`. A write that fails (disk full) leaves the file without the
    partial line, and the next write may succeed.

    Args:
      path: the file; its directory must exist. It is created if need be.
      sync_every: lines between two syncs; 1 loses nothing when the machine goes down, a larger
        number may lose that many last lines in that case (none when only the process dies).

    Raises:
      UserError: the file cannot be opened.
    """

    advice = "make room and run the same command again, it resumes from here"

    def __init__(self, path: str | Path, *, sync_every: int = 1) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1, got {sync_every}")
        self.path = Path(path)
        self._sync_every, self._unsynced = sync_every, 0
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"file {self.path} cannot be written: {error.strerror}; "
                "choose a workdir that exists and is writable"
            ) from error

    def append(self, line: bytes) -> None:
        """Append one line, which ends in a newline.

        Raises:
          UserError: the disk refuses the write; the file then ends with the line before.
        """
        self._append(line)
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self._sync()

    def _append(self, line: bytes) -> None:
        start = os.fstat(self._file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; {self.advice}"
            ) from error
        finally:
            if rest:  # neither a full disk nor Ctrl-C between two partial writes leaves half a line
                self._file.truncate(start)

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # some file systems find only now that the disk is full
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; {self.advice}"
            ) from error
        self._unsynced = 0

    def close(self) -> None:
        """Sync and close; closing twice does nothing."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LineWriter(LineFile, Generic[T]):
    """Appends values to a file, one line each; safe against a crash at any instant.

    Opening creates the file, or reads the values of an existing one: `finished` holds them in the
    order of the file, so that only missing ones are made. A torn last line (not JSON) is cut off
    with a warning, a complete last line without its newline gets it. Anything else that is wrong is
    a UserError with file and line, and the file stays as it is.

    Args:
      path: the file; its directory must exist.
      decode: a line -> a value. Raises `NotJSON` or `BadLine`.
      encode: a value -> its line. Raises ValueError for a value that readers would refuse.
      key: what identifies a value; a file holds it once. None: any number of times.
      sync_every: see `LineFile`.

    Raises:
      UserError: the file cannot be opened or written, or a line other than the last is bad.
    """

    def __init__(
        self,
        path: str | Path,
        decode: Callable[[bytes], T],
        encode: Callable[[T], bytes],
        key: Callable[[T], Hashable],
        *,
        sync_every: int = 1,
    ) -> None:
        super().__init__(path, sync_every=sync_every)
        self._decode, self._encode, self._key = decode, encode, key
        try:
            self.finished = self._recover()
        except UserError:
            self._file.close()
            raise
        self._keys = set(map(key, self.finished)) - {None}

    def _recover(self) -> list[T]:
        """Values already in the file; repairs its last line."""
        values: list[T] = []
        keys: set[Hashable] = set()
        end = 0  # of the last good line
        with open_lines(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            for number, line in numbered(file):
                try:
                    value = self._decode(line)
                    if self._key(value) in keys:
                        raise BadLine("a game that an earlier line holds already")
                except (NotJSON, BadLine) as error:
                    # A first line that does not even begin like JSON is somebody else's file.
                    ours = number > 1 or line[:1] in (b"{", b"\0")
                    if isinstance(error, NotJSON) and end + len(line) == size and ours:
                        logger.warning(
                            "%s:%d: cut off a damaged last line (%s)", self.path, number, error
                        )
                        break
                    raise UserError(complaint(self.path, number, line, error)) from error
                values.append(value)
                keys |= {self._key(value)} - {None}
                end += len(line)
        self._file.truncate(end)
        if values and not line.endswith(b"\n") and end == size:
            self._append(b"\n")
        self._sync()
        return values

    def write(self, value: T) -> None:
        """Append one value.

        Raises:
          ValueError: readers would refuse it, or the file holds its key already.
          UserError: the disk refuses the write; the file then ends with the line before.
        """
        key = self._key(value)
        if key in self._keys:
            raise ValueError(f"{self.path} holds the game {key} already")
        self.append(self._encode(value))
        self._keys |= {key} - {None}
