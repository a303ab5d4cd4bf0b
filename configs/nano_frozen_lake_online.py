"""Frozen Lake over HTTP: the default run, but its games are other people's.

    oel online --config=nano_frozen_lake_online --workdir=runs/online

A server answers players who play Frozen Lake in processes of their own; what it records is all that
this config learns from: prompts, answers, and what the players say followed. It knows no game: the
wrapper and the rules below are how these prompts are written. Everything else is that of
`nano_frozen_lake.py`.

Each round takes the conversations that the policy of that round has had, waits until there are
enough, and leaves the newest policy in the workdir, where the server finds it.

Expected: the players win about 6 % of their games at first, over 90 % after three rounds.
Run time: about 15 minutes on two CPU cores.
"""

import ml_collections

from oel_jax.config import apply_preset, default

RULES = (
    "You are the player and you are represented by 'P' on the grid. You should select the best "
    "action to reach the goal in the shortest number of steps. Your only way to interact is to "
    "move one step each time. Available actions: up, down, left, right (or w, a, s, d). "
    "Type your action as: [up], [down], [left], [right] or [w], [a], [s], [d]"
)


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The run's config; `preset` ('paper', 'released') follows a colon: FILE.py:paper."""
    c = default()
    c.rounds = 3

    c.model.path = "nano"
    c.model.dtype = "float32"
    c.model.thinking = True  # a thought of about 25 tokens, then the action

    c.mesh.fsdp = -1
    c.game.name = None  # a chat round: conversations, no game

    c.logs.wrapper = "paper"  # the players' messages are the paper's prompts
    c.logs.leave_out = RULES  # every first prompt has them; the extractor reads what differs
    c.logs.policy = "current"
    c.logs.idle = 15.0  # a game without an answer for so long has ended
    c.logs.heldout = 0.06
    c.logs.wait = 700  # 640 to train on, and those of the held-out players

    c.sampler.slots = 128
    c.sampler.prefill_rows = 16
    c.sampler.decode_steps = 8
    c.sampler.overlap = False  # on a CPU host and device are the same cores
    c.sampler.prefill_chunk = 64  # prompts of many lengths then travel together
    c.sampler.max_prompt = 384  # usually below 100 tokens; 358 after two unreadable answers
    c.sampler.max_response = 48  # the longest answers are about 45 tokens

    c.deploy.games_per_step = 32  # half the paper's, for the sake of time

    c.extract.chains = 8
    c.extract.n = 6
    c.extract.n_run = 6
    c.extract.version = "v4"
    c.extract.l_max = 96  # six games give at most 12 items of about 2 tokens each
    c.extract.max_prompt = 512  # the longest is about 350 tokens
    c.preflight.games = 0  # there is no game to try the texts with

    c.consolidate.steps = 20
    c.consolidate.learning_rate = 1.5e-4  # 3e-4 learns all in round 1, 1e-4 leaves less for round 3
    c.consolidate.token_budget = 4096
    c.consolidate.save_every = 5

    c.loss.top_k = 64
    c.loss.chunk = 2048
    return apply_preset(c, preset)
