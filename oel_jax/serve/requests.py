"""The bodies of requests, as OpenAI's API has them. What is not here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_STOPS = 16
MOST_LIKELY = 20  # alternatives of one token

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Label = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """An object whose keys are all known, with values of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(BaseModel):
    """An object that clients send back as they got it, with keys that say nothing here."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class FunctionCall(Lenient):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str


class ToolCall(Lenient):
    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Label | None = None


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TemplateOptions(Body):
    enable_thinking: bool | None = None


class Sampled(Body):
    """What requests for an answer have in common."""

    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31, description="0: off")] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    # Known to the API and accepted where they ask for nothing that is missing here.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampled):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: Annotated[bool, Field(description="false: not recorded")] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    # Accepted where they ask for nothing that is missing here, or say nothing.
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Known to the API and refused.
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @property
    def wants_stored(self) -> bool:
        """False where the client asks that the exchange be forgotten."""
        return self.store is not False


class TextRequest(Sampled):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    # Known to the API and refused.
    echo: Any = None
    suffix: Any = None
    best_of: Any = None


class FeedbackRequest(Body):
    """The body of `POST /v1/feedback`."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    text: Annotated[str, Field(min_length=1, max_length=100_000)]
    user: Label | None = None


class RollbackRequest(Body):
    """The body of `POST /admin/rollback`."""

    reason: Annotated[str, Field(max_length=1000)] | None = None


def refused(request: Sampled) -> tuple[str, str] | None:
    """(field, what it asks for) of the first thing that this server cannot do, or None."""
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(request, name):
            return name, f"A {name} other than 0"
    if request.logit_bias:
        return "logit_bias", "logit_bias"
    if isinstance(request, TextRequest):
        for name, off in (("echo", (None, False)), ("suffix", (None, "")), ("best_of", (None, 1))):
            if getattr(request, name) not in off:
                return name, name
        return None
    if not isinstance(request, ChatRequest):
        return None
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        return "response_format", "A response_format other than text"
    if request.modalities not in (None, ["text"]):
        return "modalities", "A modality other than text"
    for name in ("audio", "prediction", "web_search_options", "functions", "function_call"):
        if getattr(request, name) is not None:
            return name, name
    for name in ("reasoning_effort", "verbosity"):
        if getattr(request, name) is not None:
            return name, name
    if request.tool_choice not in (None, "auto", "none"):
        return "tool_choice", "A tool_choice other than 'auto' and 'none'"
    if request.tools and request.parallel_tool_calls is False:
        return "parallel_tool_calls", "Keeping the model from several tool calls in one answer"
    return None
