"""A small real model on Frozen Lake: on a CPU, or on one small GPU.

    python -m oel_jax.main --config=configs/frozen_lake_small.py --workdir=runs/small \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct

`config.model.path` may be SmolLM2-135M-Instruct or SmolLM2-360M-Instruct (HuggingFaceTB),
Qwen2.5-0.5B-Instruct or Qwen3-0.6B (Qwen), or a directory with one of them. All of them play
without a thought: SmolLM2 and Qwen2.5 have none, and Qwen3's would need 1024 tokens an answer.

Expect little: this shows that a real model goes through every stage, it does not repeat the paper,
whose smallest model has 1.7B parameters.
Floor: random actions 1.69 %; ceiling: perfect play 100 %.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; `preset` ('paper', 'released') follows a colon: FILE.py:paper."""
    c = default()
    c.rounds = 1
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.dtype = "float32"  # on a GPU 'bfloat16' is faster
    c.model.thinking = False
    c.mesh.fsdp = -1
    c.game.name = "frozen_lake"

    c.sampler.slots = 16
    c.sampler.decode_steps = 16
    c.sampler.overlap = False  # on a CPU host and device are the same cores; True on a GPU
    c.sampler.max_prompt = 1024  # 275 tokens at first (SmolLM2), at most 775 at the fifth turn
    c.sampler.max_response = 128

    c.deploy.games_per_step = 8

    c.extract.chains = 2
    c.extract.n = 4
    c.extract.n_run = 4
    c.extract.version = "v3"  # small models seldom keep to the form of items
    c.extract.previous = False  # small models make little of long contexts
    c.extract.l_max = 256
    c.preflight.games = 8

    c.consolidate.steps = 8
    c.consolidate.learning_rate = 5e-6
    c.consolidate.token_budget = 4096

    c.loss.top_k = 64
    c.evaluate.maps = 16
    c.evaluate.seeds = 2
    return apply_preset(c, preset)
