"""Out-of-distribution skill of nano models: what they were pre-trained on and OEL never trains.

Four skills, equally weighted, each asked for in the same words whoever is measured: the other real
game with gold knowledge, worlds with other symbols, Frozen Lake with H and G swapped, and tiny
instructions with one right answer. For real models see the lm-evaluation-harness command.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.config.negative_control import OTHER_GAME
from oel_jax.models.bundled import resolve_bundled
from oel_jax.models.huggingface import resolve
from oel_jax.nano.measure import Measurement, conditions
from oel_jax.nano.reader import Reader, check_family
from oel_jax.runs.policies import policy_directory
from oel_jax.runs.session import Run

BOARDS, SEEDS = 64, 2  # 128 games of the other game, 64 of the two others each, 100 instructions


def check_skills(config: Any) -> None:
    """Refuse `evaluate.skills` where they cannot be measured, before a model is loaded.

    Raises:
      UserError: the model is not of the nano family, or the game is neither of its two.
    """
    if not config.evaluate.skills:
        return
    if config.game.name not in OTHER_GAME:
        raise UserError(
            f"config.evaluate.skills measures Frozen Lake and Sokoban; with config.game.name="
            f"{config.game.name!r} set it to False"
        )
    try:
        check_family(resolve(resolve_bundled(config.model.path)))
    except UserError as error:
        raise UserError(
            f"config.evaluate.skills needs a nano model ({error}); set it to False, and measure "
            "others by python -m oel_jax.evaluate --lm_eval_tasks"
        ) from error


def measure_skills(run: Run, number: int) -> list[Path]:
    """What the policy after round `number` (0: the start) can do outside the game, if asked for.

    The policies kept inside the round are measured too. Returns the files.
    """
    if not run.config.evaluate.skills:
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
    places.append((steps, policy_directory(run.config, workdir, number + 1), last))
    for step, directory, file in places:
        result = evaluate_skills(run.config, directory, file)
        low, high = result["ci95"]
        values = {"skill": result["skill"], "ci95_low": low, "ci95_high": high}
        run.metrics.scalars("evaluate_skills", step, values, round=number)
        at = f" after step {step}" if step != steps else ""
        print(f"skills that are not trained{at}: {result['skill']:.1%} [{low:.1%}, {high:.1%}]")
    return [file for _, _, file in places]


def evaluate_skills(config: Any, directory: Path, file: Path) -> dict[str, Any]:
    """Measure a policy's skills and write them to `file`; returns them.

    Returns: 'skill', the mean of the four rates, with 'ci95' and each of them under 'skills'.
    """
    if file.exists():
        return read_json(file)
    other = OTHER_GAME[config.game.name]
    measured = Measurement(Reader(directory, seed=config.seed), SEEDS, BOARDS)
    gold = next(c for c in conditions(other) if c.label == "gold" and c.thinking)
    measured.real(other, gold)
    measured.other(config.game.name)
    measured.swapped()
    measured.instructions()
    lines = {name: line for name, line in measured.lines.items() if line.unit == "rate"}
    values = np.array([line.value for line in lines.values()])
    # The skills are independent samples: the variances of their means add up.
    halves = np.array([(line.high - line.low) / 2 for line in lines.values()])
    half = float(np.sqrt((halves**2).sum()) / len(lines))
    mean = float(values.mean())
    result = {
        "skill": mean,
        "ci95": [max(0.0, mean - half), min(1.0, mean + half)],
        "skills": {
            name: {"rate": line.value, "ci95": [line.low, line.high], "n": line.n}
            for name, line in lines.items()
        },
    }
    write_json(file, result)
    return result


def keep_skilled(run: Run, number: int) -> list[Path]:
    """Guard on skill: replace a policy that has lost too much by the newest one that has not.

    Candidates are, from the newest, the policies kept inside the round (`evaluate.steps`) and the
    one the round began with.

    Returns: the file that says what was done, if anything was.
    """
    workdir, allowed = run.workdir, run.config.guard.skill_drop
    if not allowed:
        return []
    first = policy_directory(run.config, workdir, 1)
    start = evaluate_skills(run.config, first, workdir.start_skills)["skill"]
    candidates = [(workdir.policy(number), workdir.evaluation(number, "skills"))]
    for step in reversed(run.config.evaluate.steps):
        if workdir.policy_at(number, step).exists():
            file = workdir.evaluation(number, f"step_{step:03d}_skills")
            candidates.append((workdir.policy_at(number, step), file))
    found = []
    for directory, file in candidates:
        skill = evaluate_skills(run.config, directory, file)["skill"]
        found.append({"policy": directory.name, "skill": skill})
        if start - found[-1]["skill"] <= allowed:
            break
    else:
        directory = policy_directory(run.config, workdir, number)
        found.append({"policy": "the one the round began with"})
    if len(found) == 1:
        return []
    before = workdir.evaluation(number, "skills")
    before.unlink()
    shutil.rmtree(workdir.policy(number))
    shutil.copytree(directory, workdir.policy(number))
    record = workdir.round(number) / "guard_skill.json"
    write_json(record, {"start": start, "allowed_drop": allowed, "tried": found})
    print(
        f"GUARD: round {number} lost skill: {found[0]['skill']:.1%} after {start:.1%} at the "
        f"start, more than {allowed:.1%} (config.guard.skill_drop); kept: {found[-1]['policy']}"
    )
    return [record]
