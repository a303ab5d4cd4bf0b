"""Messages of a conversation, checked, and made into text that knows where it comes from.

A message is a mapping as in OpenAI's chat format: `role`, `content`, and what else a template
reads (`reasoning_content`, `tool_calls`, `tool_call_id`, `name`). The name of a role is the one
text of a message that a template may build control tokens from (`<|user|>`), so only known roles
are taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.chat.control_tokens import ControlToken
from oel_jax.chat.traced import FIRST_FIELD, FIRST_TOKEN, OUTSIDE, Traced, joined, message_of
from oel_jax.data.messages import ROLES, Message


@dataclass
class Origins:
    """What the sources of a conversation's text are.

    Attributes:
        texts: all texts from outside.
        tokens: the genuine control tokens inside contents, by source: (message, token).
        used: the sources that have text.
    """

    texts: list[str] = field(default_factory=list)
    tokens: dict[int, tuple[int, ControlToken]] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def traced(self, value: Any, source: int, name: str) -> Any:
        """A JSON value, all its texts and keys traced to a source.

        Raises:
            UserError: it is not JSON, or a text is not Unicode.
        """
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{name} has half of a surrogate pair ({error.object[error.start]!a}), which "
                    "is no Unicode text; remove it"
                ) from error
            if value:
                self.texts.append(value)
                self.used.add(source)
            return Traced(value, chr(2 * source) * len(value))
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            pairs = ((k, v, f"{name}.{k}") for k, v in value.items())
            return {
                self.traced(k, source, name): self.traced(v, source, inner) for k, v, inner in pairs
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.traced(one, source, f"{name}[{i}]") for i, one in enumerate(value)]
        raise UserError(
            f"{name} is a {type(value).__name__}, not JSON; give texts, numbers, lists and objects"
        )

    def message(self, source: int) -> int:
        """The number of the message that a source belongs to; -1 if it is none's."""
        if source in self.tokens:
            return self.tokens[source][0]
        return message_of(source) if FIRST_FIELD <= source < FIRST_TOKEN else -1

    def name(self, source: int) -> str:
        """How a message to the user names a source."""
        if source == OUTSIDE:
            return "tools"
        calls = source < FIRST_TOKEN and (source - FIRST_FIELD) % 2 == 0
        return f"messages[{self.message(source)}]" + (".tool_calls" if calls else "")

    def token(self, message: int, token: ControlToken) -> Traced:
        """A control token that belongs where it is."""
        source = FIRST_TOKEN + len(self.tokens)
        self.tokens[source] = message, token
        return Traced(token.text, chr(2 * source) * len(token.text))


def trace(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    control: Mapping[int, ControlToken],
) -> tuple[list[dict[str, Any]], list[Any] | None, Origins]:
    """Messages and tools as a template reads them, with traced text.

    Raises:
        UserError: a message is malformed; the error names it.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise UserError("a conversation is a list of messages, at least one")
    origins = Origins()
    made = [_message(origins, i, message, control) for i, message in enumerate(messages)]
    if tools is None:
        return made, None, origins
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("tools must be a list of JSON schemas")
    return made, origins.traced(list(tools), OUTSIDE, "tools"), origins


def _message(
    origins: Origins, index: int, message: Message, control: Mapping[int, ControlToken]
) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        got = message.get("role") if isinstance(message, Mapping) else message
        raise UserError(f"{name}: role must be one of {', '.join(ROLES)}; got {got!r}")
    calls_source = FIRST_FIELD + 2 * index
    made: dict[str, Any] = {}
    for key, value in message.items():
        source = calls_source if key == "tool_calls" else calls_source + 1
        if not isinstance(key, str):
            raise UserError(f"{name}: the key {key!r} is no text")
        if value is None:  # as in transformers, where a template would show 'None'
            continue
        if key == "role":
            made[key] = str(value)
        elif key == "content":
            made[key] = _content(origins, index, value, source, control)
        else:
            made[key] = origins.traced(value, source, f"{name}.{key}")
    if "content" not in made and made["role"] != "assistant":
        raise UserError(f"{name} has no content, which only an assistant's message may lack")
    return made


def _content(
    origins: Origins, index: int, value: Any, source: int, control: Mapping[int, ControlToken]
) -> str:
    """The content as one text: parts follow each other without anything between them."""
    name = f"messages[{index}].content"
    if isinstance(value, str):
        return origins.traced(value, source, name)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UserError(f"{name} must be a text or a list of parts; got {value!r}")
    pieces: list[str | ControlToken] = [""]
    for number, part in enumerate(value):
        piece = part
        if isinstance(part, Mapping):
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"{name}[{number}]: only parts of type 'text' are supported; got "
                    f"{part.get('type')!r}"
                )
            piece = part["text"]
        elif type(part) is int and part in control:
            piece = control[part]
        elif not isinstance(part, str):
            raise UserError(
                f"{name}[{number}] must be a text, a part of type 'text' or the id of a control "
                f"token; got {part!r}"
            )
        if isinstance(piece, str) and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return joined(
        origins.traced(piece, source, name)
        if isinstance(piece, str)
        else origins.token(index, piece)
        for piece in pieces
    )
