"""uvicorn, told how to refuse connections and how to stop."""

import asyncio
import json
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from oel_jax.base.errors import UserError
from oel_jax.serve.api_errors import ApiError, bad_request, try_later
from oel_jax.serve.service import Service

logger = logging.getLogger(__name__)

_SILENT_SECONDS = 30.0  # for the head of a connection's first request to come


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      UserError: the address is taken or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host={host} --port={port} cannot be bound: {reason}; stop what uses it, or give "
            "another --port (0: any that is free)"
        ) from error
    return listener


def _raw(error: ApiError) -> bytes:
    """A whole HTTP response, for a connection that gets no further."""
    body = json.dumps(error.body()).encode()
    lines = [
        f"HTTP/1.1 {error.status} Refused",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in error.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Protocol(H11Protocol):
    """One connection.

    Too many are refused before they say anything; one that says nothing is closed.
    """

    most = 1000  # connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(
                _raw(
                    try_later(
                        "Too many connections are open; try again later",
                        1,
                        status=503,
                        code="too_many_connections",
                    )
                )
            )
            transport.close()
            return
        self.loop.call_later(_SILENT_SECONDS, self._close_silent)

    def _close_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_raw(bad_request("The request is not HTTP", None, "invalid_request")))
        self.transport.close()


class Server(uvicorn.Server):
    """Stops without losing an answer: on a signal new requests are refused, running ones finish.

    Those that take longer than `grace` seconds are cancelled. A second signal cancels at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self._service, self._grace = service, grace
        self._stop_at: float | None = None
        self._told = ""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.stopping:
            self._stop_at = 0.0
            return
        self._service.stopping = True
        self._stop_at = asyncio.get_running_loop().time() + self._grace
        name = signal.Signals(sig).name
        # Not logged here: the handler may have interrupted what holds the log's lock.
        self._told = f"{name}: no new requests; running answers have {self._grace:g} s to finish"

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None:
            if self._told:
                logger.warning(self._told)
                self._told = ""
            late = asyncio.get_running_loop().time() >= self._stop_at
            if late or not self._service.jobs:
                for job in list(self._service.jobs):
                    for one in job.answers:
                        one.cancel()
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(app: Any, service: Service, *, grace: float) -> Server:
    """A server; `run(sockets=[...])` serves until a signal comes and all is finished."""
    protocol = type("LimitedProtocol", (Protocol,), {"most": service.limits.connections})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service, grace)
