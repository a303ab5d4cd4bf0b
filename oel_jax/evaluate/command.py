"""`python -m oel_jax.evaluate`: the policies of a run on tasks of lm-evaluation-harness.

    python -m oel_jax.evaluate --workdir=runs/x --lm_eval_tasks=ifeval [--ifeval_data=DIR]

Every policy of the run is evaluated: the starting model, and the model after each round. Results
are next to the run's own evaluations, as `evaluate/lm_eval_<task>.json` of the round (of the
workdir for the starting model), answers in `lm_eval_<task>.responses.jsonl`. A policy that is
finished is not evaluated again, and a stopped one resumes after its last answer.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections

from oel_jax.base import caches, paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.defaults import default
from oel_jax.config.fields import FIELDS, leaves
from oel_jax.config.old_values import saved_config
from oel_jax.evaluate import require_lm_eval
from oel_jax.export.command import policy_directory
from oel_jax.models.agreement import fitting_tokenizer
from oel_jax.models.config import ModelConfig
from oel_jax.models.language_model import DTYPES, LanguageModel, load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.compilation import keep_compiled
from oel_jax.runs.metrics import Metrics, table
from oel_jax.runs.policies import start_directory
from oel_jax.runs.tensorboard import Axis
from oel_jax.runs.workdir import Workdir

if TYPE_CHECKING:  # importing it needs the harness
    from oel_jax.evaluate.tasks import Selected

# What an evaluation takes from the run's config; other fields may be of another version.
_USED = ("model", "mesh", "sampler", "log", "compilation_cache")


@dataclass(frozen=True)
class Policy:
    """A model of the run; round 0 is the one it started from."""

    round: int
    directory: Path

    @property
    def label(self) -> str:
        return f"after round {self.round}" if self.round else "start"


@dataclass(frozen=True)
class Job:
    """One policy on one name of --lm_eval_tasks; `settings`: all that the result depends on."""

    policy: Policy
    one: "Selected"
    settings: dict[str, Any]


def evaluate_policies(
    workdir: Path,
    selection: Sequence["Selected"],
    *,
    round_number: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[tuple[int, str], dict[str, Any]]:
    """Evaluate what is not evaluated yet; returns all results by (round, name).

    Args:
      workdir: of a run.
      selection: from `oel_jax.evaluate.tasks.select`.
      round_number: only the policy after this round, 0 for the starting model; None: all.
      mesh: devices; those of the run's config when not given.

    Raises:
      UserError: there is no such run or policy, a policy cannot do a task, or a result that was
        made with other settings is in the way; all of these before weights are read.
    """
    stored, config = _run_config(workdir)
    mesh = make_mesh(config.mesh.fsdp, config.mesh.tp) if mesh is None else mesh
    policies = _policies(workdir, config, round_number)
    for policy in policies:
        _check_policy(policy, selection)
    with Workdir(workdir).open(stored) as opened:
        jobs = [
            Job(policy, one, {**one.settings, "policy": _fingerprint(opened, policy, config)})
            for policy in policies
            for one in selection
        ]
        for job in jobs:
            _finished(opened, job)  # refuses results of other settings
        with Metrics(opened, config.log.tensorboard, Axis.of(stored)) as metrics:
            for policy in policies:
                left = [j for j in jobs if j.policy == policy and _finished(opened, j) is None]
                if not left:
                    continue
                model = load_model(
                    policy.directory,
                    dtype=DTYPES[config.model.dtype],
                    mesh=mesh,
                    today=opened.today,
                )
                for job in left:
                    _evaluate(opened, metrics, config, job, model)
                del model  # one model at a time
        return {(job.policy.round, job.one.name): _finished(opened, job) for job in jobs}


# --- what there is to evaluate --------------------------------------------------------------------


def _run_config(workdir: Path) -> tuple[dict[str, Any], ml_collections.ConfigDict]:
    """The run's config as it was stored, and what of it is used here."""
    file = Workdir(workdir).config_file
    if not file.is_file():
        raise UserError(
            f"--workdir={workdir} holds no run ({file.name} is missing); give the --workdir of "
            "`python -m oel_jax.main`"
        )
    stored, config = saved_config(file), default()
    for path, value in leaves({name: stored[name] for name in _USED if name in stored}).items():
        if path not in FIELDS:
            continue
        must = FIELDS[path].rule(value)
        if must:
            raise UserError(f"{file}: config.{path} is {value!r}; it must be {must}")
        config.update_from_flattened_dict({path: value})
    return stored, config


