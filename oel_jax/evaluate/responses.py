"""Answers of a policy to a task, kept one by one so that a stopped evaluation can resume."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oel_jax.base.files import write_bytes


class Place(NamedTuple):
    """Which answer: task, document, request of the document, and which of several drawn for it."""

    task: str | None
    doc: int | None
    index: int
    repeat: int = 0


@dataclass(frozen=True)
class Answer:
    """A response as it was decoded, thought included.

    Attributes:
      tokens: how many were generated, the stop token included.
      stopped: a stop token ended it (False: the budget did).
    """

    response: str
    tokens: int
    stopped: bool


def prompt_digest(ids: Sequence[int]) -> str:
    """A short hash of prompt ids."""
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:16]


class Responses:
    """Answers by place, in memory and, where a file is given, in it: one JSON object a line.

    The first line holds the settings. A file of other settings, and whatever follows a torn
    line, is dropped: those answers are made again.
    """

    def __init__(self, file: Path | None = None, settings: Mapping[str, Any] | None = None):
        self._known: dict[Place, tuple[str, Answer]] = {}
        self._out = None
        if file is None:
            return
        header = json.dumps({"settings": settings}, ensure_ascii=False).encode() + b"\n"
        kept = self._read(file, header)
        write_bytes(file, b"".join([header, *kept]))
        self._out = file.open("ab")

    def _read(self, file: Path, header: bytes) -> list[bytes]:
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        kept: list[bytes] = []
        for line in lines[1:] if lines[:1] == [header] else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            place = Place(*(row[name] for name in Place._fields))
            answer = Answer(*(row[name] for name in ("response", "tokens", "stopped")))
            self._known[place] = (row["prompt"], answer)
            kept.append(line)
        return kept

    def find(self, place: Place, digest: str) -> Answer | None:
        """The answer there, if it was given to the very same prompt."""
        known = self._known.get(place)
        return known[1] if known is not None and known[0] == digest else None

    def add(self, place: Place, digest: str, answer: Answer) -> None:
        """Keep an answer; it survives a kill from here on."""
        self._known[place] = (digest, answer)
        if self._out is not None:
            row = place._asdict() | {"prompt": digest} | asdict(answer)
            self._out.write(json.dumps(row).encode() + b"\n")
            self._out.flush()

    @property
    def answers(self) -> list[Answer]:
        """All answers."""
        return [answer for _, answer in self._known.values()]

    def close(self) -> None:
        """Write out what is still buffered."""
        if self._out is not None:
            self._out.close()
