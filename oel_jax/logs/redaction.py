"""Replaces what says who somebody is, or opens a door, before a text is written anywhere.

    text, counts = Redactor()("Mail me: jane@example.org")     # "Mail me: [EMAIL]", {"email": 1}

email  Replaced: addresses, also "jane (at) example (dot) org".
       Kept: @names, git@host:path, icon@2x.png.
phone  Replaced: +44 20 7946 0958; (555) 123-4567 and 555-123-4567; 9 to 11 digits that begin with
       0; any 7 to 15 digits after a word such as "tel", "call" or "fax".
       Kept: dates, prices, ranges, ISBN, bare digits without such a word or a leading 0.
card   Replaced: 14 to 19 digits that begin with 2 to 6 and have the checksum of cards (Luhn).
       Kept: digits with another checksum.
ip     Replaced: IPv4 and IPv6 addresses, private ones too.
       Kept: 127.*, 0.*, 255.*, :: and ::1; versions (v1.2.3.4, Chrome/1.2.3.4, x==1.2.3.4).
key    Replaced: known beginnings (sk-, ghp_, AKIA, ...), JSON web tokens, private keys, the value
       in password=..., long words that look random, 32 or more hexadecimal digits.
       Kept: UUIDs; digests after "sha256:", "md5:", "commit"; paths and names in code.
own    What a hook of one's own replaced.

In doubt a text is replaced: "1.2.3.4" alone is an address, and one in ten long numbers has the
checksum of a card by chance. Names of people and street addresses are not found; a hook of one's
own may replace them. Imports no JAX.
"""

import importlib.util
import ipaddress
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from oel_jax.base import paths
from oel_jax.base.errors import UserError

KINDS = ("email", "phone", "card", "ip", "key", "own")

Hook = Callable[[str], str]

# --- patterns -------------------------------------------------------------------------------------

_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]+@(?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])")
_SPELLED_AT = re.compile(r"[\[({]\s?at\s?[\])}]", re.IGNORECASE)
_SPELLED_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]+\s?[\[({]\s?at\s?[\])}]\s?[\w-]+"
    r"(?:\s?(?:\.|[\[({]\s?(?:dot|\.)\s?[\])}])\s?[\w-]+)*"
    r"\s?(?:\.|[\[({]\s?(?:dot|\.)\s?[\])}])\s?[^\W\d_]{2,24}(?!\w)",
    re.IGNORECASE,
)
_DOTTED = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3,}")
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|version|release|build|rev|revision|section|chapter|firmware|driver|assembly"
    r"|upgrade to|downgrade to)[ .:=]*|[\w)]/|§ ?|==|>=|<=|~=|\^)$",
    re.IGNORECASE,
)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}(?![\w:])")
# Digits in groups; what a run is, is found out in code.
_GAP = r"[ \u00a0\u202f.()/\-\u2010-\u2014]"
_GAPS = " \u00a0\u202f.)/-\u2010\u2011\u2012\u2013\u2014"
_NUMBER = re.compile(rf"\d(?:{_GAP}{{0,3}}\d){{5,}}")
_NUMBER_BEFORE = re.compile(r"(?<![\w.,$€£¥])(?:\+ ?)?\(?\Z")
_NUMBER_AFTER = re.compile(r"[\w%€£¥]|[.,]\d")
_NEXT_NUMBER = re.compile(r"\. |  +| (?=\()")
_PHONE_WORD = re.compile(
    r"\b(?:tele?(?:phone|fon)?|tel|phone|cell|mobile?|mob|handy|fax|call|ring|text|sms|whatsapp|signal"
    r"|hotline|contact|num[eé]ro|tfno|m[oó]vil|telefono|teléfono|nummer|电话|手机|電話|전화)"
    r"(?:\s?(?:me|us|him|her|them|it|is|no|nr|number|num|at|on|under|#|\.|:|：|=)){0,4}\W{0,3}$",
    re.IGNORECASE,
)
_ISBN_BEFORE = re.compile(r"\b(?:ISBN|ISSN|EAN|DOI|PMID)[-\d: ]{0,8}$", re.IGNORECASE)
_DATE = re.compile(
    r"(?:\d{4}[-/.\u2010-\u2014 ]\d{1,2}[-/.\u2010-\u2014 ]\d{1,2}"
    r"|\d{1,2}[-/.\u2010-\u2014 ]\d{1,2}[-/.\u2010-\u2014 ](?:19|20)\d\d"
    r"|\d{1,2}[-/.\u2010-\u2014]\d{1,2}[-/.\u2010-\u2014]\d\d)(?![-/.]?\d)"
)

