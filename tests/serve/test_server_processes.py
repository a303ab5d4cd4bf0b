"""`oel serve` as a process: how it starts, refuses to start, stops, and is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from served import serving, serving_tiny  # skips without the extra

import httpx  # isort: skip

from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import user

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
SMALL = ("--model=nano:tiny", "--slots=2", "--max_prompt=128", "--max_response=32")


def environment():
    cache = os.environ["OEL_TEST_XLA_CACHE"]
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}


@contextmanager
def process(*flags):
    """A running server: (process, its URL, the lines of its start)."""
    command = [sys.executable, "-m", "oel_jax", "serve", "--port=0", *flags]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    lines = []
    try:
        for line in running.stdout:
            lines.append(line)
            if line.startswith("recorded"):
                break
        else:
            raise AssertionError(running.stderr.read())
        yield running, re.search(r"http://\S+:\d+", lines[0])[0], lines
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


def refused(*flags, **more):
    """The message of a server that does not start."""
    command = [sys.executable, "-m", "oel_jax.serve", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | more, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def ask(url, text="What is two plus three?", **fields):
    body = {"model": "policy", "messages": [user(text)], "max_tokens": 8} | fields
    return httpx.post(url + CHAT, json=body, timeout=300)


@pytest.mark.processes
def test_two_servers_on_one_store_and_how_they_stop(tmp_path):
    flags = (*SMALL, f"--workdir={tmp_path}")
    with process(*flags) as (first, url, lines), process(*flags) as (second, other, _):
        assert lines[1].startswith("policy   nano:tiny") and str(tmp_path) in lines[-1]
        ids = [ask(one).json()["id"] for one in (url, other, url)]
        store = ConversationStore(tmp_path / "conversations")
        files = [file.name for file in store.files("exchanges")]
        assert files == ["exchanges_0000.jsonl", "exchanges_0001.jsonl"]
        # An answer of one server is known to the other, also after a restart.
        feedback = httpx.post(f"{other}/v1/feedback", json={"id": ids[0], "text": "Good."})
        assert feedback.status_code == 200
        port = url.rpartition(":")[2]
        message = refused(*flags, f"--port={port}")
        assert f"--port={port}" in message and "in use" in message
        body = {"model": "policy", "messages": [user("Hi")], "max_tokens": 32, "stream": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=300) as response:
            events = response.iter_lines()
            next(events)
            first.send_signal(signal.SIGTERM)
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert first.wait(120) == 0
        assert "everything that clients saw finished is recorded" in first.stdout.read()
        second.send_signal(signal.SIGINT)
        assert second.wait(120) == 0
    recorded = list(store.read(on_bad="error"))
    assert sum(len(one.turns) for one in recorded) == 4
    assert [turn.feedback for one in recorded for turn in one.turns if turn.id == ids[0]] == [
        "Good."
    ]
    with process(*flags) as (_, url, _):
        feedback = httpx.post(f"{url}/v1/feedback", json={"id": ids[1], "text": "Bad."})
        assert feedback.status_code == 200


@pytest.mark.processes
def test_a_kill_loses_no_line_that_a_client_saw_finished(tmp_path):
    from argparse import Namespace

    from benchmarks import serve_load

    options = Namespace(
        model="nano:tiny", requests=60, connections=8, cancelled=0.1, slots=4, seed=1
    )
    found = serve_load.measure(options, tmp_path)
    assert (found["lost"], found["torn"], found["twice"], found["malformed"]) == (0, 0, 0, 0)
    assert found["finished"] + found["left"] == 60 and found["exit_status"] == 0
    assert found["lines"] >= found["finished"] > 40


def test_requests_while_it_stops_are_refused(tmp_path_factory, tmp_path):
    with serving_tiny(tmp_path_factory) as policies, serving(policies, tmp_path) as served:
        served.service.stopping = True
        reply = served.chat()
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert reply.json()["error"]["code"] == "server_stopping"
        assert served.client.get("/health").status_code == 503


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "give --workdir=DIR of a run, or --model=DIR"),
        (("--model=nano:tiny",), "add --workdir=DIR, or --no_record"),
        (("--workdir=nowhere",), "holds no run yet: give --config=FILE"),
        (("--model=nowhere", "--no_record"), "nowhere"),
        (("--model=nano:tiny", "--no_record", "--host=0.0.0.0"), "give --api_key_file=FILE"),
        (("--model=nano:tiny", "--no_record", "--slots=0"), "--slots=0: it must be at least 1"),
        (("--model=nano:tiny", "--no_record", "--redact"), "--no_record records nothing"),
        (("--model=nano:tiny", "--no_record", "--max_prompt=100000"), "do not fit into the"),
        (("--model=nano:tiny", "--no_record", "--host=192.0.2.1", "--api_key_file=keys"),
         "cannot be bound"),
        (("--model=nano:tiny", "--no_record", "--api_key_file=none"), "--api_key_file=none"),
        (("--model=nano:tiny", "--no_record", "--api_key_file=short"), "at least 8 characters"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_start_says_why(flags, words, tmp_path, capsys, monkeypatch):
    from oel_jax.serve.command import main

    monkeypatch.chdir(tmp_path)
    for name in ("OEL_API_KEY", "OEL_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "keys").write_text("a-long-enough-key\n# a remark\n")
    (tmp_path / "short").write_text("short\n")
    assert main(["--port=0", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.out == ""


def test_a_taken_port_is_one_message(tmp_path, capsys):
    from oel_jax.serve.command import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*SMALL, "--no_record", f"--port={port}"]) == 2
    assert f"--port={port} cannot be bound" in capsys.readouterr().err


def test_keys_of_the_environment(monkeypatch):
    from oel_jax.base.errors import UserError
    from oel_jax.serve.keys import bearer, read_keys

    monkeypatch.setenv("OEL_API_KEY", "first-long-key, second-long-key")
    keys = read_keys(None, "OEL_API_KEY", "--api_key_file")
    assert keys and keys.open("first-long-key") and keys.open("second-long-key")
    assert not any(keys.open(key) for key in (None, "", "first-long-key, second-long-key"))
    monkeypatch.setenv("OEL_API_KEY", "has blanks inside")
    with pytest.raises(UserError, match="no blanks inside"):
        read_keys(None, "OEL_API_KEY", "--api_key_file")
    monkeypatch.delenv("OEL_API_KEY")
    assert not read_keys(None, "OEL_API_KEY", "--api_key_file")
    assert [bearer(one) for one in (None, "", "Bearer", "Bearer x", "bearer  y ", "Basic x")] == [
        None, None, None, "x", "y", None,
    ]  # fmt: skip


def test_ids_that_a_store_vouches_for(tmp_path):
    from oel_jax.logs.redaction import Redactor
    from oel_jax.serve.completion_ids import CompletionIds, secret_of

    secret = secret_of(tmp_path)
    assert secret_of(tmp_path) == secret and secret_of(tmp_path / "other") != secret
    assert [path.name for path in tmp_path.glob(".secret*")] == [".secret"]
    ids, others = CompletionIds(secret), CompletionIds(b"another")
    made = [ids.make("chatcmpl") for _ in range(200)]
    assert len(set(made)) == 200 and all(map(ids.knows, made))
    assert not any(map(others.knows, made))
    assert ids.knows(f"{made[0]}-3") and not ids.knows(f"{made[0]}-x")
    assert not any(map(ids.knows, ("", "chatcmpl-", "chatcmpl", made[0][:-1], made[0] + "0")))
    assert [Redactor()(one)[0] for one in made] == made  # redaction leaves them as they are


def test_json_of_events_is_one_line():
    from oel_jax.serve.responses import event

    line = event({"text": "a\n\u2028\r\n\U0001f600"})
    assert line.count(b"\n") == 2 and line.endswith(b"\n\n")
    assert json.loads(line[6:]) == {"text": "a\n\u2028\r\n\U0001f600"}
