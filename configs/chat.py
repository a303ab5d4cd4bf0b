"""Conversations in, a better policy out: any chat model learns from logs of its own use.

    oel logs check 'logs/*.jsonl'                # what is in there
    oel run --config=chat --workdir=runs/support \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.logs.path='logs/*.jsonl'

`config.logs.path` names the logs; without it a round takes what `oel serve --workdir` has recorded.
Each round freezes the conversations that are new, writes down what would have served these users
better, and trains that into the model. See docs/chat.md.

Expected: what the users' own words ask for. The page of the run (report.html) shows answers to
held-out conversations before and after. Run time: not measured; by the arithmetic of its tokens
some tens of minutes a round with SmolLM2-135M on two CPU cores. A model of 1 to 8B parameters wants
a GPU or TPU.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; `preset` ('recommended') follows a colon: chat:recommended."""
    c = default()
    c.rounds = 1
    c.game.name = None  # a chat round
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.dtype = "float32"  # on a GPU 'bfloat16' is faster
    c.model.thinking = False
    c.mesh.fsdp = -1

    c.logs.heldout = 0.1

    c.sampler.slots = 16
    c.sampler.overlap = False  # on a CPU host and device are the same cores; True on a GPU
    c.sampler.max_prompt = 1024  # longer prompts are left out, and counted
    c.sampler.max_response = 256

    c.deploy.games_per_step = 16  # conversations

    c.extract.chains = 4
    c.extract.n = 4
    c.extract.n_run = 4
    c.extract.version = "v3"  # small models seldom keep to the form of items
    c.extract.previous = False  # small models make little of long contexts
    c.extract.l_max = 256
    c.extract.max_prompt = 2048
    c.extract.user_share = 0.5  # one user cannot steer a text alone
    c.extract.place = "system"
    c.preflight.games = 0

    c.consolidate.steps = 8
    c.consolidate.learning_rate = 5e-6
    c.consolidate.keep_fp32_master = True  # rounded to bfloat16, so small a change would be lost
    c.consolidate.token_budget = 4096

    c.loss.top_k = 64
    return apply_preset(c, preset)
