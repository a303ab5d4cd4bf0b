"""Which fields go with a chat round, and which with a game: each mistake has one message."""

import pytest

from oel_jax.base.errors import UserError
from oel_jax.config.chat_checks import is_chat
from oel_jax.config.checks import validate
from oel_jax.config.defaults import default, with_fields
from oel_jax.config.file import load_config

CHAT = {"game.name": None, "preflight.games": 0, "extract.place": "system"}


def test_the_chat_configs_are_chat_rounds_and_valid():
    for name in ("chat", "chat_brevity"):
        config = load_config(name)
        assert is_chat(config) and validate(config) == []
    assert not is_chat(default()) and not is_chat({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preflight.games", 4),
        ("evaluate.maps", 5),
        ("evaluate.seeds", 3),
        ("evaluate.curve", (1,)),
        ("evaluate.steps", (1,)),
        ("evaluate.skills", True),
        ("evaluate.unseen_split", False),
        ("consolidate.mode", "sft"),
        ("game.max_turns", 4),
        ("game.layout", "paper"),
        ("game.module", "mine.py"),
        ("game.wrapper", "plain"),
        ("extract.outcome", "none"),
        ("extract.history_markers", "tokens"),
        ("extract.place", "paper"),
        ("extract.template_file", "paper"),
        ("negative_control", "foreign_extraction"),
        ("negative_control", "shuffled_knowledge"),
    ],
)
def test_a_chat_round_refuses_what_needs_a_game(field, value):
    config = with_fields(default(), CHAT)
    assert validate(config) == []
    with pytest.raises(UserError, match=rf"config\.{field} is "):
        validate(with_fields(config, {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logs.path", ("a.jsonl",)),
        ("logs.wait", 3),
        ("logs.wrapper", "paper"),
        ("logs.heldout", 0.5),
        ("logs.redact", False),
        ("extract.user_share", 0.5),
        ("extract.history", "reactions"),
        ("evaluate.conversations", 3),
        ("evaluate.text_file", "a.txt"),
        ("evaluate.scorer", "a.py:b"),
    ],
)
def test_a_game_refuses_what_is_for_chat_rounds(field, value):
    with pytest.raises(UserError, match=rf"config\.{field} is .*game\.name='frozen_lake'"):
        validate(with_fields(default(), {field: value}))


def test_reactions_have_one_template():
    config = with_fields(default(), CHAT | {"extract.history": "reactions"})
    with pytest.raises(UserError, match=r"extract\.version is 'v4'"):
        validate(config)
    with pytest.raises(UserError, match=r"extract\.previous is True"):
        validate(with_fields(config, {"extract.version": "v3"}))
    fine = {"extract.version": "v3", "extract.previous": False}
    assert validate(with_fields(config, fine)) == []


@pytest.mark.parametrize("value", ["scorer.py", "scorer:f", "a.py:", "a.py:not a name", 3])
def test_a_scorer_is_a_function_in_a_file(value):
    with pytest.raises(UserError, match="FILE.py:FUNCTION"):
        validate(with_fields(default(), CHAT | {"evaluate.scorer": value}))
