"""Playing games and recording them, so that none is played twice: the one way in which all do it.

Each game has a place in a file. What is recorded is not played again; every process appends its
part of the games to a file for itself (`X.process_001.jsonl`), and process 0 puts the parts into
the files they belong to, in the order of the jobs: after all have played, and first of all when a
run is resumed. So a kill at any instant loses the games in progress and no other.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from oel_jax.actor.play import Job, Played, Player, in_order, play
from oel_jax.base.files import write_bytes
from oel_jax.data.line_files import LineWriter, decode_json, encode_json
from oel_jax.parallel import processes
from oel_jax.runs.console import Progress, waiting

T = TypeVar("T")


@dataclass(frozen=True)
class GameFile:
    """A file to be filled, and the jobs whose games belong into it, in their order."""

    path: Path
    jobs: Sequence[Job]


@dataclass(frozen=True)
class Format(Generic[T]):
    """What is kept of a game, and how a line shows whose game it is.

    Attributes:
      record: what to keep of a game.
      name: of a record: a list of plain JSON types; None if it cannot be any job's.
      name_of_job: the same of the job that it is a record of.
      decode, encode: see `LineWriter`.
    """

    record: Callable[[Played], T]
    name: Callable[[T], list[Any] | None]
    name_of_job: Callable[[Job], list[Any]]
    decode: Callable[[bytes], T] = decode_json
    encode: Callable[[T], bytes] = encode_json

    def key(self, record: T) -> Hashable:
        name = self.name(record)
        return None if name is None else tuple(name)

    def open(self, path: Path) -> LineWriter[T]:
        """A writer for one of the files."""
        return LineWriter(path, self.decode, self.encode, self.key, sync_every=64)


def record_games(
    files: Sequence[GameFile],
    form: Format[T],
    make_player: Callable[[int], Player],
    label: str,
    console_every: float,
) -> None:
    """Fill the files; games that are recorded are not played again.

    Args:
      make_player: number of games for this process -> who plays them. It is called only if there
        is something to play, with the number of all games, played or not: a resumed run is the
        same.
      label: what the console calls it.
      console_every: seconds between two lines of progress.
    """
    for directory in {file.path.parent for file in files}:
        directory.mkdir(parents=True, exist_ok=True)
    processes.first_does("games so far", lambda: _merge(files, form))
    recorded = processes.from_first(
        [[form.name(one) for one in _records(file.path, form)] for file in files]
        if processes.is_first()
        else []
    )
    missing: list[tuple[Job, Path]] = []
    for file, names in zip(files, recorded, strict=True):
        done = {tuple(name) for name in names if name is not None}
        missing += [
            (job, file.path) for job in file.jobs if tuple(form.name_of_job(job)) not in done
        ]
    total = sum(len(file.jobs) for file in files)
    mine, done = processes.share(missing), total - len(missing)
    progress = Progress(done + len(mine), "games", label, every=console_every, done=done)
    with progress:
        if mine:
            player = make_player(-(-total // processes.count()))
            jobs = [job for job, _ in mine]
            played = in_order(play(player, jobs, progress), jobs)
            _write(played, [path for _, path in mine], form)
    with waiting(f"{label}: other processes play"):
        processes.wait(f"{label} is played")
    processes.first_does(f"{label} is merged", lambda: _merge(files, form))


def read_records(file: GameFile, form: Format[T]) -> list[T]:
    """The records of a file that is filled, in the order of its jobs; the same on all processes.

    The records must be plain JSON types.
    """
    return processes.from_first(_records(file.path, form) if processes.is_first() else [])


def remove_records(path: Path) -> None:
    """Remove a file of records, once the result that was made of it is written."""
    processes.wait(f"{path.name} is used")
    if processes.is_first():
        path.unlink(missing_ok=True)


def _records(path: Path, form: Format[T]) -> list[T]:
    """The records of a file; a torn last line is cut off."""
    if not path.exists():
        return []
    with form.open(path) as writer:
        return writer.finished


def _merge(files: Iterable[GameFile], form: Format[T]) -> None:
    """Put the parts of all processes into the files they belong to, in the order of the jobs.

    Records that are no job's (the config was changed) are dropped.
    """
    for file in files:
        parts = sorted(file.path.parent.glob(f"{file.path.stem}.process_*.jsonl"))
        there = _records(file.path, form)
        everything = there + [record for part in parts for record in _records(part, form)]
        by_name = {form.key(record): record for record in reversed(everything)}
        names = [tuple(form.name_of_job(job)) for job in file.jobs]
        kept = [name for name in names if name in by_name]
        if kept != [form.key(record) for record in there]:
            lines = [form.encode(by_name[name]) for name in kept]
            write_bytes(file.path, b"".join(lines))
        for part in parts:
            part.unlink()


def _own(path: Path) -> Path:
    """The file of this process that will become a part of `path`; `path` itself if it is alone."""
    if processes.count() == 1:
        return path
    return path.with_name(f"{path.stem}.process_{processes.index():03d}.jsonl")


def _write(played: Iterable[Played], paths: Iterable[Path], form: Format[T]) -> None:
    """Append games to their files as they come; one file is open at a time."""
    writer: LineWriter[T] | None = None
    try:
        for game, path in zip(played, paths, strict=True):
            if writer is None or writer.path != _own(path):
                if writer is not None:
                    writer.close()
                writer = form.open(_own(path))
            writer.write(form.record(game))
    finally:
        if writer is not None:
            writer.close()
