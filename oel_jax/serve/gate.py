"""What every request passes first: keys, sizes, origins; and the one place where they are logged.

It is plain ASGI, so that a request that is refused here costs next to nothing.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from oel_jax.serve.api_errors import ApiError
from oel_jax.serve.keys import Keys, bearer
from oel_jax.serve.service import Service

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_OPEN = ("/health", "/openapi.json")  # without a key
_BODY_SECONDS = 30.0  # for a body to come
_LINGER_BYTES, _LINGER_SECONDS = 64 * 2**20, 3.0  # see `_answer`
_FORMS = ("", "application/json", "application/x-www-form-urlencoded")  # the last: `curl -d`


def log_mistake(scope: Message) -> None:
    """Log the exception that is being handled: once, with all there is."""
    logger.exception("%s: failed", scope["oel.request"])


def mistake(scope: Message) -> ApiError:
    """What a client is told of it: the name under which it is in the log."""
    text = f"The server failed; its log has more under {scope['oel.request']}"
    return ApiError(500, text, code="internal_error")


class Gate:
    """Lets requests in.

    Args:
      app: what answers them.
      keys: of clients; without one everybody is let in.
      admin: of the administrator; without one nobody is.
      hosts: names by which the server may be called; None: any. A page of another site that a
        user's browser shows could otherwise reach a server that only this machine is to reach.
      routes: paths that there are; others are counted together.
    """

    def __init__(
        self,
        app: Any,
        service: Service,
        keys: Keys,
        admin: Keys,
        *,
        hosts: frozenset[str] | None,
        routes: frozenset[str],
    ):
        self.app, self._service, self._keys, self._admin = app, service, keys, admin
        self._hosts, self._routes = hosts, routes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = scope["oel.request"] = f"req_{secrets.token_hex(8)}"
        path = scope["path"] if scope["path"] in self._routes else "other"
        status, told = 0, b""

        async def watched(message: Message) -> None:
            nonlocal status, told
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
                self._service.measures.requests.labels(path, status).inc()
            elif 400 <= status != 500:
                told += message.get("body", b"")
                if not message.get("more_body", False):
                    logger.warning(
                        "%s: %s %s: %d %s", name, scope["method"], path, status, _message(told)
                    )
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, _Body(receive, self._service.limits.body).receive, watched)
        except ApiError as error:
            if not status:
                await _answer(watched, error, receive if error.status == 413 else None)
        except Exception:
            if status != 500:  # else the application has logged it
                log_mistake(scope)
            if not status:
                await _answer(watched, mistake(scope))

    def _check(self, scope: Message) -> None:
        """Raises ApiError for a request that the application need not see."""
        texts = {key.decode("latin-1"): one.decode("latin-1") for key, one in scope["headers"]}
        host = texts.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise ApiError(
                403, "This server is not called by this name; use localhost", code="wrong_host"
            )
        origin = texts.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(
                403, "Pages of other sites may not call this server", code="wrong_origin"
            )
        self._check_key(scope["path"], bearer(texts.get("authorization")))
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        length = texts.get("content-length", "0")
        if length.isdigit() and int(length) > self._service.limits.body:
            raise _too_large(self._service.limits.body)
        form = texts.get("content-type", "").partition(";")[0].strip().lower()
        if form not in _FORMS and not form.endswith("+json"):
            raise ApiError(
                415, "The body must be JSON (Content-Type: application/json)", code="wrong_type"
            )

    def _check_key(self, path: str, key: str | None) -> None:
        if path.startswith("/admin/"):
            if not self._admin:
                raise ApiError(
                    403, "This server was started without a key for its admin routes", code="off"
                )
            allowed = self._admin.open(key)
        elif not self._keys or path in _OPEN:
            return
        else:
            allowed = self._keys.open(key)
            if path == "/metrics":
                allowed |= self._admin.open(key)
        if not allowed:
            raise ApiError(
                401,
                "Incorrect API key provided"
                if key
                else "You did not provide an API key; give it "
                "in the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Body:
    """The body of a request, which must come in time and not be too long."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most, self._size, self._whole = receive, most, 0, False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), _BODY_SECONDS)
        except TimeoutError as error:
            raise ApiError(408, "The body of the request did not come", code="timeout") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._most:
                raise _too_large(self._most)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body of the request is larger than {most} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _name(host: str) -> str:
    """'[::1]:8000' -> '[::1]'; 'localhost:8000' -> 'localhost'."""
    head, _, tail = host.rpartition(":")
    return (head if head and tail.isdigit() else host).lower()


def _message(told: bytes) -> str:
    """The message of an error object, for the log."""
    try:
        return str(json.loads(told)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


async def _answer(send: Send, error: ApiError, rest: Receive | None = None) -> None:
    """Send an error.

    Args:
      rest: of a body that was refused. It is read on for a moment and thrown away: a client that
        still sends does not see the answer of a connection that is closed at once.
    """
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": rest is not None})
    if rest is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                await _throw_away(rest)
        await send({"type": "http.response.body", "body": b""})


async def _throw_away(receive: Receive) -> None:
    size = 0
    while size < _LINGER_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
