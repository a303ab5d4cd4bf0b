"""All texts of a trajectory that a person or a model wrote, changed by one function.

What names a thing stays: roles, names of tools, ids of calls and of exchanges. Ids of users and
conversations that the function would change become opaque ones, so that a person is still one
person and can be forgotten. Imports no JAX.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from oel_jax.data.messages import Message
from oel_jax.data.trajectories import Trajectory, Turn, altered

Change = Callable[[str], str]

_SHORTEST_NUMBER = 10**6  # smaller numbers of arguments identify nobody
_HASH = re.compile(r"[0-9a-fA-F-]{24,}")
_KEPT = ("name", "type", "role", "id")  # keys of a tool's description that are no prose


def change_message(message: Message, change: Change) -> dict[str, Any]:
    """A message with its content, its name and the arguments of its calls changed."""
    if len(message) == 2:  # most are
        return {"role": message["role"], "content": change(message["content"])}
    new = dict(message) | {"content": change(message["content"])}
    if "name" in new and message["role"] != "tool":
        new["name"] = change(new["name"])
    if "tool_calls" in new:
        new["tool_calls"] = [_change_call(call, change) for call in new["tool_calls"]]
    return new


def _change_call(call: Mapping[str, Any], change: Change) -> dict[str, Any]:
    function = dict(call["function"])
    if "arguments" in function:
        function["arguments"] = change_arguments(function["arguments"], change)
    return dict(call) | {"function": function}


def change_arguments(arguments: Any, change: Change) -> Any:
    """Arguments of a call; a string of JSON stays one."""
    if not isinstance(arguments, str):
        return change_values(arguments, change)
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return change(arguments)
    new = change_values(value, change)
    return arguments if new == value else json.dumps(new, ensure_ascii=False)


def change_values(value: Any, change: Change) -> Any:
    """JSON with all its texts and keys changed; a number that is changed becomes a text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): change_values(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [change_values(item, change) for item in value]
    if type(value) is int and abs(value) >= _SHORTEST_NUMBER:
        text = str(value)
        new = change(text)
        return value if new == text else new
    return value


def _change_tool(value: Any, change: Change) -> Any:
    """A tool's description: its prose only."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key: item if key in _KEPT and isinstance(item, str) else _change_tool(item, change)
            for key, item in value.items()
        }
    return [_change_tool(item, change) for item in value] if isinstance(value, list) else value


def change_turn(turn: Turn, change: Change) -> Turn:
    """A turn with all texts changed. Ids are left out, since they spell the text as it was."""
    new: dict[str, Any] = {"kept_ids": 0, "prompt_ids": None, "response_ids": None}
    for name in ("response", "feedback", "action", "observation"):
        text = getattr(turn, name)
        if text is not None:
            new[name] = change(text)
    if turn.answer is not None:
        new["answer"] = change_message(turn.answer, change)
    new["messages"] = tuple(change_message(message, change) for message in turn.messages)
    return altered(turn, **new)


def opaque(name: str, change: Change) -> str:
    """An id as it is, or a hash of it where the function would change it.

    A hash as sources themselves make them is no key that opens a door, and stays.
    """
    return name if _HASH.fullmatch(name) or change(name) == name else hidden(name)


def hidden(name: str) -> str:
    """What an id becomes that says who somebody is."""
    return "h-" + hashlib.sha256(name.encode("utf-8")).hexdigest()[:24]


def change_head(trajectory: Trajectory, change: Change) -> Trajectory:
    """A trajectory with all texts changed but those of its turns."""
    new: dict[str, Any] = {
        name: opaque(getattr(trajectory, name), change)
        for name in ("user", "conversation")
        if getattr(trajectory, name) is not None
    }
    if trajectory.outcome is not None:
        new["outcome"] = change(trajectory.outcome)
    if trajectory.context is not None:
        new["context"] = replace(trajectory.context, text=change(trajectory.context.text))
    tools = tuple(_change_tool(tool, change) for tool in trajectory.tools)
    return altered(trajectory, tools=tools, **new)


def change_trajectory(trajectory: Trajectory, change: Change) -> Trajectory:
    """A trajectory with all texts changed."""
    turns = tuple(change_turn(turn, change) for turn in trajectory.turns)
    return altered(change_head(trajectory, change), turns=turns)
