"""What the runs of a study share: a stage whose inputs are equal is done once.

Before a stage runs, a key is made of everything it can depend on: all config fields but those that
provably cannot matter (`LEFT_OUT`, checked by a test that changes them all and compares bytes), and
the contents of the files it reads, the starting model's included. Equal keys, equal files: they are
hard-linked (copied across file systems) instead of made again.

Games and evaluations are shared in parts: the games for knowledge, each step's games, each
evaluation. A stage that finds only some of its parts goes on from them as after a kill. Finished
files are replaced and never written to, so a link cannot change behind a run's back.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_collections

from oel_jax.config.defaults import as_json, extraction_template, leaves
from oel_jax.files import read_json, write_json
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.huggingface import resolve
from oel_jax.runs.metrics import read as read_metrics
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir, is_free, samples_of, sha256, stages_of

SCHEMA = "oel.shelf/1"

_LOSS = (
    "loss.divergence",
    "loss.support",
    "loss.correction",
    "loss.top_k",
    "loss.temperature",
    "loss.aggregation",
)
_TRAINING = (
    *_LOSS,
    "consolidate.mode",
    "consolidate.learning_rate",
    "consolidate.b1",
    "consolidate.b2",
    "consolidate.eps",
    "consolidate.weight_decay",
    "consolidate.clip_norm",
    "consolidate.token_budget",
    "consolidate.temperature",
    "consolidate.keep_fp32_master",
    "consolidate.drop_remainder",
    "consolidate.moments_dtype",
    "consolidate.teacher_dtype",
    "consolidate.turn_fraction",
    "consolidate.turn_floor",
    "consolidate.retention",
    "consolidate.retention_weight",
    "consolidate.teacher",
    "consolidate.teacher_rate",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "guard.response_tokens",
    "guard.entropy",
    "guard.skill_drop",
    "evaluate.steps",
)
_DEPLOYING = ("deploy.temperature", "deploy.top_p", "deploy.top_k")
_AMOUNT = ("deploy.games_per_step", "consolidate.steps")
_WRITING = (  # how knowledge is written, not which games it is written from
    "extract.n",
    "extract.version",
    "extract.previous",
    "extract.l_max",
    "extract.max_prompt",
    "extract.outcome",
    "extract.history_markers",
    "extract.item_marker",
    "extract.template_file",
    "extract.unfinished_thought",
    "extract.truncate",
    "extract.draft_tokens",
    "extract.model_path",
    "extract.experience",
    "extract.knowledge_from",
    "extract.deduplicate",
    "extract.no_op",
)
_GAMES_FOR_KNOWLEDGE = (
    "extract.chains",
    "extract.n_run",
    "extract.temperature",
    "extract.top_p",
    "extract.top_k",
    "extract.trajectories",
)
_JUDGING = (
    "evaluate.maps",
    "evaluate.seeds",
    "evaluate.temperature",
    "evaluate.top_p",
    "evaluate.top_k",
    "evaluate.unseen_split",
)
# Which evaluations are made, not how.
_EVALUATIONS = ("evaluate.in_context", "evaluate.curve", "evaluate.skills")
_WHICH = (*_EVALUATIONS, "preflight.games")  # nothing else reads the pre-flight

# The preset is a name, and what it sets is in the other fields; a model counts by its files.
_ALWAYS = ("preset", "model.path", "model.check_weights")

# Part of a stage -> config fields that cannot change its files. Whatever is not named here counts,
# fields that are added later included. `AMOUNT` is added where boards already seen do not count.
LEFT_OUT: dict[str, frozenset[str]] = {
    name: frozenset((*_ALWAYS, *fields))
    for name, fields in {
        "chains": (*_TRAINING, *_DEPLOYING, *_AMOUNT, *_WRITING, *_JUDGING, *_WHICH),
        "step": (
            *_TRAINING,
            "consolidate.steps",
            *_WRITING,
            *_GAMES_FOR_KNOWLEDGE,
            *_JUDGING,
            *_WHICH,
            "evaluate.seed_mode",
        ),
        # The extractor and a template file count by what is in them.
        "knowledge": (
            *_TRAINING,
            *_DEPLOYING,
            *_AMOUNT,
            *_JUDGING,
            *_WHICH,
            "extract.n",
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "extract": (
            *_TRAINING,
            *_DEPLOYING,
            *_AMOUNT,
            *_JUDGING,
            *_WHICH,
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "demonstrate": (
            *_TRAINING,
            "consolidate.steps",
            *_JUDGING,
            *_WHICH,
            "evaluate.seed_mode",
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "preflight": (  # `AMOUNT` counts: its boards come after those of training
            *_TRAINING,
            *_DEPLOYING,
            "evaluate.maps",
            "evaluate.seeds",
            "evaluate.unseen_split",
            *_EVALUATIONS,
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "consolidate": (
            *_JUDGING,
            *_WHICH,
            "evaluate.seed_mode",
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "start": (*_TRAINING, *_DEPLOYING, *_AMOUNT, *_WRITING, *_GAMES_FOR_KNOWLEDGE, *_WHICH),
        "skills": (*_TRAINING, *_DEPLOYING, *_AMOUNT, *_WRITING, *_GAMES_FOR_KNOWLEDGE, *_WHICH),
        "with_knowledge": (
            *_TRAINING,
            *_DEPLOYING,
            *_WHICH,
            "extract.model_path",
            "extract.template_file",
            "extract.knowledge_from",
        ),
        "consolidated": (
            *_TRAINING,
            *_DEPLOYING,
            *_WRITING,
            *_GAMES_FOR_KNOWLEDGE,
            *_WHICH,
        ),
    }.items()
}
AMOUNT = frozenset(_AMOUNT)


@dataclass(frozen=True)
class Part:
    """Files of a stage that are shared together."""

    key: str
    files: tuple[Path, ...]


def key_of(run: Run, round_number: int, kind: str, name: str, inputs: Any) -> str:
    """The key of something a stage makes: SHA-256 over fields and inputs.

    Args:
      kind: a key of `LEFT_OUT`.
      name: tells things of the same kind apart; random streams depend on it.
      inputs: plain JSON: the digests of all files that are read.
    """
    out = LEFT_OUT[kind]
    if kind in ("with_knowledge", "consolidated") and not run.config.evaluate.unseen_split:
        out = out | AMOUNT
    fields = counted(run.config, out)
    text = json.dumps([SCHEMA, kind, name, round_number, fields, inputs], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def counted(config: ml_collections.ConfigDict, left_out: frozenset[str]) -> dict[str, Any]:
    """The fields that count: all but free ones and `left_out`."""
    fields = leaves(as_json(config))
    return {path: fields[path] for path in fields if not is_free(path) and path not in left_out}


# --- what a stage reads ---------------------------------------------------------------------------


def _digests(run: Run, round_number: int, stage: str, skip: str = "") -> list[list[str]]:
    """[path, SHA-256] of a finished stage's files, from the manifest.

    Args:
      skip: leave out files whose name begins so.
    """
    entry = run.workdir.entry(round_number, stage)
    assert entry is not None, f"{stage} of round {round_number} is not finished"
    return [
        [file["path"], file["sha256"]]
        for file in entry["files"]
        if not skip or not PurePosixPath(file["path"]).name.startswith(skip)
    ]


_DIRECTORIES: dict[tuple[str, tuple], list[list[str]]] = {}  # hashing a model takes a while


def _directory(directory: Path) -> list[list[str]]:
    """[path, SHA-256] of all files in a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    state = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    known = (str(directory.absolute()), state)
    if known not in _DIRECTORIES:
        _DIRECTORIES[known] = [[str(p.relative_to(directory)), sha256(p)] for p in files]
    return _DIRECTORIES[known]


