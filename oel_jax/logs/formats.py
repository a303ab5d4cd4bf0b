"""One record of a log -> a conversation. The format is found for each record by its keys.

    messages            {"messages": [{"role", "content"}, ...]}: OpenAI's JSONL
    request, response   {"request": {"messages": [...]}, "response": {"choices": [...]}}: gateways
    conversations       {"conversations": [{"from": "human", "value"}, ...]}: ShareGPT
    conversation        {"conversation": [{"role", "content"}, ...]}: rows of WildChat and LMSYS
    schema              oel.trajectory/1 and /2, oel.feedback/1: our own files

`"approved": true` of a record or of an answer's message marks an answer that its user approved of;
evaluation asks how likely such answers are. A number that judges (rating, score, reward, thumbs,
...) is never read, only counted by its name.
"""

import datetime
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oel_jax.data.conversations import Feedback, decode_feedback
from oel_jax.data.line_files import BadLine, NotJSON
from oel_jax.data.messages import Message, answer_message
from oel_jax.data.trajectories import FINISHES, Trajectory, Turn, altered
from oel_jax.data.trajectory_schema import decode_line, encode
from oel_jax.logs.files import Record, Unusable
from oel_jax.logs.messages import joined, message_of, show

POLICY = "unknown"  # of answers whose model no log names
FEEDBACK_FIELDS = ("feedback",)
_USER = ("user", "user_id", "userId", "hashed_ip", "end_user", "customer_id")
_CONVERSATION = (
    "conversation_id", "conversation_hash", "session_id", "thread_id", "chat_id",
    "conversationId", "sessionId", "threadId",
)  # fmt: skip
_TIME = ("time", "timestamp", "created_at", "created", "createTime")
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens",
    "frequency_penalty", "presence_penalty", "stop",
)  # fmt: skip
_FINISH = {"function_call": "tool_calls", "tool_use": "tool_calls", "end_turn": "stop",
           "stop_sequence": "stop", "eos": "stop", "max_tokens": "length"}  # fmt: skip
_SCORE = re.compile(
    r"(?:^|[_.\-])(?:ratings?|scores?|rewards?|thumbs?|thumbs_?up|thumbs_?down|stars?|votes?|upvotes?"
    r"|downvotes?|likes?|liked|dislikes?|disliked|grades?|ranks?|preference)(?:$|[_.\-])"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NUMBER = re.compile(r"\s*[+-]?\d+(?:[.,]\d+)?\s*(?:/\s*\d+|%|stars?|points?)?\s*", re.IGNORECASE)


@dataclass
class Parsed:
    """What a record holds.

    Attributes:
        format: its name, as at the top of this file.
        trajectory: the conversation; None for a line of feedback.
        comment: the line of feedback.
        notes: what was left out or changed -> how often.
        scores: names of numbers that were not read -> how often.
    """

    format: str
    trajectory: Trajectory | None = None
    comment: Feedback | None = None
    notes: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)


def parse(record: Record, feedback_fields: Sequence[str] = FEEDBACK_FIELDS) -> Parsed:
    """The conversation of a record.

    Args:
      record: from `files.records`.
      feedback_fields: names of the fields whose text is feedback; a dot leads into an object.

    Raises:
      Unusable: with the reason.
    """
    value = record.value
    if isinstance(value, Unusable):
        raise value
    if not isinstance(value, dict):
        raise Unusable("no JSON object", show(value))
    if _half_pairs(record, value):
        raise Unusable("half a surrogate pair, which is no text")
    if isinstance(value.get("schema"), str) and value["schema"].startswith("oel."):
        return _own(record, value)
    return _Reader(value, feedback_fields).parsed()


def _half_pairs(record: Record, value: Any) -> bool:
    """Whether a text holds half a character; only an escape can write one."""
    if record.raw and b"\\ud" not in record.raw and b"\\uD" not in record.raw:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    except RecursionError as error:
        raise Unusable("nested too deep") from error
    return False


def _own(record: Record, value: Mapping[str, Any]) -> Parsed:
    line = record.raw or json.dumps(value).encode("utf-8") + b"\n"
    name = value["schema"]
    try:
        if name.startswith("oel.feedback/"):
            return Parsed(name, comment=decode_feedback(line))
        return Parsed(name, trajectory=decode_line(line))
    except (NotJSON, BadLine) as error:
        raise Unusable("a line of ours that breaks its schema", str(error)[:120]) from error


