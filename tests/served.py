"""A real server in a thread of the test's process, over a tiny model."""

# ruff: noqa: E402  (the extra is asked for before what imports it)

import json
import threading
from contextlib import contextmanager

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason="`oel serve` is an optional extra: requirements-serve.txt")

import httpx
from chat_model import write_chat_model

from oel_jax.data.conversations import ConversationStore
from oel_jax.models.language_model import load_model
from oel_jax.runs.acceptance import Policy
from oel_jax.sampler.config import SamplerConfig
from oel_jax.serve.app import make_app
from oel_jax.serve.completion_ids import CompletionIds
from oel_jax.serve.engine import Engine
from oel_jax.serve.keys import Keys
from oel_jax.serve.measures import Measures
from oel_jax.serve.policies import Policies
from oel_jax.serve.recorder import Recorder
from oel_jax.serve.server import bind, make_server
from oel_jax.serve.service import Limits, Service

LENGTH, RESPONSE, SLOTS = 256, 64, 4


class Served:
    """What a test knows of its server.

    Attributes:
      url: without '/v1'; client: for requests to it; service: its state.
    """

    def __init__(self, url, service):
        self.url, self.service = url, service
        self.client = httpx.Client(base_url=url, timeout=60)

    def chat(self, text="Hello there", **fields):
        body = {"model": "policy", "messages": [{"role": "user", "content": text}]}
        return self.client.post("/v1/chat/completions", json=body | {"max_tokens": 8} | fields)

    def stream(self, path="/v1/chat/completions", **body):
        """The events of a streamed answer, '[DONE]' as a text."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return [events_of(line) for line in response.iter_lines() if line]

    def lines(self, kind="exchanges"):
        """The lines of the store."""
        files = self.service.recorder.store.files(kind)
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def events_of(line):
    assert line.startswith("data: ")
    return line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def make_policies(model, *, slots=SLOTS, length=LENGTH, response=RESPONSE, waiting=64):
    sizes = SamplerConfig(
        slots=slots, length=length, response=response, prefill_rows=slots, decode_steps=4
    )

    def serve(model, name):
        return Engine(model, name, sizes, waiting=waiting)

    return Policies(lambda policy: model, serve, Policy("round_000", "unused"))


@contextmanager
def serving(policies, directory=None, *, keys=(), admin=(), required=False, store=None, **limits):
    """A server of a policy; records into `directory` if it is given."""
    measures = Measures()
    if store is None and directory is not None:
        store = ConversationStore(directory)
    service = Service(
        policies,
        Recorder(store, required=required, on_write=measures.written),
        CompletionIds(b"secret of the test"),
        Limits(**limits),
        measures,
    )
    listener = bind("127.0.0.1", 0)
    hosts = None if keys else frozenset({"127.0.0.1", "localhost"})
    app = make_app(service, Keys(keys), Keys(admin), hosts=hosts)
    server = make_server(app, service, grace=30)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    try:
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join()
        service.recorder.close()
        listener.close()


@contextmanager
def serving_tiny(tmp_path_factory):
    """The policies of a tiny model, to be served."""
    directory = tmp_path_factory.mktemp("models") / "chat"
    policies = make_policies(load_model(write_chat_model(directory)))
    try:
        yield policies
    finally:
        policies.close()