_KEY_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+/=.-")
_KEY_CHARACTERS = bytes(ord("x") if c in _KEY_LETTERS else ord(" ") for c in range(256))
_KEY_WORD = b"x" * 16  # no key is shorter
_NO_DIGITS = bytes(c for c in range(256) if c not in b"0123456789")
_KNOWN_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"sk-[A-Za-z0-9_-]{16,}|(?:sk|pk|rk|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w.-]{20,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|dop_v1_[a-f0-9]{32,}|key-[a-f0-9]{32}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_ASSIGNED = re.compile(
    r"(\b(?:api[_ -]?key|secret(?:[_ -]?(?:access[_ -]?)?key)?|access[_ -]?token|auth[_ -]?token"
    r"|token|passw(?:or)?d|passwort|pwd|client[_ -]?secret|bearer)\b[\"']?(?:\s*[=:]\s*| )[\"']?)"
    r"([^\s\"'<>,;\[\]]{6,})",
    re.IGNORECASE,
)
_RUN = re.compile(r"(?<![A-Za-z0-9_+/=-])[A-Za-z0-9_+/=-]{24,}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_HEX = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_DIGEST_BEFORE = re.compile(
    r"\b(?:sha-?\d*|md5|crc\d*|commit|digest|checksum|blake\w*)\W{0,3}$", re.I
)
_DIGEST = re.compile(r"(?:sha\d+|md5)[-_=:]", re.IGNORECASE)
_DIGIT = re.compile(r"\d")


# --- kinds ----------------------------------------------------------------------------------------


def _digits(text: str) -> str:
    """The decimal digits of a text, whatever script they are of."""
    return "".join(str(int(c)) for c in text if c.isdecimal())


def luhn(digits: str) -> bool:
    """Whether the last digit is the checksum of payment cards."""
    total = 0
    for at, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + at % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


_CARD_GROUP = re.compile(r"\d+")
_CARD_GAP = re.compile(r"[ \u00a0\u202f\-\u2010-\u2014]")


def _cards(run: str) -> list[tuple[int, int]]:
    """Where in a run of digits and gaps there are card numbers: groups of at least 3 digits."""
    groups = [(m.start(), m.end()) for m in _CARD_GROUP.finditer(run)]
    found, first = [], 0
    while first < len(groups):
        last = next(
            (end for end in range(min(len(groups), first + 7), first, -1)
             if _is_card(run, groups[first:end])),
            None,
        )  # fmt: skip
        if last is None:
            first += 1
        else:
            found.append((groups[first][0], groups[last - 1][1]))
            first = last
    return found


def _is_card(run: str, groups: list[tuple[int, int]]) -> bool:
    if any(end - start < 3 for start, end in groups):
        return False
    gaps = [run[end:start] for (_, end), (start, _) in zip(groups, groups[1:], strict=False)]
    if not all(_CARD_GAP.fullmatch(gap) for gap in gaps):
        return False
    digits = _digits(run[groups[0][0] : groups[-1][1]])
    return 14 <= len(digits) <= 19 and digits[0] in "23456" and luhn(digits)


def _is_phone(run: str, before: str) -> bool:
    """Whether digits with gaps are a telephone number.

    Args:
      run: from a '+', '(' or digit to a digit.
      before: the text in front of it.
    """
    digits = _digits(run)
    groups = [len(group) for group in _CARD_GROUP.findall(run)]
    if not 7 <= len(digits) <= 17 or _DATE.match(run) or _ISBN_BEFORE.search(before):
        return False
    if run.startswith("+"):
        return 8 <= len(digits) <= 15 and digits[0] != "0"
    if len(digits) <= 15 and _PHONE_WORD.search(before):
        return True
    if digits.startswith("00"):
        return 10 <= len(digits) and digits[2] != "0" and (len(groups) > 1 or len(digits) >= 12)
    american = groups[-3:] == [3, 3, 4] and digits[-10] in "23456789"
    if american and (len(groups) == 3 or (len(groups) == 4 and digits[0] == "1")):
        return True
    if "/" in run[3:] or not digits.startswith("0"):
        return bool(re.fullmatch(r"0\d{2,4}/\d{5,8}", run))
    return 9 <= len(digits) <= 11 and all(size >= 2 for size in groups[1:])


