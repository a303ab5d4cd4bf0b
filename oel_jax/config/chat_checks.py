"""A config without a game (a chat round), or with one: which fields have a meaning then."""

from typing import Any

import ml_collections

from oel_jax.config.fields import FIELDS, leaves, refuse

# Without a game, field -> what it must be: nothing else has a meaning.
_WITHOUT_GAME: dict[str, Any] = {
    "game.module": None,
    "game.max_turns": FIELDS["game.max_turns"].default,
    "game.layout": FIELDS["game.layout"].default,
    "preflight.games": 0,
    "consolidate.mode": "on_policy",
    "extract.outcome": FIELDS["extract.outcome"].default,
    "extract.history_markers": "text",
    "evaluate.maps": FIELDS["evaluate.maps"].default,
    "evaluate.seeds": FIELDS["evaluate.seeds"].default,
    "evaluate.unseen_split": FIELDS["evaluate.unseen_split"].default,
    "evaluate.skills": False,
    "evaluate.curve": (),
    "evaluate.steps": (),
}
OF_GAMES = (*_WITHOUT_GAME, "extract.template_file")
_CONTROLS = ("none", "teacher_without_knowledge", "foreign_top_k")
_OF_CHAT = (
    "extract.user_share",
    "extract.history",
    "evaluate.conversations",
    "evaluate.text_file",
    "evaluate.scorer",
)


def is_chat(config: Any) -> bool:
    """Whether the rounds of a config learn from conversations; a config of an older version has no
    such rounds."""
    return config.get("game", {}).get("name", "") is None


def check_chat(config: ml_collections.ConfigDict) -> None:
    """Refuse what needs a game.

    Raises:
      UserError: names the field.
    """
    chat = "in a chat round (config.game.name=None), which has no game"
    values = leaves(config.to_dict())
    for path, must in _WITHOUT_GAME.items():
        if _differs(values[path], must):
            refuse(path, values[path], f"{must!r} {chat}")
    if config.negative_control not in _CONTROLS:
        refuse("negative_control", config.negative_control, f"one of {', '.join(_CONTROLS)} {chat}")
    wrapper, place = config.logs.wrapper, config.extract.place
    if wrapper is None and place == "paper":
        refuse(
            "extract.place",
            place,
            "'system' or 'user' with config.logs.wrapper=None, since plain messages have no place "
            "for knowledge as the paper's prompts do",
        )
    if wrapper is None and config.game.wrapper != FIELDS["game.wrapper"].default:
        refuse("game.wrapper", config.game.wrapper, "'grid' with config.logs.wrapper=None")
    _check_reactions(config)
    if wrapper is None and config.extract.template_file == "paper":
        refuse("extract.template_file", "paper", "None or a text file: 'paper' speaks of games")


def _check_reactions(config: ml_collections.ConfigDict) -> None:
    """The built-in template for reactions is a short one, of one kind."""
    e = config.extract
    if e.history == "whole":
        return
    if config.logs.wrapper:
        refuse("extract.history", e.history, "'whole' with config.logs.wrapper='paper'")
    for field, must in (("version", "v3"), ("previous", False)):
        if e.template_file is None and e[field] != must:
            refuse(
                f"extract.{field}",
                e[field],
                f"{must!r} with config.extract.history='reactions', unless there is a "
                "config.extract.template_file",
            )


def refuse_chat_fields(config: ml_collections.ConfigDict) -> None:
    """With a game, refuse what only a chat round reads.

    Raises:
      UserError: names the field.
    """
    values, why = leaves(config.to_dict()), f"with config.game.name={config.game.name!r}"
    for path, field in FIELDS.items():
        if path.startswith("logs.") or path in _OF_CHAT:
            if _differs(values[path], field.default):
                refuse(path, values[path], f"{field.default!r} {why}: it is for chat rounds")


def _differs(value: Any, must: Any) -> bool:
    return (tuple(value) if isinstance(value, list) else value) != must