def _policy(run: Run, round_number: int) -> list[list[str]]:
    """The files of P_r."""
    if round_number == 1:
        return _directory(run.policy_directory(1))
    made = [(Path(p), digest) for p, digest in _digests(run, round_number - 1, "consolidate")]
    return [[path.name, digest] for path, digest in made if path.parent.name == "policy"]


def _extraction(run: Run, round_number: int) -> list[Any]:
    """Whatever extraction reads: extractor, games, template, another run's knowledge."""
    config = run.config.extract
    path, other = config.model_path, config.get("knowledge_from", "")
    return [
        _directory(resolve(resolve_bundled(path))) if path else _policy(run, round_number),
        _digests(run, round_number, "deploy", skip="step_"),
        extraction_template(run.config),
        _directory(Workdir(other).round(round_number) / "knowledge") if other else [],
    ]


# --- parts and wholes -----------------------------------------------------------------------------


def parts(run: Run, round_number: int, stage: str) -> list[Part]:
    """The parts of a stage that can be shared one by one; what it reads must be finished."""
    config, workdir = run.config, run.workdir

    def part(kind: str, name: str, inputs: Any, files: Iterable[Path]) -> Part:
        return Part(key_of(run, round_number, kind, name, inputs), tuple(files))

    if stage == "deploy":
        policy = _policy(run, round_number)
        chains = 1 if config.extract.trajectories == "shared" else config.extract.chains
        files = [workdir.extract_games(round_number, chain) for chain in range(chains)]
        steps = range(1, config.consolidate.steps + 1)
        return [
            part("chains", "", policy, files),
            *(
                part("step", str(step), policy, [workdir.deploy_games(round_number, step)])
                for step in steps
            ),
        ]
    if stage == "extract":
        files = [
            workdir.knowledge_step(round_number, chain, step)
            for chain in range(config.extract.chains)
            for step in range(1, config.extract.n_run + 1)
        ]
        return [part("knowledge", "", _extraction(run, round_number), files)]
    if stage == "demonstrate":
        inputs = [_policy(run, round_number), _digests(run, round_number, "extract")]
        return [
            part(stage, str(step), inputs, [workdir.demonstrations(round_number, step)])
            for step in range(1, config.consolidate.steps + 1)
        ]
    if stage == "preflight":
        inputs = [_policy(run, round_number), _digests(run, round_number, "extract")]
        return [part(stage, "", inputs, [workdir.preflight(round_number)])]
    if stage == "evaluate":
        return [
            part(kind, name, inputs, files)
            for kind, name, inputs, files in _evaluations(run, round_number)
        ]
    return []


