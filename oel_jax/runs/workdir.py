"""The name of every artifact of a run, and the record of what is finished.

    WORKDIR/
      config.json     the config the run was started with
      manifest.json   finished stages with size and SHA-256 of their files; config changes; the date
                      that chat templates show
      round_001/
        trajectories/ extract_0000.jsonl .. (games for knowledge, one file per chain),
                      deploy_0000.jsonl .. (games whose answers are trained on),
                      demonstrate_0000.jsonl .. (played with knowledge; off-policy baselines only);
                      of a chat round also heldout_0000.jsonl and snapshot.json
        knowledge/    chain_00/step_003.json .. (after 3 games), knowledge.json (the K texts);
                      review.json, review.md, approved.json (with extract.review);
                      coach_deploy_0000.jsonl .. (with coach contexts: a text for each answer)
        preflight.json  what each text gains in context, measured before consolidation
        consolidate/  Orbax checkpoints inside the round; gone when it is consolidated
        policy/       the model handed to the next round, as a Hugging Face directory
        adapter/      with LoRA: what the policy was made by, for PEFT; belongs to its start
        policy_step_005/ ..   the same after these optimizer steps, if `evaluate.steps` asks
        evaluate/     consolidated.json, in_context.json, ..., and *.samples.json: some games
      evaluate/start.json   the starting model
      conversations/  exchanges_0000.jsonl .., feedback_0000.jsonl ..: what users and policies said
                    to each other, see `oel_jax.data.conversations`; grows while a server runs
      tensorboard/  metrics.jsonl  summary.json  report.html

A stage is finished when the manifest says so and its files are there with the recorded sizes. Every
JSON file is replaced atomically, so a kill at any instant leaves the old or the new version. Paths
recorded in the manifest are relative and are refused if they lead out of the directory. One process
at a time owns a workdir. Imports no JAX.
"""

import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.fields import is_free, leaves
from oel_jax.config.old_values import saved_config

SCHEMA = "oel.workdir/1"

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def samples_of(evaluation: Path) -> Path:
    """Whole games of an evaluation, next to its result: start.json -> start.samples.json."""
    return evaluation.with_suffix(".samples.json")


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of every field that differs; an absent field counts as None."""
    before, after = leaves(old), leaves(new)
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def lock_directory(root: Path) -> int:
    """Create a workdir if need be and take its lock; returns the descriptor that holds it.

    Raises:
      UserError: the directory cannot be created or written, or belongs to a running process.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell (root, read-only mounts, full disks): write something.
        with tempfile.NamedTemporaryFile(dir=root, prefix=".write_test.") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        hint = "it is a file" if os.path.isfile(root) else error.strerror
        raise UserError(
            f"--workdir={root} cannot be written: {hint}; choose a directory that you may write to"
        ) from error
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise UserError(
            f"--workdir={root} is in use by process {owner}; wait for it, stop it, or use another "
            "--workdir"
        ) from error
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"--workdir={root} cannot be locked ({error.strerror}); use a --workdir on a file "
            "system with file locks"
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode("ascii"))
    return lock


