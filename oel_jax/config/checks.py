"""Do the fields of a config fit together? Asked before anything is loaded.

`validate` looks at the config alone; `fit` asks more once the model's shape is known.
"""

from collections.abc import Sequence

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.config import negative_control
from oel_jax.config.budgets import extraction_template, has_extractor, shows_previous
from oel_jax.config.chat_checks import check_chat, refuse_chat_fields
from oel_jax.config.choices import PER_TURN, chosen_loss, nonsense, unused
from oel_jax.config.fields import FIELDS, find_field, leaves, refuse
from oel_jax.config.fields_run import MAX_TURNS
from oel_jax.config.old_values import convert

PAPER_GAMES = ("frozen_lake", "sokoban")

# Deploy seeds of two rounds are 10,000 games apart (spec 3.2).
GAMES_PER_ROUND = 10_000


def validate(config: ml_collections.ConfigDict, games: Sequence[str] = PAPER_GAMES) -> list[str]:
    """Check every field and how fields fit together; touches no model and no device.

    Values of older versions are converted in place, with a remark (`old_values`).

    Args:
      config: what a config file returned, after command-line overrides.
      games: names that `config.game.name` may have (the registered games).

    Returns:
      Remarks for the user: legal settings that are probably not what one wants.

    Raises:
      UserError: the first wrong, missing or unknown field, with its path, value and the fix.
    """
    converted = convert(config)
    fields = leaves(config.to_dict())
    for path in fields:
        find_field(path)
    for path, field in FIELDS.items():
        if path not in fields:
            raise UserError(f"config.{path} is missing; start from oel_jax.config.default()")
        must = field.rule(fields[path])
        if must:
            refuse(path, fields[path], must)
    if config.game.name is None:
        check_chat(config)
    else:
        _check_game(config, games)
    _check_combinations(config)
    extraction_template(config)
    return [*([converted] if converted else []), *_remarks(config)]


def _check_game(config: ml_collections.ConfigDict, games: Sequence[str]) -> None:
    name = config.game.name
    if name not in games:
        refuse(
            "game.name",
            name,
            f"one of {', '.join(games)}, or None for a chat round; a game of your own is added "
            "with --game_module=FILE.py (config.game.module)",
        )
    if name in PAPER_GAMES and config.game.max_turns != MAX_TURNS:
        refuse("game.max_turns", config.game.max_turns, f"{MAX_TURNS} for {name}")
    refuse_chat_fields(config)


def _check_per_turn(config: ml_collections.ConfigDict) -> None:
    """There are no texts to play with, only what the teacher reads with each prefix."""
    kind = config.extract.experience
    with_it = f"with config.extract.experience={kind!r}, whose context belongs to single prefixes"
    if config.consolidate.mode != "on_policy":
        refuse("consolidate.mode", config.consolidate.mode, f"'on_policy' {with_it}")
    if config.negative_control != "none":
        refuse("negative_control", config.negative_control, f"'none' {with_it}")
    if config.evaluate.curve:
        refuse("evaluate.curve", config.evaluate.curve, f"() {with_it}")
    if config.evaluate.in_context:
        refuse("evaluate.in_context", True, f"False {with_it}")
    if kind == "coach":
        plain = {"history_markers": "text", "template_file": None}
        for name, must in (plain | {"deduplicate": False, "no_op": False}).items():
            if config.extract[name] != must:
                refuse(f"extract.{name}", config.extract[name], f"{must!r} {with_it}")


def _check_combinations(config: ml_collections.ConfigDict) -> None:
    e, s, t = config.extract, config.sampler, config.consolidate
    control, game = config.negative_control, config.game.name
    if control == "foreign_extraction" and game not in negative_control.OTHER_GAME:
        refuse("negative_control", control, f"another one, since {game!r} has no other game")
    _check_loss(config)
    unread = {"knowledge": (), "coach": ("knowledge_from",)}
    for name in unread.get(e.experience, ("model_path", "knowledge_from")):
        if e[name]:
            kind = f"config.extract.experience={e.experience!r}"
            refuse(f"extract.{name}", e[name], f"None with {kind}")
    if e.experience in PER_TURN:
        _check_per_turn(config)
    if e.drop_quotes and not (e.experience == "knowledge" and has_extractor(config)):
        why = "None or False where no extractor writes the K texts"
        refuse("extract.drop_quotes", True, why)
    if e.review and e.experience not in ("knowledge", "raw"):
        why = f"False with config.extract.experience={e.experience!r}, which has no texts to read"
        refuse("extract.review", True, why)
    if e.review and config.evaluate.curve:
        why = "() with config.extract.review=True, since only the texts after n are approved"
        refuse("evaluate.curve", config.evaluate.curve, why)
    if e.no_op and not e.previous:
        refuse(
            "extract.no_op",
            e.no_op,
            "False with config.extract.previous=False, since an extractor that does not see the "
            "previous knowledge cannot tell what is new",
        )
    if e.knowledge_from and e.model_path:
        refuse("extract.model_path", e.model_path, "None with config.extract.knowledge_from")
    _check_stability(config)
    _check_lora(config)
    if e.n > e.n_run:
        refuse("extract.n", e.n, f"at most config.extract.n_run = {e.n_run}")
    if config.evaluate.curve and config.evaluate.curve[-1] > e.n_run:
        refuse("evaluate.curve", config.evaluate.curve, f"within config.extract.n_run = {e.n_run}")
    longest = s.max_prompt + s.max_response
    if t.token_budget < longest:
        refuse(
            "consolidate.token_budget",
            t.token_budget,
            f"at least {longest}, the longest student sequence "
            f"(sampler.max_prompt {s.max_prompt} + sampler.max_response {s.max_response})",
        )
    if has_extractor(config) and shows_previous(config) and 0 < (e.max_prompt or 0) <= e.l_max:
        refuse(
            "extract.max_prompt",
            e.max_prompt,
            f"None or above config.extract.l_max = {e.l_max}, since the extractor's prompt "
            "holds the previous knowledge (config.extract.previous)",
        )
    if 0 < (s.max_len or 0) <= max(s.max_response, e.l_max):
        refuse(
            "sampler.max_len",
            s.max_len,
            f"None or above {max(s.max_response, e.l_max)}, the longest response; otherwise no "
            "prompt fits into the cache",
        )


