"""The shelf of a study: work that one run has finished and that other runs take over.

What can be taken is said by `study/shares.py`, by keys over all that it depends on. It is
hard-linked (copied across file systems) instead of made again. Finished files are replaced, and
never written to, so a link cannot change unnoticed.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from oel_jax.base.files import read_json, write_json
from oel_jax.runs.metrics import Metrics, NoMetrics, read_metrics
from oel_jax.runs.stages import function, stage_named
from oel_jax.runs.workdir import Workdir, sha256
from oel_jax.study.shares import SCHEMA, Shares


class Shelf:
    """Finished work of a study's runs, by key; kept in WORKDIR/shelf.json."""

    def __init__(self, root: Path):
        self._root = root
        self._file = root / "shelf.json"
        self._entries: dict[str, Any] = {}
        if self._file.exists():
            kept = read_json(self._file)
            # Of another version: nothing is lost, equal work is only done again.
            self._entries = kept["entries"] if kept.get("schema") == SCHEMA else {}

    def take(
        self,
        config: ConfigDict,
        workdir: Workdir,
        metrics: Metrics | NoMetrics,
        round_number: int,
        stage: str,
    ) -> list[Path] | None:
        """Link what equal runs have made of a stage.

        Returns:
          The files of the stage if all of it was here, its metrics copied; else None, with the
          parts that were here in place, from which the stage continues.
        """
        shares = _shares(config, workdir, round_number, stage)
        files = self._link(workdir, shares.whole) if shares.whole else None
        if files is not None:
            source = Workdir(self._root / self._entries[shares.whole]["run"])
            _copy_metrics(source, metrics, round_number, stage)
            return files
        for part in shares.parts:
            if not all(path.exists() for path in part.files):
                self._link(workdir, part.key)
        return None

    def put(self, config: ConfigDict, workdir: Workdir, round_number: int, stage: str) -> None:
        """Offer a finished stage to the other runs."""
        entry = workdir.entry(round_number, stage)
        recorded = {workdir.root / file["path"]: file for file in entry["files"]}
        shares = _shares(config, workdir, round_number, stage)
        found = {
            part.key: [recorded[path] for path in part.files if path in recorded]
            for part in shares.parts
        }
        if shares.whole:
            found[shares.whole] = list(recorded.values())
        name = workdir.root.relative_to(self._root).as_posix()
        for key, files in found.items():
            if files and not self._usable(key):
                self._entries[key] = {"run": name, "files": files}
        write_json(self._file, {"schema": SCHEMA, "entries": self._entries})

    def _sources(self, key: str) -> list[tuple[Path, Mapping[str, Any]]]:
        """(existing path, recorded size and SHA-256) of an entry's files; [] for a stray path."""
        entry = self._entries.get(key, {"run": "", "files": []})
        names = [entry["run"], *(file["path"] for file in entry["files"])]
        if any(PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts for n in names):
            return []
        return [(self._root / entry["run"] / file["path"], file) for file in entry["files"]]

    def _usable(self, key: str) -> bool:
        """Whether an entry's files are there with their sizes."""
        sources = self._sources(key)
        return bool(sources) and all(
            path.is_file() and path.stat().st_size == file["size"] for path, file in sources
        )

    def _link(self, workdir: Workdir, key: str) -> list[Path] | None:
        """Put an entry's files into a run, or None if they are not there as they were recorded."""
        if not self._usable(key):
            return None
        sources = self._sources(key)
        if any(sha256(path) != file["sha256"] for path, file in sources):
            return None
        targets = [workdir.root / file["path"] for _, file in sources]
        for (source, _), target in zip(sources, targets, strict=True):
            if not (target.exists() and target.samefile(source)):
                _place(source, target)
        return targets


def _shares(config: ConfigDict, workdir: Workdir, round_number: int, stage: str) -> Shares:
    named = stage_named(stage).shares
    return function(named)(config, workdir, round_number) if named else Shares()


def _copy_metrics(
    source: Workdir, metrics: Metrics | NoMetrics, round_number: int, stage: str
) -> None:
    """The rows of a stage, but for those of its time."""
    for row in read_metrics(source.metrics_file):
        if row["round"] != round_number or row["stage"] != stage:
            continue
        values = {name: float(value) for name, value in row["values"].items()}
        metrics.rewind(stage, round_number, row["step"] - 1)
        metrics.scalars(stage, row["step"], values, round=round_number)


def _place(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none; replaces what is there at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.shelf.tmp")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