def _is_random(run: str) -> bool:
    """Whether a long word looks drawn at random: its letters and digits change kind often."""
    if _UUID.fullmatch(run) or _DIGEST.match(run):
        return False
    if _HEX.fullmatch(run):
        return _DIGIT.search(run) is not None
    pieces = [piece for piece in re.split(r"[/=]", run) if piece] if "/" in run else [run]
    return any(_mixed(piece) for piece in pieces if len(piece) >= (18 if len(pieces) > 1 else 24))


def _mixed(run: str) -> bool:
    kinds = ["0" if c.isdigit() else "a" if c.islower() else "A" for c in run if c.isalnum()]
    if len(kinds) < 18 or kinds.count("0") < 2:
        return False
    changes = sum(one != two for one, two in zip(kinds, kinds[1:], strict=False))
    if "a" in kinds and "A" in kinds:
        return changes >= 0.35 * len(kinds)
    return len(kinds) >= 28 and "-" not in run and "_" not in run and changes >= 0.35 * len(kinds)


# --- the redactor ---------------------------------------------------------------------------------


class Redactor:
    """Replaces kinds of text; see the top of this file. Takes time in proportion to the text.

    Args:
      hook: called first with each whole text; returns the text to go on with. What it changes
        counts as 'own'.

    Attributes:
      total: kind -> number of replacements so far.
    """

    def __init__(self, hook: Hook | None = None) -> None:
        self._hook = hook
        self.total: Counter[str] = Counter()

    def __call__(self, text: str) -> tuple[str, dict[str, int]]:
        """The text to keep, and kind -> number of replacements (without kinds that have none).

        Raises:
          UserError: the hook failed or returned no text.
        """
        counts: dict[str, int] = defaultdict(int)
        if self._hook is not None:
            text = self._own(text, counts)
        if "PRIVATE KEY-----" in text:
            text = _replace(_PRIVATE_KEY, text, lambda m: True, "key", counts)
        long, digits = _outline(text)
        text = _keys(text, counts, long, digits > 0)
        if "@" in text:
            text = _replace(_EMAIL, text, _is_email, "email", counts)
        if ("(" in text or "[" in text or "{" in text) and _SPELLED_AT.search(text):
            text = _replace(_SPELLED_EMAIL, text, lambda m: True, "email", counts)
        if digits and text.count(":") > 1:
            text = _replace(_IPV6, text, _is_ipv6, "ip", counts)
        if digits >= 4 and text.count(".") > 2:
            text = _replace(_DOTTED, text, _is_ipv4, "ip", counts)
        if digits >= 7:
            text = _numbers(text, counts)
        if not counts:
            return text, {}
        self.total.update(counts)
        return text, dict(counts)

    def change(self, text: str) -> str:
        """The text to keep."""
        return self(text)[0]

    def _own(self, text: str, counts: dict[str, int]) -> str:
        try:
            new = self._hook(text)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the redaction hook failed: {type(error).__name__}: {error} "
                f"({Path(where.filename).name}:{where.lineno}); correct it"
            ) from error
        if not isinstance(new, str):
            raise UserError(
                f"the redaction hook returned {type(new).__name__}; it must return the text"
            )
        if new != text:
            counts["own"] += 1
        return new


def _replace(
    pattern: re.Pattern,
    text: str,
    right: Callable[[re.Match], bool],
    kind: str,
    counts: dict[str, int],
) -> str:
    def new(match: re.Match) -> str:
        if not right(match):
            return match[0]
        counts[kind] += 1
        return f"[{kind.upper()}]"

    return pattern.sub(new, text)


def _before(match: re.Match, length: int = 40) -> str:
    return match.string[max(0, match.start() - length) : match.start()]


def _is_email(match: re.Match) -> bool:
    name, _, host = match[0].rpartition("@")
    after = match.string[match.end() : match.end() + 1]
    if name == "git" and after == ":":
        return False
    return not re.match(r"[1-4]x\.", host)


