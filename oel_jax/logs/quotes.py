"""Which lines of a knowledge text give away the conversation that they were drawn from.

A line is named for one of these reasons:

quote     8 words in a row that somebody said in the conversation. Case and punctuation do not
          count. In scripts without spaces (Chinese, Japanese, Thai, ...) two characters count as
          a word.
name      a name from the users' messages: one that is introduced ("my name is X", "call me X", "I
          am X Y"), has a title ("Mr X") or ends a letter ("Regards, X"), or two or more words in a
          row with a capital inside of a sentence ("with Anna Kowalska").
address   a street with a number ("12 Baker Street", "Hauptstraße 5").
contact   an e-mail address, a number of a phone or card, an IP address or a key, as
          `oel_jax.logs.redaction` finds them.

All of it is heuristic, and errs on the side of naming a line: "New York" counts as a name where a
user spoke of it. A name in lower case, or one word that nobody introduced, is not found. Imports no
JAX.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from oel_jax.data.history import words_of
from oel_jax.data.trajectories import Trajectory
from oel_jax.logs.redaction import Redactor

QUOTED_WORDS = 8

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_NAME = r"((?:[^\W\d_][\w'’\-]*[ \t]*){1,3})"
_INTRODUCED = re.compile(
    r"\b(?:my name is|my name's|my name:|call me|ich heiße|me llamo|je m'appelle|nazywam się)\s+"
    + _NAME,
    re.IGNORECASE,
)
_I_AM = re.compile(rf"\b(?:I am|I'm|I’m|this is)\s+{_NAME}", re.IGNORECASE)
_TITLED = re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Sr|Sra)\b\.?\s+{_NAME}")
_SIGNED = re.compile(
    r"\b(?:regards|sincerely|cheers|yours|best wishes|thanks|grüße)\b[ ,!.]*\n+[ \t]*"
    rf"{_NAME}(?=\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_STREETS = (
    re.compile(
        r"\b\d{1,5}[a-zA-Z]?,?\s+(?:[A-Z][\w'’-]*\s+){1,3}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|"
        r"Drive|Boulevard|Blvd|Court|Square|Terrace|Place|Way)\b"
    ),
    re.compile(r"\b[A-ZÄÖÜ]\w*(?:straße|strasse|str\.|gasse|allee|platz)\s+\d+\b"),
    re.compile(r"\b(?:ul\.|ulica|[Rr]ue|[Vv]ia|[Cc]alle)\s+(?:[A-ZÀ-Ž][\w'’-]*\s*){1,3},?\s*\d+\b"),
    re.compile(r"\b\d{1,4},?\s+rue\s+(?:\w+\s+){0,3}[A-ZÀ-Ž]\w+"),
)
# Words with a capital that are no part of a name.
_NO_NAMES = frozenset(
    "I A An The My Your His Her Our Their This That These Those It We You He She They And Or But "
    "If In On At To For From With Please Thanks Hello Hi Dear Monday Tuesday Wednesday Thursday "
    "Friday Saturday Sunday January February March April May June July August September October "
    "November December".split()
)


@dataclass(frozen=True)
class Finding:
    """Why a line gives something away.

    Attributes:
      reason: 'quote', 'name', 'address' or 'contact'.
      what: the words, or the kind of contact.
    """

    reason: str
    what: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.what}"


class Source:
    """What was said in a conversation, ready to be compared with lines."""

    def __init__(self, trajectory: Trajectory):
        said: list[str] = []
        users: list[str] = []
        for turn in trajectory.turns:
            said += [words_of(message) for message in (*turn.messages, turn.shown)]
            users += [words_of(each) for each in turn.messages if each["role"] == "user"]
            if turn.feedback:
                said.append(turn.feedback)
                users.append(turn.feedback)
        self._windows = {window for text in said for window, _ in _windows(text)}
        self._names = {name for text in users for name in _names(text)}

    def findings(self, line: str) -> list[Finding]:
        """Why this line gives something away; [] if it does not."""
        found = []
        quoted = [shown for window, shown in _windows(line) if window in self._windows]
        if quoted:
            found.append(Finding("quote", f"{quoted[0]} ..."))
        found += [
            Finding("name", name)
            for name in sorted(self._names)
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line)
        ]
        street = next(filter(None, (pattern.search(line) for pattern in _STREETS)), None)
        if street:
            found.append(Finding("address", street[0]))
        _, counts = Redactor()(line)
        return found + [Finding("contact", kind) for kind in counts]


def drop_lines(text: str, source: Source) -> tuple[str, list[tuple[str, list[Finding]]]]:
    """Leave out the lines that give something away.

    Returns:
        (the other lines, '' if there are none; each line that was left out, and why).
    """
    kept, dropped = [], []
    for line in text.split("\n"):
        found = source.findings(line)
        if found:
            dropped.append((line, found))
        else:
            kept.append(line)
    return ("\n".join(kept).strip(), dropped) if dropped else (text, [])


def _windows(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every shortest run of words that is as long as a quote, and how it is shown.

    Whether a run is one depends on its own words alone, so that what two texts have in common, they
    have in common as the same runs.
    """
    matches = list(_WORD.finditer(text))
    words = [match[0].casefold() for match in matches]
    weights = [0.5 if re.fullmatch(rf"[{_UNSPACED}]", word) else 1.0 for word in words]
    end, weight = 0, 0.0
    for start in range(len(words)):
        while end < len(words) and weight < QUOTED_WORDS:
            weight += weights[end]
            end += 1
        if weight < QUOTED_WORDS:
            return
        yield tuple(words[start:end]), text[matches[start].start() : matches[end - 1].end()]
        weight -= weights[start]


def _names(text: str) -> Iterator[str]:
    """Names that a user's message introduces, or has inside of a sentence."""
    for pattern, least in ((_INTRODUCED, 1), (_TITLED, 1), (_SIGNED, 1), (_I_AM, 2)):
        for match in pattern.finditer(text):
            parts = _capitalised(match[1])
            if len(parts) >= least:
                yield from (part for part in parts if len(part) > 1)
    for sentence in re.split(r"[.!?:;\n]+\s*", text):
        run: list[str] = []
        # The first word has its capital from its place.
        for word in [*re.findall(r"[\w'’\-]+|,", sentence)[1:], ""]:
            if word[:1].isupper() and word not in _NO_NAMES:
                run.append(word)
                continue
            if len(run) > 1:
                yield " ".join(run)
            run = []


def _capitalised(text: str) -> list[str]:
    """The words at the beginning that have a capital and may be a name."""
    parts = []
    for word in text.split():
        word = word.strip("'’-")
        if not word[:1].isupper() or word in _NO_NAMES:
            break
        parts.append(word)
    return parts
