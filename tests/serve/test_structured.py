"""Structured replies over HTTP: OpenAI's, vLLM's and llama.cpp's fields, streams, and what the answers count."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from balcony_runtime.serve.http.server import Server
from tests.serve.client import metric, until

QUESTION: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


class Animal(pydantic.BaseModel):
    kind: Literal["fox", "dog"]
    legs: int = pydantic.Field(ge=0, le=9)


SCHEMA = Animal.model_json_schema() | {"additionalProperties": False}


def test_parse_with_a_class(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Animal, seed=3)
    (choice,) = found.choices
    assert isinstance(choice.message.parsed, Animal) and choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, None),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, None),
        ({"guided_json": SCHEMA}, None),
        ({"guided_json": json.dumps(SCHEMA)}, None),
        ({"json_schema": SCHEMA}, None),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, None),
        ({"structured_outputs": {"json": SCHEMA, "disable_fallback": False, "json_object": False}}, None),
        ({"structured_outputs": {"choice": ["fox", 'a "dog"']}}, 'fox|a "dog"'),
        ({"structured_outputs": {"choice": ["fox", "dog"], "disable_any_whitespace": True}}, "fox|dog"),
        ({"guided_choice": ["fox", "dog"]}, "fox|dog"),
        ({"guided_choice": [f"fox {number}" for number in range(3000)]}, r"fox \d+"),
        ({"guided_regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"structured_outputs": {"regex": "[a-f]{3}"}}, "[a-f]{3}"),
        ({"guided_grammar": 'start: "fox" | "dog"'}, "fox|dog"),
        ({"grammar": 'root ::= "fox" | "dog"'}, "fox|dog"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_field_gives_its_structure(http: httpx.Client, extra: dict[str, Any], pattern: str | None) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": QUESTION}), ("/v1/completions", {"prompt": "the"})):
        found = http.post(path, json={**prompt, "max_tokens": 60, "seed": 1} | extra).json()
        choice = found["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert choice["finish_reason"] == "stop"
        if pattern is None:
            Animal.model_validate_json(text)
        else:
            assert re.fullmatch(pattern, text)


def test_a_schema_that_is_not_strict_may_have_what_no_grammar_enforces(http: httpx.Client) -> None:
    """As Zod 4 writes ``z.email()``, ``z.record()`` and ``z.set()``."""
    schema = SCHEMA | {"properties": {
        **SCHEMA["properties"],
        "mail": {"type": "string", "format": "email", "pattern": r"^(?!\.)[a-z]+@[a-z]+$"},
        "tags": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}},
    }}  # fmt: skip
    for strict, status in ((None, 200), (False, 200), (True, 400)):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
        body = {"messages": QUESTION, "max_tokens": 60, "seed": 1, "response_format": asked}
        found = http.post("/v1/chat/completions", json=body)
        assert found.status_code == status, found.text
        if status == 200:
            Animal.model_validate_json(found.json()["choices"][0]["message"]["content"])


def test_an_object_that_is_not_strict_has_only_the_properties_it_lists(http: httpx.Client) -> None:
    """As pydantic writes a class, and as instructor sends it: also within lists."""
    pair = {"type": "array", "items": {"$ref": "#/$defs/Animal"}, "minItems": 2, "maxItems": 2}
    schema = {"type": "object", "properties": {"pair": pair}, "required": ["pair"],
              "$defs": {"Animal": Animal.model_json_schema()}}  # fmt: skip
    for seed in range(8):
        body = {"messages": QUESTION, "max_tokens": 120, "seed": seed, "temperature": 2.0}
        asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
        text = http.post("/v1/chat/completions", json=body | asked).json()["choices"][0]["message"]["content"]
        found = json.loads(text)
        assert found.keys() == {"pair"} and [one.keys() for one in found["pair"]] == [{"kind", "legs"}] * 2


def test_any_object(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "response_format": {"type": "json_object"}, "max_tokens": 8, "temperature": 0}
    assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"].startswith("{")


def test_streams_and_counts(client: openai.OpenAI, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A stream has the same text, and forced tokens are counted by a name of their own and by no exit."""
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "temperature": 0,
        "extra_body": {"json_schema": SCHEMA},
    }
    whole = client.chat.completions.create(**options)
    before = metric(server.url, "balcony_forced_tokens_total")
    with caplog.at_level(logging.INFO, logger="balcony_runtime.serve.requests"):
        pieces = list(client.chat.completions.create(**options, stream=True))
        until(lambda: '"stream": true' in caplog.text)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    facts = pieces[-1].balcony
    made = facts["forced_tokens"] + sum(facts["tokens_per_exit"].values())
    assert facts["forced_tokens"] > 3 and made == whole.usage.completion_tokens and facts["mean_depth"] == 5
    assert metric(server.url, "balcony_forced_tokens_total") == before + facts["forced_tokens"]
    line = json.loads(caplog.records[-1].getMessage())
    assert line["tokens"] == line["forced_tokens"] + sum(line["tokens_per_exit"].values()) == made


def test_choices_have_structures_of_their_own(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "n": 4, "guided_regex": "[a-z]{6}", "temperature": 1.5, "seed": 2}
    texts = [one["message"]["content"] for one in http.post("/v1/chat/completions", json=body).json()["choices"]]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts) and len(set(texts)) > 1


@pytest.mark.parametrize("special", [None, True, False])
def test_names_of_control_tokens(http: httpx.Client, server: Server, special: bool | None) -> None:
    """``parse_special``, as llama.cpp calls it: by default names are tokens in plain texts and no messages."""
    messages, text = [{"role": "user", "content": "a<end>"}], "a<end>"
    found = [http.post("/tokenize", json={**one, "parse_special": special}).json()["tokens"] for one in
             ({"messages": messages}, {"content": text})]  # fmt: skip
    assert [0 in ids for ids in found] == [bool(special), special is not False]
    for path, prompt, ids in zip(("/v1/chat/completions", "/v1/completions"), ({"messages": messages}, {"prompt": text}),
                                 found, strict=True):  # fmt: skip
        body = {**prompt, "parse_special": special, "max_tokens": 1}
        assert http.post(path, json=body).json()["usage"]["prompt_tokens"] == len(ids)
