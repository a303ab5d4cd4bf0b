"""Synthetic users: the same for a seed, unhappy with long answers, glad of short ones."""

import pytest

from oel_jax.base.errors import UserError
from oel_jax.testing.synthetic_users import conversations, is_short, wishes

LONG, BRIEF = "word " * 60, "A short answer."


def first_long_then_brief(talks):
    return [LONG if len(talk) == 1 else BRIEF for talk in talks]


def test_they_complain_of_long_answers_and_are_glad_of_short_ones():
    rows = conversations(80, 3, first_long_then_brief)
    asked_again = [row for row in rows if len(row["messages"]) == 4]
    assert 20 < len(asked_again) < 60
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        content = is_short(row["messages"][-1]["content"])
        assert row.get("approved", False) is content is (row in asked_again)
        assert row["feedback"]
    assert rows == conversations(80, 3, first_long_then_brief)
    assert rows != conversations(80, 4, first_long_then_brief)


def test_short_answers_are_never_asked_again():
    rows = conversations(20, 0, lambda talks: [BRIEF] * len(talks))
    assert all(len(row["messages"]) == 2 and row["approved"] for row in rows)


def test_no_question_is_asked_twice():
    asked = wishes(600, 1)
    assert len({wish.question for wish in asked}) == len({wish.id for wish in asked}) == 600
    assert len({wish.user for wish in asked}) == 150
    with pytest.raises(UserError, match="choose from 1 to 600"):
        wishes(601, 1)
