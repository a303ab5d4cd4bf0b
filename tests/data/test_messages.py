"""Contexts in their places: the paper's wrapper, a system message, the last user message."""

import pytest

from oel_jax.base.errors import UserError
from oel_jax.data import prompts
from oel_jax.data.messages import NOTHING, PLACES, Context, Dialogue, place_context, user

SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "[up]"}
TOOL = {"role": "tool", "content": "42", "tool_call_id": "1"}
NASTY = r"{experience} {0} \1 <|im_end|> </think>"


@pytest.mark.parametrize("wrapper", list(prompts.WRAPPERS))
def test_the_paper_s_place_is_the_wrapper_byte_for_byte(wrapper):
    game = Dialogue((user(NASTY + "\n"),), wrapper)
    head, told = prompts.WRAPPERS[wrapper]
    assert place_context(game) == [user(head + NASTY + "\n" + prompts.TAIL)]
    before, between = told.split("{experience}")
    expected = [user(before + NASTY + between + NASTY + "\n" + prompts.TAIL)]
    assert place_context(game, Context("knowledge", NASTY)) == expected


def test_a_system_message_is_made_or_continued():
    context = Context("knowledge", "K", "system")
    assert place_context(Dialogue((user("q"),)), context) == [
        {"role": "system", "content": "K"},
        user("q"),
    ]
    assert place_context(Dialogue((SYSTEM, user("q"))), context)[0] == {
        "role": "system",
        "content": "Be brief.\n\nK",
    }


def test_the_user_s_place_is_the_last_user_message():
    dialogue = Dialogue((SYSTEM, user("a"), ANSWER, user("b"), ANSWER, TOOL))
    placed = place_context(dialogue, Context("raw", "K", "user"))
    assert placed == [SYSTEM, user("a"), ANSWER, user("K\n\nb"), ANSWER, TOOL]


@pytest.mark.parametrize("place", ["system", "user"])
def test_other_places_leave_the_wrapper_without_knowledge(place):
    placed = place_context(Dialogue((user("s\n"),), "grid"), Context("knowledge", "K", place))
    plain = prompts.play_prompt("s\n")
    assert placed[-1]["content"] == ("K\n\n" + plain if place == "user" else plain)


@pytest.mark.parametrize("wrapper", ["", "grid"])
@pytest.mark.parametrize("place", PLACES)
def test_an_empty_context_is_none_wherever_it_is(place, wrapper):
    dialogue = Dialogue((SYSTEM, user("q")), wrapper)
    assert place_context(dialogue, Context("knowledge", "", place)) == place_context(dialogue)


def test_the_dialogue_is_not_changed():
    dialogue = Dialogue((dict(SYSTEM), user("q")), "grid")
    for place in PLACES:
        place_context(dialogue, Context("knowledge", "K", place))
    assert dialogue.messages == (SYSTEM, user("q"))


@pytest.mark.parametrize(
    ("dialogue", "context", "message"),
    [
        (Dialogue((user("q"),)), Context("raw", "K"), "place 'paper' needs .*use 'system' or"),
        (Dialogue((user("q"),), "round"), NOTHING, "wrapper 'round' is unknown.*grid, plain"),
        (Dialogue((SYSTEM,), "grid"), NOTHING, "needs a user message"),
        (Dialogue((SYSTEM,)), Context("raw", "K", "user"), "needs a user message"),
    ],
)
def test_what_does_not_fit_is_refused(dialogue, context, message):
    with pytest.raises(UserError, match=message):
        place_context(dialogue, context)


def test_a_place_that_does_not_exist():
    with pytest.raises(ValueError, match="place must be one of paper, system, user"):
        Context("knowledge", "K", "left")
