"""Finding tasks of lm-evaluation-harness and checking them before a model is loaded."""

import difflib
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import langdetect
import nltk
import numpy as np
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from oel_jax.base.errors import UserError
from oel_jax.evaluate.model import generation

# How the paper samples for IF-Eval (spec 9.2); the limit of 1280 tokens is the task's own.
PAPER_IFEVAL = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}

_PUNKT = "tokenizers/punkt_tab/english"


@dataclass
class Selected:
    """One name of --lm_eval_tasks: a task, or a group or tag of several.

    Attributes:
      name: as it was given.
      loaded: what the harness evaluates: {'tasks': ..., 'groups': ..., 'group_map': ...}.
      settings: all that a score depends on but the policy; plain JSON types.
    """

    name: str
    loaded: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Task name -> task."""
        return self.loaded["tasks"]

    @property
    def most_new(self) -> int:
        """The longest answer that a task asks for, in tokens; 0: none asks for one."""
        return max(
            (generation(t.config.generation_kwargs, n).max_new for n, t in _answered(self.loaded)),
            default=0,
        )

    def seed(self) -> None:
        """Put every source of chance outside the model back to its start.

        Few-shot examples, and the one prompt of IF-Eval whose checker draws a letter, are then the
        same for all policies.
        """
        seed = self.settings["seed"]
        random.seed(seed)
        np.random.seed(seed)
        langdetect.DetectorFactory.seed = seed
        for task in self.tasks.values():
            task.set_fewshot_seed(seed)


def select(
    names: Sequence[str],
    *,
    seed: int = 42,
    sampling: Mapping[str, Any] | None = None,
    chat: bool = True,
    limit: int | None = None,
    truncate: bool = False,
    ifeval_data: Path | None = None,
    include: Path | None = None,
) -> list[Selected]:
    """Load tasks and their data.

    Args:
      names: tasks, groups or tags of the harness.
      seed: of answers, few-shot examples and the language detector.
      sampling: `generation_kwargs` that take the place of the tasks' own.
      chat: prompts go into the model's chat template.
      limit: only the first documents of each task.
      truncate: a prompt that does not fit loses its beginning.
      ifeval_data: directory with `input_data.jsonl` and `nltk_data`: task ifeval without a network.
      include: directory with further task files (YAML) of the user's own.

    Raises:
      UserError: a name that the harness does not know, a task that cannot be loaded here, needs
        pictures or sound, runs code that the model wrote, or asks for what our sampler lacks.
    """
    if not names or len(set(names)) < len(names):
        raise UserError(f"--lm_eval_tasks={','.join(names)}: give each name once, at least one")
    if include is not None and not include.is_dir():
        raise UserError(f"--lm_eval_include={include} is no directory; give one with task files")
    if ifeval_data is not None and "ifeval" not in names:
        raise UserError("--ifeval_data is for task ifeval; add it to --lm_eval_tasks")
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"--lm_eval_tasks: the installed lm_eval {metadata.version('lm_eval')} has no task "
                f"{name!r}{hint}; `lm_eval ls tasks` lists all. Your own: --lm_eval_include=DIR"
            )
    digest = None if ifeval_data is None else _offline(ifeval_data)
    found = []
    for name in names:
        data = ifeval_data if name == "ifeval" else None
        one = Selected(name, _load(manager, name, data))
        _configure(one.loaded, name, sampling or {})
        _check(one)
        one.settings = {
            "tasks": {task: str(one.tasks[task].VERSION) for task in sorted(one.tasks)},
            "lm_eval": metadata.version("lm_eval"),
            "seed": seed,
            "generation": {n: dict(t.config.generation_kwargs) for n, t in _answered(one.loaded)},
            "chat_template": chat,
            "limit": limit,
            "truncate_prompts": truncate,
            "data_sha256": digest if data else None,
        }
        found.append(one)
    if sampling and not any(one.most_new for one in found):
        raise UserError(
            f"{', '.join('--' + n for n in sampling if n != 'do_sample')}: none of --lm_eval_tasks="
            f"{','.join(names)} asks for answers; leave it out"
        )
    return found


def _answered(loaded: Mapping[str, Any]) -> list[tuple[str, Task]]:
    """Tasks whose model writes answers."""
    tasks = sorted(loaded["tasks"].items())
    return [(name, task) for name, task in tasks if task.OUTPUT_TYPE == "generate_until"]


def _offline(directory: Path) -> str:
    """Have the checkers read their tables from `directory`; SHA-256 of the prompts there."""
    prompts, tables = directory / "input_data.jsonl", directory / "nltk_data"
    for path in (prompts, tables / _PUNKT):
        if not path.exists():
            raise UserError(
                f"--ifeval_data={directory}: {path} is missing; give a directory with the file "
                f"input_data.jsonl of google/IFEval and the folder nltk_data/{_PUNKT}"
            )
    if str(tables) not in nltk.data.path:
        nltk.data.path.insert(0, str(tables))
    return hashlib.sha256(prompts.read_bytes()).hexdigest()


def _load(manager: TaskManager, name: str, ifeval_data: Path | None) -> dict[str, Any]:
    spec: Any = name
    if ifeval_data is not None:
        rows = _rows(ifeval_data / "input_data.jsonl")

        def local(**_: Any) -> dict[str, Any]:
            return {"train": datasets.Dataset.from_list(rows)}

        # A group of our own is how the harness takes changes to a task that it knows.
        spec = {"group": "offline", "task": [{"task": name, "custom_dataset": local}]}
    try:
        loaded = manager.load([spec])
        if "ifeval" in name:  # the harness runs without its tables, and fails after all answers
            nltk.data.find(_PUNKT)
    except Exception as error:  # a task is foreign code, and its data come over the network
        hint = " or give --ifeval_data=DIR, which needs no network" if name == "ifeval" else ""
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"--lm_eval_tasks: {name} cannot be loaded ({type(error).__name__}: {reason}). Its "
            f"data come from a hub, some tasks need further packages; see to that{hint}"
        ) from error
    if ifeval_data is not None:
        loaded |= {"groups": {}, "group_map": {}}
    return loaded


def _rows(file: Path) -> list[dict[str, Any]]:
    """The prompts of IF-Eval, one JSON object a line."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = {"key", "prompt", "instruction_id_list", "kwargs"}
        if not isinstance(row, dict) or not wanted <= row.keys():
            raise UserError(
                f"--ifeval_data: {file}:{number} is not a prompt of IF-Eval; it needs the fields "
                f"{', '.join(sorted(wanted))}"
            )
        rows.append({field: row[field] for field in sorted(wanted)})
    if not rows:
        raise UserError(f"--ifeval_data: {file} is empty; copy it again")
    return rows


def _configure(loaded: Mapping[str, Any], name: str, sampling: Mapping[str, Any]) -> None:
    """Set how answers are sampled: the caller's wishes over the paper's over the task's own."""
    ours = {**(PAPER_IFEVAL if name == "ifeval" else {}), **sampling}
    for _, task in _answered(loaded):
        task.set_config("generation_kwargs", {**(task.config.generation_kwargs or {}), **ours})
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)


def _check(one: Selected) -> None:
    for name, task in sorted(one.tasks.items()):
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"--lm_eval_tasks: {name} runs code that the model writes; that is not supported "
                "here, leave it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"--lm_eval_tasks: {name} needs pictures or sound; policies read text only"
            )
        if task.OUTPUT_TYPE == "generate_until":
            generation(task.config.generation_kwargs, name)