class _Reader:
    """Reads one record that is not ours."""

    def __init__(self, record: Mapping[str, Any], feedback_fields: Sequence[str]) -> None:
        self.record, self.fields = record, feedback_fields
        self.notes: Counter[str] = Counter()
        self.scores: Counter[str] = Counter()
        self.places = [record]  # objects in which facts of the conversation are looked for

    def parsed(self) -> Parsed:
        name, trajectory = self._read()
        if trajectory.tools or any("tool_calls" in t.shown for t in trajectory.turns):
            try:
                encode(altered(trajectory, id="log"))
            except ValueError as error:
                raise Unusable(
                    "a tool or a call that breaks the schema", str(error)[:90]
                ) from error
        return Parsed(name, trajectory, None, self.notes, self.scores)

    def _read(self) -> tuple[str, Trajectory]:
        record = self.record
        self._look_into("metadata")
        request, response = _object(record.get("request")), _object(record.get("response"))
        if request is not None and response is not None:
            return "request, response", self._pair(request, response)
        for name in ("messages", "conversations", "conversation"):
            if isinstance(record.get(name), list):
                break
        else:
            keys = ", ".join(sorted(map(str, record))[:6])
            raise Unusable("no known format", f"keys {keys[:80]}")
        turns = self._turns(record[name])
        exchange = _identity(record, ("id", "request_id", "completion_id"))
        conversation = self._name(_CONVERSATION)
        if name == "messages":
            turns = self._name_last(turns, exchange)
        elif conversation is None:
            conversation = exchange
        return name, self._finished(turns, conversation)

    def _pair(self, request: Mapping[str, Any], response: Mapping[str, Any]) -> Trajectory:
        if "messages" not in request:
            request = _object(request.get("body")) or request
        if "choices" not in response:
            response = _object(response.get("body")) or response
        if response.get("error"):
            raise Unusable("a request that was answered with an error", show(response["error"]))
        messages, choices = request.get("messages"), response.get("choices")
        if not isinstance(messages, list):
            raise Unusable("a request without messages", show(messages))
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unusable("a response without choices", show(choices))
        if len(choices) > 1:
            self.notes["further choices of a response, left out"] += len(choices) - 1
        answer = choices[0].get("message")
        if not isinstance(answer, dict):
            raise Unusable("a choice without a message", show(choices[0]))
        self.places += [request, response]
        for place in (request, response):
            self._look_into("metadata", place)
        turns = self._turns([*messages, {"role": "assistant", **answer}])
        facts: dict[str, Any] = {}
        finish = choices[0].get("finish_reason")
        finish = _FINISH.get(finish, finish) if isinstance(finish, str) else None
        if finish in FINISHES:
            facts["finish"] = finish
        sampling = {k: request[k] for k in _SAMPLING if _plain(request.get(k))}
        if sampling:
            facts["sampling"] = sampling
        turns[-1] = altered(turns[-1], **facts)
        turns = self._name_last(turns, _identity(response, ("id",)))
        return self._finished(turns, self._name(_CONVERSATION))

    # --- messages ---------------------------------------------------------------------------------

    def _turns(self, given: list[Any]) -> list[Turn]:
        """The answered turns, each with what is new before its answer."""
        turns: list[Turn] = []
        new: list[Message] = []
        asked = False
        for item in given:
            message, thought = message_of(item)
            if len(item) > 2:
                self._count_scores(item)
            if message["role"] == "system" and not message["content"].strip():
                continue
            if message["role"] != "assistant" or not asked:
                asked = asked or message["role"] in ("user", "tool")
                self._answer_comment(turns, item)
                new.append(message)
                continue
            if not new:
                self.notes["answers in a row, joined to one"] += 1
                turns[-1] = _lengthened(turns[-1], message)
                continue
            turns.append(self._turn(new, message, thought, item, bool(turns)))
            new = []
        if not asked:
            raise Unusable("no message of a user")
        if not turns:
            raise Unusable("no answer")
        if any(message["role"] == "user" for message in new):
            self.notes["last messages without an answer, left out"] += 1
        return turns

    def _turn(
        self, new: list[Message], message: Message, thought: str, item: Any, continues: bool
    ) -> Turn:
        response = f"<think>\n{thought}\n</think>\n\n" if thought else ""
        response += message["content"]
        plain = message == answer_message(response)
        return Turn(
            messages=tuple(new),
            response=response,
            continues=continues,
            answer=None if plain else message,
            feedback=self._comment_in(item),
            time=_time(item, _TIME),
            approved=item.get("approved") is True,
        )

    def _answer_comment(self, turns: list[Turn], item: Any) -> None:
        """Feedback that is stored with the message after an answer."""
        comment = self._comment_in(item)
        if comment is not None and turns:
            old = turns[-1].feedback
            turns[-1] = altered(turns[-1], feedback="\n".join(filter(None, (old, comment))))

    def _name_last(self, turns: list[Turn], name: str | None) -> list[Turn]:
        return turns if name is None else [*turns[:-1], altered(turns[-1], id=name)]

    def _finished(self, turns: list[Turn], conversation: str | None) -> Trajectory:
        for place in self.places:
            self._count_scores(place)
        turns = self._with_comments(turns)
        if any(place.get("approved") is True for place in self.places):
            turns[-1] = altered(turns[-1], approved=True)
        if turns[-1].time is None:
            time = next(filter(None, (_time(place, _TIME) for place in self.places)), None)
            turns[-1] = altered(turns[-1], time=time)
        return Trajectory(
            policy=self._name(("model", "model_name"), last=True) or POLICY,
            purpose="deploy",
            turns=tuple(turns),
            conversation=conversation,
            user=self._name(_USER),
            tools=self._tools(),
        )

    # --- facts ------------------------------------------------------------------------------------

    def _look_into(self, name: str, place: Mapping[str, Any] | None = None) -> None:
        inner = _object((self.record if place is None else place).get(name))
        if inner is not None:
            self.places.append(inner)

    def _name(self, names: Sequence[str], *, last: bool = False) -> str | None:
        places = reversed(self.places) if last else self.places
        return next(filter(None, (_identity(place, names) for place in places)), None)

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        for place in self.places:
            tools = place.get("tools")
            if isinstance(tools, str):
                try:
                    tools = json.loads(tools)
                except (ValueError, RecursionError):
                    continue
            if isinstance(tools, list) and tools:
                return tuple(tools)
            functions = place.get("functions")
            if isinstance(functions, list) and functions:
                return tuple({"type": "function", "function": one} for one in functions)
        return ()

    def _count_scores(self, place: Any) -> None:
        for name, value in place.items():
            if name in ("role", "content", "from", "value"):  # of most messages; no judgement
                continue
            if value is not None and _judges(str(name)):
                text = isinstance(value, str) and not _NUMBER.fullmatch(value)
                if not (text and name in self.fields):
                    self.scores[str(name)[:60]] += 1

    def _with_comments(self, turns: list[Turn]) -> list[Turn]:
        """With feedback on the whole record: to its last answer, or, of a list, each to its own."""
        turns = list(turns)
        for place in self.places:
            for name in self.fields:
                value = _at(place, name)
                if isinstance(value, list) and len(value) == len(turns):
                    found = [(at, self._text_of(name, one)) for at, one in enumerate(value)]
                else:
                    found = [(len(turns) - 1, self._text_of(name, value))]
                for at, text in found:
                    if text:
                        both = filter(None, (turns[at].feedback, text))
                        turns[at] = altered(turns[at], feedback="\n".join(both))
        return turns

    def _comment_in(self, item: Mapping[str, Any]) -> str | None:
        if len(item) == 2:  # a role and a text
            return None
        texts = [self._text_of(name, _at(item, name)) for name in self.fields]
        return "\n".join(filter(None, texts)) or None

    def _text_of(self, name: str, value: Any) -> str | None:
        """The text of a field of feedback; a number is counted and not read."""
        if isinstance(value, dict):
            inner = (value.get(key) for key in ("text", "comment", "content", "message"))
            texts = [one for one in inner if isinstance(one, str)]
            self._count_scores(value)
            return self._text_of(name, texts[0]) if texts else None
        if isinstance(value, list):
            texts = [self._text_of(name, one) for one in value]
            return "\n".join(filter(None, texts)) or None
        if isinstance(value, str) and value.strip() and not _NUMBER.fullmatch(value):
            return value
        if value is not None and value != "":
            self.scores[name[:60]] += 1
        return None


