"""The OpenAPI description, and requests that are made from it alone."""

import pytest
from served import serving, serving_tiny


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with (
        serving_tiny(tmp_path_factory) as policies,
        serving(policies, tmp_path_factory.mktemp("store"), admin=("the-admin-key",)) as running,
    ):
        yield running


def references(value):
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from references(item)


def test_the_description_is_whole(served):
    description = served.client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}",
        "/v1/feedback", "/health", "/metrics", "/admin/rollback",
    }  # fmt: skip
    schemas = description["components"]["schemas"]
    named = set(references(description))
    assert named and {name.rpartition("/")[2] for name in named} <= set(schemas)
    chat = description["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["required"] is True
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(chat["responses"])


@pytest.mark.slow
def test_requests_made_from_the_description(served):
    """A protocol fuzzer: no answer is a server error, or other than the description says."""
    schemathesis = pytest.importorskip("schemathesis", reason="tests/requirements.txt")
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    checks = [
        not_a_server_error,
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    ]
    count = {}

    def fuzz(operation, mode):
        @seed(0)
        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call(headers={"Authorization": "Bearer the-admin-key"})
            case.validate_response(response, checks=checks)
            count[operation.label] = count.get(operation.label, 0) + 1

        check()

    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            try:
                fuzz(found.ok(), mode)
            except Unsatisfiable:  # a route without anything to be wrong
                continue
    assert len(count) == 8 and sum(count.values()) > 150
    assert served.chat().status_code == 200
