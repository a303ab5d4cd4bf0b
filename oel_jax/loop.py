"""Online Experiential Learning, paper Algorithm 1: read this first.

    P_1 = the model you start from
    for each round r:
        deploy       P_r plays; games become trajectories          (user side)
        extract      K knowledge texts are drawn from them         (server side, no games)
        preflight    P_r plays with each text: is it worth it?     (user side, may be off)
        consolidate  the texts are distilled into P_r's weights    (server side, no games)
        evaluate     P_r, P_r with knowledge, and P_{r+1} play     (user side)
        P_{r+1} goes back to the user side

Every stage reads files and writes files and is done when its files are there; running the same
command again does what is missing.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from oel_jax.actor.deploy import demonstrate, deploy
from oel_jax.actor.evaluate import evaluate
from oel_jax.actor.preflight import heed, preflight
from oel_jax.config import negative_control
from oel_jax.config.defaults import as_json, leaves
from oel_jax.errors import UserError
from oel_jax.files import read_json, write_json
from oel_jax.learner.consolidate import consolidate
from oel_jax.learner.extract import extract
from oel_jax.machine import preemption
from oel_jax.nano.skills import evaluate_skills, keep_skilled
from oel_jax.parallel import processes
from oel_jax.report import page as report
from oel_jax.report.gains import gains, mean_error, sentence
from oel_jax.runs.metrics import duration, table
from oel_jax.runs.profiling import compile_seconds
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import STAGES, samples_of, stages_of

# What must be finished in the same round before a stage can run.
_NEEDS = {
    "deploy": (),
    "extract": ("deploy",),
    "demonstrate": ("extract",),
    "preflight": ("extract",),
    "consolidate": ("deploy", "extract", "demonstrate"),
    "evaluate": ("extract", "consolidate"),
}


def learn(run: Run, stages: Sequence[str] = STAGES) -> None:
    """Run all rounds; `stages` limits what is done, finished stages are skipped."""
    print(negative_control.announcement(run.config), end="")
    _say_rounds(run)
    began, compiled = time.monotonic(), compile_seconds()
    if "evaluate" in stages:
        _stage(run, 0, "evaluate", lambda: _evaluate_start(run))
    for number in range(1, run.config.rounds + 1):
        work: dict[str, Callable[[], list[Path]]] = {
            "deploy": lambda r=number: deploy(run, r),
            "extract": lambda r=number: extract(run, r),
            "demonstrate": lambda r=number: demonstrate(run, r),
            "preflight": lambda r=number: preflight(run, r),
            "consolidate": lambda r=number: _consolidate(run, r),
            "evaluate": lambda r=number: _evaluate_round(run, r),
        }
        print(f"\n=== round {number} of {run.config.rounds} ===")
        for stage in stages_of(run.config):
            if stage not in stages or run.finished(number, stage):
                continue
            missing = _missing(run, number, stage)
            if missing:
                _summary(run)
                raise UserError(
                    f"round {number}: {stage} needs {' and '.join(missing)} first; add it to "
                    "--stages and run the same command again. What --stages asked for before that "
                    "is done"
                )
            if stage == "consolidate":
                _heed_preflight(run, number)
            _stage(run, number, stage, work[stage])
        if run.finished(number, "consolidate") and processes.is_first():
            run.workdir.drop_checkpoints(number)
        _summary(run)
        if run.finished(number, "evaluate") and processes.is_first():
            print(_round_table(run, number))
    compiled = compile_seconds() - compiled
    print(f"\nall: {duration(time.monotonic() - began)}, {compiled:.1f} s of it compiling")


def _say_rounds(run: Run) -> None:
    """Whoever asks for fewer rounds than are there is told so."""
    there, asked = run.workdir.rounds() if processes.is_first() else 0, run.config.rounds
    if there > asked:
        print(
            f"note: config.rounds={asked}, and this workdir has {there} rounds. What is there is "
            f"kept and shown; nothing is done after round {asked}. For a run of {asked} round(s) "
            "take a new --workdir"
        )


def _missing(run: Run, number: int, stage: str) -> list[str]:
    """Unfinished stages that `stage` of this round builds on."""
    needs = [need for need in _NEEDS[stage] if need in stages_of(run.config)]
    missing = [need for need in needs if not run.finished(number, need)]
    if number > 1 and not run.finished(number - 1, "consolidate"):
        missing.append(_before(number))
    return missing


def _heed_preflight(run: Run, number: int) -> None:
    """Warn or stop; here, not in the stage, since what follows from its numbers may be changed."""
    try:
        heed(run, number)
    except UserError:
        _summary(run)
        raise


def _before(number: int) -> str:
    return f"consolidate of round {number - 1}"


def _stage(run: Run, number: int, name: str, work: Callable[[], list[Path]]) -> None:
    """Run one stage unless it is finished; record its files and its time."""
    if run.finished(number, name):
        return
    began, compiled = time.monotonic(), compile_seconds()
    taken = run.shelf.take(run, number, name) if run.shelf else None
    with preemption.holding(0):  # what the stage holds, it holds until it is recorded
        files = taken or work()
        seconds, compiled = time.monotonic() - began, compile_seconds() - compiled
        record = partial(run.workdir.finish, number, name, files, seconds)
        processes.first_does(f"{number} {name} is finished", record)
    if run.shelf:
        run.shelf.put(run, number, name)
    timing = {f"{name}_seconds": seconds, f"{name}_compile_seconds": compiled}
    run.metrics.rewind(f"time_{name}", number, number - 1)
    run.metrics.scalars(f"time_{name}", number, {}, round=number, time_values=timing)
    run.metrics.flush()
    share = f", {compiled:.1f} s of it compiling" if compiled >= 0.5 else ""
    share += ", made by another run" if taken else ""
    print(f"{f'round {number}' if number else 'start'} {name}: done in {duration(seconds)}{share}")


def _consolidate(run: Run, number: int) -> list[Path]:
    """The stage, and the guard on skills, which are measured by playing: not on its side."""
    files = consolidate(run, number)
    if run.config.guard.skill_drop and processes.is_first():
        files += keep_skilled(run, number)
    return files


def _evaluate_start(run: Run) -> list[Path]:
    """P_1 without knowledge: where the run starts from."""
    file = run.workdir.start_evaluation
    result = evaluate(
        run, run.policy(1), file, round_number=0, name="start", label="evaluate starting model"
    )
    _log(run, 0, "start", 0, result)
    print(f"starting model: {_rate(result)}, {result['response_tokens']:.1f} tokens/answer")
    return [file, samples_of(file), *_skills(run, 0)]


def _skills(run: Run, number: int) -> list[Path]:
    """What the policy after round `number` (0: the start) can do beside the game, if asked for."""
    if not run.config.evaluate.skills or not processes.is_first():
        return []
    workdir = run.workdir
    run.metrics.rewind("evaluate_skills", number, -1)
    places = []
    for step in run.config.evaluate.steps if number else ():
        if workdir.policy_at(number, step).exists():
            file = workdir.evaluation(number, f"step_{step:03d}_skills")
            places.append((step, workdir.policy_at(number, step), file))
    last = workdir.evaluation(number, "skills") if number else workdir.start_skills
    steps = run.config.consolidate.steps if number else 0
    places.append((steps, run.policy_directory(number + 1), last))
    for step, directory, file in places:
        result = evaluate_skills(run, directory, file)
        low, high = result["ci95"]
        values = {"skill": result["skill"], "ci95_low": low, "ci95_high": high}
        run.metrics.scalars("evaluate_skills", step, values, round=number)
        at = f" after step {step}" if step != steps else ""
        print(f"skills that are not trained{at}: {result['skill']:.1%} [{low:.1%}, {high:.1%}]")
    return [file for _, _, file in places]


def _evaluate_round(run: Run, number: int) -> list[Path]:
    """P_r with knowledge in context, and P_{r+1} without."""
    workdir, config = run.workdir, run.config.evaluate
    files = []
    points = {n: f"curve_{n:03d}" for n in config.curve}
    if config.in_context:
        points[run.config.extract.n] = "in_context"
    policy = run.policy(number) if points else None
    for n in sorted(points):
        files.append(workdir.evaluation(number, points[n]))
        result = evaluate(
            run,
            policy,
            files[-1],
            round_number=number,
            name=f"knowledge_{n}",
            label=f"round {number} evaluate knowledge of {n} games in context",
            texts=_texts(run, number, n),
        )
        _log(run, number, "in_context", n, result)
    del policy  # one model at a time
    files += _inside(run, number)
    files.append(workdir.evaluation(number, "consolidated"))
    result = evaluate(
        run,
        run.policy(number + 1),
        files[-1],
        round_number=number,
        name="consolidated",
        label=f"round {number} evaluate consolidated model",
    )
    _log(run, number, "consolidated", run.config.consolidate.steps, result)
    final = {f"final/{name}": result[name] for name in ("pass_rate", "response_tokens")}
    run.metrics.settings(leaves(as_json(run.config)), final, step=number)
    if processes.is_first():
        run.metrics.image("pass_rate", number, report.figure(workdir), "figures")
    return files + [samples_of(file) for file in files] + _skills(run, number)


def _inside(run: Run, number: int) -> list[Path]:
    """The policies kept inside the round: the game, and what they can do beside it."""
    files = []
    for step in run.config.evaluate.steps:
        directory = run.workdir.policy_at(number, step)
        if not processes.from_first(directory.exists()):  # a guard stopped the round before
            continue
        files.append(run.workdir.evaluation(number, f"step_{step:03d}"))
        result = evaluate(
            run,
            run.player(run.load(directory)),
            files[-1],
            round_number=number,
            name=f"step_{step}",
            label=f"round {number} evaluate step {step}",
        )
        _log(run, number, "consolidated", step, result)
    return files


def _texts(run: Run, number: int, n: int) -> list[str]:
    """The K texts after n trajectories."""
    texts = [
        read_json(run.workdir.knowledge_step(number, chain, n))["text"]
        for chain in range(run.config.extract.chains)
    ]
    return negative_control.knowledge_texts(run.config, number, texts)


def _log(run: Run, number: int, name: str, step: int, result: dict[str, Any]) -> None:
    run.metrics.rewind(f"evaluate_{name}", number, step - 1)
    run.metrics.scalars(
        f"evaluate_{name}",
        step,
        {
            "pass_rate": result["pass_rate"],
            "ci95_low": result["ci95"][0],
            "ci95_high": result["ci95"][1],
            "response_tokens": result["response_tokens"],
            "turns": result["turns"],
        },
        round=number,
    )


_KEPT = ("pass_rate", "ci95", "response_tokens")


def _short(file: Path) -> dict[str, Any] | None:
    """The part of an evaluation that goes into the summary, or None if it was not made."""
    if not file.exists():
        return None
    result = read_json(file)
    return {name: result[name] for name in _KEPT}


def _summary(run: Run) -> None:
    """summary.json: the start, and per round both evaluations, gains, the seconds of each stage.

    report.html shows the same and more.
    """
    if not processes.is_first():
        return
    workdir = run.workdir
    rounds = []
    found = gains(workdir, workdir.rounds())
    for number in range(1, workdir.rounds() + 1):
        entry: dict[str, Any] = {"round": number}
        for name in ("in_context", "consolidated"):
            entry[name] = _short(workdir.evaluation(number, name))
        gained = found[number - 1]
        entry["gain"] = {key: gained[key] for key in ("in_context", "after", "error")}
        rounds.append(entry | {"seconds": workdir.seconds(number)})
    start = _short(workdir.start_evaluation)
    summary = negative_control.mark(run.config) | {"start": start, "rounds": rounds}
    summary["gain_error"] = mean_error(found)
    write_json(workdir.summary_file, summary)
    report.write(workdir)


def _rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not measured"
    low, high = result["ci95"]
    return f"{result['pass_rate']:.1%} [{low:.1%}, {high:.1%}]"


def _round_table(run: Run, number: int) -> str:
    """The short table that ends a round."""
    workdir = run.workdir
    before = (
        workdir.start_evaluation if number == 1 else workdir.evaluation(number - 1, "consolidated")
    )
    files = {
        "before, without knowledge": before,
        "before, knowledge in context": workdir.evaluation(number, "in_context"),
        "after consolidation": workdir.evaluation(number, "consolidated"),
    }
    last = read_json(workdir.evaluation(number, "consolidated"))
    unseen = last.get("unseen", {"maps": 0})["maps"]
    headers = [f"round {number}", "pass rate [95 % interval]", "tokens/answer"]
    if unseen:
        headers.append(f"{unseen} maps not met in deployment")
    rows = []
    for name, file in files.items():
        result = read_json(file) if file.exists() else None
        row = [name, _rate(result), f"{result['response_tokens']:.1f}" if result else "-"]
        if unseen:  # earlier evaluations knew of fewer met boards: another set of maps
            part = (result or {}).get("unseen", {"maps": 0})
            row.append(_rate(part) if part["maps"] == unseen else "-")
        rows.append(row)
    text = negative_control.announcement(run.config) + table(rows, headers)
    maps, seeds = len(last["passed"][0]), len(last["passed"])  # as measured, whatever the config
    text += f"\n{maps} held-out maps x {seeds} games each"
    if "random_policy" in last:
        text += (
            f"; a random policy passes {last['random_policy']:.2%}, "
            f"perfect play {last['perfect_play']:.1%}"
        )
    seconds = (f"{stage} {value:.0f}" for stage, value in workdir.seconds(number).items())
    gained = sentence(gains(workdir, number), number)
    text += f"\n{gained}" if gained else ""
    return f"{text}\nseconds per stage: {', '.join(seconds)}"
