"""Files of trajectories: reading them, and appending to them safely."""

import logging
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from oel_jax.base.errors import UserError
from oel_jax.data.line_files import LineWriter, NotJSON, complaint, numbered, open_lines
from oel_jax.data.trajectories import PURPOSES, Trajectory
from oel_jax.data.trajectory_schema import NotATrajectory, decode_line, encode

logger = logging.getLogger(__name__)


def write_line(file: BinaryIO, trajectory: Trajectory) -> None:
    """Write one trajectory as one line to a binary file. Raises ValueError if it breaks the schema.

    For a file that must survive a crash use `TrajectoryWriter`.
    """
    file.write(encode(trajectory))


def read(path: str | Path, *, on_bad: str = "error") -> list[Trajectory]:
    """All trajectories of a file, ordered by (round, chain, seed), not by who finished first.

    Conversations, which have no seed, keep the order of the file.

    Args:
        path: a JSON Lines file of this schema or of schema 1.
        on_bad: 'error' stops at the first bad line; 'skip' leaves bad lines out and logs a warning
            with file and line for each.

    Raises:
        UserError: naming file and line: not UTF-8, not JSON, wrong schema version, unknown, missing
            or doubled key, wrong type or range, a game that an earlier line holds already; naming
            the file: it cannot be read, is empty, or has no good line.
    """
    path = Path(path)
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    found: list[Trajectory] = []
    seen: dict[tuple[Any, ...], int] = {}
    number = skipped = 0
    with open_lines(path) as file:
        for number, line in numbered(file):
            try:
                trajectory = decode_line(line)
                if trajectory.key in seen:
                    raise NotATrajectory(f"the game of line {seen[trajectory.key]} again")
            except (NotJSON, NotATrajectory) as error:
                if on_bad == "error":
                    raise UserError(complaint(path, number, line, error)) from error
                logger.warning("%s:%d: skipped: %s", path, number, error)
                skipped += 1
                continue
            seen[trajectory.key] = number
            found.append(trajectory)
    if number == 0:
        raise UserError(
            f"trajectory file {path} is empty; remove it and run the deploy stage again"
        )
    if not found:
        raise UserError(f"trajectory file {path} has no good line ({skipped} skipped)")
    if skipped:
        logger.warning("%s: skipped %d of %d lines", path, skipped, number)
    return sorted(found, key=_order)


def _order(one: Trajectory) -> tuple[int, int, int]:
    return tuple(-1 if value is None else value for value in (one.round, one.chain, one.seed))


class TrajectoryWriter(LineWriter[Trajectory]):
    """Appends trajectories to a file, see `LineWriter`.

    with TrajectoryWriter(path) as writer:
        done = {game.seed for game in writer.finished}
        writer.write(trajectory)
    """

    def __init__(self, path: str | Path, *, sync_every: int = 1) -> None:
        super().__init__(path, decode_line, encode, lambda one: one.key, sync_every=sync_every)


class Stored(NamedTuple):
    """A trajectory of a store, and the file it is in."""

    path: Path
    trajectory: Trajectory


class TrajectoryStore:
    """The trajectories of a round: for each purpose, files in order, each with some of them.

    The order of the trajectories of a purpose is that of the files, then that within a file. How
    many are in a file says nothing; who reads a store asks for a range.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._counts: dict[str, list[tuple[Path, int]]] = {}
        self._last: tuple[Path, list[Trajectory]] | None = None

    def path(self, purpose: str, number: int) -> Path:
        """File `number` (from 0) of a purpose; of 'extract', that of chain `number`."""
        if purpose not in PURPOSES:
            raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}; got {purpose!r}")
        return self.directory / f"{purpose}_{number:04d}.jsonl"

    def files(self, purpose: str) -> list[Path]:
        """The files that there are, in order."""
        pattern = re.compile(rf"{purpose}_([0-9]{{4,}})\.jsonl")
        found = [(pattern.fullmatch(p.name), p) for p in self.directory.glob(f"{purpose}_*.jsonl")]
        return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]

    def read(self, purpose: str, start: int, stop: int) -> list[Stored]:
        """Trajectories `start` to `stop - 1` of a purpose, counted from 0.

        Only files that hold some of them are read.

        Raises:
          UserError: there are fewer, or a file is empty or has a bad line (with file and line).
        """
        found, first = [], 0
        for path, count in self._counted(purpose):
            if first < stop and first + count > start:
                inside = self._content(path)[max(start - first, 0) : stop - first]
                found += [Stored(path, trajectory) for trajectory in inside]
            first += count
        if len(found) < stop - start:
            raise UserError(
                f"{self.directory} holds {first} trajectories for {purpose!r}, and numbers "
                f"{start + 1} to {stop} are needed; run the {_STAGES[purpose]} stage again"
            )
        return found

    def count(self, purpose: str) -> int:
        """How many trajectories there are for a purpose."""
        return sum(count for _, count in self._counted(purpose))

    def _counted(self, purpose: str) -> list[tuple[Path, int]]:
        """(file, number of its lines); an empty file is refused."""
        if purpose not in self._counts:
            counts = []
            for path in self.files(purpose):
                with open_lines(path) as file:
                    counts.append((path, sum(1 for _ in file)))
                if not counts[-1][1]:
                    read(path)  # says what is wrong
            self._counts[purpose] = counts
        return self._counts[purpose]

    def _content(self, path: Path) -> list[Trajectory]:
        if self._last is None or self._last[0] != path:
            self._last = path, read(path)
        return self._last[1]


_STAGES = {"extract": "deploy", "deploy": "deploy", "demonstrate": "demonstrate"}
