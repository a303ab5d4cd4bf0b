"""The `openai` package as a client: answers, streams, tools, log-probabilities, errors."""

import json
from dataclasses import replace

import pytest
from chat_model import write_chain_model
from served import RESPONSE, make_policies, serving, serving_tiny

openai = pytest.importorskip("openai", reason="the client is not installed: tests/requirements.txt")

from oel_jax.chat.render import render  # noqa: E402
from oel_jax.data.messages import Dialogue, user  # noqa: E402
from oel_jax.models.language_model import load_model  # noqa: E402

HELLO = [user("Hello")]
PIECES = (
    "Let me look. ",
    "<tool_call>",
    '\n{ "name": "get_weather", ',  # blanks, so that the template does not write the same
    '"arguments": { "city": ',
    '"Oslo" } }\n',
    "</tool_call>",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with (
        serving_tiny(tmp_path_factory) as policies,
        serving(policies, tmp_path_factory.mktemp("store"), keys=("the-right-key",)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="the-right-key", max_retries=0)


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A server whose model always calls a tool."""
    directory = write_chain_model(tmp_path_factory.mktemp("models") / "chain", PIECES)
    policies = make_policies(load_model(directory), length=512)
    with serving(policies, tmp_path_factory.mktemp("store")) as running:
        yield running
    policies.close()


def test_whole_and_streamed(client):
    asked = {"model": "policy", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    assert isinstance(whole.choices[0].message.content, str) and whole.model == "round_000"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_all_settings_at_once(client):
    made = client.chat.completions.create(
        model="round_000",
        messages=[{"role": "developer", "content": "Be brief."}, *HELLO],
        temperature=1.2,
        top_p=0.9,
        max_completion_tokens=5,
        n=2,
        seed=3,
        stop=["never comes"],
        logprobs=True,
        top_logprobs=2,
        user="u1",
        metadata={"conversation": "c1"},
        extra_body={"top_k": 20},
    )
    assert len(made.choices) == 2
    for choice in made.choices:
        scores = choice.logprobs.content
        assert all(len(one.top_logprobs) == 2 and one.logprob < 0 for one in scores)
        assert all(bytes(one.bytes).decode() == one.token for one in scores)


def test_plain_texts_and_models(client):
    made = client.completions.create(model="policy", prompt="Once", max_tokens=4, logprobs=1)
    assert isinstance(made.choices[0].text, str) and made.choices[0].logprobs.token_logprobs
    assert [one.id for one in client.models.list()] == ["policy", "round_000"]
    assert client.models.retrieve("round_000").owned_by == "oel_jax"


def test_tools(caller):
    client = openai.OpenAI(base_url=f"{caller.url}/v1", api_key="any", max_retries=0)
    asked = {"model": "policy", "messages": [user("Weather in Oslo?")], "temperature": 0}
    plain = client.chat.completions.create(**asked)  # nobody gave tools: it is text
    assert plain.choices[0].message.content == "".join(PIECES)
    assert plain.choices[0].message.tool_calls is None
    made = client.chat.completions.create(**asked, tools=[TOOL])
    (choice,) = made.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    none = client.chat.completions.create(**asked, tools=[TOOL], tool_choice="none")
    assert none.choices[0].message.content == "".join(PIECES)

    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(**asked, tools=[TOOL], stream=True)
    ]
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert streamed.index == 0 and streamed.function.to_dict() == call.function.to_dict()

    # The next request shows the call and its result, as the client's own objects.
    messages = [*asked["messages"], choice.message, {"role": "tool", "content": "Rain"}]
    messages[-1]["tool_call_id"] = call.id
    client.chat.completions.create(**(asked | {"messages": messages}), tools=[TOOL])
    first, last = caller.lines()[1], caller.lines()[-1]
    assert last["parent"] == first["id"] and first["tools"] == [TOOL]
    assert first["turns"][0]["finish"] == "tool_calls"
    (whole,) = [
        one for one in caller.service.recorder.store.read() if one.turns[-1].id == last["id"]
    ]
    point = list(whole.points())[-1]
    model = caller.service.policies.engine().model
    assert list(point.prompt_ids) == render(model.tokenizer, point.dialogue, thinking=False)
    text = model.tokenizer.decode(point.prompt_ids)
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text and "Rain" in text
    assert isinstance(point.dialogue, Dialogue) and point.dialogue.tools == (TOOL,)


@pytest.mark.parametrize(
    "fields, error, param",
    [
        ({"model": "gpt-9"}, "NotFoundError", "model"),
        ({"max_tokens": RESPONSE + 1}, "BadRequestError", "max_tokens"),
        ({"messages": []}, "BadRequestError", "messages"),
        ({"response_format": {"type": "json_object"}}, "BadRequestError", "response_format"),
        ({"extra_body": {"reward": 1}}, "BadRequestError", "reward"),
    ],
)
def test_errors_are_the_clients_own(client, fields, error, param):
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**({"model": "policy", "messages": HELLO} | fields))
    assert caught.value.body["param"] == param and caught.value.request_id.startswith("req_")


def test_a_wrong_key(served):
    for key in ("wrong", "the-right-key2"):
        other = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_a_stream_that_fails_raises(served, client, monkeypatch):
    monkeypatch.setattr(served.service, "limits", replace(served.service.limits, seconds=0.0))
    asked = {"model": "policy", "messages": HELLO, "max_tokens": RESPONSE}
    with pytest.raises(openai.APIError, match="took longer"):
        list(client.chat.completions.create(**asked, stream=True))
