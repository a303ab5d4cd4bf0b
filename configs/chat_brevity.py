"""A real model learns from logs of chats that its users want short answers: on a CPU, in minutes.

    python -m oel_jax.testing.synthetic_users --model=HuggingFaceTB/SmolLM2-135M-Instruct \\
        --out=chats.jsonl
    oel run --config=chat_brevity --workdir=runs/brevity --config.logs.path=chats.jsonl

SmolLM2-135M-Instruct answers everyday questions at length. Synthetic users (no person, no network:
oel_jax/testing/synthetic_users.py) complain about long answers and are glad of short ones. The
model reads these conversations, writes down what the users want, and one round trains that into it.
Fresh questions of users that it has not learned from then get short answers without instruction.

Expected: what SmolLM2 writes down is like "Please answer in one short sentence." Held-out answers
become shorter and end by themselves. `python -m benchmarks.chat_brevity --model=DIR` measures by
how much, with several seeds. Run time: an estimate is 15 minutes on two idle CPU cores.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; `preset` ('recommended') follows a colon."""
    c = default()
    c.rounds = 1
    c.game.name = None  # a chat round
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.dtype = "float32"
    c.model.thinking = False
    c.mesh.fsdp = -1

    c.logs.heldout = 0.2

    c.sampler.slots = 16
    c.sampler.decode_steps = 16
    c.sampler.overlap = False  # on a CPU host and device are the same cores
    c.sampler.prefill_chunk = 128
    c.sampler.max_prompt = 384
    c.sampler.max_response = 128

    c.deploy.games_per_step = 12  # conversations; about 17 answers

    c.extract.chains = 4
    c.extract.n = 3
    c.extract.n_run = 3
    c.extract.version = "v3"
    c.extract.history = "reactions"  # 135M parameters are lost in whole conversations
    c.extract.previous = False
    c.extract.temperature = 0.3
    c.extract.l_max = 40
    c.extract.max_prompt = 768
    c.extract.user_share = 0.5
    c.extract.place = "system"
    c.preflight.games = 0

    c.consolidate.steps = 5
    c.consolidate.learning_rate = 1e-5
    c.consolidate.keep_fp32_master = True  # rounded to bfloat16, so small a change would be lost
    c.consolidate.token_budget = 2048

    c.loss.top_k = 64
    c.loss.chunk = 1024
    c.evaluate.conversations = 16
    return apply_preset(c, preset)
