"""One TensorBoard run for a workdir: the event files in WORKDIR/tensorboard.

Tags are stable (`consolidate/loss`, `evaluate/pass_rate`) and steps global over rounds, so that two
experiments can be laid over each other. A point that is written again replaces the old one: the
events are then written out anew without it, since TensorBoard itself can only forget all that a run
has from a step on. Written by the `tensorboard` package alone; TensorFlow is never imported.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

Point = tuple[str, int]  # (tag, global step)
_VERSION = "brain.Event:2"  # of the format of event files


class Axis:
    """Where the steps of a stage are on the x axis.

    Attributes:
      per_round: stage -> steps of a round, for stages whose steps begin anew in each round. Of all
        others the step is the round.
    """

    def __init__(self, per_round: Mapping[str, int] | None = None):
        self.per_round = per_round or {}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Axis":
        """Training and the evaluation of policies by optimizer steps, extraction by games read."""
        steps, games = config["consolidate"]["steps"], config["extract"]["n_run"]
        by_step = ("consolidate", "evaluate_consolidated", "evaluate_skills")
        by_game = ("extract", "evaluate_in_context")
        return cls(dict.fromkeys(by_step, steps) | dict.fromkeys(by_game, games))

    def place(self, stage: str, round_number: int, step: int) -> int:
        """The global step."""
        return max(round_number - 1, 0) * self.per_round.get(stage, 0) + step


def prefix(stage: str) -> str:
    """What begins the tags of a stage; what is the same thing at another time has the same one."""
    if stage in ("evaluate_start", "evaluate_consolidated"):
        return "evaluate"
    return "time" if stage.startswith("time_") else stage


class EventFiles:
    """Writes points into the event files of one directory; each point is there once.

    The files are numbered, since TensorBoard reads them in the order of their names.
    """

    def __init__(self, directory: Path):
        self._directory, self._file = directory, None
        for older in ("run", "round_*"):  # versions that had a TensorBoard run for every stage
            _delete(directory.glob(f"{older}/**/*tfevents*"))
        self._points: set[Point] = set()
        doubled = False
        for _, points in _events(directory):
            doubled |= not self._points.isdisjoint(points)
            self._points |= set(points)
        if doubled:  # killed while the events were written anew
            self._write_anew(set())

    @property
    def empty(self) -> bool:
        """Whether there is no point yet."""
        return not self._points

    def add(self, summary: summary_pb2.Summary, step: int) -> None:
        """Write points; those that are there are replaced."""
        points = {(value.tag, step) for value in summary.value}
        self.drop(points)
        self._points |= points
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = self._next_name().open("ab")
            _write(self._file, event_pb2.Event(wall_time=time.time(), file_version=_VERSION))
        _write(self._file, event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def drop(self, points: Set[Point]) -> None:
        """Forget points, if they are there."""
        if not self._points.isdisjoint(points):
            self._write_anew(points)

    def _write_anew(self, unwanted: Set[Point]) -> None:
        """All points once, the newest of each, but for those that are unwanted."""
        self.close()
        old = sorted(self._directory.glob("*tfevents*"))
        newest: dict[Point, tuple[float, Any]] = {}
        for event, points in _events(self._directory):
            for value, point in zip(event.summary.value, points, strict=True):
                newest[point] = (event.wall_time, value)
        self._points = newest.keys() - unwanted
        whole = self._directory / ".anew.tmp"
        with whole.open("wb") as file:
            _write(file, event_pb2.Event(wall_time=time.time(), file_version=_VERSION))
            # A viewer that is open forgets what it has read, and reads all of it again.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            _write(file, event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
            for point, (at, value) in newest.items():
                if point in self._points:
                    summary = summary_pb2.Summary(value=[value])
                    _write(file, event_pb2.Event(wall_time=at, step=point[1], summary=summary))
        name = self._next_name()
        os.replace(whole, name)
        _delete(old)
        self._file = name.open("ab")

    def _next_name(self) -> Path:
        numbers = [int(file.name.split(".")[3]) for file in self._directory.glob("*tfevents*")]
        return self._directory / f"events.out.tfevents.{max(numbers, default=0) + 1:010d}.oel_jax"

    def close(self) -> None:
        """Close the file; more can be added."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(file: BinaryIO, event: event_pb2.Event) -> None:
    RecordWriter(file).write(event.SerializeToString())
    file.flush()


def _events(directory: Path) -> Iterator[tuple[event_pb2.Event, list[Point]]]:
    """All events with points, in the order in which they were written; a cut last one is not."""
    for file in sorted(directory.glob("*tfevents*")):
        for raw in RawEventFileLoader(str(file)).Load():
            event = event_pb2.Event.FromString(raw)
            points = [(value.tag, event.step) for value in event.summary.value]
            if points:
                yield event, points


def _delete(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink(missing_ok=True)
