"""Fig. 5: how long the answers are along accumulation and rounds, relative to the starting model.

Paper, Fig. 5 (Frozen Lake, Qwen3-1.7B): the mean response length per turn falls while knowledge
gathers, stays low after consolidation, and is about 70 % of the first length by the third round
(the only value printed). Intervals are over loop seeds.

Expected: shorter with knowledge in context; shorter than the start after the last round.

Found (nano, loop seeds 1-3): 0.85 [0.77, 0.93] with round 1's knowledge in context, 0.77 after
round 3 on every seed: a nano answer has a fixed form, which ends at 20 of 26 tokens.
Run time: 9 minutes on one CPU core.
"""

from pathlib import Path

from oel_jax.study.command import Expectation, Measure, Plot, Study, Variant, load_config

PRESETS = ("nano", "qwen3_1p7b")
_CONFIGS = Path(__file__).resolve().parent.parent
_ROUNDS = 3
_LENGTH = {"value": "response_tokens", "per_start": True}


def get_study(preset: str) -> Study:
    """The study; 'nano' is the default run, the other is the paper's model."""
    if preset == "nano":
        config = load_config(_CONFIGS / "nano_frozen_lake.py")
        config.evaluate.maps, config.evaluate.seeds = 64, 2  # lengths need few games
        config.preflight.games = 0
        points, seeds = (1, 2, 4), (1, 2, 3)
    else:
        config = load_config(_CONFIGS / "frozen_lake_qwen3_1p7b.py")
        points, seeds = (1, 5, 10), (0, 1, 2)
    config.rounds = _ROUNDS
    config.evaluate.unseen_split = False
    config.evaluate.curve = points
    measures, breaks = [Measure("start", "start", **_LENGTH)], []
    for number in range(1, _ROUNDS + 1):
        breaks += [len(measures)] if number > 1 else []
        measures += [
            Measure(f"round {number}, {n} games read", f"curve_{n:03d}", number, **_LENGTH)
            for n in points
        ]
        measures.append(Measure(f"round {number} in context", "in_context", number, **_LENGTH))
        measures.append(Measure(f"round {number} consolidated", "consolidated", number, **_LENGTH))
    last = f"round {_ROUNDS} consolidated"
    return Study(
        config=config,
        variants=(Variant("oel"),),
        seeds=seeds,
        measures=tuple(measures),
        paper={("oel", last): 0.70},
        expectations=(
            Expectation(
                "answers are shorter with round 1's knowledge in context, intervals apart",
                higher=("oel", "start"),
                lower=("oel", "round 1 in context"),
                apart=True,
            ),
            Expectation(
                "answers are shorter after the last round than at the start, intervals apart",
                higher=("oel", "start"),
                lower=("oel", last),
                apart=True,
            ),
        ),
        plots=(
            Plot(
                "length",
                "Response tokens per turn, starting model = 1",
                tuple(measure.name for measure in measures),
                kind="line",
                breaks=tuple(breaks),
            ),
        ),
    )
