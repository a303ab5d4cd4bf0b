"""The default run: the bundled nano model learns Frozen Lake from its own play, on a laptop CPU.

What happens: three rounds. Without knowledge the nano model guesses anew at every turn what the
letters do and passes about as often as the paper's Qwen3 does at the start. It writes down what its
games show ("You lose on H.", "You win on G."), plays better with that text in its prompt, and after
consolidation plays better without it. Round 1 mostly learns from losses, later rounds from wins.

Floor and ceiling: random actions pass 1.69 %, perfect play 100 % of the 128 held-out maps.
Run time: at most 10 minutes and 4 GB of memory on two CPU cores, after installation.
"""

import ml_collections

from oel_jax import config as oel_config


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The run's config; `preset` ('paper', 'released') stands behind a colon: FILE.py:paper."""
    c = oel_config.default()
    c.rounds = 3

    c.model.path = "nano"
    c.model.dtype = "float32"
    c.model.thinking = True  # a thought of about 25 tokens, then the action

    c.mesh.fsdp = -1
    c.game.name = "frozen_lake"

    c.sampler.slots = 128
    c.sampler.prefill_rows = 16
    c.sampler.decode_steps = 8
    c.sampler.max_prompt = 384  # usually below 100 tokens; 358 after two unreadable answers
    c.sampler.max_response = 48  # the longest answers are about 45 tokens

    c.deploy.games_per_step = 32  # half the paper's, for the sake of time

    c.extract.chains = 8
    c.extract.n = 15  # about 6 in 100 games are won at first: fewer rarely show what wins
    c.extract.n_run = 15
    c.extract.version = "v4"
    c.extract.l_max = 64  # 15 games give at most 30 items of about 2 tokens each
    c.extract.max_prompt = 512  # the longest is about 350 tokens

    c.consolidate.steps = 20
    c.consolidate.learning_rate = 3e-4
    c.consolidate.token_budget = 4096
    c.consolidate.save_every = 5

    c.loss.top_k = 64
    c.loss.chunk = 2048
    return oel_config.apply_preset(c, preset)
