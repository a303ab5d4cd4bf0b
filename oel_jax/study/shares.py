"""What the runs of a study can take over from each other, stage by stage.

A key is made of everything a stage can depend on: all config fields but those that provably cannot
matter (`Field.affects`, checked by a test that changes them all and compares bytes), and the
contents of the files it reads, the starting model's included. Equal keys, equal files.

Games and evaluations are shared in parts: the games for knowledge, each file of games to train on,
each evaluation. A stage that finds only some of its parts continues from them as after a kill.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from oel_jax.config.budgets import extraction_template
from oel_jax.config.choices import PER_TURN
from oel_jax.config.defaults import as_json
from oel_jax.config.fields import is_free, leaves, unaffected
from oel_jax.data.trajectory_files import TrajectoryStore
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.huggingface import resolve
from oel_jax.runs.policies import start_directory
from oel_jax.runs.stages import stages_of
from oel_jax.runs.workdir import Workdir, samples_of, sha256

SCHEMA = "oel.shelf/1"

# A field counts for a part of a stage unless the table of fields says that it cannot change it
# (`Field.affects`), fields that are added later included. These two count for evaluations only
# where boards already seen do.
AMOUNT = frozenset({"deploy.games_per_step", "consolidate.steps"})


@dataclass(frozen=True)
class Part:
    """Files of a stage that are shared together."""

    key: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Shares:
    """What of a stage can be shared; what the stage reads must be finished.

    Attributes:
      parts: one by one.
      whole: the key of all files of the stage; '' for a stage that is no more than its parts.
    """

    parts: tuple[Part, ...] = ()
    whole: str = ""


def counted(config: ConfigDict, left_out: frozenset[str]) -> dict[str, Any]:
    """The fields that count: all but free ones and `left_out`."""
    fields = leaves(as_json(config))
    return {path: fields[path] for path in fields if not is_free(path) and path not in left_out}


def share_key(config: ConfigDict, number: int, kind: str, name: str, inputs: Any) -> str:
    """The key of something a stage makes: SHA-256 over fields and inputs.

    Args:
      number: of the round.
      kind: one of `oel_jax.config.field.PARTS`.
      name: tells things of the same kind apart; random streams depend on it.
      inputs: plain JSON: the digests of all files that are read.
    """
    out = unaffected(kind)
    if kind in ("with_knowledge", "consolidated") and not config.evaluate.unseen_split:
        out = out | AMOUNT
    fields = counted(config, out)
    text = json.dumps([SCHEMA, kind, name, number, fields, inputs], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _key_of_parts(stage: str, parts: Iterable[Part]) -> str:
    text = json.dumps([stage, [part.key for part in parts]])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# --- what stages read -----------------------------------------------------------------------------


def _digests(workdir: Workdir, number: int, stage: str, skip: str = "") -> list[list[str]]:
    """[path, SHA-256] of a finished stage's files, from the manifest.

    Args:
      skip: leave out files whose name begins so.
    """
    entry = workdir.entry(number, stage)
    assert entry is not None, f"{stage} of round {number} is not finished"
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


def _policy(config: ConfigDict, workdir: Workdir, number: int) -> list[list[str]]:
    """The files of P_r."""
    if number == 1:
        return _directory(start_directory(config))
    made = [(Path(p), digest) for p, digest in _digests(workdir, number - 1, "consolidate")]
    return [[path.name, digest] for path, digest in made if path.parent.name == "policy"]


def _extraction(config: ConfigDict, workdir: Workdir, number: int) -> list[Any]:
    """Whatever extraction reads: extractor, games, template, another run's knowledge."""
    path, other = config.extract.model_path, config.extract.get("knowledge_from", "")
    extractor = resolve(resolve_bundled(path)) if path else None
    per_turn = config.extract.experience in PER_TURN  # then it reads the answers trained on, too
    return [
        _directory(extractor) if extractor else _policy(config, workdir, number),
        _digests(workdir, number, "deploy", skip="" if per_turn else "deploy_"),
        extraction_template(config),
        _directory(Workdir(other).round(number) / "knowledge") if other else [],
    ]