def _policies(
    workdir: Path, config: ml_collections.ConfigDict, round_number: int | None
) -> list[Policy]:
    if round_number:
        return [Policy(round_number, policy_directory(workdir, round_number))]
    found = [Policy(0, start_directory(config))]
    names = Workdir(workdir)
    while round_number is None and names.policy(len(found)).is_dir():
        found.append(Policy(len(found), names.policy(len(found))))
    return found


def _check_policy(policy: Policy, selection: Sequence["Selected"]) -> None:
    """UserError if a task asks too much of the model; reads its config and its tokenizer."""
    cfg = ModelConfig.from_directory(policy.directory)
    tokenizer = fitting_tokenizer(policy.directory, cfg)
    for one in selection:
        if one.settings["chat_template"]:
            try:
                tokenizer.chat("hello", thinking=False)
            except UserError as error:
                raise UserError(f"{error}; or give --no-chat_template") from error
        if one.most_new >= cfg.max_positions:
            raise UserError(
                f"--lm_eval_tasks: {one.name} asks for answers of up to {one.most_new} tokens, but "
                f"{policy.directory} was made for {cfg.max_positions} positions, prompt included; "
                "lower --max_gen_toks"
            )


# --- one policy on one name -----------------------------------------------------------------------


def _stage(name: str) -> str:
    """'lm_eval_' and the task, with all but lower-case letters, digits and _ spelt out."""
    return "lm_eval_" + re.sub(r"[^a-z0-9_]", lambda found: f"_x{ord(found[0]):02x}_", name)


def _fingerprint(workdir: Workdir, policy: Policy, config: ml_collections.ConfigDict) -> str:
    """What tells this policy from another one in its place."""
    if not policy.round:
        return str(config.model.path)
    entry = workdir.entry(policy.round, "consolidate")
    if entry is None:
        raise UserError(
            f"--workdir={workdir.root}: round {policy.round} has a policy, but its consolidation "
            "is not recorded as finished; run `python -m oel_jax.main` again first"
        )
    return hashlib.sha256(json.dumps(entry["files"], sort_keys=True).encode()).hexdigest()[:16]


def _file(workdir: Workdir, job: Job) -> Path:
    if job.policy.round:
        return workdir.evaluation(job.policy.round, _stage(job.one.name))
    return workdir.start_evaluation.with_name(f"{_stage(job.one.name)}.json")


def _finished(workdir: Workdir, job: Job) -> dict[str, Any] | None:
    """The result that is there, or None.

    Raises:
      UserError: it was made with other settings.
    """
    if not workdir.finished(job.policy.round, _stage(job.one.name)):
        return None
    file = _file(workdir, job)
    result = read_json(file)
    before, now = result["settings"], json.loads(json.dumps(job.settings))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"{file} was made with other settings ({', '.join(changed)}); give the same flags, or "
            "move the file away to have it made again"
        )
    return result


def _evaluate(
    workdir: Workdir,
    metrics: Metrics,
    config: ml_collections.ConfigDict,
    job: Job,
    model: LanguageModel,
) -> None:
    """Evaluate, and write result, metrics row and manifest entry."""
    from lm_eval.evaluator import evaluate

    from oel_jax.evaluate.model import PolicyLM
    from oel_jax.evaluate.responses import Responses
    from oel_jax.evaluate.results import summarise

    began, settings = time.monotonic(), job.settings
    policy, one = job.policy, job.one
    file, stage = _file(workdir, job), _stage(one.name)
    answers_file = file.with_suffix(".responses.jsonl")
    responses = Responses(answers_file, settings)
    lm = PolicyLM(
        model,
        seed=settings["seed"],
        truncate=settings["truncate_prompts"],
        sampler=config.sampler,
        block=config.model.attention_block,
        responses=responses,
        label=f"{policy.label} {one.name}",
        console_every=config.log.console_every,
    )
    one.seed()
    try:
        evaluated = evaluate(
            lm, one.loaded, limit=settings["limit"], apply_chat_template=settings["chat_template"]
        )
    finally:
        responses.close()
    result = summarise(one.name, evaluated, responses.answers, lm.truncated)
    write_json(file, {**result, "settings": settings, "policy": policy.label})
    seconds = time.monotonic() - began
    values: dict[str, float] = {}
    for entry in result["scores"]:
        at = entry["metric"] if len(result["scores"]) == 1 else f"{entry['task']}/{entry['metric']}"
        values[at] = float(entry["value"])
        if entry["ci95"]:
            values |= dict(zip((f"{at}_ci95_low", f"{at}_ci95_high"), entry["ci95"], strict=True))
    if "response_tokens" in result:
        values["response_tokens"] = result["response_tokens"]
    metrics.rewind(stage, policy.round, policy.round - 1)
    timing = {"seconds": seconds}
    metrics.scalars(stage, policy.round, values, round=policy.round, time_values=timing)
    workdir.finish(policy.round, stage, [file, answers_file], seconds)


