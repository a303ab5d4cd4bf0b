"""A chat request as a dialogue of the project, and what it becomes when it comes back."""

import json
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.chat.render import render
from oel_jax.data.messages import Dialogue, Message
from oel_jax.models.language_model import LanguageModel
from oel_jax.serve.api_errors import bad_request, of_template
from oel_jax.serve.requests import ChatMessage, ChatRequest


def dialogue_of(request: ChatRequest) -> Dialogue:
    """The messages and tools of a request.

    Raises:
      ApiError: a message lacks its content, or has what its role does not have.
    """
    messages = tuple(
        message_of(message, f"messages[{index}]") for index, message in enumerate(request.messages)
    )
    tools: tuple[dict[str, Any], ...] = ()
    if request.tools and request.tool_choice != "none":
        tools = tuple(tool.model_dump(exclude_unset=True) for tool in request.tools)
    return Dialogue(messages, tools=tools)


def message_of(message: ChatMessage, where: str) -> Message:
    """One message as chat templates take it; the parts of a text are put together.

    Raises:
      ApiError: see `dialogue_of`.
    """
    role = message.role
    made: dict[str, Any] = {"role": role, "content": _text(message)}
    if message.content is None and not (role == "assistant" and message.tool_calls):
        raise bad_request(f"{where}.content must be a text", f"{where}.content")
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        if role != "tool":
            raise bad_request(
                f"{where}.tool_call_id belongs to the role 'tool'", f"{where}.tool_call_id"
            )
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if role != "assistant":
            raise bad_request(
                f"{where}.tool_calls belong to the role 'assistant'", f"{where}.tool_calls"
            )
        made["tool_calls"] = [
            _call(call.model_dump(exclude_none=True), f"{where}.tool_calls[{number}]")
            for number, call in enumerate(message.tool_calls)
        ]
    return made


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as JSON themselves."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        place = f"{where}.function.arguments"
        raise bad_request(f"{place} must be a JSON object, written as a string", place)
    return call | {"function": function | {"arguments": arguments}}


def answer_of_calls(content: str, calls: list[dict[str, Any]]) -> Message:
    """An answer as later requests show it."""
    made: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        made["tool_calls"] = [
            call | {"function": call["function"] | _arguments(call)} for call in calls
        ]
    return made


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    return {"arguments": json.loads(call["function"]["arguments"])}


def prompt_of(model: LanguageModel, dialogue: Dialogue, *, thinking: bool) -> list[int]:
    """Ids of a dialogue in the model's chat template; text never becomes a control token.

    Raises:
      ApiError: the template refuses the conversation, or shows nothing of the tools or a message.
    """
    try:
        return render(model.tokenizer, dialogue, thinking=thinking)
    except UserError as error:
        raise of_template(error, model.directory) from error
