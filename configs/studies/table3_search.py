"""Table 3: the search over format, games read, L_max, learning rate and steps, as one study.

Paper, Table 3 (the ranges that were searched; no results printed): structured knowledge from 25 or
50 games with L_max 8192, unstructured from 15 with L_max 2048; learning rate 1e-6 or 5e-6; 20 or
100 steps a round. All twelve combinations share deployments, knowledge and evaluations where they
can. The nano ranges are 3 or 6 and 4 games, 96 and 48 tokens, 1.5e-4 or 3e-4, 10 or 20 steps.

Expected: no order; of each pair that differs in the learning rate or in the steps alone, the one
with more training ends higher on the nano model (measured over all pairs).

Found (nano, loop seed 1): the larger learning rate gains 39.6 points, twice the steps 38.4.
Run time: 11 minutes on one CPU core.
"""

from pathlib import Path

from oel_jax.study.command import Expectation, Measure, Plot, Study, Variant, load_config

PRESETS = ("nano", "qwen3_1p7b", "qwen3_4b_instruct")
_CONFIGS = Path(__file__).resolve().parent.parent
_AFTER = "round 1 consolidated"


def get_study(preset: str) -> Study:
    """The study; 'nano' and 'qwen3_1p7b' are Frozen Lake, 'qwen3_4b_instruct' Sokoban."""
    if preset == "nano":
        config = load_config(_CONFIGS / "nano_frozen_lake.py")
        config.evaluate.seeds = 4
        config.preflight.games = 0
        formats = [("v4", 3, 6, 96), ("v4", 6, 6, 96), ("v3", 4, 4, 48)]
        rates, steps, seeds = (1.5e-4, 3e-4), (10, 20), (1,)
    else:
        file = {"qwen3_1p7b": "frozen_lake_qwen3_1p7b.py"}
        config = load_config(_CONFIGS / file.get(preset, "sokoban_qwen3_4b_instruct.py"))
        formats = [("v4", 25, 50, 8192), ("v4", 50, 50, 8192), ("v3", 15, 15, 2048)]
        rates, steps, seeds = (1e-6, 5e-6), (20, 100), (0,)
    config.rounds = 1
    config.evaluate.unseen_split = False
    variants = tuple(
        Variant(
            f"{version}_n{n}_lr{index + 1}_s{count}",
            {
                "extract.version": version,
                "extract.n": n,
                "extract.n_run": n_run,
                "extract.l_max": l_max,
                "consolidate.learning_rate": rate,
                "consolidate.steps": count,
            },
        )
        for version, n, n_run, l_max in formats
        for index, rate in enumerate(rates)
        for count in steps
    )
    more = Expectation(
        "more training ends higher, on average over the pairs",
        test=lambda results: _more(results, formats, steps),
    )
    return Study(
        config=config,
        variants=variants,
        seeds=seeds,
        measures=(
            Measure("start", "start"),
            Measure("round 1 in context", "in_context", 1),
            Measure(_AFTER, "consolidated", 1),
        ),
        baseline=variants[0].name,
        expectations=(more,) if preset == "nano" else (),
        plots=(Plot("search", "Round 1 of the search", ("round 1 in context", _AFTER)),),
    )


def _more(results, formats, steps) -> tuple[bool, str]:
    """Mean gain from the larger learning rate and from the larger number of steps."""
    rate = {
        (version, n, index, count): results.mean(f"{version}_n{n}_lr{index}_s{count}", _AFTER)
        for version, n, _, _ in formats
        for index in (1, 2)
        for count in steps
    }
    by_rate = [rate[v, n, 2, s] - rate[v, n, 1, s] for v, n, i, s in rate if i == 1]
    few, many = steps
    by_steps = [rate[v, n, i, many] - rate[v, n, i, few] for v, n, i, s in rate if s == few]
    gains = sum(by_rate) / len(by_rate), sum(by_steps) / len(by_steps)
    shown = f"learning rate {100 * gains[0]:+.1f} points, steps {100 * gains[1]:+.1f} points"
    return min(gains) > 0, shown
