"""What a policy reads before it answers: messages, and a context that a teacher sees in addition.

A message is a plain dictionary, as chat templates take it:

    role          "system", "developer", "user", "assistant" or "tool"
    content       string
    tool_calls    of an assistant, optional: list of objects, each with function.name
    tool_call_id  of a tool's answer, optional: string
    name          optional: string

`place_context` is the one way in which a text is put before a model in addition to the messages.
Nothing here imports JAX.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from oel_jax.base.errors import UserError
from oel_jax.data.prompts import WRAPPERS, play_prompt

ROLES = ("system", "developer", "user", "assistant", "tool")
PLACES = ("paper", "system", "user")

Message = Mapping[str, Any]


class Dialogue(NamedTuple):
    """The messages that a policy reads before one answer.

    Attributes:
        messages: in order; the policy answers the last one.
        wrapper: name of the paper's wrapper (a key of `prompts.WRAPPERS`) that the last user
            message is shown in; '' shows it as it is. The message holds the bare situation.
        tools: descriptions of the tools that the policy may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    wrapper: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Context:
    """What a model reads in addition to the messages.

    Attributes:
        kind: where the text comes from: 'knowledge', 'raw', 'hindsight' or 'none'.
        text: '' adds nothing, wherever the place is.
        place: 'paper' puts the text where the paper's wrapper has its knowledge, 'system' into a
            system message, 'user' in front of the last user message.
    """

    kind: str
    text: str
    place: str = "paper"

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}; got {self.place!r}")


NOTHING = Context("none", "")


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def place_context(dialogue: Dialogue, context: Context = NOTHING) -> list[dict[str, Any]]:
    """The messages as a chat template takes them: wrapper and context are in their places.

    Raises:
        UserError: the wrapper is unknown; the place is 'paper' and the dialogue has no wrapper; a
            wrapper or the place 'user' needs a user message, and there is none.
    """
    messages = [dict(message) for message in dialogue.messages]
    text = context.text
    asked = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if not asked and (dialogue.wrapper or text and context.place == "user"):
        raise UserError("a context or wrapper needs a user message, and the conversation has none")
    if text and context.place == "paper" and not dialogue.wrapper:
        raise UserError(
            "place 'paper' needs prompts in one of the paper's wrappers "
            f"({', '.join(WRAPPERS)}), and this conversation has none; use 'system' or 'user'"
        )
    if dialogue.wrapper:
        if dialogue.wrapper not in WRAPPERS:
            raise UserError(
                f"wrapper {dialogue.wrapper!r} is unknown; it must be one of {', '.join(WRAPPERS)}"
            )
        told = text if context.place == "paper" else ""
        last = messages[asked[-1]]
        last["content"] = play_prompt(last["content"], told, dialogue.wrapper)
    if text and context.place == "user":
        last = messages[asked[-1]]
        last["content"] = f"{text}\n\n{last['content']}"
    if text and context.place == "system":
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = f"{messages[0]['content']}\n\n{text}"
        else:
            messages.insert(0, {"role": "system", "content": text})
    return messages


def answer_message(response: str) -> dict[str, str]:
    """An answer as the messages after it show it."""
    return {"role": "assistant", "content": response}


def latest(messages: Sequence[Message]) -> str:
    """The text of the messages that came after the last answer."""
    new: list[str] = []
    for message in reversed(messages):
        if message["role"] == "assistant":
            break
        new.append(message["content"])
    return "\n\n".join(reversed(new))
