"""Token ids to text, piece by piece: nothing is given out that later tokens could change."""

from collections.abc import Callable, Sequence

from oel_jax.data.answers import CLOSE, OPEN

_LONGEST_CHARACTER = 3  # bytes of a character that can be there while its last one is missing
_WINDOW = 32  # ids that are decoded again for each new one, or a few more


class TextStream:
    """Grows the text of an answer by its ids.

    A character whose bytes are spread over tokens is held back until it is whole. Only the last ids
    are decoded again, so that an answer of n tokens costs time in proportion to n.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []  # the last ids, from the start of a character on
        self._shown = 0  # characters of the window's text that are given out
        self._mark = 0  # ids of the window after which a character ended

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these ids add for certain; with `last` all that is left."""
        self._window += ids
        text = self._decode(self._window)
        whole = not text.endswith("\ufffd")
        if not last:
            for _ in range(_LONGEST_CHARACTER):
                text = text.removesuffix("\ufffd")
        new = text[self._shown :]  # nothing where an incomplete character follows an odd byte
        self._shown = max(self._shown, len(text))
        if whole and len(self._window) > _WINDOW and self._mark:
            self._window = self._window[self._mark :]
            self._shown, self._mark = len(self._decode(self._window)), 0
        if whole and not self._mark:
            self._mark = len(self._window)
        return new


class StopTexts:
    """Cuts a growing text before the first of some texts.

    The end of the text so far may be the beginning of a stop text; it is held back until it is not.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str, *, last: bool = False) -> str:
        """What can be given out; nothing comes after a stop text."""
        if self.found:
            return ""
        held = self._held + text
        # The one that ends first counts, so that it does not matter how the text came in pieces.
        found = [(at + len(one), at) for one in self._stops if (at := held.find(one)) >= 0]
        if found:
            self.found, self._held = True, ""
            return held[: min(found)[1]]
        keep = 0 if last else longest_start(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def longest_start(text: str, wanted: Sequence[str]) -> int:
    """How many characters at the end of `text` begin one of some texts without completing it."""
    most = min(len(text), max((len(one) for one in wanted), default=1) - 1)
    for count in range(most, 0, -1):
        if any(len(one) > count and one.startswith(text[-count:]) for one in wanted):
            return count
    return 0


class ThoughtStream:
    """Separates the thought that an answer may begin with from what is said.

    Blanks around the thought's end belong to neither, as in `oel_jax.data.answers`.
    """

    def __init__(self, *, opened: bool):
        self._place = "thought" if opened else "start"
        self._held = ""

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """(new of the thought, new of what is said)."""
        self._held += text
        thought = ""
        if self._place == "start":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._place, self._held = "thought", begun.removeprefix(OPEN)
            elif last or not OPEN.startswith(begun):
                self._place = "said"
        if self._place == "thought":
            inside, closed, after = self._held.partition(CLOSE)
            keep = 0 if closed or last else longest_start(inside, (CLOSE,))
            thought = inside[: len(inside) - keep]
            self._held = after if closed else inside[len(inside) - keep :]
            self._place = "gap" if closed else "thought"
        if self._place == "gap":
            self._held = self._held.lstrip()
            self._place = "said" if self._held else "gap"
        said = ""
        if self._place == "said":
            said, self._held = self._held, ""
        return thought, said
