"""Where control tokens are in a template's text: the rules of the `tokenizers` library.

The library looks for added tokens twice, from left to right and the longest first: for those that
are matched as they are written, then, in what is left between them, for those that are matched
after normalising. Blanks next to a token belong to it if its flags say so.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

# What Unicode calls white space. Python's `str.strip` would also take U+001C to U+001F.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
BLANKS += "\u2028\u2029\u202f\u205f\u3000"

_WORD_CATEGORIES = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"))
# Letters to Unicode, although their category is that of symbols.
_LETTERS_IN_CIRCLES = (
    ("\u24b6", "\u24e9"),
    ("\U0001f130", "\U0001f149"),
    ("\U0001f150", "\U0001f169"),
    ("\U0001f170", "\U0001f189"),
)


@dataclass(frozen=True)
class ControlToken:
    """A token that only the template (or the model) may produce, never outside text.

    `special` tokens are dropped when ids are decoded. `lstrip` and `rstrip` tokens swallow the
    blanks before or after them, `single_word` ones match only between word boundaries, and
    `normalized` ones are looked for after the others.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


Part = str | ControlToken


def split(text: str, tokens: Sequence[ControlToken], before: str, after: str) -> list[Part]:
    """`text` as pieces of plain text and control tokens, in order; blanks stay where they are.

    Args:
        before: what precedes the text. It matters for word boundaries alone.
        after: what follows it.
    """
    parts: list[Part] = [text]
    for normalized in (False, True):
        group = tuple(token for token in tokens if token.normalized == normalized)
        if not group:
            continue
        found: list[Part] = []
        for index, part in enumerate(parts):
            if isinstance(part, ControlToken):
                found.append(part)
                continue
            left = before if index == 0 else ""
            right = after if index == len(parts) - 1 else ""
            found += _split(part, group, left, right)
        parts = found
    return parts


def _split(text: str, tokens: tuple[ControlToken, ...], before: str, after: str) -> list[Part]:
    pattern, by_text = _pattern(tokens)
    parts: list[Part] = []
    end = 0
    for match in pattern.finditer(text):
        token = by_text[match[0]]
        left, right = before + text[: match.start()], text[match.end() :] + after
        if token.single_word and (_is_word(left[-1:]) or _is_word(right[:1])):
            continue
        parts += [text[end : match.start()], token]
        end = match.end()
    return [*parts, text[end:]]


@cache
def _pattern(
    tokens: tuple[ControlToken, ...],
) -> tuple[re.Pattern[str], dict[str, ControlToken]]:
    # Longest first, so that no token hides one that it is a part of.
    ordered = sorted(tokens, key=lambda token: len(token.text), reverse=True)
    pattern = "|".join(re.escape(token.text) for token in ordered)
    return re.compile(pattern), {token.text: token for token in ordered}


def _is_word(character: str) -> bool:
    r"""Whether the library's `\w` takes it. Python's differs: marks are not in it, and ½ is."""
    return bool(character) and (
        unicodedata.category(character) in _WORD_CATEGORIES
        or character in "\u200c\u200d"
        or any(low <= character <= high for low, high in _LETTERS_IN_CIRCLES)
    )


def swallow_blanks(parts: Iterable[Part]) -> list[Part]:
    """The same without the blanks that belong to a token, and without empty pieces of text."""
    parts = list(parts)
    for index, part in enumerate(parts):
        if not isinstance(part, str):
            continue
        before = parts[index - 1] if index else ""
        after = parts[index + 1] if index + 1 < len(parts) else ""
        if isinstance(before, ControlToken) and before.rstrip:
            part = part.lstrip(BLANKS)
        if isinstance(after, ControlToken) and after.lstrip:
            part = part.rstrip(BLANKS)
        parts[index] = part
    return [part for part in parts if part != ""]