@functools.lru_cache(maxsize=4096)
def _judges(name: str) -> bool:
    """Whether a field's name is that of a judgement in numbers."""
    return _SCORE.search(_CAMEL.sub("_", name).lower()) is not None


def _lengthened(turn: Turn, message: Message) -> Turn:
    shown = joined(turn.shown, message)
    response = "\n\n".join(filter(None, (turn.response, message["content"])))
    plain = shown == answer_message(response)
    return altered(turn, response=response, answer=None if plain else shown)


def _object(value: Any) -> Mapping[str, Any] | None:
    """An object, also one that is stored as a text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _identity(place: Mapping[str, Any], names: Sequence[str]) -> str | None:
    if place.keys().isdisjoint(names):
        return None
    for name in names:
        value = place.get(name)
        if isinstance(value, dict):
            value = value.get("id")
        if type(value) is int:
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value[:200]
    return None


def _at(place: Any, name: str) -> Any:
    for part in name.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    return place


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return value is not None and isinstance(value, str | int | float)


def _time(place: Any, names: Sequence[str]) -> str | None:
    """A time in UTC as the schema writes it; None if there is none that can be read."""
    if not isinstance(place, dict) or place.keys().isdisjoint(names):
        return None
    for name in names:
        value = place.get(name)
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                seconds = value / 1000 if value > 1e11 else value
                when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
            elif isinstance(value, str):
                when = datetime.datetime.fromisoformat(value.strip())
                when = when.replace(tzinfo=when.tzinfo or datetime.UTC)
            else:
                continue
            return when.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
        except (ValueError, OverflowError, OSError):
            continue
    return None


def examples() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of a format, a small record of it), for the documentation and the tests."""
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    yield "messages", {"messages": said}
    response = {"choices": [{"message": said[1], "finish_reason": "stop"}]}
    yield "request, response", {"request": {"messages": said[:1]}, "response": response}
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    yield "conversations", {"conversations": turns}
    yield "conversation", {"conversation": said, "conversation_id": "c1", "language": "English"}
