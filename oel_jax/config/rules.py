"""Kinds of values: what a config field may be, and how a text of the command line becomes one.

A `Rule` is made for each field of `fields`. Imports no JAX.
"""

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oel_jax.base import paths

AUTO = "auto"  # a field that oel_jax/plan/auto.py decides at the start
HELD_OUT_BOARDS = 128  # evaluation seeds of spec 3.2
PRESETS = ("default", "paper", "released", "recommended")
ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down")  # as in models.decoder
MAY_WAIT = ("optimizer", "masters", "teacher")  # as in parallel.offload

# What JAX itself can keep compiled programs in, and the further package it needs (with etils).
BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}


@dataclass(frozen=True)
class Rule:
    """What a field may be.

    Attributes:
      check: a value -> what it must be, in words, or None if it is right.
      read: a text of the command line -> the value; ValueError if there is none. Whether the value
        is right is asked of `check` afterwards.
    """

    check: Callable[[Any], str | None]
    read: Callable[[str], Any] = str

    def __call__(self, value: Any) -> str | None:
        return self.check(value)

    @property
    def words(self) -> str:
        """What any value must be."""
        return self.check(_NEVER_RIGHT)


_NEVER_RIGHT = object()


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    """A finite number between two bounds, which are allowed themselves (but for an open one)."""
    bounds = f"{'above' if open_low else 'at least'} {low:.10g}"
    bounds += f" and at most {high:.10g}" if high < math.inf else ""

    def check(value: Any) -> str | None:
        right = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > low if open_low else value >= low)
            and value <= high
        )
        return None if right else f"a number {bounds}"

    return Rule(check, float)


def integer(low: int, high: float = math.inf) -> Rule:
    """An integer between two bounds, which are allowed themselves."""
    in_range = number(low, high)

    def check(value: Any) -> str | None:
        wrong = in_range(value)
        if not wrong and isinstance(value, int):
            return None
        return (wrong or in_range.words).replace("a number", "an integer")

    return Rule(check, int)


def choice(*values: str) -> Rule:
    """One of these texts."""

    def check(value: Any) -> str | None:
        right = isinstance(value, str) and value in values
        return None if right else " or ".join(map(repr, values))

    return Rule(check)


def _check_flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"  # 1 must not pass for True


def _read_flag(text: str) -> bool:
    known = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _check_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text that is not empty"


def _check_line(value: Any) -> str | None:
    right = _check_text(value) is None and "\n" not in value and value == value.strip()
    return None if right else "one line of text without space at its ends"


def _check_path(value: Any) -> str | None:
    return _check_text(value) or paths.wrong(value)


def _check_cache(value: Any) -> str | None:
    kind = paths.scheme(value) if isinstance(value, str) else None
    in_full = kind in BUCKETS and value.lower().startswith(f"{kind}://")
    return None if in_full else _check_path(value)


def _read_tuple(text: str) -> tuple[Any, ...]:
    """'(1, 5)', '1,5' and 'q,k,v' -> a tuple; '()', '' and 'none' -> an empty one."""
    if text.lower() == "none":
        return ()
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        inside = text.strip().removeprefix("(").removesuffix(")")
        return tuple(part.strip(" '\"") for part in inside.split(",") if part.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _check_texts(value: Any) -> str | None:
    right = isinstance(value, (tuple, list)) and all(_check_text(item) is None for item in value)
    right = right and len(value) == len(set(value))
    return None if right else "different texts in a tuple, or ()"


def _check_scorer(value: Any) -> str | None:
    file, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    right = file.endswith(".py") and paths.wrong(file) is None and name.isidentifier()
    return None if right else "FILE.py:FUNCTION"


def _check_steps(value: Any) -> str | None:
    right = isinstance(value, (tuple, list)) and all(type(item) is int for item in value)
    right = right and list(value) == sorted(set(value)) and all(item >= 1 for item in value)
    return None if right else "increasing integers of at least 1, e.g. (1, 5, 25)"


def _check_band(value: Any) -> str | None:
    right = isinstance(value, (tuple, list)) and len(value) == 2
    right = right and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    if right and 0 <= value[0] < 1 < value[1]:
        return None
    return "(low, high) with low below 1 and high above 1, e.g. (0.5, 2.0)"


def some(among: Sequence[str], *, empty: bool = False) -> Rule:
    """A tuple of different names; whether it may be empty."""

    def check(value: Any) -> str | None:
        right = isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)
        right = right and set(value) <= set(among) and len(value) == len(set(value))
        if right and (value or empty):
            return None
        return f"{'()' if empty else 'a tuple'} or some of {', '.join(map(repr, among))} in a tuple"

    return Rule(check, _read_tuple)


def traced_steps(text: str | None) -> range:
    """The optimizer steps that `config.profile` asks for: 'step:10..12' -> range(10, 13).

    Raises:
      ValueError: it is neither None nor of that form.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"step:([1-9]\d*)\.\.([1-9]\d*)", text) if type(text) is str else None
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(text)
    return range(int(found[1]), int(found[2]) + 1)


def _check_profile(value: Any) -> str | None:
    try:
        traced_steps(value)
    except ValueError:
        return "'step:FIRST..LAST' with 1 <= FIRST <= LAST, e.g. 'step:10..12'"
    return None


def _check_devices(value: Any) -> str | None:
    wrong = None if value == -1 and type(value) is int else POSITIVE(value)
    return wrong and f"{wrong}, or -1 for all devices that config.mesh.tp leaves"


def or_none(rule: Rule) -> Rule:
    """The rule, or None; 'none' on the command line."""

    def check(value: Any) -> str | None:
        wrong = None if value is None else rule(value)
        return wrong and f"{wrong}, or None"

    return Rule(check, lambda text: None if text.lower() == "none" else rule.read(text))


def or_auto(rule: Rule) -> Rule:
    """The rule, or 'auto'."""

    def check(value: Any) -> str | None:
        wrong = None if value == AUTO and type(value) is str else rule(value)
        return wrong and f"{wrong}, or {AUTO!r}"

    return Rule(check, lambda text: text if text == AUTO else rule.read(text))


FLAG = Rule(_check_flag, _read_flag)
TEXT = Rule(_check_text)
LINE = Rule(_check_line)
PATH = Rule(_check_path)
TEXTS = Rule(_check_texts, _read_tuple)
SCORER = Rule(_check_scorer)
CACHE = Rule(_check_cache)
PROFILE = Rule(_check_profile)
STEP_LIST = Rule(_check_steps, _read_tuple)
BAND = Rule(_check_band, _read_tuple)
POSITIVE = integer(1)
DEVICES = Rule(_check_devices, int)
TEMPERATURE = number(0, open_low=True)  # greedy decoding: top_k=1
TOP_P = number(0, 1, open_low=True)
TOP_K = integer(0)
DTYPE = choice("float32", "bfloat16")
