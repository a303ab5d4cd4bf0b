"""The objects that clients get, in the shapes of OpenAI's API."""

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from oel_jax.serve.completions import Answering, Delta
from oel_jax.serve.token_scores import TokenScore

# --- shapes, for the description of the API -------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class Scored(Likely):
    top_logprobs: list[Likely]


class Scores(BaseModel):
    content: list[Scored]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: Scores | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None = None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class FeedbackReceipt(BaseModel):
    object: Literal["feedback"]
    id: str


class Health(BaseModel):
    status: Literal["ok", "failing", "stopping"]
    policy: str
    recording: Literal["on", "off", "failing"]


class RollbackResult(BaseModel):
    object: Literal["rollback"]
    refused: str
    policy: str


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ApiErrorBody(BaseModel):
    error: ErrorObject


# --- what is made of answers ----------------------------------------------------------------------


def usage_of(answers: Sequence[Answering], prompts: int) -> dict[str, int]:
    """Counts of tokens: of the prompts, which choices share, and of all answers."""
    written = sum(len(one.ids) for one in answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
    }


def frame(kind: str, completion: str, policy: str, created: int) -> dict[str, Any]:
    """What all objects of one answer begin with."""
    return {"id": completion, "object": kind, "created": created, "model": policy}


def chat_choice(index: int, one: Answering) -> dict[str, Any]:
    """A finished answer."""
    message: dict[str, Any] = {"role": "assistant", "content": one.said, "refusal": None}
    if one.thought:
        message["reasoning_content"] = one.thought
    if one.calls:
        message |= {"content": one.said or None, "tool_calls": one.calls}
    return {
        "index": index,
        "message": message,
        "finish_reason": one.finish,
        "logprobs": _chat_scores(one, one.scores, 0),
    }


def chat_delta(index: int, one: Answering, delta: Delta) -> dict[str, Any]:
    """What is new of an answer."""
    new: dict[str, Any] = {}
    if delta.said:
        new["content"] = delta.said
    if delta.thought:
        new["reasoning_content"] = delta.thought
    if delta.calls:
        first = len(one.calls) - len(delta.calls)
        new["tool_calls"] = [{"index": first + i} | call for i, call in enumerate(delta.calls)]
    before = len(one.scores) - len(delta.scores)
    scores = _chat_scores(one, delta.scores, before)
    return {"index": index, "delta": new, "finish_reason": None, "logprobs": scores}


def chat_beginning(index: int) -> dict[str, Any]:
    """The first event of a streamed answer."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def chat_end(index: int, one: Answering) -> dict[str, Any]:
    """The last event of a streamed answer."""
    return {"index": index, "delta": {}, "finish_reason": one.finish, "logprobs": None}


def text_choice(index: int, one: Answering) -> dict[str, Any]:
    """A finished answer to a plain text."""
    return {
        "index": index,
        "text": one.said,
        "finish_reason": one.finish,
        "logprobs": _text_scores(one, one.scores, 0, one.said),
    }


def text_delta(index: int, one: Answering, delta: Delta) -> dict[str, Any]:
    """What is new of an answer to a plain text."""
    scores = _text_scores(one, delta.scores, len(one.scores) - len(delta.scores), "")
    return {"index": index, "text": delta.said, "finish_reason": None, "logprobs": scores}


def text_end(index: int, one: Answering) -> dict[str, Any]:
    """The last event of a streamed answer to a plain text."""
    return {"index": index, "text": "", "finish_reason": one.finish, "logprobs": None}


def event(value: Any) -> bytes:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


END = b"data: [DONE]\n\n"


def created_now() -> int:
    """Seconds, as the API gives times."""
    return int(time.time())


# --- scores ---------------------------------------------------------------------------------------


def _chat_scores(
    one: Answering, scores: Sequence[TokenScore], before: int
) -> dict[str, Any] | None:
    if one.wanted.top is None:
        return None
    content = []
    for at, score in _spoken(one, scores, before):
        top = [_likely(one, at, token, value) for token, value in score.top]
        content.append(_likely(one, at, score.id, score.log_prob) | {"top_logprobs": top})
    return {"content": content}


def _text_scores(
    one: Answering, scores: Sequence[TokenScore], before: int, _: str
) -> dict[str, Any] | None:
    if one.wanted.top is None:
        return None
    spoken = list(_spoken(one, scores, before))
    tokens = [_token_text(one, at, score.id) for at, score in spoken]
    offset = sum(len(_token_text(one, at, one.ids[at])) for at in range(before))
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [score.log_prob for _, score in spoken],
        "top_logprobs": [
            {_token_text(one, at, token): value for token, value in reversed(score.top)}
            for at, score in spoken
        ],
        "text_offset": offsets,
    }


def _spoken(one: Answering, scores: Sequence[TokenScore], before: int):
    """(place, score) of the tokens, without the one that ends an answer."""
    stop_ids = one.wanted.model.tokenizer.stop_ids
    for at, score in enumerate(scores, before):
        if score.id not in stop_ids:
            yield at, score


def _likely(one: Answering, at: int, token: int, log_prob: float) -> dict[str, Any]:
    text = _token_text(one, at, token)
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def _token_text(one: Answering, at: int, token: int) -> str:
    """What a token adds to the text in place `at`; bytes of a character count to its last token."""
    decode = one.wanted.model.tokenizer.decode
    context = one.ids[max(0, at - 8) : at]
    before, after = decode(context).rstrip("\ufffd"), decode([*context, token])
    return after[len(before) :] if after.startswith(before) else after
