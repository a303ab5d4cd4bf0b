"""What is measured after each round: P_r with the round's knowledge in its prompt, and P_{r+1}.

All of it is played on the held-out boards; nothing of it is read by a later stage.
"""

from pathlib import Path
from typing import Any

from oel_jax.actor.evaluate import evaluate
from oel_jax.base.files import read_json
from oel_jax.config import negative_control
from oel_jax.config.defaults import as_json
from oel_jax.config.fields import leaves
from oel_jax.parallel import processes
from oel_jax.report import page
from oel_jax.report.summary import rate
from oel_jax.runs.metrics import Metrics, NoMetrics
from oel_jax.runs.policies import load_player, load_player_of_round
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import samples_of


def evaluate_start(run: Run, _: int = 0) -> list[Path]:
    """P_1 without knowledge: where the run starts from. Returns the files."""
    file = run.workdir.start_evaluation
    result = evaluate(
        run,
        load_player_of_round(run.config, run.workdir, 1, run.host, today=run.today),
        file,
        round_number=0,
        name="start",
        label="evaluate starting model",
    )
    _log(run.metrics, 0, "start", 0, result)
    print(f"starting model: {rate(result)}, {result['response_tokens']:.1f} tokens/answer")
    return [file, samples_of(file)]


def evaluate_round(run: Run, number: int) -> list[Path]:
    """All evaluations of round `number` that the config asks for; returns the files."""
    files = _with_knowledge(run, number) + _inside(run, number)
    files.append(run.workdir.evaluation(number, "consolidated"))
    result = evaluate(
        run,
        load_player_of_round(run.config, run.workdir, number + 1, run.host, today=run.today),
        files[-1],
        round_number=number,
        name="consolidated",
        label=f"round {number} evaluate consolidated model",
    )
    _log(run.metrics, number, "consolidated", run.config.consolidate.steps, result)
    final = {f"final/{name}": result[name] for name in ("pass_rate", "response_tokens")}
    run.metrics.settings(leaves(as_json(run.config)), final, step=number)
    if processes.is_first():
        run.metrics.image("pass_rate", number, page.figure(run.workdir), "figures")
    return files + [samples_of(file) for file in files]


def _with_knowledge(run: Run, number: int) -> list[Path]:
    """P_r with the texts after n trajectories, for each n that is asked for."""
    files: list[Path] = []
    points = {n: f"curve_{n:03d}" for n in run.config.evaluate.curve}
    if run.config.evaluate.in_context:
        points[run.config.extract.n] = "in_context"
    if not points:
        return files
    policy = load_player_of_round(run.config, run.workdir, number, run.host, today=run.today)
    for n in sorted(points):
        files.append(run.workdir.evaluation(number, points[n]))
        texts = _texts(run, number, n)
        result = evaluate(
            run,
            policy,
            files[-1],
            round_number=number,
            name=f"knowledge_{n}",
            label=f"round {number} evaluate knowledge of {n} games in context",
            texts=negative_control.knowledge_texts(run.config, number, texts),
        )
        _log(run.metrics, number, "in_context", n, result)
    return files


def _inside(run: Run, number: int) -> list[Path]:
    """The policies that were kept inside the round (`evaluate.steps`)."""
    files = []
    for step in run.config.evaluate.steps:
        directory = run.workdir.policy_at(number, step)
        if not processes.from_first(directory.exists()):  # a guard stopped the round before
            continue
        files.append(run.workdir.evaluation(number, f"step_{step:03d}"))
        result = evaluate(
            run,
            load_player(run.config, directory, run.host, today=run.today),
            files[-1],
            round_number=number,
            name=f"step_{step}",
            label=f"round {number} evaluate step {step}",
        )
        _log(run.metrics, number, "consolidated", step, result)
    return files


def _texts(run: Run, number: int, n: int) -> list[str]:
    """The text of each chain after n trajectories; with `extract.review` those approved."""
    if run.config.extract.review:  # then n is that of the texts that are used
        return processes.json_from_first(run.workdir.approved(number))["texts"]
    chains = range(run.config.extract.chains)
    files = (run.workdir.knowledge_step(number, chain, n) for chain in chains)
    return [read_json(file)["text"] for file in files]


def _log(
    metrics: Metrics | NoMetrics, number: int, name: str, step: int, result: dict[str, Any]
) -> None:
    metrics.rewind(f"evaluate_{name}", number, step - 1)
    values = {
        "pass_rate": result["pass_rate"],
        "ci95_low": result["ci95"][0],
        "ci95_high": result["ci95"][1],
        "response_tokens": result["response_tokens"],
        "turns": result["turns"],
    }
    metrics.scalars(f"evaluate_{name}", step, values, round=number)
