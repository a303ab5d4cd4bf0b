"""Out-of-distribution skill of nano models: what they were pre-trained on and OEL never trains.

Four skills, equally weighted, each asked for in the same words whoever is measured: the other real
game with gold knowledge, worlds with other symbols, Frozen Lake with H and G swapped, and tiny
instructions with one right answer. For real models see the lm-evaluation-harness command.
"""

from pathlib import Path
from typing import Any

import numpy as np

from oel_jax.errors import UserError
from oel_jax.lm.huggingface import resolve
from oel_jax.lm.language_model import bundled
from oel_jax.nano.measure import Measurement, conditions
from oel_jax.nano.reader import Reader, check_family
from oel_jax.negative_control import OTHER_GAME
from oel_jax.run import Run
from oel_jax.workdir import read_json, write_json

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
        check_family(resolve(bundled(config.model.path)))
    except UserError as error:
        raise UserError(
            f"config.evaluate.skills needs a nano model ({error}); set it to False, and measure "
            "others by python -m oel_jax.evaluate --lm_eval_tasks"
        ) from error


def evaluate_skills(run: Run, directory: Path, file: Path) -> dict[str, Any]:
    """Measure a policy's skills and write them to `file`; returns them.

    Returns: 'skill', the mean of the four rates, with 'ci95' and each of them under 'skills'.
    """
    if file.exists():
        return read_json(file)
    other = OTHER_GAME[run.config.game.name]
    measured = Measurement(Reader(directory, seed=run.config.seed), SEEDS, BOARDS)
    gold = next(c for c in conditions(other) if c.label == "gold" and c.thinking)
    measured.real(other, gold)
    measured.other(run.config.game.name)
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