def _evaluations(run: Run, round_number: int) -> list[tuple[str, str, Any, tuple[Path, ...]]]:
    """(kind, name, inputs, files) of all evaluations of a round."""
    config, workdir = run.config, run.workdir
    found = []

    def add(kind: str, name: str, inputs: Any, *files: Path) -> None:
        found.append((kind, name, inputs, files))

    after = _policy(run, round_number + 1)
    if round_number:
        points = {n: f"curve_{n:03d}" for n in config.evaluate.curve}
        if config.evaluate.in_context:
            points[config.extract.n] = "in_context"
        inputs = [_policy(run, round_number), _digests(run, round_number, "extract")]
        for n, name in points.items():
            file = workdir.evaluation(round_number, name)
            add("with_knowledge", f"{name} {n}", inputs, samples_of(file), file)
        file = workdir.evaluation(round_number, "consolidated")
        add("consolidated", "", after, samples_of(file), file)
        skills = workdir.evaluation(round_number, "skills")
        for step in config.evaluate.steps:
            policy = workdir.policy_at(round_number, step)
            if policy.exists():
                file = workdir.evaluation(round_number, f"step_{step:03d}")
                add("consolidated", f"step {step}", _directory(policy), samples_of(file), file)
                if config.evaluate.skills:
                    file = workdir.evaluation(round_number, f"step_{step:03d}_skills")
                    add("skills", "", _directory(policy), file)
    else:
        add("start", "", after, samples_of(workdir.start_evaluation), workdir.start_evaluation)
        skills = workdir.start_skills
    if config.evaluate.skills:
        add("skills", "", after, skills)
    return found


