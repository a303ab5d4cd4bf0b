"""What came after an answer, and cutting a text to a number of tokens."""

import random

import pytest

from oel_jax.data.coaching import NOTHING_CAME, coach_prompt, fitted_prompt, transcript
from oel_jax.data.hindsight import HEAD, hindsight, later_parts, longest_part
from oel_jax.data.messages import answer_message, user
from oel_jax.data.trajectories import Trajectory, Transcript, Turn

TOOL = {"role": "tool", "content": "error 7", "tool_call_id": "a"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": "{}"}}],
}


def words(text):
    return len(text.split())


def conversation():
    """Three answers: to a question, to a tool's error with a new question, and a last one."""
    made = Transcript()
    first = [{"role": "system", "content": "SECRET RULES"}, user("Q1")]
    made.add(first, "A1", answer=CALL)
    made.add([*first, CALL, TOOL, user("Q2")], "A2", feedback="thumbs down: too long")
    second = [*first, CALL, TOOL, user("Q2"), answer_message("A2"), user("thanks")]
    made.add(second, "A3")
    return Trajectory(policy="p", purpose="deploy", turns=made.turns, id="talk")


def game(outcome="Summary:\nFinal Result: lost\nYou fell.\n"):
    turns = [
        Turn((user(f"board {i}\n"),), f"think {i} [up]", action="[up]", observation=f"seen {i}")
        for i in range(3)
    ]
    return Trajectory(
        policy="p", purpose="deploy", turns=turns, game="g", seed=1, round=1, outcome=outcome
    )


def test_what_came_after_each_answer_of_a_conversation():
    talk = conversation()
    assert later_parts(talk, 0) == [
        "Tool: error 7",
        "User: Q2",
        "Feedback: thumbs down: too long",
        "User: thanks",
    ]
    assert later_parts(talk, 1) == ["Feedback: thumbs down: too long", "User: thanks"]
    assert later_parts(talk, 2) == []
    assert hindsight([], 100, words) == ""


def test_what_came_after_each_answer_of_a_game():
    assert later_parts(game(), 1)[0] == "Observation: seen 2"
    assert later_parts(game(), 2) == ["Outcome: Summary:\nFinal Result: lost\nYou fell."]
    assert later_parts(game(), 2, outcome_mode="text_only") == ["Outcome: Summary:\nYou fell."]
    assert later_parts(game(), 2, outcome_mode="none") == []
    text = hindsight(later_parts(game(), 0), 1000, words)
    assert text.startswith(HEAD.strip()) and text.index("seen 1") < text.index("seen 2")


@pytest.mark.parametrize("made", [conversation(), game()])
def test_nothing_of_the_policy_and_no_instruction_is_in_it(made):
    for turn in range(len(made.turns)):
        text = "\n".join(later_parts(made, turn))
        assert not any(each.response in text for each in made.turns)
        assert "SECRET" not in text and "look" not in text


def test_a_turn_that_begins_anew_counts_from_its_last_answer_on():
    turns = [
        Turn((user("Q1"),), "A1"),
        Turn((user("Q1, shortened"), answer_message("A1"), user("and now?")), "A2"),
    ]
    talk = Trajectory(policy="p", purpose="deploy", turns=turns, id="talk")
    assert later_parts(talk, 0) == ["User: and now?"]


def test_blank_replies_are_nothing():
    turns = [Turn((user("Q"),), "A", feedback=" \n"), Turn((user(" "),), "B", continues=True)]
    talk = Trajectory(policy="p", purpose="deploy", turns=turns, id="talk")
    assert later_parts(talk, 0) == []


COUNTS = {"words": words, "characters": len, "bytes": lambda text: len(text.encode())}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("keep", ["head", "tail"])
def test_the_longest_part_that_fits(name, keep):
    """Never too long, a part of the text, and not much shorter than what would fit."""
    draw, count = random.Random(name + keep), COUNTS[name]
    for _ in range(300):
        letters = [draw.choice("ab ż中\n ") for _ in range(draw.randrange(60))]
        text, limit = "".join(letters), draw.randrange(30)
        part = longest_part(text, limit, count, keep)
        assert count(part) <= limit and part in text
        if count(text) <= limit:
            assert part == text
            continue
        fits = [
            piece
            for n in range(len(text) + 1)
            if count(piece := (text[:n] if keep == "head" else text[len(text) - n :])) <= limit
        ]
        best = max((piece.strip() for piece in fits), key=len)
        assert best.startswith(part) if keep == "head" else best.endswith(part)
        assert 2 * len(part) >= len(best) - 1


def test_hindsight_keeps_what_is_nearest():
    parts = ["User: " + "no " * 30, "Outcome: bad"]
    text = hindsight(parts, words(HEAD) + 10, words)
    assert words(text) <= words(HEAD) + 10 and text.endswith("no") and "bad" not in text


def test_a_coach_reads_text_from_outside_as_it_is():
    nasty = "{ANSWER} {LATER} {SITUATION} \\1 {0}"
    for talk in (True, False):
        prompt = coach_prompt(nasty, f"x{nasty}", f"y{nasty}", conversation=talk)
        assert [prompt.count(text) for text in (nasty, f"x{nasty}", f"y{nasty}")] == [3, 1, 1]
        assert NOTHING_CAME in coach_prompt("s", "a", "", conversation=talk)
    games, talks = (coach_prompt("s", "a", "l", conversation=talk) for talk in (False, True))
    assert "game" in games and "game" not in talks and "conversation" in talks


def test_a_transcript_shows_roles_and_calls():
    shown = transcript([user("Q"), CALL, TOOL])
    assert shown.splitlines()[0] == "[user]: Q" and "[tool]: error 7" in shown
    assert "[assistant]: [calls look: " in shown


@pytest.mark.parametrize("most", [150, 200, 300, 1000])
def test_a_coach_s_prompt_fits(most):
    """What is near the answer stays: the end of the situation, the beginning of the rest."""
    texts = [" ".join(f"{name}{i}" for i in range(200)) for name in "sal"]
    prompt = fitted_prompt(*texts, conversation=True, most=most, count=words)
    assert words(prompt) <= most
    assert ("s199" in prompt and "a0" in prompt and "l0" in prompt) == (most > 150)
    if most == 1000:
        assert prompt == coach_prompt(*texts, conversation=True)
    short = fitted_prompt(
        "s " * 500, "the answer", "more", conversation=True, most=200, count=words
    )
    assert words(short) in range(195, 201) and "the answer" in short and "more" in short
