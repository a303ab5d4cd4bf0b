"""Text that knows, for each of its characters, where the character comes from.

A chat template mixes its text with the text of messages. Only the template's text may become
control tokens, so the two must be told apart after rendering, whatever the template did to them:
strip, split, join, repeat, drop. `Traced` is a `str` that carries the origin of each character
through these operations. The template sees an ordinary string and renders what it always renders.

An operation either keeps the origin of each character, or, where it makes new text out of old
(`upper`, `tojson`, `format`), all of its result counts as text from outside. So a mistake can make
a control token of the template into plain text, which is noticed when a model is loaded, but it can
never make a control token out of outside text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import jinja2.utils
from jinja2.exceptions import SecurityError

# An origin is 2 * source + (1 inside `{% generation %}`), as one character; 0 is the template.
TEMPLATE = 0
OUTSIDE = 1  # tools, or text of several messages
FIRST_FIELD = 2  # two sources for each message: its tool calls, and the rest
FIRST_TOKEN = 0x40000  # one source for each control token that is known to be genuine

_PLAIN = (bool, int, float, type(None), jinja2.Undefined, range)


class Traced(str):
    """A string with the origin of each character. Without `origin` all of it is from outside."""

    __slots__ = ("_origin",)
    _origin: str

    def __new__(cls, text: object = "", origin: str | None = None) -> "Traced":
        made = super().__new__(cls, text)
        made._origin = chr(2 * OUTSIDE) * len(made) if origin is None else origin
        return made

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: Any) -> "Traced":
        return Traced(str.__getitem__(self, key), self._origin[key])

    def __iter__(self) -> Iterator["Traced"]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Any) -> "Traced":
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> "Traced":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> "Traced":
        return Traced(str.__mul__(self, times), self._origin * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return outside(str.__mod__(self, values), (self, values))

    def __rmod__(self, text: Any) -> str:
        return outside(str.__mod__(text, self), (self, text))

    def __format__(self, form: str) -> str:
        return Traced(str.__format__(self, form))

    def encode(self, *_: Any, **__: Any) -> bytes:
        raise SecurityError("a chat template cannot encode text to bytes; remove `.encode`")

    def strip(self, letters: Any = None, /) -> "Traced":
        return self.lstrip(letters).rstrip(letters)

    def lstrip(self, letters: Any = None, /) -> "Traced":
        return self[len(self) - len(str.lstrip(self, letters)) :]

    def rstrip(self, letters: Any = None, /) -> "Traced":
        return self[: len(str.rstrip(self, letters))]

    def removeprefix(self, start: str, /) -> "Traced":
        return self[len(start) :] if self.startswith(start) else self

    def removesuffix(self, end: str, /) -> "Traced":
        return self[: len(self) - len(end)] if self.endswith(end) else self

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: Any = False) -> list[str]:
        lines, end = [], 0
        pieces = str.splitlines(self, keepends)
        for piece, whole in zip(pieces, str.splitlines(self, True), strict=True):
            lines.append(self[end : end + len(piece)])
            end += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        start = self.find(sep)
        return (self, "", "") if start < 0 else self._cut(start, start + len(sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        start = self.rfind(sep)
        return ("", "", self) if start < 0 else self._cut(start, start + len(sep))

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        if not old:
            return outside(str.replace(self, old, new, count), (self, new))
        return joined(pieces, new) if len(pieces := self.split(old, count)) > 1 else self

    def join(self, parts: Iterable[str], /) -> str:
        return joined(parts, self)

    def _cut(self, start: int, end: int) -> tuple[str, str, str]:
        return self[:start], self[start:end], self[end:]

    def _located(self, pieces: list[str], sep: str | None) -> list[str]:
        """The same pieces with their origins: between two is `sep`, or blanks if it is None."""
        found, end = [], 0
        for piece in pieces:
            # A piece between blanks begins with none, unless the text begins with it.
            start = self.find(piece, end) if sep is None else end + bool(found) * len(sep)
            end = start + len(piece)
            found.append(self[start:end])
        return found


def _remade(name: str) -> Any:
    def method(self: Traced, *values: Any, **named: Any) -> str:
        return outside(getattr(str, name)(self, *values, **named), (self, values, named))

    return method


for _name in (
    "capitalize", "casefold", "center", "expandtabs", "ljust", "lower", "rjust", "swapcase",
    "title", "translate", "upper", "zfill",
):  # fmt: skip
    setattr(Traced, _name, _remade(_name))


def origin_of(text: str) -> str:
    """One character for each of the text's: its origin."""
    return text._origin if isinstance(text, Traced) else chr(TEMPLATE) * len(text)


def runs(codes: str) -> Iterator[tuple[str, int, int]]:
    """(code, start, end) of each run of equal characters; a text has few of them."""
    return ((run[1], *run.span()) for run in re.finditer(r"(.)\1*", codes, re.DOTALL))


def plain(text: str) -> str:
    """The text without its origins."""
    return str.__str__(text)


def joined(parts: Iterable[str], between: str = "") -> str:
    """`between.join(parts)`; an ordinary string where no part is traced."""
    parts = list(parts)
    text = plain(between).join(map(plain, parts))
    if not any(isinstance(part, Traced) for part in (between, *parts)):
        return text
    return Traced(text, origin_of(between).join(map(origin_of, parts)))


def generated(text: str) -> Traced:
    """The text of a `{% generation %}` block."""
    return Traced(plain(text), "".join(chr(ord(code) | 1) for code in origin_of(text)))


def text_of(value: Any) -> str:
    """`str(value)`; text of a list or another value with traced text in it is from outside."""
    if isinstance(value, str):
        return value
    if isinstance(value, _PLAIN):
        return str(value)
    if _contents(value) is None:  # what it may hold is unknown
        return Traced(str(value))
    return outside(str(value), value)


def outside(made: str, values: Any) -> str:
    """`made`, as text from outside if it was made of `values` that hold such text."""
    sources = {ord(code) >> 1 for text in reached(values) for code in set(origin_of(text))}
    if not sources - {TEMPLATE}:
        return made
    fields = sorted(s for s in sources if s not in (TEMPLATE, OUTSIDE) and s < FIRST_TOKEN)
    one = len({message_of(s) for s in fields}) == 1 and OUTSIDE not in sources
    return Traced(plain(made), chr(2 * (fields[0] if one else OUTSIDE)) * len(made))


def message_of(source: int) -> int:
    """The number of the message that a source is a field of."""
    return (source - FIRST_FIELD) // 2


def reached(value: Any, seen: set[int] | None = None) -> Iterator[Traced]:
    """All traced text inside a value."""
    seen = set() if seen is None else seen
    if isinstance(value, Traced):
        yield value
        return
    inner = _contents(value)
    if not inner or id(value) in seen:
        return
    seen.add(id(value))
    for one in inner:
        yield from reached(one, seen)


def _contents(value: Any) -> Iterable[Any] | None:
    """What a container holds, () for a value that holds nothing, None for an unknown kind."""
    if isinstance(value, jinja2.utils.Namespace):
        value = value._Namespace__attrs  # what its text shows
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, str | bytes) or isinstance(value, _PLAIN):
        return ()
    if isinstance(value, Sequence | Set | ValuesView):
        return list(value)
    return None
