"""From a model's response to the action that is sent to a game (spec 3.6)."""

import re

from oel_jax.data import answers

NO_ACTION = "[no valid action]"
DIRECTIONS = ("up", "down", "left", "right")
_KEYS = {"w": "up", "a": "left", "s": "down", "d": "right"}
_ACTION = re.compile(r"\[(up|down|left|right|w|a|s|d)\]")


def parse_action(response: str) -> str:
    """Return the last action named in `response`, or `NO_ACTION`.

    The whole text is searched, thought included, for the literal strings `[up]` ... `[d]`: case and
    blanks matter (`[UP]` and `[ up ]` are no actions). The last one by position wins; w, a, s and d
    become words. The result is wrapped in brackets, as the games expect it.
    """
    words = _ACTION.findall(answers.full_response(response))
    if not words:
        return NO_ACTION
    return f"[{_KEYS.get(words[-1], words[-1])}]"