def _check_loss(config: ml_collections.ConfigDict) -> None:
    """The loss must be one that trains what it says, and use what is set."""
    mode, loss = config.consolidate.mode, chosen_loss(config)
    field = unused(config)
    if field:
        refuse(
            f"loss.{field}",
            config.loss[field],
            f"{FIELDS[f'loss.{field}'].default!r} with config.consolidate.mode={mode!r}, whose "
            "loss is minus the log-probability of each answer's own tokens",
        )
    wrong = nonsense(*loss, config.loss.top_k)
    if wrong:
        raise UserError(
            f"config.loss.divergence={loss.divergence!r}, loss.support={loss.support!r} and "
            f"loss.correction={loss.correction!r} do not go together: {wrong} (None means "
            f"what config.consolidate.mode={mode!r} trains with)"
        )
    if config.negative_control == "foreign_top_k" and (mode == "sft" or loss.support == "full"):
        refuse(
            "negative_control",
            config.negative_control,
            f"another one with config.consolidate.mode={mode!r} and config.loss.support="
            f"{loss.support!r}, whose loss chooses no top k",
        )
    if config.loss.aggregation == "micro_token_mean" and not config.consolidate.drop_remainder:
        refuse(
            "consolidate.drop_remainder",
            0,
            "the number of GPUs whose micro-batches are reproduced (16 in the released scripts) "
            "with config.loss.aggregation='micro_token_mean'; or use "
            "config.loss.aggregation='token_mean'",
        )


def _check_stability(config: ml_collections.ConfigDict) -> None:
    """What keeps a run stable must fit the rest."""
    t, v = config.consolidate, config.evaluate
    if t.retention != "none" and t.teacher == "ema":
        refuse(
            "consolidate.retention",
            t.retention,
            "'none' with config.consolidate.teacher='ema', since the frozen teacher that it holds "
            "on to is not kept; use teacher='frozen' or 'trust_region'",
        )
    if "teacher" in t.offload and t.teacher == "ema":
        why = "without 'teacher' if config.consolidate.teacher='ema', which is made anew each step"
        refuse("consolidate.offload", t.offload, why)
    if "masters" in t.offload and config.model.dtype == "float32":
        why = "without 'masters' if config.model.dtype='float32', since rollouts read them"
        refuse("consolidate.offload", t.offload, why)
    if t.mode == "sft" and t.teacher != "frozen":
        refuse("consolidate.teacher", t.teacher, "'frozen' with config.consolidate.mode='sft'")
    if config.guard.skill_drop and not v.skills:
        refuse(
            "guard.skill_drop", config.guard.skill_drop, "None, or set config.evaluate.skills=True"
        )
    if v.steps and v.steps[-1] >= t.steps:
        refuse("evaluate.steps", v.steps, f"below config.consolidate.steps = {t.steps}")


def _check_lora(config: ml_collections.ConfigDict) -> None:
    """With an adapter there are no masters, and the teacher is the base without it."""
    t, rank = config.consolidate, config.lora.rank
    if not rank:
        return
    with_it = f"with config.lora.rank={rank}"
    if t.teacher_dtype:
        why = f"None {with_it}, where student and teacher are one set of weights"
        refuse("consolidate.teacher_dtype", t.teacher_dtype, why)
    if set(t.offload) - {"optimizer"}:
        why = f"() or ('optimizer',) {with_it}, where the student needs the teacher's weights"
        refuse("consolidate.offload", t.offload, why)
    if t.teacher == "ema":
        refuse(
            "consolidate.teacher",
            t.teacher,
            f"'frozen' or 'trust_region' {with_it}, whose teacher is the model without the adapter",
        )
    if t.keep_fp32_master:
        why = "False {}, which keeps no float32 weights of the model"
        refuse("consolidate.keep_fp32_master", True, why.format(with_it))
    if config.guard.skill_drop:
        why = "None {}, since the adapter of the policy that it puts back is not kept"
        refuse("guard.skill_drop", config.guard.skill_drop, why.format(with_it))


def _remarks(config: ml_collections.ConfigDict) -> list[str]:
    remarks = []
    last = config.deploy.games_per_step * (config.consolidate.steps + 1) + config.preflight.games
    if config.game.name and config.rounds > 1 and last > GAMES_PER_ROUND:
        remarks.append(
            "config.deploy.games_per_step x steps, with config.preflight.games, reaches game "
            f"{last} of a round; from {GAMES_PER_ROUND} on, deploy boards of consecutive rounds "
            "repeat (spec 3.2)"
        )
    dropped, games = config.consolidate.drop_remainder, config.deploy.games_per_step
    if dropped > games:
        remarks.append(
            f"config.consolidate.drop_remainder={dropped} leaves nothing of a step that has fewer "
            f"prefixes; config.deploy.games_per_step={games} games may have no more than {games}"
        )
    return remarks
