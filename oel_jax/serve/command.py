"""Serve a policy behind OpenAI's API, and record what is said to it.

    oel serve --workdir=runs/support --port=8000     the newest accepted policy of a run
    oel serve --model=DIR --no_record                any model; nothing is written

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, POST /v1/feedback, GET /health,
GET /metrics, POST /admin/rollback; GET /openapi.json describes them. Stop it with Ctrl-C or
SIGTERM: running answers finish.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from oel_jax.base import paths
from oel_jax.base.errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oel serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=paths.argument, help="of a run; conversations are recorded there")
    add("--model", help="a model directory, a hub id, or nano; default: the workdir's policy")
    add("--config", help="of a run that has not begun; its model is served until it has a policy")
    add("--host", default="127.0.0.1", help="address to bind; beyond this machine a key is needed")
    add("--port", type=int, default=8000, help="0: any that is free, printed at the start")
    add("--slots", type=int, help="answers written at once; default: the run's, else 16")
    add("--max_prompt", type=int, help="tokens of a prompt; default: the run's, else 2048")
    add("--max_response", type=int, help="tokens of an answer; default: the run's, else 1024")
    add("--decode_steps", type=int, default=8, help="tokens between two pieces of a stream")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's")
    add("--thinking", action=argparse.BooleanOptionalAction, help="the template's thinking flag")
    add("--queue", type=int, default=256, help="answers that may wait for a slot")
    add("--timeout", type=float, default=600.0, help="seconds for an answer, waiting included")
    add("--max_body", type=int, default=4 * 2**20, help="bytes of a request")
    add("--connections", type=int, default=1000, help="open at once")
    add("--grace", type=float, default=60.0, help="seconds for running answers when told to stop")
    add("--api_key_file", type=paths.argument, help="keys of clients, one a line; or OEL_API_KEY")
    add("--admin_key_file", type=paths.argument, help="of /admin routes; or OEL_ADMIN_KEY")
    add("--period", type=float, default=3.0, help="seconds between looks for a newer policy")
    add("--canary", type=float, default=0.0, help="share of conversations for a new policy")
    add("--shadow", action="store_true", help="a new policy first answers beside the current one")
    add("--guard", type=int, default=50, help="answers by which a new policy is judged; 0: never")
    add("--redact_hook", help="FILE.py:function, text -> text, for what --redact does not know")
    add("--redact", action="store_true", help="take out what identifies people before recording")
    add("--no_record", action="store_true", help="record nothing")
    add("--record_required", action="store_true", help="answer only what can be recorded")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        _check(given)
        _require_packages()
        return _serve(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130


def _check(given: argparse.Namespace) -> None:
    """UserError for flags that cannot be."""
    for name, least in (
        ("port", 0),
        ("slots", 1),
        ("max_prompt", 1),
        ("max_response", 1),
        ("decode_steps", 1),
        ("guard", 0),
        ("queue", 0),
        ("max_body", 1),
        ("connections", 1),
    ):
        if getattr(given, name) is not None and getattr(given, name) < least:
            raise UserError(f"--{name}={getattr(given, name)}: it must be at least {least}")
    if not given.timeout > 0 or not given.grace >= 0:
        raise UserError("--timeout must be above 0 and --grace at least 0")
    if given.port > 65535:
        raise UserError(f"--port={given.port}: it must be at most 65535")
    if given.workdir is None and given.model is None:
        raise UserError("give --workdir=DIR of a run, or --model=DIR, or both")
    if given.workdir is None and not given.no_record:
        raise UserError(
            "--model alone has no place for conversations: add --workdir=DIR, or --no_record"
        )
    if given.redact_hook and not given.redact:
        raise UserError("--redact_hook is for --redact")
    if given.no_record and (given.record_required or given.redact):
        raise UserError("--no_record records nothing: leave out --record_required and --redact")


def _require_packages() -> None:
    """UserError if the extra `serve` is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"oel serve needs a package that is not installed ({error.name}): "
            "pip install 'oel_jax[serve]', or pip install -r requirements-serve.txt"
        ) from error


def _serve(given: argparse.Namespace) -> int:
    from oel_jax.serve.keys import read_keys
    from oel_jax.serve.server import bind, make_server

    keys = read_keys(given.api_key_file, "OEL_API_KEY", "--api_key_file")
    admin = read_keys(given.admin_key_file, "OEL_ADMIN_KEY", "--admin_key_file")
    local = given.host in _LOOPBACK
    if not local and not keys:
        raise UserError(
            f"--host={given.host} lets other machines in: give --api_key_file=FILE or OEL_API_KEY, "
            "or bind 127.0.0.1"
        )
    listener = bind(given.host, given.port)
    try:
        from oel_jax.serve.app import make_app
        from oel_jax.serve.start import describe, make_service

        service = make_service(given)
        app = make_app(service, keys, admin, hosts=_NAMES if local and not keys else None)
        host = f"[{given.host}]" if ":" in given.host else given.host
        print(f"serving  http://{host}:{listener.getsockname()[1]}/v1")
        print("\n".join(describe(service)), flush=True)
        try:
            make_server(app, service, grace=given.grace).run(sockets=[listener])
        finally:
            service.close()
    finally:
        listener.close()
    print("stopped; everything that clients saw finished is recorded", flush=True)
    return 0
