"""Messages of logs in the many ways they are written -> the messages of `oel_jax.data.messages`."""

import json
from collections.abc import Mapping
from typing import Any

from oel_jax.data.messages import Message
from oel_jax.logs.files import Unusable

_ROLES = {
    "user": "user human prompter customer client",
    "assistant": "assistant gpt chatgpt model bot chatbot ai bing bard claude llm function_call",
    "system": "system",
    "developer": "developer",
    "tool": "tool function observation function_response tool_response ipython",
}
ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_MEDIA = {
    "an image": ("image", "image_url", "input_image", "image_file"),
    "audio": ("audio", "input_audio", "output_audio", "audio_url"),
    "video": ("video", "video_url", "input_video"),
    "a file": ("file", "input_file", "document", "file_url"),
}
MEDIA_OF = {kind: name for name, kinds in _MEDIA.items() for kind in kinds}


def role_of(value: Any) -> str:
    """The role that a name stands for. Raises `Unusable`."""
    role = ROLE_OF.get(value.lower().strip()) if isinstance(value, str) else None
    if role is None:
        raise Unusable("an unknown role", show(value))
    return role


def show(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def message_of(record: Any) -> tuple[dict[str, Any], str]:
    """(a message, what the model thought before it) of an object with role and content.

    Content may be a text, null, or parts of text. Raises `Unusable`.
    """
    if not isinstance(record, dict):
        raise Unusable("a message that is no object", show(record))
    if len(record) == 2:  # most messages are a role and a text
        role, content = ROLE_OF.get(str(record.get("role"))), record.get("content")
        if role is not None and isinstance(content, str) and content and not content.isspace():
            return {"role": role, "content": content}, ""
    name = record.get("role", record.get("from"))
    role = role_of(name)
    content = record.get("content", record.get("value", record.get("text")))
    message: dict[str, Any] = {"role": role, "content": _text(content)}
    if record.get("audio") or record.get("images") or record.get("image"):
        raise Unusable("audio" if record.get("audio") else "an image", "in a message")
    if role == "assistant":
        if calls := _calls(record, name):
            message["tool_calls"] = calls
            if name == "function_call":
                message["content"] = ""
        elif not message["content"] and isinstance(record.get("refusal"), str):
            message["content"] = record["refusal"]
    if role == "tool" and isinstance(record.get("tool_call_id"), str) and record["tool_call_id"]:
        message["tool_call_id"] = record["tool_call_id"]
    if isinstance(record.get("name"), str) and record["name"]:
        message["name"] = record["name"]
    if not message["content"].strip() and role != "system" and "tool_calls" not in message:
        if role != "tool":  # a tool may well return nothing
            raise Unusable("an empty message", f"of the {role}")
    thought = record.get("reasoning_content") or record.get("reasoning")
    return message, thought if isinstance(thought, str) and role == "assistant" else ""


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("content that is neither text nor parts", show(content))
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in MEDIA_OF:
            raise Unusable(MEDIA_OF[kind], f"a part of type {kind}")
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Unusable("a part of content that is no text", show(part))
        texts.append(text)
    return "\n".join(texts)


def _calls(record: Mapping[str, Any], name: Any) -> list[dict[str, Any]]:
    """Tool calls in the form of today, from that and two older ones."""
    given = record.get("tool_calls")
    if not given and isinstance(record.get("function_call"), dict):
        given = [{"function": record["function_call"]}]
    if not given and name == "function_call":
        try:
            given = [{"function": json.loads(_text(record.get("value", record.get("content"))))}]
        except (ValueError, RecursionError) as error:
            raise Unusable("a function call that is no JSON") from error
    if not given:
        return []
    if not isinstance(given, list):
        raise Unusable("tool calls that are no list", show(given))
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("a tool call without the name of a function", show(call))
        kept = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
        kept["function"] = {key: function[key] for key in ("name", "arguments") if key in function}
        calls.append(kept)
    return calls


def joined(one: Message, other: Message) -> dict[str, Any]:
    """Two answers in a row as one."""
    texts = [m["content"] for m in (one, other) if m["content"]]
    new = dict(one) | {"content": "\n\n".join(texts)}
    if calls := [*one.get("tool_calls", ()), *other.get("tool_calls", ())]:
        new["tool_calls"] = calls
    return new
