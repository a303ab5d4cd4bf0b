"""Tool calls in an answer's text, in the form that Qwen's and Hermes' templates ask for.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

What looks like a call and is none stays text.
"""

import json
import secrets
from typing import Any

from oel_jax.serve.streaming import longest_start

_BEGIN, _END = "<tool_call>", "</tool_call>"


def call_of(text: str) -> dict[str, Any] | None:
    """The call that the text between the marks describes, as an object of the API; None: none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # some write JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {
            "name": call["name"],
            "arguments": json.dumps(arguments, ensure_ascii=False),
        },
    }


class ToolCallStream:
    """Takes the calls out of a growing text. Without `active` all is text.

    Blanks around calls are left out: they are part of the form.
    """

    def __init__(self, *, active: bool):
        self._active = active
        self._held = ""
        self._after_call = False
        self.calls: list[dict[str, Any]] = []

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """(new text, new calls)."""
        if not self._active:
            return text, []
        self._held += text
        said, calls = "", []
        while True:
            if self._after_call:
                self._held = self._held.lstrip()
                self._after_call = not self._held
            before, begun, after = self._held.partition(_BEGIN)
            inside, ended, rest = after.partition(_END)
            if not ended:
                break
            call = call_of(inside)
            said += before + begun + inside + ended if call is None else before.rstrip()
            calls += [] if call is None else [call]
            self._held, self._after_call = rest, call is not None
        if last:
            said, self._held = said + self._held, ""
        elif not begun:
            said += self._release()
        self.calls += calls
        return said, calls

    def _release(self) -> str:
        """What cannot be the beginning of a call; a blank may belong to the next one."""
        held = self._held
        keep = longest_start(held, (_BEGIN,))
        free = held[: len(held) - keep].rstrip()
        self._held = held[len(free) :]
        return free
