"""The stages of a round, one row each. Whoever needs to know a stage reads this table.

Functions are named, `module:function`, and imported when they are called: the table itself imports
nothing, so that the report reads it without JAX, and a process loads what its stages need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from oel_jax.config.chat_checks import is_chat
from oel_jax.config.choices import PER_TURN


def _always(_: Mapping[str, Any]) -> bool:
    return True


def _off_policy(config: Mapping[str, Any]) -> bool:
    return config["consolidate"].get("mode", "on_policy") != "on_policy"


def _is_reviewed(config: Mapping[str, Any]) -> bool:
    return config.get("extract", {}).get("review", False)


def _texts_are_tried(config: Mapping[str, Any]) -> bool:
    own = config.get("extract", {}).get("experience") in PER_TURN  # no text to play with
    return not own and bool(config.get("preflight", {"games": 0})["games"])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the table.

    Attributes:
      name: as in `--stages`, the manifest and metrics.jsonl.
      needs: stages of the same round that must be finished first, of those that the run has. From
        round 2 on, all stages also need the consolidation of the round before.
      work: does the stage: (run, round) -> files, of which any may be there after a kill.
      start: the same before round 1, where the round is 0; '' does nothing then.
      plays: whether it needs the game.
      wanted: config -> whether runs of this config have the stage. Old configs lack new fields.
      check: (config); called before a workdir is made. UserError: the config cannot run.
      before: (run, round); called when `work` is due. UserError: the run is stopped.
      after: (run, round) -> more files; follows `work` on process 0.
      shares: in a study, what other runs can take over: (config, workdir, round) ->
        `study.shares.Shares`.
      chat: what is different in a chat round, which has no game: attribute -> value.
    """

    name: str
    needs: tuple[str, ...] = ()
    work: str
    start: str = ""
    plays: bool = False
    wanted: Callable[[Mapping[str, Any]], bool] = _always
    check: str = ""
    before: str = ""
    after: str = ""
    shares: str = ""
    chat: Mapping[str, Any] = field(default_factory=dict)


STAGES = (
    Stage(
        name="deploy",
        work="oel_jax.actor.deploy:deploy",
        plays=True,
        shares="oel_jax.study.shares:deploy",
        chat={"work": "oel_jax.actor.snapshot:deploy", "plays": False},
    ),
    Stage(
        name="extract",
        needs=("deploy",),
        work="oel_jax.learner.extract:extract",
        check="oel_jax.learner.contexts:check_other_run",
        shares="oel_jax.study.shares:extract",
    ),
    Stage(
        name="review",
        needs=("extract",),
        work="oel_jax.review.gate:write_approved",
        before="oel_jax.review.gate:check_decided",
        wanted=_is_reviewed,
    ),
    Stage(
        name="demonstrate",
        needs=("extract", "review"),
        work="oel_jax.actor.deploy:demonstrate",
        plays=True,
        wanted=_off_policy,
        shares="oel_jax.study.shares:demonstrate",
    ),
    Stage(
        name="preflight",
        needs=("extract", "review"),
        work="oel_jax.actor.preflight:preflight",
        plays=True,
        wanted=_texts_are_tried,
        shares="oel_jax.study.shares:preflight",
    ),
    Stage(
        name="consolidate",
        needs=("deploy", "extract", "review", "demonstrate"),
        work="oel_jax.learner.consolidate:consolidate",
        before="oel_jax.actor.preflight:check_gain",
        after="oel_jax.nano.skills:keep_skilled",
        shares="oel_jax.study.shares:consolidate",
        chat={"before": "", "after": ""},
    ),
    Stage(
        name="evaluate",
        needs=("extract", "review", "consolidate"),
        work="oel_jax.actor.round_evaluation:evaluate_round",
        start="oel_jax.actor.round_evaluation:evaluate_start",
        plays=True,
        check="oel_jax.nano.skills:check_skills",
        after="oel_jax.nano.skills:measure_skills",
        shares="oel_jax.study.shares:evaluate",
        chat={
            "work": "oel_jax.actor.chat_evaluation:evaluate_round",
            "start": "",
            "plays": False,
            "check": "oel_jax.actor.chat_evaluation:check_files",
            "after": "",
        },
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The row of a stage."""
    return STAGES[NAMES.index(name)]


def stages_of(config: Mapping[str, Any], round_number: int = 1) -> tuple[Stage, ...]:
    """The stages that a run of this config has in a round (0: before round 1), in order."""
    rows = STAGES
    if is_chat(config):
        rows = tuple(replace(stage, **stage.chat) for stage in STAGES)
    return tuple(stage for stage in rows if stage.wanted(config) and (round_number or stage.start))


def known_games(config: Mapping[str, Any]) -> list[str]:
    """Names that `config.game.name` may have. A chat round needs none and imports no game."""
    return [] if is_chat(config) else function("oel_jax.environments:known")(config["game"])


def function(name: str) -> Callable[..., Any]:
    """The function that a row names `module:function`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def check_stages(config: Mapping[str, Any]) -> None:
    """What each stage asks of a config before a workdir is made.

    Raises:
      UserError: names the field.
    """
    for stage in stages_of(config):
        if stage.check:
            function(stage.check)(config)
