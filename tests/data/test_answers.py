"""What of a response is its answer: one rule for extraction, the harness and games."""

import pytest

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.data import answers

# response; answer where the model writes <think> itself; answer where the template has written it.
CASES = [
    ("no thought at all", "no thought at all", None),
    ("  blanks stay\n", "  blanks stay\n", None),
    ("<think>a</think>\n\nb", "\n\nb", "\n\nb"),
    ("a</think>b", "b", "b"),  # an end without a beginning
    ("a</think>b</think>c", "c", "c"),
    ("<think>a</think>b<think>c</think>d", "d", "d"),
    ("<think>a<think>b</think>c</think>d", "d", "d"),  # one inside the other
    ("<think>a<think>b</think>c", "c", "c"),
    ("<think>cut off", None, None),
    ("cut o", "cut o", None),
    ("<think>a</think>b<think>cut off", None, None),
    ("<think>a</think><think>", None, None),
    ("a</think><think>b", None, None),
    ("<think>a</think>", "", ""),
    ("<think></think>b", "b", "b"),
    ("</think>", "", ""),
    ("<think", "<think", None),  # no marker: a response that ends in the middle of one
    ("a</think", "a</think", None),
    ("<THINK>a", "<THINK>a", None),
    ("", "", None),
]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_answer_of_a_response(case, opened):
    response, expected = case[0], case[2 if opened else 1]
    finished = expected is not None
    assert answers.split_thought(response, opened=opened) == (expected, finished)
    kept = expected if finished else response.rpartition("</think>")[2]
    assert answers.split_thought(response, "keep", opened=opened) == (kept, finished)
    as_it_is = expected == response
    said = response if as_it_is else (expected or "").lstrip()
    assert answers.answer_of(response, opened=opened) == said


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="unfinished_thought"):
        answers.split_thought("x", "maybe", opened=False)


@pytest.mark.parametrize(
    ("text", "left_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think></think><think>Okay,", True),
        ("assistant\n", False),
        ("</think>", False),
        ("", False),
    ],
)
def test_whether_a_prompt_ends_inside_a_thought(text, left_open):
    assert answers.leaves_open(text) is left_open


def test_games_read_the_thought_too():
    assert environments.parse_action("<think>[up] or [down]") == "[down]"
    assert environments.parse_action("[left] then</think>no") == "[left]"
