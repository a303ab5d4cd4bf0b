"""Errors as clients of the API expect them: an error object and the right status.

An answer never holds a path or a traceback. What went wrong inside is in the server's log, under
the request's id.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from oel_jax.base.errors import UserError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Branches of a union that pydantic names in the place of an error; a client's JSON has no such key.
_BRANCH = re.compile(r"^(str|int|list\[.*\]|function-.*|[A-Z]\w*)$")


class ApiError(Exception):
    """What a client is told.

    Attributes:
      status: of HTTP.
      message: one or two sentences.
      param: the field that is wrong, 'messages[0].role'.
      code: a word for programs.
      headers: of the response, in addition.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A request that can never be served as it is."""
    return ApiError(400, message, param=param, code=code)


def not_supported(param: str, what: str) -> ApiError:
    """A request for something that the API knows and this server does not."""
    return bad_request(f"{what} is not supported by this server", param, "unsupported_parameter")


def try_later(message: str, seconds: int, *, status: int = 429, code: str) -> ApiError:
    """A request that may be served when it comes again."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(seconds, 1))})


def of_template(error: UserError, directory: Any) -> ApiError:
    """A conversation that the chat template refuses; the model's directory stays private."""
    text = str(error).replace(f"{directory}: ", "").replace(str(directory), "the model")
    return bad_request(f"the model cannot read this conversation: {text}", "messages")


def place_of(where: Sequence[str | int]) -> str | None:
    """('messages', 0, 'role') -> 'messages[0].role'."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _BRANCH.match(part):
            text += f".{part}" if text else part
    return text or None


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request, of what pydantic has found."""
    # Where a field may be of several types, the longest place is that of the type that was meant.
    error = max(errors, key=lambda one: len(one["loc"]))
    first = errors[0]["loc"][:1]
    if error["loc"][:1] != first:
        error = errors[0]
    param, kind = place_of(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        return bad_request(
            f"Unrecognized request argument supplied: {param}", param, "unknown_parameter"
        )
    if kind == "missing":
        return bad_request(
            f"Missing required parameter: '{param}'", param, "missing_required_parameter"
        )
    if param and re.search(r"content\[\d+\]\.type$", param):
        given = error.get("input")
        what = given if isinstance(given, str) and len(given) < 40 else "this kind"
        return not_supported(param, f"Content of the type {what!r}")
    message = str(error["msg"]).removeprefix("Value error, ")
    return bad_request(f"Invalid value for '{param or 'body'}': {message}", param, "invalid_value")
