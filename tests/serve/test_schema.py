"""``/openapi.json``: it has all paths and fields, and requests that are made from it never break the server."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest

from balcony_runtime.serve.http.server import Server
from tests.serve.client import is_free, until


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_the_document_has_what_the_server_has(document: dict[str, Any]) -> None:
    assert {"/v1/chat/completions", "/v1/models/{name}", "/slots/{key}", "/health", "/openapi.json"} <= set(
        document["paths"]
    )
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"].endswith("."), path
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert chat["required"] == ["messages"] and chat["properties"]["functions"]["enum"] == [[], None]
    assert chat["properties"]["n"]["anyOf"][0]["maximum"] == 128
    text = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(text["properties"]) - set(chat["properties"]) == {"prompt", "echo", "add_special_tokens"}
    response = document["paths"]["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert response["required"] == ["input"] and "messages" not in response["properties"]
    tools = {"tools", "tool_choice", "parallel_tool_calls", "documents", "chat_template_kwargs"}
    assert tools <= set(chat["properties"]) - set(text["properties"])


def test_generated_requests_never_break_the_server(
    server: Server, http: httpx.Client, document: dict[str, Any]
) -> None:
    """Seconds of what ``st run URL/openapi.json`` does for minutes."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings

    known = copy.deepcopy(document)
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
    ):  # random names and budgets would all be refused at once
        content = known["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        content["schema"]["properties"] |= {"model": {"enum": ["tiny", "tiny:exit-2", "tiny:lossless"]}}
        content["schema"]["properties"]["budget"] = {"enum": [None, {}, {"tpot_ms": 5}, {"exit_layer": 3}]}
    schema = schemathesis.openapi.from_dict(known)
    checks = [schemathesis.checks.not_a_server_error]
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def try_it(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body["max_output_tokens" if case.path == "/v1/responses" else "max_tokens"] = 2
            case.call_and_validate(base_url=server.url, checks=checks, timeout=30)

        try_it()
    until(lambda: is_free(server))
    assert http.get("/health").status_code == 200