def whole(run: Run, round_number: int, stage: str) -> str | None:
    """The key of a whole stage; None for stages that are no more than their parts."""
    if stage in ("deploy", "demonstrate"):
        keys = [part.key for part in parts(run, round_number, stage)]
        return hashlib.sha256(json.dumps([stage, keys]).encode("utf-8")).hexdigest()
    if stage == "extract":
        return key_of(run, round_number, "extract", "", _extraction(run, round_number))
    if stage == "consolidate":
        inputs = [
            _policy(run, round_number),
            _digests(run, round_number, "deploy", skip="extract_chain_"),
            _digests(run, round_number, "extract"),
        ]
        if "demonstrate" in stages_of(run.config):
            inputs.append(_digests(run, round_number, "demonstrate"))
        return key_of(run, round_number, "consolidate", "", inputs)
    return None


class Shelf:
    """Finished work of a study's runs, by key; kept in WORKDIR/shelf.json.

    Attributes:
      taken: what the last stage found here: (files, runs they came from).
    """

    def __init__(self, root: Path):
        self._root = root
        self._file = root / "shelf.json"
        self._entries: dict[str, Any] = {}
        if self._file.exists():
            kept = read_json(self._file)
            # Of another version: nothing is lost, equal work is only done again.
            self._entries = kept["entries"] if kept.get("schema") == SCHEMA else {}

    def take(self, run: Run, round_number: int, stage: str) -> list[Path] | None:
        """Link what equal runs have made of a stage.

        Returns:
          The files of the stage if all of it was here, its metrics copied; else None, with the
          parts that were here in place, from which the stage goes on.
        """
        key = whole(run, round_number, stage)
        files = self._link(run, key) if key else None
        if files is not None:
            self._copy_metrics(run, round_number, stage, self._entries[key]["run"])
            return files
        for part in parts(run, round_number, stage):
            if not all(path.exists() for path in part.files):
                self._link(run, part.key)
        return None

    def put(self, run: Run, round_number: int, stage: str) -> None:
        """Offer a finished stage to the other runs."""
        entry = run.workdir.entry(round_number, stage)
        recorded = {run.workdir.root / file["path"]: file for file in entry["files"]}
        found = {
            part.key: [recorded[path] for path in part.files if path in recorded]
            for part in parts(run, round_number, stage)
        }
        key = whole(run, round_number, stage)
        if key:
            found[key] = list(recorded.values())
        name = run.workdir.root.relative_to(self._root).as_posix()
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

    def _link(self, run: Run, key: str) -> list[Path] | None:
        """Put an entry's files into a run, or None if they are not there as they were recorded."""
        if not self._usable(key):
            return None
        sources = self._sources(key)
        if any(sha256(path) != file["sha256"] for path, file in sources):
            return None
        targets = [run.workdir.root / file["path"] for _, file in sources]
        for (source, _), target in zip(sources, targets, strict=True):
            if not (target.exists() and target.samefile(source)):
                _place(source, target)
        return targets

    def _copy_metrics(self, run: Run, round_number: int, stage: str, source: str) -> None:
        """The rows of a stage, but for those of its time."""
        for row in read_metrics(Workdir(self._root / source).metrics_file):
            if row["round"] != round_number or row["stage"] != stage:
                continue
            values = {name: float(value) for name, value in row["values"].items()}
            run.metrics.rewind(stage, round_number, row["step"] - 1)
            run.metrics.scalars(stage, row["step"], values, round=round_number)


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