def _is_ipv4(match: re.Match) -> bool:
    octets = match[0].split(".")
    if len(octets) != 4 or any(int(octet) > 255 for octet in octets):
        return False
    if int(octets[0]) in (0, 127, 255):
        return False
    before, after = _before(match), match.string[match.end() : match.end() + 2]
    if re.search(r"[\w.]$", before) or re.match(r"[\w-]|\.\d", after):
        return False
    return not _VERSION_BEFORE.search(before)


def _is_ipv6(match: re.Match) -> bool:
    if not _DIGIT.search(match[0]):
        return False
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


def _assigns(lower: str) -> bool:
    """Whether one of the words of `_ASSIGNED` may be there; spelled out, since it is always run."""
    return (
        "key" in lower
        or "secret" in lower
        or "token" in lower
        or "pass" in lower
        or "pwd" in lower
        or "bearer" in lower
    )


def _outline(text: str) -> tuple[bool, int]:
    """Whether there is a long word of key characters, and how many digits there are at most.

    Most texts hold nothing to replace; this finds out at the speed of memory.
    """
    plain = text.encode("ascii", "replace")
    long = _KEY_WORD in plain.translate(_KEY_CHARACTERS)
    digits = len(plain.translate(None, _NO_DIGITS))
    return long, digits if text.isascii() else digits + len(_DIGIT.findall(text))


def _keys(text: str, counts: dict[str, int], long: bool, digits: bool) -> str:
    if long:
        text = _replace(_KNOWN_KEYS, text, lambda m: True, "key", counts)
    if _assigns(text.lower()):

        def assigned(match: re.Match) -> str:
            value = match[2]
            secret = _DIGIT.search(value) and re.search(r"[^\W\d_]", value) or match[1][-1] != " "
            plain = re.fullmatch(r"\d+|[a-z_.]+\(.*|[A-Za-z]+", value)
            if not secret or plain:
                return match[0]
            counts["key"] += 1
            return f"{match[1]}[KEY]"

        text = _ASSIGNED.sub(assigned, text)
    if long and digits:

        def random(match: re.Match) -> bool:
            return _is_random(match[0]) and not _DIGEST_BEFORE.search(_before(match))

        text = _replace(_RUN, text, random, "key", counts)
    return text


def _numbers(text: str, counts: dict[str, int]) -> str:
    pieces, done = [], 0
    for match in _NUMBER.finditer(text):
        before = _before(match)
        begin = _NUMBER_BEFORE.search(before)
        if begin is None or _NUMBER_AFTER.match(text, match.end()):
            continue
        start = match.start() - (len(before) - begin.start())
        run = text[start : match.end()]
        pieces += [text[done:start], _number(run, before[: begin.start()], counts)]
        done = match.end()
    return "".join((*pieces, text[done:])) if pieces else text


def _number(run: str, before: str, counts: dict[str, int]) -> str:
    """A run of digits and gaps with its cards and telephone numbers replaced."""
    if run[:1] == "(" and run.count("(") > run.count(")"):
        return "(" + _number(run[1:], before, counts)
    if cards := _cards(run):
        start, end = cards[0]
        counts["card"] += 1
        left = _number(run[:start], before, counts)
        return f"{left}[CARD]{_number(run[end:], '', counts)}"
    number = run.strip(_GAPS)
    if _is_phone(number, before):
        counts["phone"] += 1
        return run.replace(number, "[PHONE]")
    if gap := _NEXT_NUMBER.search(run):  # several numbers one after the other
        left, right = run[: gap.start()], run[gap.end() :]
        return _number(left, before, counts) + gap[0] + _number(right, left[-9:] + gap[0], counts)
    return run


def load_hook(name: str) -> Hook:
    """A hook from 'FILE.py:function'.

    Raises:
      UserError: there is no such file or function, or the file fails.
    """
    file, _, function = name.rpartition(":")
    path = paths.local(file, "the redaction hook") if file else Path(name)
    if path.suffix != ".py" or not path.is_file() or not function:
        raise UserError(f"redaction hook {name!r}: give FILE.py:function of a file that exists")
    spec = importlib.util.spec_from_file_location(f"oel_redaction_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"redaction hook {name!r}: {type(error).__name__}: {error}") from error
    hook = getattr(module, function, None)
    if not callable(hook):
        raise UserError(f"redaction hook {name!r}: {path.name} has no function {function!r}")
    return hook