# --- the command ----------------------------------------------------------------------------------


def report(results: dict[tuple[int, str], dict[str, Any]]) -> str:
    """The short table: a line for each policy and score."""
    rows, remarks = [], []
    for (number, name), result in results.items():
        label = Policy(number, Path()).label
        for entry in result["scores"]:
            value, interval = entry["value"], entry["ci95"]
            shown = f"{value:.4f}" if isinstance(value, float) else value
            shown += f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            tokens = f"{result['response_tokens']:.1f}" if "response_tokens" in result else "-"
            rows.append((label, entry["task"], entry["metric"], shown, entry["n"], tokens))
        if result["truncated_prompts"]:
            remarks.append(
                f"{label}, {name}: {result['truncated_prompts']} prompts were too long and lost "
                "their beginning"
            )
        if result.get("cut_by_budget"):
            remarks.append(f"{label}, {name}: {result['cut_by_budget']} answers hit --max_gen_toks")
    headers = ("policy", "task", "metric", "score [95 % interval]", "n", "tokens/answer")
    return "\n".join([table(rows, headers), *remarks])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.evaluate", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--workdir", type=paths.argument, required=True, help="of the run, as for main")
    add("--lm_eval_tasks", required=True, help="tasks, groups or tags, separated by commas")
    add("--round", type=int, help="only the policy after this round; 0: the starting model")
    add("--ifeval_data", type=paths.argument, help="input_data.jsonl and nltk_data: ifeval offline")
    add(
        "--lm_eval_include",
        type=paths.argument,
        help="directory with your own task files (YAML)",
    )
    add("--limit", type=int, help="only the first documents of each task")
    add("--seed", type=int, default=42, help="of answers and few-shot examples; default 42")
    add("--temperature", type=float, help="default: the paper's for ifeval, else the task's")
    add("--top_p", type=float, help="as --temperature")
    add("--top_k", type=int, help="as --temperature; 0: off")
    add("--max_gen_toks", type=int, help="tokens of an answer; default: the task's own")
    add(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts go into the model's template, thinking off",
    )
    add("--truncate_prompts", action="store_true", help="too long ones lose their beginning")
    add("--fsdp", type=int, help="devices as config.mesh.fsdp; default: the run's")
    add("--tp", type=int, help="devices as config.mesh.tp; default: the run's")
    return parser


def _sampling(given: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as `generation_kwargs`."""
    bounds = {
        "temperature": (0, None),
        "top_p": (0, 1),
        "top_k": (0, None),
        "max_gen_toks": (1, None),
    }
    chosen = {}
    for name, (low, high) in bounds.items():
        value = getattr(given, name)
        if value is None:
            continue
        if not low <= value <= (value if high is None else high) or (name == "top_p" and not value):
            raise UserError(
                f"--{name}={value}: it must be {'above' if name == 'top_p' else 'at least'} {low}"
                + (f" and at most {high}" if high else "")
            )
        chosen[name] = value
    if "temperature" in chosen:
        chosen["do_sample"] = chosen["temperature"] > 0
    return chosen


def run(given: argparse.Namespace) -> dict[tuple[int, str], dict[str, Any]]:
    """Check all flags, evaluate, return the results."""
    for name, least in (("round", 0), ("limit", 1), ("seed", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: it must be at least {least}")
    sampling = _sampling(given)
    caches.set_hugging_face_home()
    require_lm_eval()
    _, config = _run_config(given.workdir)
    _policies(given.workdir, config, given.round)
    keep_compiled(config.compilation_cache)
    try:
        mesh = make_mesh(
            config.mesh.fsdp if given.fsdp is None else given.fsdp,
            config.mesh.tp if given.tp is None else given.tp,
        )
    except UserError as error:
        raise UserError(f"{error}; here with --fsdp and --tp") from error

    from oel_jax.evaluate.tasks import select  # needs the harness, and takes seconds

    selection = select(
        [name.strip() for name in given.lm_eval_tasks.split(",") if name.strip()],
        seed=given.seed,
        sampling=sampling,
        chat=given.chat_template,
        limit=given.limit,
        truncate=given.truncate_prompts,
        ifeval_data=given.ifeval_data,
        include=given.lm_eval_include,
    )
    return evaluate_policies(given.workdir, selection, round_number=given.round, mesh=mesh)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        results = run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Finished answers are kept; the same command resumes.", file=sys.stderr)
        return 130
    print(report(results))
    print(f"files: {given.workdir}/evaluate and {given.workdir}/round_*/evaluate, lm_eval_*.json")
    return 0