class Workdir:
    """One run's directory. `Workdir(root)` only names things; `open` creates, locks and checks it.

    As a context manager it gives the lock back at the end:

        with Workdir("runs/nano").open(config) as workdir: ...
    """

    def __init__(self, root: str | Path):
        self.root = paths.local(root, "--workdir")
        self._lock: int | None = None
        self._manifest: dict[str, Any] | None = None

    # --- names ------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What to call the run: the directory's name; in a study its place below the study's."""
        root = self.root.absolute()
        for above in root.parents[:2]:  # STUDY/VARIANT/seed_S
            if (above / "study.json").is_file():
                return root.relative_to(above).as_posix()
        return root.name

    @property
    def config_file(self) -> Path:
        return self.root / "config.json"

    @property
    def manifest_file(self) -> Path:
        return self.root / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.root / "summary.json"

    @property
    def report_file(self) -> Path:
        """The report page: one HTML file, written again after each round."""
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def conversations(self) -> Path:
        """The store of conversations, see `oel_jax.data.conversations`."""
        return self.root / "conversations"

    @property
    def start_evaluation(self) -> Path:
        """Evaluation of the starting model."""
        return self.root / "evaluate" / "start.json"

    @property
    def start_skills(self) -> Path:
        """Other skills of the starting model (`config.evaluate.skills`)."""
        return self.root / "evaluate" / "start_skills.json"

    def round(self, number: int) -> Path:
        """Directory of a round, counted from 1."""
        if not isinstance(number, int) or number < 1:
            raise UserError(f"round {number!r} does not exist; rounds count from 1")
        return self.root / f"round_{number:03d}"

    def trajectories(self, round_number: int) -> Path:
        """The round's store of trajectories, see `oel_jax.data.trajectory_files`."""
        return self.round(round_number) / "trajectories"

    def snapshot(self, round_number: int) -> Path:
        """Which conversations a chat round has taken, with hashes of their files."""
        return self.trajectories(round_number) / "snapshot.json"

    def heldout(self, round_number: int) -> Path:
        """The conversations of a chat round that only evaluation reads."""
        return self.trajectories(round_number) / "heldout_0000.jsonl"

    def knowledge_step(self, round_number: int, chain: int, step: int) -> Path:
        """Knowledge of chain `chain` (from 0) after `step` trajectories (from 1)."""
        chains = self.round(round_number) / "knowledge"
        return chains / f"chain_{chain:02d}" / f"step_{step:03d}.json"

    def knowledge(self, round_number: int) -> Path:
        """The K knowledge texts that the round uses."""
        return self.round(round_number) / "knowledge" / "knowledge.json"

    def coach(self, round_number: int, trajectories: Path) -> Path:
        """What the coach wrote for the answers in a file of the round's trajectories."""
        return self.round(round_number) / "knowledge" / f"coach_{trajectories.name}"

    def review(self, round_number: int) -> Path:
        """What has been decided about each knowledge text (`extract.review`)."""
        return self.round(round_number) / "knowledge" / "review.json"

    def review_page(self, round_number: int) -> Path:
        """The texts and their sources, to read."""
        return self.round(round_number) / "knowledge" / "review.md"

    def approved(self, round_number: int) -> Path:
        """The knowledge texts that were approved, as the round uses them."""
        return self.round(round_number) / "knowledge" / "approved.json"

    def preflight(self, round_number: int) -> Path:
        """What each knowledge text gains in context, before consolidation."""
        return self.round(round_number) / "preflight.json"

    def checkpoints(self, round_number: int) -> Path:
        """Orbax checkpoints inside the round (absolute, as Orbax wants it)."""
        return (self.round(round_number) / "consolidate").absolute()

    def drop_checkpoints(self, round_number: int) -> None:
        """Delete the checkpoints of a round that is consolidated: nothing resumes from them."""
        shutil.rmtree(self.checkpoints(round_number), ignore_errors=True)

    def adapter(self, round_number: int) -> Path:
        """PEFT directory of the adapter that round `round_number` trained, if it did."""
        return self.round(round_number) / "adapter"

    def policy(self, round_number: int) -> Path:
        """Hugging Face directory of the model that round `round_number` produced."""
        return self.round(round_number) / "policy"

    def policy_at(self, round_number: int, step: int) -> Path:
        """The same after an optimizer step inside the round (`evaluate.steps`)."""
        return self.round(round_number) / f"policy_step_{step:03d}"

    def guard_file(self, round_number: int) -> Path:
        """Why the round was stopped early, if a guard did."""
        return self.round(round_number) / "guard.json"

    def evaluation(self, round_number: int, name: str) -> Path:
        """An evaluation of the round, e.g. 'consolidated', 'in_context', 'curve_chain_00'."""
        return self.round(round_number) / "evaluate" / f"{_checked_name(name)}.json"

    # --- life cycle -------------------------------------------------------------------------------

    def open(
        self,
        config: Mapping[str, Any],
        allow_change: bool = False,
        today: datetime.datetime | None = None,
    ) -> "Workdir":
        """Create the directory or resume in an old one; takes the lock.

        Args:
          config: plain JSON types (`oel_jax.config.as_json`).
          allow_change: accept a changed config; it is stored and the change recorded.
          today: what `today` is in a new directory, local time; now, if not given.

        Raises:
          UserError: the directory cannot be created or written, belongs to a running process, is
            not a workdir, or holds a run with another config (fields listed old -> new).
        """
        self._lock = lock_directory(self.root)
        try:
            config = json.loads(json.dumps(config, allow_nan=False))
            if self.config_file.exists():
                self._refuse_old_layout()
                if "rounds" in config and self.manifest_file.exists():
                    config["rounds"] = max(config["rounds"], self.rounds())  # none is forgotten
                self._compare_config(config, allow_change)
            else:
                if self.manifest_file.exists():
                    raise UserError(
                        f"{self.manifest_file} exists but {self.config_file} does not; restore it "
                        "or use an empty --workdir"
                    )
                write_json(self.config_file, config)
            if not self.manifest_file.exists():
                self._write_manifest(
                    {
                        "schema": SCHEMA,
                        "created_at": _now(),
                        "today": (today or datetime.datetime.now()).isoformat(timespec="seconds"),
                        "stages": [],
                        "config_changes": [],
                    }
                )
            if "today" not in self._read_manifest():  # local time where it is first gone on with
                self._write_manifest(self._read_manifest() | {"today": self.today.isoformat()})
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_old_layout(self) -> None:
        """A run whose games are in files by optimizer step cannot be resumed."""
        for old in sorted(self.root.glob("round_*/deploy")):
            raise UserError(
                f"--workdir={self.root} holds a run of an older version of oel_jax: its games are "
                f"in {old}, and this version keeps them in {self.round(1).name}/trajectories and "
                "cannot resume it. Use a new --workdir; report, export and evaluate still read "
                "this one"
            )

    def _compare_config(self, config: dict[str, Any], allow_change: bool) -> None:
        old = saved_config(self.config_file)
        changes = changed_fields(old, config)
        refused = {path: pair for path, pair in changes.items() if not is_free(path)}
        if refused and not allow_change:
            lines = "\n".join(
                f"  config.{path}: {_show(before)} -> {_show(after)}"
                for path, (before, after) in refused.items()
            )
            raise UserError(
                f"--workdir={self.root} holds a run with another config:\n{lines}\n"
                "Use a new --workdir, the old values, or --allow_config_change to resume with the "
                "new ones (finished stages stay as they are)."
            )
        if changes:
            manifest = self._read_manifest()
            fields = {path: {"old": old, "new": new} for path, (old, new) in changes.items()}
            manifest["config_changes"].append({"at": _now(), "fields": fields})
            self._write_manifest(manifest)
            write_json(self.config_file, config)

    @property
    def today(self) -> datetime.datetime:
        """When the run was started, in local time there: what chat templates show as the date.

        All prompts of a run have this one date, on whatever day and host they are made. Runs of
        older versions did not record it; theirs is the day on which the manifest was created. Where
        no run was started (a scratch directory, as in notebooks) it is now.
        """
        if not self.manifest_file.exists():
            return datetime.datetime.now()
        manifest = self._read_manifest()
        try:
            if "today" in manifest:
                return datetime.datetime.fromisoformat(manifest["today"]).replace(tzinfo=None)
            created = datetime.datetime.fromisoformat(manifest["created_at"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.manifest_file} does not say when the run was started ({error}); restore "
                'it, or write "today": "2026-01-31T12:00:00" into it'
            ) from error
        return created.astimezone().replace(tzinfo=None)

    # --- manifest ---------------------------------------------------------------------------------

    def finished(self, round_number: int, stage: str) -> bool:
        """Whether the stage is recorded and all its files are there with their recorded sizes."""
        entry = self.entry(round_number, stage)
        return entry is not None and all(
            path.is_file() and path.stat().st_size == size
            for path, size, _ in self._recorded(entry)
        )

    def verify(self, round_number: int, stage: str) -> None:
        """Recompute the hashes of a finished stage.

        Raises:
          UserError: the stage is not recorded, or a file is missing or has changed.
        """
        entry = self.entry(round_number, stage)
        if entry is None:
            raise UserError(f"{self.root}: stage {stage} of round {round_number} is not finished")
        for path, _, digest in self._recorded(entry):
            if not path.is_file() or sha256(path) != digest:
                raise UserError(
                    f"{path} is missing or has changed since stage {stage} of round {round_number} "
                    "was finished; restore it, or delete it to have the stage done again"
                )

    def finish(self, round_number: int, stage: str, files: Iterable[Path], seconds: float) -> None:
        """Record a finished stage; a directory means all files in it.

        Args:
          round_number: from 1; 0 for what belongs to the run, not to a round.
          stage: lower-case name.
          files: existing paths inside the workdir.
          seconds: wall-clock time of the stage, for the summary.
        """
        recorded = []
        for path in files:
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in inside:
                relative = file.absolute().relative_to(self.root.absolute()).as_posix()
                recorded.append(
                    {"path": relative, "size": file.stat().st_size, "sha256": sha256(file)}
                )
        entry = {
            "round": round_number,
            "stage": _checked_name(stage),
            "finished_at": _now(),
            "seconds": round(float(seconds), 3),
            "files": recorded,
        }
        manifest = self._read_manifest()
        others = [
            e for e in manifest["stages"] if (e["round"], e["stage"]) != (round_number, stage)
        ]
        self._write_manifest({**manifest, "stages": [*others, entry]})

    def record_change(self, path: Path) -> None:
        """Have the manifest say what a recorded file is now; one that is gone is dropped from it.

        For lines that a user asked to remove; the stages stay finished.
        """
        if not self.manifest_file.exists():
            return
        relative = path.absolute().relative_to(self.root.absolute()).as_posix()
        now = (
            [{"path": relative, "size": path.stat().st_size, "sha256": sha256(path)}]
            if path.exists()
            else []
        )
        manifest = self._read_manifest()
        stages = [
            entry
            | {
                "files": [
                    new
                    for file in entry["files"]
                    for new in (now if file["path"] == relative else [file])
                ]
            }
            for entry in manifest["stages"]
        ]
        self._write_manifest(manifest | {"stages": stages})

    def entry(self, round_number: int, stage: str) -> dict[str, Any] | None:
        """The manifest's entry of a stage, or None."""
        for entry in self._read_manifest()["stages"]:
            if (entry["round"], entry["stage"]) == (round_number, _checked_name(stage)):
                return entry
        return None

    def rounds(self) -> int:
        """The last round of which a stage is finished; 0 for none."""
        return max((entry["round"] for entry in self._read_manifest()["stages"]), default=0)

    def seconds(self, round_number: int) -> dict[str, float]:
        """Stage -> wall-clock seconds of the finished stages of a round."""
        stages = self._read_manifest()["stages"]
        return {e["stage"]: e["seconds"] for e in stages if e["round"] == round_number}

    def _recorded(self, entry: Mapping[str, Any]) -> list[tuple[Path, int, str]]:
        found = []
        for file in entry["files"]:
            relative = PurePosixPath(file["path"])
            if relative.is_absolute() or ".." in relative.parts:
                raise UserError(
                    f"{self.manifest_file}: file {file['path']!r} leads out of the workdir; the "
                    "manifest was edited or comes from elsewhere: restore it"
                )
            found.append((self.root / relative, file["size"], file["sha256"]))
        return found

    def _read_manifest(self) -> dict[str, Any]:
        if self._manifest is None:
            manifest = read_json(self.manifest_file)
            manifest = manifest if isinstance(manifest, dict) else {}
            schema = manifest.get("schema")
            if schema != SCHEMA or not isinstance(manifest.get("stages"), list):
                raise UserError(
                    f"{self.manifest_file} has schema {schema!r}, this version of oel_jax reads "
                    f"{SCHEMA!r}; use a new --workdir"
                )
            self._manifest = manifest
        return self._manifest

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_json(self.manifest_file, manifest)
        self._manifest = manifest


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for an artifact; use lower-case letters, digits and _"
        )
    return name


def _show(value: Any) -> str:
    return "None" if value is None else json.dumps(value, ensure_ascii=False)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
