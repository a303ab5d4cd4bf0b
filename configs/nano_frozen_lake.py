"""The default run: the bundled nano model learns Frozen Lake from its own play, on a laptop CPU.

What happens: three rounds. Without knowledge the nano model guesses anew at every turn what the
symbols do and passes about as often as the paper's Qwen3 does at the start. It writes down what its
games show ("H is deadly.", "G wins the game."), plays better with that text in its prompt, and
after consolidation plays better without it. Round 1 mostly learns from losses, later rounds from
wins; the learning rate is such that one round does not do it all.

Floor and ceiling: random actions pass 1.69 %, perfect play 100 % of the 128 held-out maps.
Expected (five seeds, 128 maps x 10 games): 5 to 7 % at the start, 3 to 18 % after round 1, 76 to
100 % after round 2, 100 % after round 3.
Run time: about 5 minutes on one CPU core, 4 GB of memory, after installation.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The run's config; `preset` ('paper', 'released') follows a colon: FILE.py:paper."""
    c = default()
    c.rounds = 3

    c.model.path = "nano"
    c.model.dtype = "float32"
    c.model.thinking = True  # a thought of about 25 tokens, then the action

    c.mesh.fsdp = -1
    c.game.name = "frozen_lake"

    c.sampler.slots = 128
    c.sampler.prefill_rows = 16
    c.sampler.decode_steps = 8
    c.sampler.overlap = False  # on a CPU host and device are the same cores
    c.sampler.prefill_chunk = 64  # prompts of many lengths then travel together
    c.sampler.max_prompt = 384  # usually below 100 tokens; 358 after two unreadable answers
    c.sampler.max_response = 48  # the longest answers are about 45 tokens

    c.deploy.games_per_step = 32  # half the paper's, for the sake of time

    c.extract.chains = 8
    c.extract.n = 6  # about 5 in 100 games are won at first: most texts only learn what loses
    c.extract.n_run = 6
    c.extract.version = "v4"
    c.extract.l_max = 96  # six games give at most 12 items of about 2 tokens each
    c.extract.max_prompt = 512  # the longest is about 350 tokens

    c.consolidate.steps = 20
    c.consolidate.learning_rate = 1.5e-4  # 3e-4 learns all in round 1, 1e-4 leaves less for round 3
    c.consolidate.token_budget = 4096
    c.consolidate.save_every = 5

    c.loss.top_k = 64
    c.loss.chunk = 2048
    return apply_preset(c, preset)
