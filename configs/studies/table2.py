"""Table 2: whose knowledge: one's own, a larger model's from the same games, a larger model's own.

Paper, Table 2 (Frozen Lake, Qwen3-1.7B): 7.3 % without; knowledge by Qwen3-4B 18.0 % in context
and 22.7 % consolidated; by itself 23.8 % and 31.1 %. The paper's cross-model line is read as 'the
larger model extracts from the smaller one's trajectories' (`larger_reads`); `larger_plays` takes
what the larger model wrote about games that it played itself (`larger`, which is only deployed and
read).

Expected: every source of knowledge raises the pass rate; one's own raises it most when
consolidated.

Found (nano, loop seeds 1-3): every source raises it in the mean (4.6 % -> own 63.3 %, larger_reads
64.7 %, larger_plays 37.7 %, consolidated), but how much of round 1's knowledge is learned differs
so much between seeds that no interval is apart from the start's. That the larger model reads makes
no difference, since small and medium extract equally well; that one's own is better than what a
larger model learned from its own games holds in the mean, as in the paper.
Run time: 7.5 minutes on one CPU core.
"""

from pathlib import Path

from oel_jax.study.command import Expectation, Measure, Other, Plot, Study, Variant, load_config

PRESETS = ("nano", "qwen3_1p7b")
_CONFIGS = Path(__file__).resolve().parent.parent

_NONE, _CONTEXT, _AFTER = "no experience", "round 1 in context", "round 1 consolidated"
_PAPER = {
    ("own", _NONE): 0.073,
    ("larger_reads", _CONTEXT): 0.180,
    ("larger_reads", _AFTER): 0.227,
    ("own", _CONTEXT): 0.238,
    ("own", _AFTER): 0.311,
}
_SHOWN = ("own", "larger_reads", "larger_plays")


def get_study(preset: str) -> Study:
    """The study; 'nano' compares the bundled small with medium, the other Qwen3-1.7B with 4B."""
    if preset == "nano":
        config = load_config(_CONFIGS / "nano_frozen_lake.py")
        config.consolidate.learning_rate = 3e-4
        config.evaluate.seeds = 4
        config.preflight.games = 0
        larger, seeds = "nano:medium", (1, 2, 3)
    else:
        config = load_config(_CONFIGS / "frozen_lake_qwen3_1p7b.py")
        larger, seeds = "Qwen/Qwen3-4B", (0, 1, 2)
    config.rounds = 1
    config.evaluate.unseen_split = False
    rises = (
        Expectation(
            f"{name}: consolidated above no experience, intervals apart",
            higher=(name, _AFTER),
            lower=(name, _NONE),
            apart=True,
        )
        for name in _SHOWN
    )
    best = (
        Expectation(f"consolidated: own above {name}", higher=("own", _AFTER), lower=(name, _AFTER))
        for name in _SHOWN[1:]
    )
    return Study(
        config=config,
        variants=(
            Variant("larger", {"model.path": larger}, stages=("deploy", "extract")),
            Variant("own"),
            Variant("larger_reads", {"extract.model_path": larger}),
            Variant("larger_plays", {"extract.knowledge_from": Other("larger")}),
        ),
        seeds=seeds,
        measures=(
            Measure(_NONE, "start"),
            Measure(_CONTEXT, "in_context", 1),
            Measure(_AFTER, "consolidated", 1),
        ),
        baseline="own",
        paper=_PAPER,
        expectations=(*rises, *best),
        plots=(Plot("pass_rate", "Whose knowledge", (_NONE, _CONTEXT, _AFTER), _SHOWN),),
    )
