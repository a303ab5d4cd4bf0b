"""Numbers of a run: `metrics.jsonl`, TensorBoard event files, and what the console shows.

A line of `metrics.jsonl` is

    {"stage": "consolidate", "round": 1, "step": 3, "values": {"loss": 0.21}, "time": {"at": ...}}

where everything but `time` is the same in a resumed and in an uninterrupted run. Imports no JAX.
"""

import json
import math
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.util import tensor_util

from oel_jax.base.errors import UserError
from oel_jax.base.files import write_bytes
from oel_jax.runs.tensorboard import Axis, EventFiles, prefix
from oel_jax.runs.workdir import Workdir

Value = float | tuple[float, float]  # a number, or (sum, count), whose mean is written


class Metrics:
    """Writes scalars, texts, histograms and settings of one run; a context manager.

    TensorBoard shows a workdir as one run, see `tensorboard`.
    """

    def __init__(self, workdir: Workdir, tensorboard: bool = True, axis: Axis | None = None):
        self._path, self._axis = workdir.metrics_file, axis or Axis()
        # A kill may have left half a line: it was never a metric.
        rows = _rows(self._path)
        if self._path.exists() and b"".join(line for _, line in rows) != self._path.read_bytes():
            write_bytes(self._path, b"".join(line for _, line in rows))
        self._file = self._path.open("ab")
        self._events = EventFiles(workdir.tensorboard) if tensorboard else None
        if self._events is not None and self._events.empty:  # of an older version, or switched on
            for row, _ in rows:
                timed = {k: v for k, v in row.get("time", {}).items() if k != "at"}
                self._show(row["stage"], row["step"], row["round"], row["values"] | timed)

    def scalars(
        self,
        stage: str,
        step: int,
        values: Mapping[str, Value],
        round: int = 0,
        time_values: Mapping[str, Value] | None = None,
    ) -> None:
        """Write one row.

        Args:
          stage: e.g. 'consolidate'.
          step: optimizer step, chain step or round.
          values: name -> number or (sum, count); a pair with count 0 is left out. NaN and infinity
            are written as the strings "NaN", "Infinity", "-Infinity".
          round: the round, from 1; 0 = the whole run.
          time_values: numbers that depend on the machine (tokens/s); kept under "time".
        """
        means, timed = mean_values(values), mean_values(time_values or {})
        row = {
            "stage": stage,
            "round": int(round),
            "step": int(step),
            "values": {name: _json_number(value) for name, value in means.items()},
            "time": {"at": time.time()} | {k: _json_number(v) for k, v in timed.items()},
        }
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        if self._events is not None:
            self._show(stage, int(step), int(round), means | timed)

    def _show(self, stage: str, step: int, round: int, values: Mapping[str, Any]) -> None:
        """A row in TensorBoard."""
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=f"{prefix(stage)}/{name}", simple_value=float(value))
                for name, value in values.items()
            ]
        )
        if values:
            self._events.add(summary, self._axis.place(stage, round, step))

    def text(self, tag: str, step: int, text: str, stage: str, round: int = 0) -> None:
        """Show a text in TensorBoard (`tag` under 'Text'), line breaks kept as in the original.

        Args:
          step: as for `scalars`; of an evaluation the round. The same for what follows.
        """
        if self._events is None:
            return
        shown = "    " + text.replace("\n", "\n    ")  # Markdown: an indented block is literal
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[shown.encode("utf-8")]
        )
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._add(summary_pb2.Summary(value=[value]), step, stage, round)

    def histogram(
        self, tag: str, step: int, values: Sequence[float], stage: str, round: int = 0
    ) -> None:
        """Show how `values` (not empty) are distributed, in TensorBoard alone."""
        if self._events is not None:
            # Not the tag of the scalar, which is the mean.
            made = histogram_pb(f"{tag}_histogram", np.asarray(values, np.float64))
            self._add(made, step, stage, round)

    def bars(
        self,
        tag: str,
        step: int,
        ends: Sequence[float],
        heights: Sequence[float],
        stage: str,
        round: int = 0,
    ) -> None:
        """Show bars of given heights as a histogram in TensorBoard; bar i ends at `ends[i]`."""
        if self._events is None:
            return
        starts = [0.0, *ends[:-1]]
        rows = np.array([starts, ends, heights], np.float64).T
        made = histogram_pb(tag, np.zeros(1), buckets=1)  # for its metadata
        made.value[0].tensor.CopyFrom(tensor_util.make_tensor_proto(rows))
        self._add(made, step, stage, round)

    def image(self, tag: str, step: int, png: bytes, stage: str, round: int = 0) -> None:
        """Show a PNG in TensorBoard."""
        if self._events is not None:
            width, height = struct.unpack(">II", png[16:24])  # the header comes first in every PNG
            shown = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png
            )
            value = summary_pb2.Summary.Value(tag=tag, image=shown)
            self._add(summary_pb2.Summary(value=[value]), step, stage, round)

    def _add(self, summary: summary_pb2.Summary, step: int, stage: str, round: int) -> None:
        for value in summary.value:
            value.tag = f"{prefix(stage)}/{value.tag}"
        by_round = stage.startswith("evaluate_")
        place = int(step) if by_round else self._axis.place(stage, round, int(step))
        self._events.add(summary, place)

    def settings(
        self, fields: Mapping[str, object], results: Mapping[str, float], step: int
    ) -> None:
        """Put the run's settings next to its results in TensorBoard's HPARAMS view.

        Args:
          fields: dotted config path -> value; what is no number, text or flag is shown as JSON.
          results: the run's numbers so far, e.g. the pass rate after the last round.
          step: the round they were measured after.
        """
        if self._events is None:
            return
        shown = {
            path: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for path, value in fields.items()
        }
        made = hparams_pb(shown, trial_id="")
        # TensorBoard shows the mean of trials that have one name. Without a name a trial is called
        # by the place of its files below --logdir, which no two runs share.
        plugin = made.value[0].metadata.plugin_data
        started = HParamsPluginData.FromString(plugin.content)
        started.session_start_info.group_name = ""
        plugin.content = started.SerializeToString()
        self._events.add(made, 0)
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in results.items()
            ]
        )
        self._events.add(summary, int(step))

    def rewind(self, stage: str, round: int, step: int) -> None:
        """Forget the rows of (stage, round) after `step`: they are about to be computed again."""
        rows = _rows(self._path)
        kept = [line for row, line in rows if not _is_later(row, stage, round, step)]
        if len(kept) < len(rows):
            self._file.close()
            write_bytes(self._path, b"".join(kept))
            self._file = self._path.open("ab")
        if self._events is not None and len(kept) < len(rows):
            gone = {
                (f"{prefix(stage)}/{name}", self._axis.place(stage, round, row["step"]))
                for row, _ in rows
                if _is_later(row, stage, round, step)
                for name in row["values"] | row.get("time", {})
            }
            self._events.drop(gone)

    def close(self) -> None:
        """Write out what is still buffered."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics:
    """In the place of `Metrics` on processes that write nothing."""

    def scalars(self, *_: object, **__: object) -> None:
        """Nothing."""

    text = histogram = bars = image = settings = rewind = scalars

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; half a line at the end (a kill) is ignored.

    Raises:
      UserError: a line that is not a row, with file and line.
    """
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    rows: list[tuple[dict[str, Any], bytes]] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"stage", "round", "step", "values"} <= row.keys():
            raise UserError(f"{path}:{number} is not a row of metrics; restore or delete the file")
        rows.append((row, line))
    return rows


def _is_later(row: Mapping[str, Any], stage: str, round: int, step: int) -> bool:
    return (row["stage"], row["round"]) == (stage, round) and row["step"] > step


def mean_values(values: Mapping[str, Value]) -> dict[str, float]:
    means = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            total, count = (float(part) for part in value)
            if not count:
                continue
            means[name] = total / count
        else:
            means[name] = float(value)
    return means


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# --- console --------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as '0:07', '12:34' or '1:02:03'."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """Outside text for a terminal: what is not printable (escape sequences, bells) becomes '?'."""
    return "".join(char if char.isprintable() else "?" for char in text)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A plain text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(parts).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), ruler, *map(line, cells[1:])])
