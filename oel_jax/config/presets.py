"""Named sets of values: the paper's, the released code's, and what we recommend for many rounds."""

from typing import Any

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config.chat_checks import OF_GAMES, is_chat
from oel_jax.config.rules import PRESETS
from oel_jax.data import knowledge

# Spec section 12: (row, field, value in the paper, value in the released code). A callable gets the
# config. Rows without a field: 14 and 15 are TextArena's and the released rule for everyone, 17 are
# separate protocols, 20 (bf16 log-probabilities) and 21 (optimizer lost on resume) are not copied.
# Row 0 is for what the section does not list: the paper says nothing, the released code differs.
ROWS: tuple[tuple[int, str, Any, Any], ...] = (
    (0, "extract.history_markers", "text", "tokens"),
    # The text after n games is used (spec 2.1); the released scripts play and read 2n, which only
    # lengthens the curve and doubles the cost of extraction: n by default.
    (0, "extract.n_run", lambda c: c.extract.n, lambda c: 2 * c.extract.n),
    # Ours alone. It reads wins and losses (to warn, never to train), which both do without.
    (0, "preflight.games", 0, 0),
    (1, "deploy.games_per_step", 64, 128),
    (2, "loss.aggregation", "seq_mean", "micro_token_mean"),
    (3, "loss.temperature", 1.0, 0.7),
    (3, "loss.correction", "none", "none"),
    (4, "extract.trajectories", "shared", "per_chain"),
    (5, "extract.outcome", "none", "full"),
    (6, "extract.item_marker", "-- EXPERIENCE ITEM:", knowledge.MARKER),
    (7, "extract.template_file", "paper", None),
    (8, "extract.unfinished_thought", "drop", "keep"),
    (9, "extract.truncate", "head", "tail"),
    (10, "evaluate.unseen_split", False, False),
    (11, "evaluate.seed_mode", "independent", "constant"),
    (12, "game.layout", "paper", "released"),  # row 13 is the same field
    (16, "rounds", 3, lambda c: 2 if c.game.name == "frozen_lake" else 3),
    (18, "consolidate.keep_fp32_master", False, False),
    (19, "consolidate.drop_remainder", 0, 16),  # 16 = GPUs of the released scripts
)

# Against collapse over many rounds; configs/studies/ten_rounds.py has the evidence.
RECOMMENDED: dict[str, Any] = {
    "loss.aggregation": "trajectory_mean",
    "consolidate.turn_floor": 0.01,
    "consolidate.retention": "plain",
    "consolidate.retention_weight": 0.3,
    "extract.deduplicate": True,
}


def apply_preset(config: ml_collections.ConfigDict, name: str | None) -> ml_collections.ConfigDict:
    """Set the fields of a preset in place; single fields can still be overridden afterwards.

    'paper' and 'released' set every row of spec section 12 to their column, 'recommended' sets
    `RECOMMENDED`; 'default', '' and None change nothing. What is about games is left out in a
    config of chat rounds.

    Raises:
      UserError: another name.
    """
    name = name or "default"
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    config.preset = name
    values = dict(RECOMMENDED) if name == "recommended" else {}
    if name in ("paper", "released"):
        column = 2 if name == "paper" else 3
        values = {row[1]: row[column] for row in ROWS}
    if is_chat(config):
        values = {path: value for path, value in values.items() if path not in OF_GAMES}
    for path, value in values.items():
        group, _, field = path.rpartition(".")
        (config[group] if group else config)[field] = value(config) if callable(value) else value
    return config
