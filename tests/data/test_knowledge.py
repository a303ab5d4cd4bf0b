"""Knowledge: parsing, thoughts, accumulation and truncation (spec 6.1-6.3)."""

import random
import re

import pytest

from oel_jax.base.errors import UserError
from oel_jax.data import knowledge

ITEM = "- EXPERIENCE ITEM:"


def words(text):
    """A stand-in tokenizer: one token per word and one per newline, so that counts add up."""
    return len(re.findall(r"\n|[^ \n]+", text))


def test_the_counter_itself():
    assert words("a b\nc") == 4 and words("") == 0 and words("a\n") == 2


# --- parsing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v4", "v1"])
def test_items_are_parsed(version):
    text = (
        "Additional Experience:\n# Experience\n"
        f"{ITEM} first  \n   continuation is lost\n"
        f"* text before is lost {ITEM} second\n"
        f"{ITEM} third {ITEM}fourth\n"
        f"{ITEM}   \n-- EXPERIENCE ITEM: paper style\n- experience item: lower\n"
    )
    assert knowledge.parse(text, version) == (
        f"{ITEM} first\n{ITEM} second\n{ITEM} third\n{ITEM}fourth\n{ITEM} paper style"
    )
    assert knowledge.parse("nothing here", version) == ""
    assert knowledge.parse("", version) == ""


def test_lines_end_at_newlines_only():
    text = f"{ITEM} one\u2028still one\x0band\x85on\r\nlost\n{ITEM} two"
    assert knowledge.parse(text, "v4") == f"{ITEM} one\u2028still one\x0band\x85on\n{ITEM} two"
    fits = "a\u2028b c d"
    assert knowledge.truncate(f"x y z\n{fits}", 4, words, "v3") == fits


def test_unstructured_and_dashed_versions():
    text = "  \n# Title\n - one \n-two\n* three\n\t- four\n- \n"
    assert knowledge.parse(text, "v3") == knowledge.parse(text, "v5") == text.strip()
    assert knowledge.parse(text, "v2") == "- one\n- four"


def test_own_marker():
    assert knowledge.parse("x -- RULE: a\n- EXPERIENCE ITEM: b", "v4", "-- RULE:") == "-- RULE: a"
    with pytest.raises(UserError, match="item_marker"):
        knowledge.parse("x", "v4", " ")


# --- accumulation and truncation ------------------------------------------------------------------


def test_append():
    assert knowledge.append("", "") == ""
    assert knowledge.append("", "a") == "a"
    assert knowledge.append("a", "") == "a"
    assert knowledge.append("a", "b\nc") == "a\nb\nc"


# --- upkeep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("H is deadly.", "H is deadly."),
        ("H is deadly.", "h IS Deadly"),
        ("H is deadly", "  H  is\tdeadly .  "),
        ("Stra\u00dfe.", "STRASSE"),
    ],
)
def test_equal_items_are_left_out(old, new):
    for one, other in ((old, new), (new, old)):
        text = f"{ITEM} first\n{ITEM} {one}"
        assert knowledge.deduplicate(text, f"{ITEM} {other}") == ("", 1)
        assert knowledge.deduplicate("", f"{ITEM} {one}\n{ITEM}{other}") == (
            f"{ITEM} {one}".rstrip(),
            1,
        )
        assert knowledge.deduplicate(one, f"{other}\nmore") == ("more", 1)  # lines of v3


@pytest.mark.parametrize(
    "new", ["G is deadly.", "H is deadly..", "H is deadly!", "H isdeadly", "H is", "- H is deadly."]
)
def test_other_items_stay(new):
    assert knowledge.deduplicate(f"{ITEM} H is deadly.", f"{ITEM} {new}") == (f"{ITEM} {new}", 0)


def test_what_has_no_duplicate_stays_byte_for_byte():
    for parsed in ("", "one\n\n\ntwo  \n.\n..", f"{ITEM} a\n{ITEM} b", "\u2028 x"):
        assert knowledge.deduplicate("", parsed) == (parsed, 0)
        assert knowledge.deduplicate("zero\n\nthree", parsed) == (parsed, 0)
    assert knowledge.deduplicate("b", "# a\n\nB.\n\nc") == ("# a\n\n\nc", 1)  # blank lines stay
    assert knowledge.deduplicate("b", "B.\n\nb") == ("", 2)


def test_deduplication_against_all_pairs():
    """By definition: an item stays if no earlier one is equal, in the text or in the answer."""
    rng = random.Random(0)
    pool = ["H is bad", "h is bad.", "H  is bad", "G wins", "G wins.", "short paths", "H", "h."]

    def equal(one, other):
        shape = [re.sub(r"\s+", " ", text).strip().lower() for text in (one, other)]
        return len({text[:-1] if text.endswith(".") else text for text in shape}) == 1

    dropped_in_all = 0
    for _ in range(200):
        old, new = (rng.choices(pool, k=rng.randint(0, 4)) for _ in range(2))
        kept = []
        for i, item in enumerate(new):
            if not any(equal(item, other) for other in [*old, *new[:i]]):
                kept.append(item)
        texts = ["\n".join(f"{ITEM} {item}" for item in some) for some in (old, new, kept)]
        dropped_in_all += len(new) - len(kept)
        assert knowledge.deduplicate(texts[0], texts[1]) == (texts[2], len(new) - len(kept))
    assert dropped_in_all > 100