# --- stages, as `runs/stages.py` names them -------------------------------------------------------


def deploy(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """The games for knowledge, and each file of games to train on."""
    policy = _policy(config, workdir, number)
    chains = 1 if config.extract.trajectories == "shared" else config.extract.chains
    store = TrajectoryStore(workdir.trajectories(number))
    files = tuple(store.path("extract", chain) for chain in range(chains))
    parts = [Part(share_key(config, number, "chains", "", policy), files)]
    for file in range(config.consolidate.steps):
        key = share_key(config, number, "deploy", str(file), policy)
        parts.append(Part(key, (store.path("deploy", file),)))
    return Shares(tuple(parts), _key_of_parts("deploy", parts))


def extract(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """The texts of all chains after each step; and the stage, with the texts that are used."""
    inputs = _extraction(config, workdir, number)
    files = tuple(
        workdir.knowledge_step(number, chain, step)
        for chain in range(config.extract.chains)
        for step in range(1, config.extract.n_run + 1)
    )
    part = Part(share_key(config, number, "knowledge", "", inputs), files)
    return Shares((part,), share_key(config, number, "extract", "", inputs))


def demonstrate(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """Each file of demonstrations."""
    inputs = [_policy(config, workdir, number), _digests(workdir, number, "extract")]
    store = TrajectoryStore(workdir.trajectories(number))
    parts = [
        Part(
            share_key(config, number, "demonstrate", str(file), inputs),
            (store.path("demonstrate", file),),
        )
        for file in range(config.consolidate.steps)
    ]
    return Shares(tuple(parts), _key_of_parts("demonstrate", parts))


def preflight(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """Its one file."""
    inputs = [_policy(config, workdir, number), _digests(workdir, number, "extract")]
    key = share_key(config, number, "preflight", "", inputs)
    return Shares((Part(key, (workdir.preflight(number),)),))


def consolidate(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """The policies, all of them or none."""
    inputs = [
        _policy(config, workdir, number),
        _digests(workdir, number, "deploy", skip="extract_"),
        _digests(workdir, number, "extract"),
    ]
    if "demonstrate" in [stage.name for stage in stages_of(config)]:
        inputs.append(_digests(workdir, number, "demonstrate"))
    return Shares(whole=share_key(config, number, "consolidate", "", inputs))


def evaluate(config: ConfigDict, workdir: Workdir, number: int) -> Shares:
    """Each evaluation; number 0 is that of the start."""
    parts = []

    def add(kind: str, name: str, inputs: Any, *files: Path) -> None:
        parts.append(Part(share_key(config, number, kind, name, inputs), files))

    after = _policy(config, workdir, number + 1)
    if number:
        points = {n: f"curve_{n:03d}" for n in config.evaluate.curve}
        if config.evaluate.in_context:
            points[config.extract.n] = "in_context"
        inputs = [_policy(config, workdir, number), _digests(workdir, number, "extract")]
        for n, name in points.items():
            file = workdir.evaluation(number, name)
            add("with_knowledge", f"{name} {n}", inputs, samples_of(file), file)
        file = workdir.evaluation(number, "consolidated")
        add("consolidated", "", after, samples_of(file), file)
        skills = workdir.evaluation(number, "skills")
        for step in config.evaluate.steps:
            policy = workdir.policy_at(number, step)
            if policy.exists():
                file = workdir.evaluation(number, f"step_{step:03d}")
                add("consolidated", f"step {step}", _directory(policy), samples_of(file), file)
                if config.evaluate.skills:
                    file = workdir.evaluation(number, f"step_{step:03d}_skills")
                    add("skills", "", _directory(policy), file)
    else:
        add("start", "", after, samples_of(workdir.start_evaluation), workdir.start_evaluation)
        skills = workdir.start_skills
    if config.evaluate.skills:
        add("skills", "", after, skills)
    return Shares(tuple(parts))
