"""One line of a trajectory file: checked to the letter, from bytes and to bytes."""

import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from oel_jax.data import schema_1
from oel_jax.data.line_files import BadLine, NotJSON
from oel_jax.data.messages import PLACES, ROLES, Context
from oel_jax.data.trajectories import FINISHES, PURPOSES, SCHEMA, Trajectory, Turn

_MAX_ID = 2**31
_MAX_SEED = 2**63
_DEEPEST = 32  # levels of objects and lists within a tool's description or call


class NotATrajectory(BadLine):
    """A JSON text that does not follow the schema."""


# --- checks ---------------------------------------------------------------------------------------


def _check_text(value: Any, where: str, *, empty: bool = True) -> None:
    if not isinstance(value, str):
        raise NotATrajectory(f"{where} must be a string, got {_show(value)}")
    if not value and not empty:
        raise NotATrajectory(f"{where} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotATrajectory(
            f"{where} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error


def _check_int(value: Any, where: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value < high:
        raise NotATrajectory(
            f"{where} must be an integer from {low} to {high - 1}, got {_show(value)}"
        )


def _check_ids(value: Any, where: str) -> None:
    if not isinstance(value, list | tuple):
        raise NotATrajectory(f"{where} must be a list of token ids, got {_show(value)}")
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < _MAX_ID:
            _check_int(token, f"{where}[{i}]", 0, _MAX_ID)


def _check_keys(
    record: Any, required: Sequence[str], optional: Collection[str], where: str
) -> None:
    if not isinstance(record, dict | Mapping):
        raise NotATrajectory(f"{where} must be a JSON object, got {_show(record)}")
    unknown = [key for key in record if key not in required and key not in optional]
    if unknown:
        name = str(unknown[0]).lower()
        score = any(word in name for word in ("reward", "score"))
        hint = "; trajectories carry no rewards and no scores" if score else ""
        raise NotATrajectory(f"{where} has the unknown key {_show(unknown[0])}{hint}")
    missing = [key for key in required if key not in record]
    if missing:
        raise NotATrajectory(f"{where} lacks the key {missing[0]!r}")


def _check_list(value: Any, where: str, what: str) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise NotATrajectory(f"{where} must be a list of at least one {what}, got {_show(value)}")


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """JSON of any shape: texts that can be encoded, finite numbers, no deeper than need be."""
    if depth > _DEEPEST:
        raise NotATrajectory(f"{where} is nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict | Mapping):
        for key, item in value.items():
            _check_text(key, f"a key of {where}")
            _check_plain(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise NotATrajectory(f"{where} must be a finite number, got {_show(value)}")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise NotATrajectory(f"{where} must be a JSON value, got {_show(value)}")


def _check_message(message: Any, where: str) -> None:
    _check_keys(message, ("role", "content"), ("tool_calls", "tool_call_id", "name"), where)
    role = message["role"]
    if role not in ROLES:
        raise NotATrajectory(f"{where}.role must be one of {', '.join(ROLES)}, got {_show(role)}")
    _check_text(message["content"], f"{where}.content")
    for key in ("tool_call_id", "name"):
        if key in message:
            _check_text(message[key], f"{where}.{key}", empty=False)
    if "tool_call_id" in message and role != "tool":
        raise NotATrajectory(f"{where} has a tool_call_id, but its role is {role!r}, not 'tool'")
    if "tool_calls" not in message:
        return
    if role != "assistant":
        raise NotATrajectory(f"{where} has tool_calls, but its role is {role!r}, not 'assistant'")
    _check_list(message["tool_calls"], f"{where}.tool_calls", "call")
    for i, call in enumerate(message["tool_calls"]):
        place = f"{where}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise NotATrajectory(f"{place} must be an object with function.name, got {_show(call)}")
        _check_plain(call, place)


def _check_time(value: Any, where: str) -> None:
    _check_text(value, where)
    try:
        offset = datetime.datetime.fromisoformat(value).utcoffset()
    except ValueError:
        offset = None
    if offset != datetime.timedelta(0):
        raise NotATrajectory(
            f"{where} must be a time in UTC such as '2026-01-31T12:00:00Z', got {_show(value)}"
        )


def _check_exchange(turn: Mapping[str, Any], where: str) -> None:
    """The facts of a turn that a server records."""
    for key in ("id", "policy"):
        if key in turn:
            _check_text(turn[key], f"{where}.{key}", empty=False)
    if "time" in turn:
        _check_time(turn["time"], f"{where}.time")
    if "sampling" in turn:
        if not isinstance(turn["sampling"], Mapping):
            raise NotATrajectory(
                f"{where}.sampling must be a JSON object, got {_show(turn['sampling'])}"
            )
        _check_plain(turn["sampling"], f"{where}.sampling")
    if turn.get("approved", True) is not True:
        raise NotATrajectory(f"{where}.approved must be true, or left out")
    if "finish" in turn and turn["finish"] not in FINISHES:
        raise NotATrajectory(
            f"{where}.finish must be one of {', '.join(FINISHES)}, got {_show(turn['finish'])}"
        )


def _check_turn(turn: Any, where: str, t: int, before: int | None, is_game: bool) -> int:
    """Checks turn number `t`; returns how many ids it holds, prompt and response.

    `before`: how many ids the turn before holds; None: it is in another line.
    """
    _check_keys(turn, ("messages", "response"), _TURN_OPTIONAL, where)
    _check_list(turn["messages"], f"{where}.messages", "message")
    for m, message in enumerate(turn["messages"]):
        _check_message(message, f"{where}.messages[{m}]")
    for key in ("response", "feedback", "action", "observation"):
        if key in turn:
            _check_text(turn[key], f"{where}.{key}")
    for key in ("action", "observation"):
        if is_game and key not in turn:
            raise NotATrajectory(f"{where} lacks the key {key!r}, which a game has")
    continues = turn.get("continues", False)
    if type(continues) is not bool:
        raise NotATrajectory(f"{where}.continues must be true or false, got {_show(continues)}")
    if continues and not t and before is not None:
        raise NotATrajectory(f"{where} continues a turn, but it is the first")
    _check_exchange(turn, where)
    if "answer" in turn:
        _check_message(turn["answer"], f"{where}.answer")
        if turn["answer"]["role"] != "assistant":
            raise NotATrajectory(f"{where}.answer must have the role 'assistant'")
    if ("prompt_ids" in turn) != ("response_ids" in turn):
        raise NotATrajectory(f"{where} must have both prompt_ids and response_ids, or neither")
    kept = turn.get("kept_ids", 0)
    most = (_MAX_ID if before is None else before + 1) if continues else 1
    most = most if "prompt_ids" in turn else 1
    _check_int(kept, f"{where}.kept_ids", 0, most)
    if "prompt_ids" not in turn:
        return 0
    _check_ids(turn["prompt_ids"], f"{where}.prompt_ids")
    _check_ids(turn["response_ids"], f"{where}.response_ids")
    if not kept + len(turn["prompt_ids"]):
        raise NotATrajectory(f"{where}.prompt_ids must not be empty")
    return kept + len(turn["prompt_ids"]) + len(turn["response_ids"])


_REQUIRED = ("schema", "policy", "purpose", "turns")
_OPTIONAL = [f.name for f in fields(Trajectory) if f.name not in _REQUIRED]
_TURN_OPTIONAL = [f.name for f in fields(Turn) if f.name not in ("messages", "response")]


def check_record(record: Any) -> None:
    """Raises `NotATrajectory` unless `record` follows the schema to the letter."""
    if isinstance(record, dict | Mapping) and record.get("schema") != SCHEMA:
        raise NotATrajectory(
            f"schema is {_show(record.get('schema'))}, this version reads {SCHEMA!r} and "
            f"{schema_1.SCHEMA!r}; convert the file or collect it again"
        )
    _check_keys(record, _REQUIRED, _OPTIONAL, "the line")
    _check_text(record["policy"], "policy", empty=False)
    if record["purpose"] not in PURPOSES:
        raise NotATrajectory(
            f"purpose must be one of {', '.join(PURPOSES)}, got {_show(record['purpose'])}"
        )
    for key in ("game", "id", "wrapper", "parent", "conversation", "user"):
        if key in record:
            _check_text(record[key], key, empty=False)
    for key, low, high in (("seed", 0, _MAX_SEED), ("round", 1, _MAX_ID), ("chain", 0, _MAX_ID)):
        if key in record:
            _check_int(record[key], key, low, high)
    if "outcome" in record:
        _check_text(record["outcome"], "outcome")
    is_game = "id" not in record
    for key in ("game", "seed", "round", "outcome") if is_game else ():
        if key not in record:
            raise NotATrajectory(
                f"the line lacks the key {key!r}, which a game has; a conversation has an 'id'"
            )
    for key in () if is_game else ("game", "seed"):
        if key in record:
            raise NotATrajectory(f"the line has both 'id' and {key!r}: a conversation or a game")
    if "context" in record:
        context = record["context"]
        _check_keys(context, ("kind", "text", "place"), (), "context")
        _check_text(context["kind"], "context.kind", empty=False)
        _check_text(context["text"], "context.text")
        if context["place"] not in PLACES:
            raise NotATrajectory(
                f"context.place must be one of {', '.join(PLACES)}, got {_show(context['place'])}"
            )
    if "tools" in record:
        _check_list(record["tools"], "tools", "tool")
        for i, tool in enumerate(record["tools"]):
            if not isinstance(tool, Mapping):
                raise NotATrajectory(f"tools[{i}] must be a JSON object, got {_show(tool)}")
            _check_plain(tool, f"tools[{i}]")
    _check_list(record["turns"], "turns", "turn")
    held = None if _check_parent(record) else 0
    for t, turn in enumerate(record["turns"]):
        held = _check_turn(turn, f"turns[{t}]", t, held, is_game)


def _check_parent(record: Mapping[str, Any]) -> bool:
    """Whether the line continues another."""
    if "parent" not in record:
        return False
    first = record["turns"][0]
    if "id" not in record or not isinstance(first, Mapping) or first.get("continues") is not True:
        raise NotATrajectory("a line with a parent must have an id, and its first turn continues")
    if record["parent"] == record["id"]:
        raise NotATrajectory("the line is its own parent")
    return True


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- bytes ----------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    raise NotATrajectory(f"{name} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise NotATrajectory(f"the key {_show(twice)} occurs twice")
    return record


def decode_line(line: bytes) -> Trajectory:
    """One line, of this schema or of schema 1. Raises `NotJSON` or `NotATrajectory`."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise NotJSON(f"not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise NotJSON(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise NotATrajectory("nested far deeper than a trajectory") from error
    except (NotJSON, NotATrajectory):
        raise
    except ValueError as error:  # Python's limit on the digits of one integer
        raise NotATrajectory(f"a number is too large ({error})") from error
    if isinstance(record, dict) and record.get("schema") == schema_1.SCHEMA:
        try:
            record = schema_1.upgrade(record)
        except schema_1.NotSchema1 as error:
            raise NotATrajectory(str(error)) from error
    check_record(record)
    del record["schema"]
    if "context" in record:
        record["context"] = Context(**record["context"])
    record["turns"] = tuple(Turn(**turn) for turn in record["turns"])
    return Trajectory(**record)


def encode(trajectory: Trajectory) -> bytes:
    """The line of a trajectory, with its newline. Raises ValueError if it breaks the schema."""
    record: dict[str, Any] = {"schema": SCHEMA, **present(trajectory)}
    if trajectory.context is not None:
        record["context"] = vars(trajectory.context)
    record["turns"] = [present(turn) for turn in trajectory.turns]
    try:
        check_record(record)
    except NotATrajectory as error:
        raise ValueError(f"cannot write this trajectory: {error}") from error
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8") + b"\n"


def present(value: Trajectory | Turn) -> dict[str, Any]:
    """The fields that are not left out."""
    defaults = _DEFAULTS[type(value)]
    return {name: item for name, item in vars(value).items() if item != defaults[name]}


_DEFAULTS = {kind: {f.name: f.default for f in fields(kind)} for kind in (Trajectory, Turn)}