@pytest.mark.parametrize("version", ["v3", "v4"])
@pytest.mark.parametrize(
    ("answer", "rest", "no_new"),
    [
        ("NO NEW EXPERIENCE", "", True),
        ("\n\n no new Experience. \n", "", True),
        (f"{ITEM} NO NEW EXPERIENCE", "", True),
        (f"{ITEM} no new experience.\n{ITEM} NO NEW EXPERIENCE", "", True),
        (f"{ITEM} H is deadly.\n{ITEM} NO NEW EXPERIENCE", f"{ITEM} H is deadly.", False),
        (f"{ITEM} H is deadly.", f"{ITEM} H is deadly.", False),
        (f"{ITEM} There is NO NEW EXPERIENCE", f"{ITEM} There is NO NEW EXPERIENCE", False),
        ("", "", False),
    ],
)
def test_nothing_new(version, answer, rest, no_new):
    parsed = knowledge.parse(answer, version)
    assert knowledge.without_no_op(answer, parsed) == (rest, no_new)


def test_nothing_new_in_other_words_is_no_such_answer():
    for answer in ("There is no new experience here.", "NO NEW EXPERIENCES", "NO NEW EXPERIENCE!"):
        assert knowledge.without_no_op(answer, "") == ("", False)
        assert knowledge.without_no_op(answer, answer) == (answer, False)
    marker = "-- RULE:"
    parsed = knowledge.parse("-- RULE: no new experience", "v4", marker)
    assert knowledge.without_no_op("", parsed, marker) == ("", True)
    assert knowledge.without_no_op("", parsed) == (parsed, False)  # of another marker


def items(*sizes):
    """Items of the given numbers of tokens, the newline after each not counted."""
    return [f"{ITEM}" + f" w{i}" * (size - 3) for i, size in enumerate(sizes)]


def test_a_text_that_fits_is_unchanged():  # (a)
    text = " \n" + "\n".join(items(5, 5)) + "\n\n"
    assert knowledge.truncate(text, words(text), words, "v4") is text
    assert knowledge.truncate("", 1, words, "v4") == ""


@pytest.mark.parametrize("version", ["v1", "v3", "v4"])
def test_newest_lines_are_kept(version):
    lines = items(9, 6, 5)
    text = "\n".join(lines)
    assert knowledge.truncate(text, 13, words, version) == "\n".join(lines[1:])
    assert knowledge.truncate(text, 12, words, version) == lines[2]
    assert knowledge.truncate(text, 13, words, version, keep="head") == lines[0]
    assert knowledge.truncate(text, 17, words, version, keep="head") == "\n".join(lines[:2])


def test_a_small_old_item_is_not_kept_behind_a_large_one():
    lines = items(3, 90, 5)
    assert knowledge.truncate("\n".join(lines), 20, words, "v4") == lines[2]


def test_an_overlong_last_line_wipes_everything():  # (b)
    text = "\n".join(items(5, 50))
    for version in knowledge.VERSIONS:
        assert knowledge.truncate(text, 20, words, version) == ""
    assert knowledge.truncate("\n".join(items(50, 5)), 20, words, "v4", keep="head") == ""


def test_an_overlong_last_continuation_line_wipes_everything_too():  # (b), nothing kept yet
    text = "\n".join([*items(5), "c" + " c" * 50])
    assert knowledge.truncate(text, 20, words, "v4") == ""


def test_an_overflowing_continuation_line_is_skipped():  # (c)
    first, last = items(5, 5)
    text = "\n".join([first, "long" + " c" * 50, last])
    assert knowledge.truncate(text, 20, words, "v4") == f"{first}\n{last}"
    assert knowledge.truncate(text, 20, words, "v3") == last  # every line counts as an item


def test_lines_before_the_first_item_are_dropped():
    old, new = items(50, 5)
    text = "\n".join([old, "orphan", new, "tail"])
    assert knowledge.truncate(text, 20, words, "v4") == f"{new}\ntail"
    assert knowledge.truncate(text, 20, words, "v3") == f"orphan\n{new}\ntail"


def test_the_last_newline_counts():  # (d)
    lines = items(5, 5)
    text = "\n".join(lines)
    assert words(text) == 11
    longer = "\n".join(["x" * 3, *lines])
    assert words(longer) == 13
    assert knowledge.truncate(longer, 12, words, "v4") == text  # 6 + 6, joint count 11
    assert knowledge.truncate(longer, 11, words, "v4") == lines[1]  # joint count would fit


def test_no_item_among_the_kept_lines():  # (e)
    text = "\n".join([*items(50), "one", "two"])
    assert knowledge.truncate(text, 10, words, "v4") == "one\ntwo"


def test_a_long_paragraph_is_wiped_under_v3():  # (f)
    assert knowledge.truncate("word " * 40, 20, words, "v3") == ""


def test_own_marker_and_dashes_in_truncation():
    text = "-- RULE: a\nx" + " c" * 20 + "\n-- RULE: b"
    assert knowledge.truncate(text, 10, words, "v4", marker="-- RULE:") == "-- RULE: a\n-- RULE: b"
    dashed = "- a\nx" + " c" * 20 + "\n- b"
    assert knowledge.truncate(dashed, 10, words, "v2") == "- a\n- b"


def test_bad_settings_are_user_errors():
    for call, field in (
        (lambda: knowledge.parse("x", "v9"), "extract.version"),
        (lambda: knowledge.truncate("x", 1, words, "V4"), "extract.version"),
        (lambda: knowledge.truncate("x", 1, words, "v4", keep="middle"), "extract.truncate"),
        (lambda: knowledge.truncate("x", 0, words, "v4"), "extract.l_max"),
        (lambda: knowledge.truncate("x", True, words, "v4"), "extract.l_max"),
    ):
        with pytest.raises(UserError, match=field):
            call()
