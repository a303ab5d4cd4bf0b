"""What clients get for requests that cannot be served: an error object, the right status, one line
in the log, no path and no traceback; and nothing is recorded."""

import http.client
import json
import logging
import socket
import threading

import httpx
import pytest
from served import LENGTH, RESPONSE, SLOTS, make_policies, serving, serving_tiny

from oel_jax.data.conversations import ConversationStore
from oel_jax.data.messages import user

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    with serving_tiny(tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module")
def served(policies, tmp_path_factory):
    with serving(policies, tmp_path_factory.mktemp("store")) as running:
        yield running


def error_of(response, status, param=None, code=None):
    """The error's message, after checks that hold for every error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "/tmp" not in response.text and "Traceback" not in response.text
    assert ".py" not in response.text and "<class" not in response.text
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    return error["message"]


HELLO = [user("Hello")]
NESTED = {"a": 1}
for _ in range(60):
    NESTED = {"a": NESTED}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "fields, status, param",
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": "Hello"}, 400, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, None),
        ({"messages": [*HELLO, {"role": "assistant"}]}, 400, "messages[1].content"),
        ({"messages": [HELLO[0] | {"tool_call_id": "x"}]}, 400, "messages[0].tool_call_id"),
        ({"messages": [HELLO[0] | {"tool_calls": [
            {"function": {"name": "f", "arguments": "{}"}}]}]}, 400, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[]"}}]}]},
         400, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64,xx"}}]}]}, 400, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "x"},
            {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]}]},
         400, "messages[0].content[1].type"),
        ({"model": "gpt-9"}, 404, "model"),
        ({"model": "../../etc/passwd"}, 404, "model"),
        ({"model": ""}, 400, "model"),
        ({"model": None}, 400, "model"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": RESPONSE + 1}, 400, "max_tokens"),
        ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": 5.5}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"messages": [user("long " * LENGTH)]}, 400, "messages"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_p": 1.01}, 400, "top_p"),
        ({"top_k": -1}, 400, "top_k"),
        ({"n": 0}, 400, "n"),
        ({"n": SLOTS + 1}, 400, "n"),
        ({"n": 10**20}, 400, "n"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stop": ""}, 400, None),
        ({"stop": [""]}, 400, None),
        ({"stop": ["x"] * 17}, 400, None),
        ({"stop": 3}, 400, None),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format"),
        ({"logit_bias": {"5": 3}}, 400, "logit_bias"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"presence_penalty": -0.5}, 400, "presence_penalty"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, 400, "audio"),
        ({"tools": [TOOL], "tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no blanks"}}]}, 400, None),
        ({"tools": [{"type": "retrieval"}]}, 400, None),
        ({"tools": [TOOL], "parallel_tool_calls": False}, 400, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, 400, "functions"),
        ({"tools": [TOOL | {"function": {"name": "f", "parameters": NESTED}}]}, 400, None),
        ({"reward": 1.0}, 400, "reward"),
        ({"metadata": {"conversation": 5}}, 400, None),
        ({"user": ""}, 400, "user"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_chat_that_cannot_be(served, caplog, fields, status, param):
    body = {"model": "policy", "messages": HELLO, "max_tokens": 4} | fields
    before = len(served.lines())
    with caplog.at_level(logging.WARNING):
        response = served.client.post(CHAT, json=body)
    error_of(response, status, param)
    assert len(served.lines()) == before
    told = [one for one in caplog.records if one.name.startswith("oel_jax.serve")]
    assert len(told) == 1 and str(status) in told[0].getMessage()
    assert response.headers["x-request-id"] in told[0].getMessage()
    assert not served.service.jobs


def test_what_asks_for_nothing_that_is_missing_is_taken(served):
    """The values that clients send by habit."""
    habits = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, 
        "response_format": {"type": "text"}, "modalities": ["text"], "tools": None, "seed": None,
        "tool_choice": "none", "stream": False, "logprobs": False, "service_tier": "auto",
        "metadata": {"any": "thing"}, "top_k": 0, "prompt_cache_key": "x", "stop": ["never comes"],
    }  # fmt: skip
    assert served.chat(**habits).status_code == 200
    assert served.chat(stop="a stop text that never comes").status_code == 200
    ends = [user("Hi"), {"role": "assistant", "content": "Hello"}]  # no user at the end
    assert served.chat(messages=ends).status_code == 200
    extra = [{"role": "assistant", "content": "x", "refusal": None, "audio": None}, HELLO[0]]
    assert served.chat(messages=extra).status_code == 200
    assert served.chat(messages=[{"role": "developer", "content": "x"}]).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1, 2", b"null", b"[]", b'"text"', b"3", b"\xff\xfe", b'{"model": NaN}',
        b'{"model": "policy", "messages": [{"role": "user", "content": "\xc3"}]}',
        b'{"model": "policy", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model":"policy","messages":[{"role":"user","content":"x"}],"user":"\\uDFFF"}',
        b"[" * 100_000, b'{"a":' * 50_000, b'{"seed": ' + b"9" * 5000 + b"}",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n",
    ],
    ids=lambda value: repr(value[:24]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/feedback"])
def test_what_is_no_json_object(served, path, body):
    headers = {"Content-Type": "application/json"}
    error_of(served.client.post(path, content=body, headers=headers), 400)


def test_whole_surrogate_pairs_are_text(served):
    body = json.dumps({"model": "policy", "max_tokens": 1, "messages": [user("\U0001f600")]})
    assert "\\ud83d\\ude00" in body
    assert served.client.post(CHAT, content=body).status_code == 200  # as `curl -d` sends it
    assert served.lines()[-1]["turns"][0]["messages"] == [user("\U0001f600")]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHAT, 405), ("PUT", "/v1/models", 405), ("GET", "/", 404), ("POST", "/v1", 404),
        ("GET", "/v1/models/none", 404), ("GET", "/v1/models/%2e%2e%2f", 404),
        ("GET", "/docs", 404), ("DELETE", "/v1/feedback", 405), ("OPTIONS", CHAT, 405),
    ],
)  # fmt: skip
def test_routes_that_there_are_not(served, method, path, status):
    response = served.client.request(method, path)
    error_of(response, status)
    assert status != 405 or response.headers["allow"]


def test_other_forms_of_bodies(served):
    for kind in ("text/xml", "multipart/form-data; boundary=x", "text/plain"):
        response = served.client.post(CHAT, content=b"{}", headers={"Content-Type": kind})
        error_of(response, 415)
    body = json.dumps({"model": "policy", "messages": HELLO, "max_tokens": 1}).encode()
    for kind in ("application/json; charset=utf-8", "application/vnd.x+json"):
        response = served.client.post(CHAT, content=body, headers={"Content-Type": kind})
        assert response.status_code == 200


def test_pages_of_other_sites_and_names_are_kept_out(served):
    host = served.url.partition("://")[2]
    body = {"model": "policy", "messages": HELLO, "max_tokens": 1}
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://{host}"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": f"evil.example:{host.partition(':')[2]}"}, 403),
        ({"Host": "localhost"}, 200),
    ):
        response = served.client.post(CHAT, json=body, headers=headers)
        assert response.status_code == status, headers
        if status != 200:
            error_of(response, status)


def test_fifty_megabytes_are_refused_unread(served):
    served.chat()
    most = served.service.limits.body
    host, port = served.url.removeprefix("http://").split(":")
    # The head alone: the answer comes although no byte of the body was sent.
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(50 * 2**20))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()
    # A client that sends it all sees the answer too.
    error_of(served.client.post(CHAT, content=b"x" * 50 * 2**20), 413)

    def without_length():
        for _ in range(50):
            yield b" " * 2**20

    error_of(served.client.post(CHAT, content=without_length()), 413)
    assert served.client.post(CHAT, content=b" " * most).status_code == 400  # just fits
    assert served.chat().status_code == 200


def test_what_is_not_http(served):
    host, port = served.url.removeprefix("http://").split(":")
    for head in (b"\x16\x03\x01\x02\x00", b"HELO there\r\n\r\n", b"GET / HTTP/1.1\r\nbad\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as raw:
            raw.sendall(head + b"\r\n\r\n")
            answer = raw.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 400") and b'"error"' in answer
    assert served.client.get("/health").json()["status"] == "ok"


def test_too_many_connections_are_refused_at_once(policies, tmp_path):
    with serving(policies, tmp_path, connections=4) as served:
        host, port = served.url.removeprefix("http://").split(":")
        served.client.close()
        held = [socket.create_connection((host, int(port)), timeout=60) for _ in range(4)]
        # Each is known to the server when it has answered.
        for one in held:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(12) == b"HTTP/1.1 200"
        with socket.create_connection((host, int(port)), timeout=60) as extra:
            answer = extra.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer.lower()
        assert b'"too_many_connections"' in answer
        for one in held:
            one.close()


def test_a_full_queue_says_when_to_come_again(policies, tmp_path):
    model = policies.engine().model
    small = make_policies(model, slots=1, waiting=2)
    with serving(small, tmp_path) as served:
        replies, body = [], {"model": "policy", "messages": HELLO, "max_tokens": RESPONSE}

        def ask(seed):
            replies.append(httpx.post(served.url + CHAT, json=body | {"seed": seed}, timeout=60))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        full = [one for one in replies if one.status_code == 429]
        assert full and len(full) + sum(one.status_code == 200 for one in replies) == 24
        for one in full:
            error_of(one, 429, code="rate_limit_exceeded")
            assert int(one.headers["retry-after"]) >= 1
        assert len(served.lines()) == 24 - len(full)
    small.close()


def test_an_answer_that_takes_too_long(policies, tmp_path):
    with serving(policies, tmp_path, seconds=0.0) as served:
        error_of(served.chat(max_tokens=RESPONSE), 504, code="timeout")
        events = served.stream(model="policy", messages=HELLO, max_tokens=RESPONSE)
        assert events[-1]["error"]["code"] == "timeout"  # and no [DONE]
        assert not served.service.jobs
        assert served.lines() == []


# --- keys -----------------------------------------------------------------------------------------


def test_keys(policies, tmp_path):
    keys, admin = ("client-key-1", "client-key-2"), ("admin-key-1",)
    with serving(policies, tmp_path, keys=keys, admin=admin) as served:

        def ask(path, key=None, **more):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
            return served.client.request(more.pop("method", "GET"), path, headers=headers, **more)

        for key in (None, "wrong", "client-key-", "client-key-11", "admin-key-1", "é"):
            body = {"model": "policy", "messages": HELLO}
            error_of(ask(CHAT, key, method="POST", json=body), 401, code="invalid_api_key")
        assert [ask("/v1/models", key).status_code for key in keys] == [200, 200]
        assert ask("/health").status_code == 200  # for load balancers
        assert [ask("/metrics", key).status_code for key in (None, keys[0], admin[0])] == [
            401, 200, 200,
        ]  # fmt: skip
        rollback = {"method": "POST", "json": {}}
        error_of(ask("/admin/rollback", keys[0], **rollback), 401)
        # There is one policy only: a conflict, said in plain words.
        message = error_of(ask("/admin/rollback", admin[0], **rollback), 409)
        assert "roll back" in message
        basic = served.client.get("/v1/models", headers={"Authorization": "Basic x"})
        error_of(basic, 401)
        assert basic.headers["www-authenticate"] == "Bearer"


def test_admin_routes_are_closed_without_a_key_of_their_own(served):
    error_of(served.client.post("/admin/rollback", json={}), 403)


# --- feedback -------------------------------------------------------------------------------------


def test_feedback(served):
    completion = served.chat().json()["id"]

    def say(**fields):
        return served.client.post("/v1/feedback", json={"id": completion, "text": "Good."} | fields)

    assert say(user="u7").json() == {"object": "feedback", "id": completion}
    assert served.lines("feedback")[-1] | {"time": ""} == {
        "schema": "oel.feedback/1", "id": completion, "text": "Good.", "time": "", "user": "u7",
    }  # fmt: skip
    before = len(served.lines("feedback"))
    for score in (5, 0.9, True, None, {"score": 1}, ["x"]):
        error_of(say(text=score), 400, "text")
    error_of(say(text=""), 400, "text")
    error_of(say(text=" \n"), 400, "text")
    error_of(say(score=1), 400, "score")
    error_of(say(rating="5"), 400, "rating")
    for other in ("chatcmpl-1", completion[:-1] + "x", completion.replace("chat", "x"), "é", "-"):
        error_of(say(id=other), 404, "id", "completion_not_found")
    assert len(served.lines("feedback")) == before
    first, second = (one["id"] for one in served.lines()[-1:] * 2)
    several = served.chat(n=2).json()["id"]
    assert say(id=f"{several}-1").status_code == 200 and first == second


def test_feedback_where_nothing_is_recorded(policies):
    with serving(policies) as served:
        completion = served.chat().json()["id"]
        body = {"id": completion, "text": "Good."}
        error_of(served.client.post("/v1/feedback", json=body), 409, code="not_recording")
        assert served.client.get("/health").json()["recording"] == "off"


# --- a full disk ----------------------------------------------------------------------------------


class FullDisk(ConversationStore):
    """A store whose disk is full while `full` is set; otherwise a real one."""

    full = True

    def _open_exchanges(self):
        if self.full:
            from oel_jax.base.errors import UserError

            raise UserError(f"cannot write to {self.directory}: No space left on device")
        return super()._open_exchanges()


@pytest.mark.parametrize("required", [False, True])
def test_a_full_disk(policies, tmp_path, caplog, required):
    store = FullDisk(tmp_path)
    with serving(policies, store=store, required=required) as served:
        with caplog.at_level(logging.WARNING):
            replies = [served.chat() for _ in range(3)]
            events = served.stream(model="policy", messages=HELLO, max_tokens=4)
        fails = [one for one in caplog.records if "recording fails" in one.getMessage()]
        assert len(fails) == 1  # said once, not with every answer
        assert served.client.get("/health").json()["recording"] == "failing"
        page = served.client.get("/metrics").text
        assert "oel_record_failures_total 4.0" in page and "oel_recording_failing 1.0" in page
        if required:
            for one in replies:
                error_of(one, 503, code="recording_failed")
                assert one.headers["retry-after"]
            assert events[-1]["error"]["code"] == "recording_failed"
            assert all(
                not choice["finish_reason"] for event in events[:-1] for choice in event["choices"]
            )
        else:
            assert [one.status_code for one in replies] == [200] * 3 and events[-1] == "[DONE]"
        store.full = False
        assert served.chat().status_code == 200 and len(served.lines()) == 1
        assert served.client.get("/health").json()["recording"] == "on"


def test_a_mistake_of_the_server_shows_nothing_of_it(policies, tmp_path, caplog, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret at /tmp/place.py")

    with serving(policies, tmp_path) as served:
        monkeypatch.setattr(served.service.policies, "names", broken)
        with caplog.at_level(logging.ERROR):
            response = served.client.get("/v1/models")
        assert "secret" not in error_of(response, 500, code="internal_error")
        (told,) = [one for one in caplog.records if one.exc_info and "oel_jax" in one.name]
        assert response.headers["x-request-id"] in told.getMessage()
        monkeypatch.undo()
        assert served.chat().status_code == 200


def test_health_says_when_the_policy_does_not_answer(policies, tmp_path, monkeypatch):
    with serving(policies, tmp_path) as served:
        assert served.client.get("/health").json()["status"] == "ok"
        engine = served.service.policies.engine()
        monkeypatch.setattr(engine, "_failed", True)  # what too many failures leave
        response = served.client.get("/health")
        assert response.status_code == 503 and response.json()["status"] == "failing"
        monkeypatch.undo()
        assert served.client.get("/health").status_code == 200
