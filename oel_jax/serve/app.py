"""The routes, as a FastAPI application."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import oel_jax
from oel_jax.base.errors import UserError
from oel_jax.serve import responses
from oel_jax.serve.api_errors import ApiError, bad_request, of_validation
from oel_jax.serve.gate import Gate, log_mistake, mistake
from oel_jax.serve.keys import Keys
from oel_jax.serve.measures import CONTENT_TYPE
from oel_jax.serve.requests import ChatRequest, FeedbackRequest, RollbackRequest, TextRequest
from oel_jax.serve.service import CURRENT, Job, Service

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=BaseModel)
_DEEPEST = 32  # levels of objects and lists in a body
_FAILURES = (400, 401, 403, 404, 408, 413, 415, 429, 503, 504)  # of a request for an answer
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_CONVERSATION = "x-conversation-id"


def make_app(service: Service, keys: Keys, admin: Keys, *, hosts: frozenset[str] | None) -> Gate:
    """The application of a server.

    Args:
      keys: of clients; without one everybody is let in.
      admin: of the administrator; without one nobody is.
      hosts: names by which the server may be called; None: any.
    """
    app = FastAPI(
        title="oel_jax",
        version=oel_jax.__version__,
        description="A policy behind OpenAI's API, with feedback and metrics.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_chat(app, service)
    _add_text(app, service)
    _add_models(app, service)
    _add_feedback(app, service)
    _add_operation(app, service)
    _add_bodies(app)
    routes = frozenset(
        getattr(route, "path", "") for route in app.routes if getattr(route, "path", "")
    )
    return Gate(app, service, keys, admin, hosts=hosts, routes=routes)


# --- bodies ---------------------------------------------------------------------------------------


_PLACE = "#/components/schemas/{model}"


def _described(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route, for the description of the API."""
    schema = {"$ref": _PLACE.format(model=model.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }


def _add_bodies(app: FastAPI) -> None:
    """Put the bodies into the description: FastAPI knows those only that it reads itself."""
    bodies = (ChatRequest, TextRequest, FeedbackRequest, RollbackRequest)
    _, made = models_json_schema([(model, "validation") for model in bodies], ref_template=_PLACE)
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        schema["components"]["schemas"].update(made["$defs"])
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _answers(
    model: type[BaseModel], *statuses: int, streamed: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The responses of a route, for the description of the API."""
    errors = {status: {"model": responses.ApiErrorBody} for status in (*statuses, 500)}
    good: dict[str, Any] = {"model": model}
    if streamed:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: good, **errors}


async def _read(request: Request, model: type[B]) -> B:
    """The body of a request.

    Raises:
      ApiError: it is no JSON, or not what the route takes.
    """
    raw = await request.body()
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad_request("The body is not UTF-8", None, "invalid_json") from error
    except RecursionError as error:
        raise bad_request("The body is nested too deeply", None, "invalid_json") from error
    except ValueError as error:
        raise bad_request("The body is not valid JSON", None, "invalid_json") from error
    _check_depth(body)
    if _HALF.search(raw):
        try:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise bad_request(
                "The body holds half a surrogate pair, which is no text", None, "invalid_json"
            ) from error
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False)) from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise bad_request(
                f"The body is nested deeper than {_DEEPEST} levels", None, "invalid_json"
            )
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
        depth += 1


# --- errors ---------------------------------------------------------------------------------------


def error_response(error: ApiError) -> JSONResponse:
    """An error as clients get it."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        told = {
            404: f"There is no {request.method} {request.url.path[:100]}",
            405: f"{request.url.path[:100]} does not take {request.method}",
        }
        message = told.get(error.status_code, "The request cannot be served")
        return error_response(
            ApiError(error.status_code, message, headers=dict(error.headers or {}))
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        log_mistake(request.scope)
        return error_response(mistake(request.scope))


# --- answers --------------------------------------------------------------------------------------

Choice = Callable[..., dict[str, Any]]


class _Shape:
    """How the answers of one route look."""

    def __init__(self, kind: str, event_kind: str, whole: Choice, delta: Choice, end: Choice):
        self.kind, self.event_kind = kind, event_kind
        self.whole, self.delta, self.end = whole, delta, end


_CHAT = _Shape(
    "chat.completion",
    "chat.completion.chunk",
    responses.chat_choice,
    responses.chat_delta,
    responses.chat_end,
)
_TEXT = _Shape(
    "text_completion",
    "text_completion",
    responses.text_choice,
    responses.text_delta,
    responses.text_end,
)


async def _respond(
    request: Request, service: Service, job: Job, shape: _Shape, body: ChatRequest | TextRequest
) -> Response:
    headers = {"X-Policy": job.policy}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = _events(service, job, shape, usage)
        return _Stream(events, lambda: service.release(job), headers)
    try:
        await _unless_gone(request, _finish(service, job))
        made = responses.frame(shape.kind, job.id, job.policy, responses.created_now())
        made["choices"] = [shape.whole(*item) for item in enumerate(job.answers)]
        made["usage"] = responses.usage_of(job.answers, job.prompts)
        return JSONResponse(made, headers=headers)
    finally:
        service.release(job)


class _Stream(StreamingResponse):
    """Server-sent events; `release` is called at their end, also where they never begin."""

    def __init__(
        self, events: AsyncIterator[bytes], release: Callable[[], None], headers: dict[str, str]
    ):
        headers = headers | {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._release = release

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._release()


async def _finish(service: Service, job: Job) -> None:
    async for _ in service.deltas(job):
        pass
    await service.settle(job)


async def _unless_gone(request: Request, work: Any) -> None:
    """Do some work while the client waits for it.

    Raises:
      ClientGone: it does not wait any more; the work is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client has closed the connection", code="client_gone")
        await working
    finally:
        leaving.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, job: Job, shape: _Shape, with_usage: bool
) -> AsyncIterator[bytes]:
    """The server-sent events of a job."""
    frame = responses.frame(shape.event_kind, job.id, job.policy, responses.created_now())
    if with_usage:
        frame["usage"] = None

    def event(*choices: dict[str, Any], **more: Any) -> bytes:
        return responses.event(frame | {"choices": list(choices)} | more)

    try:
        if shape is _CHAT:
            for index in range(len(job.answers)):
                yield event(responses.chat_beginning(index))
        async for index, delta in service.deltas(job):
            job.shown = True
            yield event(shape.delta(index, job.answers[index], delta))
        await service.settle(job)
        for item in enumerate(job.answers):
            yield event(shape.end(*item))
        if with_usage:
            yield event(usage=responses.usage_of(job.answers, job.prompts))
        yield responses.END
    except ApiError as error:
        logger.warning("%s: %d %s", job.id, error.status, error.message)
        yield responses.event(error.body())


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        openapi_extra=_described(ChatRequest),
        responses=_answers(responses.ChatCompletion, *_FAILURES, streamed=True),
    )
    async def chat(request: Request) -> Response:
        body = await _read(request, ChatRequest)
        job = await service.chat(body, request.headers.get(_CONVERSATION))
        return await _respond(request, service, job, _CHAT, body)


def _add_text(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        summary="Continue a plain text",
        openapi_extra=_described(TextRequest),
        responses=_answers(responses.TextCompletion, *_FAILURES, streamed=True),
    )
    async def text(request: Request) -> Response:
        body = await _read(request, TextRequest)
        return await _respond(request, service, await service.text(body), _TEXT, body)


def _add_models(app: FastAPI, service: Service) -> None:
    started = responses.created_now()

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "oel_jax"}

    def names() -> list[str]:
        return list(dict.fromkeys([CURRENT, *service.policies.names()]))

    @app.get("/v1/models", summary="Policies", responses=_answers(responses.ModelList, 401, 403))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in names()]})

    @app.get(
        "/v1/models/{model}",
        summary="One policy",
        responses=_answers(responses.ModelEntry, 401, 404),
    )
    async def model(model: str) -> Response:
        if model not in names():
            raise ApiError(404, "The model does not exist", param="model", code="model_not_found")
        return JSONResponse(described(model))


def _add_feedback(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/feedback",
        summary="Say in words how an answer was",
        openapi_extra=_described(FeedbackRequest),
        responses=_answers(responses.FeedbackReceipt, *_FAILURES, 409),
    )
    async def feedback(request: Request) -> Response:
        body = await _read(request, FeedbackRequest)
        await service.feedback(body.id, body.text, body.user)
        return JSONResponse({"object": "feedback", "id": body.id})


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="State", responses=_answers(responses.Health, 503))
    async def health() -> Response:
        recorder, engine = service.recorder, service.policies.engine()
        recording = "failing" if recorder.failing else "on"
        status = "ok" if service.policies.healthy else "failing"
        status = "stopping" if service.stopping else status
        state = {
            "status": status,
            "policy": "" if engine is None else engine.policy_name,
            "recording": "off" if recorder.store is None else recording,
        }
        return JSONResponse(state, 200 if status == "ok" else 503)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    page = {200: text, 401: {"model": responses.ApiErrorBody}}

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=Response, responses=page)
    async def metrics() -> Response:
        return Response(service.measures.page(), media_type=CONTENT_TYPE)

    @app.post(
        "/admin/rollback",
        summary="Return to the policy before",
        openapi_extra=_described(RollbackRequest),
        responses=_answers(responses.RollbackResult, *_FAILURES, 409),
    )
    async def rollback(request: Request) -> Response:
        body = await _read(request, RollbackRequest)
        reason = body.reason or "asked for by the administrator"
        try:
            refused, policy = await asyncio.to_thread(service.policies.rollback, reason)
        except UserError as error:
            logger.warning("rollback is not possible: %s", error)
            raise ApiError(
                409, "There is no earlier policy to roll back to, or it cannot be loaded"
            ) from error
        return JSONResponse({"object": "rollback", "refused": refused, "policy": policy})
