"""The nano model learns Sokoban (6x6, one box) from its own play, on a laptop CPU.

What happens: three rounds. Without knowledge the model guesses anew at every turn which symbol is
wall, box or target. Its games show it ("# blocks the way.", "X can be pushed."), and a win shows
the target.

Floor and ceiling: random actions pass 16.40 %, perfect play 113 of the 128 held-out maps (88.3 %),
because five moves are all a game has.
The model's own ceiling, with the truth in its prompt, is 82 %. Expected (seed 1, 128 maps x 10
games): 23.3 % at the start, 84.2 % with knowledge in context, 64.1, 83.3 and 84.0 % after
the rounds.
Run time: about 13 minutes on one CPU core.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The run's config; `preset` ('paper', 'released') follows a colon: FILE.py:paper."""
    c = default()
    c.rounds = 3

    c.model.path = "nano"
    c.model.dtype = "float32"
    c.model.thinking = True  # a thought of about 40 tokens, then the action

    c.mesh.fsdp = -1
    c.game.name = "sokoban"

    c.sampler.slots = 128
    c.sampler.prefill_rows = 16
    c.sampler.decode_steps = 8
    c.sampler.overlap = False  # on a CPU host and device are the same cores
    c.sampler.prefill_chunk = 64  # prompts of many lengths then travel together
    c.sampler.max_prompt = 384  # five boards are about 130 tokens; knowledge comes before them
    c.sampler.max_response = 64  # the longest answers are about 50 tokens

    c.deploy.games_per_step = 32  # half the paper's, for the sake of time

    c.extract.chains = 8
    c.extract.n = 8
    c.extract.n_run = 8
    c.extract.version = "v4"
    c.extract.l_max = 128  # nine facts of about seven tokens, and some advice
    c.extract.max_prompt = 640  # a game of five turns is up to 400 tokens

    c.consolidate.steps = 20
    c.consolidate.learning_rate = 3e-4
    c.consolidate.token_budget = 4096
    c.consolidate.save_every = 5

    c.loss.top_k = 64
    c.loss.chunk = 2048
    return apply_preset(c, preset)
