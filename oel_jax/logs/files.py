"""Files of logs: found by path, directory or glob, plain or gzip, read record by record.

A file holds JSON Lines, or one JSON array of records as some data sets do. A directory is searched
for `*.jsonl`, `*.ndjson` and `*.json`, each also with `.gz`; the same command sees what has come
since. At most one record is in memory. Imports no JAX.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from oel_jax.base import paths
from oel_jax.base.errors import UserError

LONGEST = 16 * 2**20  # bytes of one record
_ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_CHUNK = 2**20


class Unusable(Exception):
    """A record, or the rest of a file, that cannot be used.

    Args:
      reason: in words that are the same for all records with this fault.
      detail: what was found here.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Record(NamedTuple):
    """One record of a log.

    Attributes:
        path: of the file.
        line: number from 1 of the line where it begins.
        value: what the JSON says, or why it cannot be used.
        raw: its bytes; b"" for a record of an array.
    """

    path: Path
    line: int
    value: Any | Unusable
    raw: bytes


def find(patterns: str | Sequence[str]) -> list[Path]:
    """The files of paths, directories and globs, each once; sorted within a pattern.

    Raises:
      UserError: a pattern is a URL or matches nothing.
    """
    found: dict[Path, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = paths.local(pattern, "a path of logs")
        if path.is_dir():
            matches = _inside(path)
        elif path.exists():
            matches = [path]
        else:
            matches = []
            for name in sorted(glob.glob(str(path), recursive=True)):
                matches += _inside(Path(name)) if Path(name).is_dir() else [Path(name)]
        if not matches and not path.is_dir():
            raise UserError(f"no log file matches {pattern!r}; check the path")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())


def _inside(directory: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.rglob("*")
        if path.name.lower().endswith(_ENDINGS)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def records(path: Path) -> Iterator[Record]:
    """All records of a file, bad ones too; a file that cannot be read is one bad record."""
    number = 1
    try:
        with _open(path) as file:
            for number, value, raw in _values(file):
                yield Record(path, number, value, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Record(path, number, Unusable("a damaged or cut-off gzip file", str(error)), b"")
    except OSError as error:
        yield Record(
            path, number, Unusable("a file that cannot be read", error.strerror or str(error)), b""
        )


def _open(path: Path) -> BinaryIO:
    file = path.open("rb")
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file


def _values(file: BinaryIO) -> Iterator[tuple[int, Any, bytes]]:
    number, first = 0, True
    while line := file.readline(LONGEST + 1):
        number += 1
        if first:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if first and line.lstrip()[:1] == b"[" and not _one_list(line):
            yield from _elements(file, line, number)
            return
        first = first and not line.strip()
        if len(line) > LONGEST and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            yield number, Unusable(f"a line of more than {LONGEST >> 20} MiB"), b""
        elif line.strip():
            yield number, _parse(line), line


def _one_list(line: bytes) -> bool:
    """Whether a line that begins like an array is one whole list of something else than records."""
    text = line.strip()
    return text.endswith(b"]") and text[1:].lstrip()[:1] != b"{" and len(text) > 2


def _parse(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", f"byte {error.start} of the line")
    try:
        return load(text)
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            return Unusable("an unfinished last line", "cut off, or being written now")
        return Unusable("not JSON", f"{error.msg}, column {error.colno}")
    except RecursionError:
        return Unusable("nested too deep")
    except ValueError as error:  # Python's limit on the digits of one integer
        return Unusable("a number that is too large", str(error)[:60])


_DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN: not there


def load(text: str) -> Any:
    """JSON with NaN and infinities as null, as tables are exported with."""
    return _DECODER.decode(text)


def _elements(file: BinaryIO, begin: bytes, number: int) -> Iterator[tuple[int, Any, bytes]]:
    """The elements of one array, with the line on which each begins."""
    data, ended = begin, False
    at = data.index(b"[") + 1
    text, left = "", b""
    number += data[:at].count(b"\n")
    data = data[at:]
    while True:
        try:
            text, left = _decoded(left + data, ended) if data or left else ("", b"")
        except UnicodeDecodeError as error:
            yield number, Unusable("not UTF-8", f"{error.reason} in an array"), b""
            return
        rest = text
        while True:
            skipped = len(rest) - len(rest.lstrip(" \t\r\n,"))
            number += rest.count("\n", 0, skipped)
            rest = rest[skipped:]
            if rest[:1] == "]":
                return
            try:
                value, end = _DECODER.raw_decode(rest) if rest else (None, 0)
            except json.JSONDecodeError as error:
                if ended or len(rest) > LONGEST:
                    reason = "not JSON" if ended else f"a record of more than {LONGEST >> 20} MiB"
                    yield number, Unusable(reason, f"{error.msg}, in an array"), b""
                    return
                break
            except RecursionError:
                yield number, Unusable("nested too deep"), b""
                return
            except ValueError as error:
                yield number, Unusable("a number that is too large", str(error)[:60]), b""
                return
            if not end:
                break
            if end == len(rest) and not ended:  # a number may go on in the next chunk
                break
            yield number, value, b""
            number += rest.count("\n", 0, end)
            rest = rest[end:]
        if ended:
            yield number, Unusable("an unfinished array", "cut off, or being written now"), b""
            return
        more = file.read(max(_CHUNK, len(rest)))
        ended = not more
        left, data = rest.encode("utf-8", "surrogatepass") + left, more


def _decoded(data: bytes, ended: bool) -> tuple[str, bytes]:
    """Text, and the bytes of a character that is not complete yet."""
    try:
        return data.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if ended or error.end < len(data) or len(data) - error.start > 3:
            raise
        return data[: error.start].decode("utf-8"), data[error.start :]
