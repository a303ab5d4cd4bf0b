"""Lines that give a conversation away: what is found, and what is not."""

import pytest

from oel_jax.data.messages import answer_message, user
from oel_jax.data.trajectories import Trajectory, Transcript
from oel_jax.logs.quotes import QUOTED_WORDS, Source, drop_lines

SAID = "Please tell me how I can cancel the premium plan that my company bought last year."
CHINESE = "我想知道如何取消去年公司购买的高级套餐并且拿回全部的钱"


def source(
    *messages, feedback=None, answer="Sure, you can do that in the settings of the account."
):
    transcript = Transcript()
    transcript.add([user(text) for text in messages], answer, feedback=feedback)
    return Source(Trajectory(policy="p", purpose="deploy", turns=transcript.turns, id="talk"))


def reasons(line, *messages, **facts):
    return [found.reason for found in source(*messages, **facts).findings(line)]


WORDS = SAID.split()


@pytest.mark.parametrize("start", range(len(WORDS) - QUOTED_WORDS + 1))
def test_eight_words_in_a_row_are_a_quote_and_seven_are_not(start):
    run = WORDS[start : start + QUOTED_WORDS]
    assert reasons(f"- EXPERIENCE ITEM: say '{' '.join(run)}' first", SAID) == ["quote"]
    assert reasons(f"- EXPERIENCE ITEM: SAY {', '.join(run).upper()} first", SAID) == ["quote"]
    assert reasons(" ".join(run[:-1]), SAID) == []
    assert reasons(" ".join([*run[:4], "really", *run[4:]]), SAID) == []


@pytest.mark.parametrize("start", range(len(CHINESE) - 15))
def test_two_characters_of_a_script_without_spaces_are_a_word(start):
    assert reasons(f"x{CHINESE[start : start + 16]}y", CHINESE) == ["quote"]
    assert reasons(CHINESE[start : start + 15], CHINESE) == []


def test_answers_and_feedback_are_quoted_too():
    assert reasons("you can do that in the settings of the account", "hi") == ["quote"]
    assert reasons(SAID, "hi", feedback=SAID) == ["quote"]


def test_short_texts_quote_nothing():
    assert reasons("", SAID) == reasons("cancel the premium plan", SAID) == []
    assert reasons(SAID) == []


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Hello, my name is Zofia.", "Greet Zofia first"),
        ("my name is Zofia Nowak and I wait", "Nowak waits"),
        ("You can call me Bo", "Be kind to Bo."),
        ("I'm Jane Eyre from accounting", "Jane wants short answers"),
        ("Ich heiße Jürgen, guten Tag", "Jürgen mag kurze Antworten"),
        ("it broke\nKind regards,\nOlu Adeyemi", "Adeyemi was angry"),
        ("I spoke with Mr. Okafor about it", "Okafor decides"),
        ("I live with Anna Kowalska in town", "ask Anna Kowalska"),
        ("we drove to New York, then home", "New York is far"),  # in doubt it is a name
        ("Was it O'Brien? No: it was Sean O'Brien then", "ask Sean O'Brien"),
    ],
)
def test_names_from_the_users_messages(message, line):
    assert "name" in reasons(line, message)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Hello, my name is Zofia.", "Greet people first"),
        ("I am German and I am Happy", "Answer German speakers in German"),
        ("Python is slow. Please use Rust", "Rust and Python differ"),  # one word each
        ("On Monday I wrote to you", "Monday is busy"),
        ("my name is secret", "keep a secret"),
        ("Call me tomorrow", "tomorrow is late"),
        ("Mark my words", "Use a mark"),
        ("Anna Kowalska is here", "ask anna about kowalska"),  # other case
        ("What about Anna Kowalska?", "the Annas and Kowalskas of this world"),
    ],
)
def test_what_is_no_name_or_is_not_repeated(message, line):
    assert reasons(line, message) == []


def test_a_name_in_the_policy_s_own_answer_is_nobody_s():
    assert reasons("Ask Sean Brown", "hi", answer="I spoke with Sean Brown about it") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("send it to 12 Baker Street", "address"),
        ("send it to 7b Old Mill Lane, please", "address"),
        ("sie wohnt Hauptstraße 5", "address"),
        ("elle est au 10 rue de la Paix", "address"),
        ("mieszka na ul. Długa 7", "address"),
        ("write to jane@example.org", "contact"),
        ("call +44 20 7946 0958", "contact"),
        ("use the key sk-abcdefghijklmnopqrstuvwx1234567890", "contact"),
    ],
)
def test_addresses_and_contacts_count_wherever_they_are_from(line, reason):
    assert reasons(line, "hi") == [reason]


@pytest.mark.parametrize(
    "line",
    [
        "- EXPERIENCE ITEM: Answer in one short sentence.",
        "use at most 3 lanes and 12 streets",
        "Version 1.2 of the Way is better",
        "in 2024 the Place to be",
        "say it in 5 words",
    ],
)
def test_plain_advice_is_no_address(line):
    assert reasons(line, "hi") == []


def test_lines_are_left_out_with_their_reasons():
    text = "\n".join(["- EXPERIENCE ITEM: Be brief.", f"- EXPERIENCE ITEM: {SAID}", "- x"])
    kept, dropped = drop_lines(text, source(SAID))
    assert kept == "- EXPERIENCE ITEM: Be brief.\n- x"
    ((line, (why,)),) = dropped
    assert line.endswith(SAID) and str(why).startswith("quote: Please tell me how")
    assert drop_lines(SAID, source(SAID))[0] == ""
    assert drop_lines("a\n\nb ", source(SAID)) == ("a\n\nb ", [])  # nothing left out: as it is


def test_messages_of_a_conversation_that_grows_are_all_compared():
    transcript = Transcript()
    transcript.add([user("hi")], "hello")
    transcript.add([user("hi"), answer_message("hello"), user(SAID)], "ok")
    talk = Trajectory(policy="p", purpose="deploy", turns=transcript.turns, id="talk")
    assert [found.reason for found in Source(talk).findings(SAID)] == ["quote"]
