"""Text of a growing answer: whatever pieces the ids come in, the result is that of the whole."""

import json
import random

import pytest
from chat_model import write_tokenizer

from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.data.answers import answer_of
from oel_jax.models.bundled import MODEL_DIR
from oel_jax.serve.streaming import StopTexts, TextStream, ThoughtStream, longest_start
from oel_jax.serve.tool_calls import ToolCallStream, call_of

TEXTS = [
    "plain words, and more of them\n\n  with blanks ",
    "naïve café, 中文字符, \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301!",
    "odd \ufffd and \u0000 \u2028 end \U0001f600",
    "\U0001f600" * 60,
    "",
]


def pieces(draw, items):
    """The items cut into random pieces, some of them empty."""
    items, made = list(items), []
    while items:
        count = draw.choice((0, 1, 1, 2, 3, 16, 40))
        made.append(items[:count])
        items = items[count:]
    return made


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return {"sentencepiece": load_tokenizer(MODEL_DIR), "bytes": load_tokenizer(directory)}


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_to_the_decoded_whole(tokenizers, kind, text):
    tokenizer, draw = tokenizers[kind], random.Random(0)
    ids = tokenizer.encode(text) + list(tokenizer.stop_ids)
    for _ in range(20):
        stream, shown = TextStream(tokenizer.decode), ""
        for piece in pieces(draw, ids):
            shown += stream.add(piece)
            assert tokenizer.decode(ids).startswith(shown)
        assert shown + stream.add((), last=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_any_ids_at_all_grow_to_the_decoded_whole(tokenizers, kind):
    """A model may write half characters, control tokens, anything."""
    tokenizer, draw = tokenizers[kind], random.Random(1)
    for length in (1, 2, 3, 40, 41, 200):
        for _ in range(15):
            ids = [draw.randrange(tokenizer.vocab_size) for _ in range(length)]
            stream, shown = TextStream(tokenizer.decode), ""
            for piece in pieces(draw, ids):
                shown += stream.add(piece)
            assert shown + stream.add((), last=True) == tokenizer.decode(ids)


def test_half_a_character_is_never_shown(tokenizers):
    tokenizer = tokenizers["bytes"]
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) == 6  # one id for each byte
    stream = TextStream(tokenizer.decode)
    assert [stream.add((one,)) for one in ids] == ["a", "", "", "", "\U0001f600", "b"]


def cut_one_by_one(text, stops):
    """The reference: the text before the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stops if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)], True
    return text, False


@pytest.mark.parametrize(
    "stops", [("ab",), ("aab", "b"), ("abab", "ba"), ("a", "abc"), ("cccc",), ("bca", "cab"), ()]
)
def test_stop_texts_cut_wherever_they_are_and_never_show(stops):
    draw = random.Random(2)
    for _ in range(300):
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(12)))
        cutter, shown = StopTexts(stops), ""
        for piece in pieces(draw, text):
            shown += cutter.add("".join(piece))
            assert text.startswith(shown) and not any(one in shown for one in stops)
        shown += cutter.add("", last=True)
        assert (shown, cutter.found) == cut_one_by_one(text, stops)


def test_the_start_of_a_text_at_an_end():
    assert longest_start("xx<too", ("<tool>",)) == 4
    assert longest_start("xx<tool>", ("<tool>",)) == 0
    assert longest_start("aaa", ("aaaa", "ab")) == 3
    assert longest_start("", ("a",)) == 0 and longest_start("abc", ()) == 0


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "plain", "  plain ", "<think>why</think>\n\nbecause", "<think>why", "<thin", "<", "",
        " \n<think>\na </thin b</think> c", "why</think>  because", "why</think>", "a <think> b",
    ],
)  # fmt: skip
def test_thoughts_are_taken_off_the_front(text, opened):
    draw = random.Random(3)
    for _ in range(50):
        stream, thought, said = ThoughtStream(opened=opened), "", ""
        for piece in [*pieces(draw, text), None]:
            more = ("", True) if piece is None else ("".join(piece), False)
            new = stream.add(more[0], last=more[1])
            thought, said = thought + new[0], said + new[1]
        if not opened and not text.lstrip().startswith("<think>"):
            assert (thought, said) == ("", text)  # a later thought is no thought of the answer
        else:
            assert said == answer_of(text, opened=opened)
            assert thought == text.lstrip().removeprefix("<think>").partition("</think>")[0] or (
                opened and thought == text.partition("</think>")[0]
            )


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    "text, said, names",
    [
        (CALL, "", ["f"]),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", "Let me see.", ["f", "f"]),
        (f"a {CALL} b", "ab", ["f"]),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call> x', '<tool_call>{"name": 3}</tool_call> x', []),
        ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
        ("<tool_", "<tool_", []),
        ("words  \n", "words  \n", []),
        (f"<tool_call>x</tool_call>{CALL}", "<tool_call>x</tool_call>", ["f"]),
    ],
)
def test_tool_calls_in_any_pieces(text, said, names):
    draw = random.Random(4)
    for _ in range(60):
        stream, shown, calls = ToolCallStream(active=True), "", []
        for piece in [*pieces(draw, text), None]:
            made = stream.add("" if piece is None else "".join(piece), last=piece is None)
            shown, calls = shown + made[0], calls + made[1]
        assert (shown, [call["function"]["name"] for call in calls]) == (said, names)
        assert calls == stream.calls
    stream = ToolCallStream(active=False)
    assert stream.add(text) == (text, [])


def test_what_is_a_call():
    made = call_of(' {"name": "f", "arguments": "{\\"a\\": 1}"} ')
    assert json.loads(made["function"]["arguments"]) == {"a": 1} and made["type"] == "function"
    assert made["id"].startswith("call_") and made["id"] != call_of('{"name": "f"}')["id"]
    deep = "[" * 100_000
    bad = ("[]", "3", '{"name": ""}', '{"name": "f", "arguments": [1]}', deep, "")
    assert [call_of(text) for text in bad] == [None] * len(bad)
