"""Qwen3-8B on Frozen Lake, thinking, structured knowledge (paper Table 4, column 3).

Expect: the paper prints no numbers for this pair (Fig. 7): initial pass rates are about flat across
sizes (7 %), each of two rounds gains, and larger models generally end higher.
Floor: random actions 1.69 %; ceiling: perfect play 100 %.

Cost, an estimate by arithmetic and not a measurement: AdamW in float32 needs 131 GB for this
size and the teacher 16 GB more, so use several devices; 100 steps of 64 games each round. The KV of
ten knowledge texts at their cap is 12 GB.
"""

import ml_collections

from oel_jax.config import apply_preset, default


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; `preset` ('paper', 'released') follows a colon: FILE.py:paper."""
    c = default()
    c.rounds = 2
    c.model.path = "Qwen/Qwen3-8B"
    c.model.thinking = True
    c.mesh.fsdp = c.mesh.tp = c.sampler.slots = "auto"
    c.game.name = "frozen_lake"

    # Search ranges (paper Table 3) in brackets.
    c.extract.version = "v4"  # {unstructured = v3, structured = v4}
    c.extract.previous = True
    c.extract.n = 50  # unstructured {15}, structured {25, 50}
    c.extract.n_run = 50  # the released scripts run on to 100, for the curve only
    c.extract.l_max = 8192  # unstructured {2048}, structured {8192}
    c.consolidate.learning_rate = 1e-6  # {1e-6, 5e-6}
    c.consolidate.steps = 100  # {20, 100}
    return apply_preset(c, preset)
