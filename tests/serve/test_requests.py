"""What the server refuses, and how: every answer is OpenAI's error object."""

from __future__ import annotations

import json
import logging
import socket
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest

from balcony_edge.errors import BusyError, DeviceError, MissingDependencyError
from balcony_runtime.backends.base import FloatArray, IntArray, not_finite
from balcony_runtime.decoding.sampling import Sampler
from balcony_runtime.serve.bodies.asked import read_asked
from balcony_runtime.serve.bodies.fields import FOREIGN
from balcony_runtime.serve.bodies.refusal import RefusedError, draining, refusal_of, stopped, too_long
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.jobs import Job
from balcony_runtime.serve.work.service import Limits, Service
from tests.serve.client import until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
FOX: dict[str, Any] = {"prompt": "the fox", "max_tokens": 2}


class Case(NamedTuple):
    """A request and its answer: status, code, and a part of the message."""

    path: str
    body: Any
    status: int
    code: str
    message: str
    headers: dict[str, str] | None = None


UNIQUE = {"type": "array", "uniqueItems": True}
REFUSALS = [
    Case(CHAT, b"{", 400, "invalid_json", "the body is not JSON"),
    Case(CHAT, b"", 400, "invalid_json", "the body is not JSON"),
    Case(CHAT, b"[1]", 400, "invalid_json", "the body is a JSON list: send one object"),
    Case(CHAT, b"\xff\xfe\x00", 400, "invalid_json", "the body is not JSON"),
    Case(CHAT, b"[" * 100_000, 400, "invalid_json", "the body is not JSON"),
    Case(CHAT, b'{"temperature": NaN}', 400, "invalid_json", "NaN is not a JSON number"),
    Case(CHAT, {}, 400, "invalid_value", "messages = None: must be a list of messages"),
    Case(CHAT, {"messages": []}, 400, "invalid_value", "messages = []: must be a list"),
    Case(CHAT, {"messages": ["hello"]}, 400, "invalid_value", "messages = 'hello': each must be an object"),
    Case(CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "must be a mapping with 'role' and 'content'"),
    Case(CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "invalid_value", "must be a text or a list"),
    Case(
        CHAT,
        {"messages": [*HELLO["messages"], {"role": "assistant", "content": None, "function_call": {"name": "a"}}]},
        400,
        "invalid_value",
        "function_call is not supported here; give the call as tool_calls",
    ),
    Case(CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value", "not valid UTF-8"),
    Case(CHAT, HELLO | {"model": "x\ud800"}, 404, "model_not_found", "there is no such model"),
    Case(CHAT, HELLO | {"model": 7}, 400, "invalid_value", "model = 7: must be a text"),
    Case(CHAT, HELLO | {"model": "tiny:voic"}, 404, "model_not_found", "did you mean tiny:voice?"),
    Case(CHAT, HELLO | {"max_tokens": 0}, 400, "invalid_value", "max_tokens = 0: must be a whole number above 0"),
    Case(CHAT, HELLO | {"max_completion_tokens": 1.5}, 400, "invalid_value", "max_completion_tokens = 1.5: must be"),
    Case(CHAT, HELLO | {"n": 0}, 400, "invalid_value", "n = 0: must be a whole number from 1 to 128"),
    Case(CHAT, HELLO | {"n": True}, 400, "invalid_value", "n = True: must be a whole number"),
    Case(CHAT, HELLO | {"temperature": -1}, 400, "invalid_value", "temperature = -1: must be a finite number"),
    Case(CHAT, HELLO | {"temperature": "hot"}, 400, "invalid_value", "temperature = 'hot': must be a number"),
    Case(CHAT, HELLO | {"temperature": 10**400}, 400, "invalid_value", "must be a number within ±1e+15"),
    Case(CHAT, HELLO | {"top_p": -0.1}, 400, "invalid_value", "top_p = -0.1: must be a number above 0"),
    Case(CHAT, HELLO | {"top_k": -2}, 400, "invalid_value", "top_k = -2: must be a whole number from -1"),
    Case(CHAT, HELLO | {"min_p": 1}, 400, "invalid_value", "min_p = 1: must be a number, at least 0"),
    Case(
        CHAT, HELLO | {"seed": 2**63}, 400, "invalid_value", "seed = 9223372036854775808: must be a whole number from"
    ),
    Case(CHAT, HELLO | {"stop": [""]}, 400, "invalid_value", "stop = ['']: must be a text or a list of texts"),
    Case(CHAT, HELLO | {"top_logprobs": 2}, 400, "invalid_value", "top_logprobs = 2: needs logprobs = true"),
    Case(CHAT, HELLO | {"logprobs": 3}, 400, "invalid_value", "logprobs = 3: must be true or false"),
    Case(CHAT, HELLO | {"logit_bias": [1]}, 400, "invalid_value", "logit_bias = [1]: must map token ids"),
    Case(CHAT, HELLO | {"logit_bias": {"a": 1}}, 400, "invalid_value", "logit_bias = {'a': 1}: must map token ids"),
    Case(CHAT, HELLO | {"logit_bias": {"9999": 1}}, 400, "invalid_value", "the vocabulary has 0 to 319"),
    Case(CHAT, HELLO | {"tools": [{}]}, 400, "invalid_value", "tools: {}: must be a function"),
    Case(CHAT, HELLO | {"functions": [{}]}, 400, "invalid_value", "functions = [{}]: is not supported here; leave it"),
    Case(CHAT, HELLO | {"mirostat": 2}, 400, "invalid_value", "mirostat = 2: is not supported here; leave it"),
    Case(CHAT, HELLO | {"grammar": "\x89W"}, 400, "invalid_value", "grammar: is not supported ("),
    Case(CHAT, HELLO | {"grammar": "start: \ud800"}, 400, "invalid_value", "grammar: is not supported ("),
    Case(CHAT, HELLO | {"guided_json": {"const": "\ud800"}}, 400, "invalid_value", "json_schema: is not supported ("),
    Case(CHAT, HELLO | {"response_format": {"type": "xml"}}, 400, "invalid_value", "must be {'type': 'text'}"),
    Case(CHAT, HELLO | {"response_format": {"type": "json_schema"}}, 400, "invalid_value", "must be {'type': 'text'}"),
    Case(CHAT, HELLO | {"guided_json": 3}, 400, "invalid_value", "json_schema = 3: must be a JSON object"),
    Case(CHAT, HELLO | {"guided_json": UNIQUE}, 400, "invalid_value", 'Unimplemented keys: ["uniqueItems"]'),
    Case(CHAT, HELLO | {"guided_regex": "(a"}, 400, "invalid_value", "regex: is not supported ("),
    Case(CHAT, HELLO | {"guided_choice": []}, 400, "invalid_value", "guided_choice = []: must be a list of texts"),
    Case(CHAT, HELLO | {"guided_regex": "a", "grammar": "b"}, 400, "invalid_value", "a reply has one structure"),
    Case(CHAT, HELLO | {"structured_outputs": {"xml": 1}}, 400, "invalid_value", "must have exactly one of json"),
    Case(CHAT, HELLO | {"structured_outputs": {}}, 400, "invalid_value", "must have exactly one of json"),
    Case(CHAT, HELLO | {"guided_regex": "a", "ignore_eos": True}, 400, "invalid_value", "ignore_eos: the structure"),
    Case(CHAT, HELLO | {"frequency_penalty": "a"}, 400, "invalid_value", "frequency_penalty = 'a': must be a number"),
    Case(CHAT, HELLO | {"stream": "yes"}, 400, "invalid_value", "stream = 'yes': must be true or false"),
    Case(CHAT, HELLO | {"stream": True, "stream_options": 1}, 400, "invalid_value", "stream_options = 1: must be"),
    Case(CHAT, HELLO | {"budget": 5}, 400, "invalid_value", "budget = 5: must be an object"),
    Case(CHAT, HELLO | {"budget": {"tpot_ms": -5}}, 400, "invalid_budget", "tpot_ms = -5: must be a finite number"),
    Case(CHAT, HELLO | {"budget": {"exit": 2}}, 400, "invalid_budget", "exit = 2: no such key"),
    Case(CHAT, HELLO | {"budget": {"exit_layer": 4}}, 400, "invalid_budget", "this bundle has exits 2, 3, 5"),
    Case(CHAT, HELLO, 400, "invalid_value", "x-slo-tpot-ms = 'fast': must be", {"x-slo-tpot-ms": "fast"}),
    Case(CHAT, HELLO, 400, "invalid_value", "x-llm-d-slo-ttft-ms = '-1': must be", {"x-llm-d-slo-ttft-ms": "-1"}),
    Case(CHAT, HELLO, 403, "foreign_origin", "origin https://evil.example", {"origin": "https://evil.example"}),
    Case(CHAT, HELLO, 403, "foreign_host", "host evil.example: use localhost", {"host": "evil.example"}),
    Case(CHAT, HELLO, 403, "foreign_host", "host [::1: use localhost", {"host": "[::1"}),
    Case(CHAT, HELLO, 403, "foreign_origin", "origin http://[: pages of other sites", {"origin": "http://["}),
    Case(TEXT, {"prompt": None}, 400, "invalid_value", "prompt = None: must be a text, a list of texts"),
    Case(TEXT, {"prompt": []}, 400, "invalid_value", "prompt = []: must be a text"),
    Case(TEXT, {"prompt": [1, "a"]}, 400, "invalid_value", "prompt = [1, 'a']: must be"),
    Case(TEXT, {"prompt": ["a", ""]}, 400, "invalid_value", "one of the prompts is empty"),
    Case(TEXT, {"prompt": ""}, 400, "invalid_value", "the prompt is empty"),
    Case(TEXT, {"prompt": [5000]}, 400, "invalid_value", "token 5000: the vocabulary has 0 to 319"),
    Case(TEXT, {"prompt": [-1], "echo": True, "logprobs": 1}, 400, "invalid_value", "the vocabulary has 0 to 319"),
    Case(TEXT, {"prompt": [7] * 300}, 400, "context_length_exceeded", "context size (256"),
    Case(
        TEXT,
        {"prompt": [7] * 300, "echo": True, "logprobs": 0},
        400,
        "context_length_exceeded",
        "context size (256",
    ),
    Case(
        TEXT,
        {"prompt": [7] * 300, "echo": True, "logprobs": 0, "max_tokens": 0},
        400,
        "context_length_exceeded",
        "context size (256",
    ),
    Case(TEXT, {"prompt": "a", "stop": ["x"] * 65}, 400, "invalid_value", "at most 64 texts of at most 256 characters"),
    Case(TEXT, {"prompt": "a", "stop": "x" * 257}, 400, "invalid_value", "at most 64 texts of at most 256 characters"),
    Case(TEXT, FOX | {"max_tokens": 0}, 400, "invalid_value", "0 needs echo in a completion"),
    Case(TEXT, FOX | {"logprobs": 21}, 400, "invalid_value", "logprobs = 21: must be a whole number from 0 to 20"),
    Case(TEXT, FOX | {"suffix": "end"}, 400, "invalid_value", "suffix = 'end': is not supported"),
    Case(TEXT, FOX | {"best_of": 2}, 400, "invalid_value", "best_of = 2: is not supported"),
    Case(TEXT, {"prompt": ["a"] * 100, "n": 2}, 400, "invalid_value", "100 prompts make 200 replies"),
    Case(TEXT, FOX | {"model": "tiny:strict"}, 422, "infeasible", "infeasible: tpot_ms = 1e-06"),
    Case(TEXT, FOX | {"model": "tiny:strict", "stream": True}, 422, "infeasible", "infeasible: tpot_ms = 1e-06"),
    Case("/tokenize", {}, 400, "invalid_value", "give a text as content"),
    Case("/tokenize", {"messages": "hello"}, 400, "invalid_value", "messages = 'hello': must be a list of messages"),
    Case("/tokenize", HELLO | {"add_generation_prompt": False}, 400, "invalid_value", "is not supported here"),
    Case("/tokenize", {"content": 1}, 400, "invalid_value", "content = 1: must be a text"),
    Case("/detokenize", {"tokens": [-1]}, 400, "invalid_value", "the vocabulary has 0 to 319"),
    Case("/detokenize", {"tokens": "a"}, 400, "invalid_value", "tokens = 'a': must be a list of token ids"),
    Case("/detokenize", {"tokens": [7] * 257}, 400, "context_length_exceeded", "257 tokens: this exceeds"),
    Case(
        "/tokenize",
        {"content": "the fox " * 300, "with_pieces": True},
        400,
        "context_length_exceeded",
        "context size (256",
    ),
    Case("/slots/123456", {"budget": None}, 404, "no_such_slot", "slot 123456: has no reply in progress"),
    Case("/slots/1", {"tpot_ms": 3}, 400, "invalid_value", "give the keys of a budget as budget"),
    Case("/slots/1", b"", 400, "invalid_value", "or null for the server's own budget"),
    Case("/slots/1", {"budget": {"tpo_ms": 3}}, 400, "invalid_budget", "did you mean tpot_ms"),
    Case("/v1/embeddings", {}, 404, "not_found", "POST /v1/embeddings: no such path"),
    Case("/v1/models", {}, 405, "method_not_allowed", "POST /v1/models: no such method"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case.path} {str(case.body)[:50]} {case.headers or ''}")
def test_a_bad_request_has_its_line(case: Case, http: httpx.Client) -> None:
    content = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    found = http.post(case.path, content=content, headers=case.headers)
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (case.status, case.code), error
    assert case.message in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and found.headers["x-balcony-reason"] == case.code


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0.5, "n": None, "stop": None},
        {"grammar": "", "json_schema": None},
        {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5, "top_p": 0.9, "seed": 1},
        {"max_completion_tokens": 1, "max_tokens": None},
        {"reasoning_effort": "none", "chat_template_kwargs": {"mood": "lazy"}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "the"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            ]
        },
        {"max_completion_tokens": -1, "stop": ["e", "t", "a"], "top_p": 0},
        {"stream": True, "stream_options": {"include_usage": None}, "top_k": 40.0, "max_tokens": 2.0},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_other_fields_are_accepted(extra: dict[str, Any], http: httpx.Client) -> None:
    assert http.post(CHAT, json=HELLO | extra).status_code == 200


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_that_would_change_the_answer_is_refused(name: str) -> None:
    """Unless its value asks for nothing."""
    for chat, body in ((True, HELLO), (False, FOX)):
        with pytest.raises(RefusedError, match=rf"^{name} = 7\.5: is not supported here"):
            read_asked(json.dumps(body | {name: 7.5}).encode(), chat=chat)
        for nothing in (None, *FOREIGN[name]):
            read_asked(json.dumps(body | {name: nothing}).encode(), chat=chat)


@pytest.mark.parametrize("name", ["max_tokens", "n_predict"])
def test_llama_cpps_minus_one_is_no_bound(name: str) -> None:
    assert read_asked(json.dumps({"prompt": "the fox", name: -1}).encode(), chat=False).max_tokens is None
    assert read_asked(json.dumps(FOX | {"n_predict": -1}).encode(), chat=False).max_tokens == 2


@pytest.mark.parametrize(("chat", "body"), [(True, HELLO), (False, FOX)], ids=["chat", "completion"])
def test_every_sampling_field_reaches_the_sampler(chat: bool, body: dict[str, Any]) -> None:
    """llama.cpp's penalty is another name; with both, that of vLLM counts."""
    numbers: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1, "top_k": 40}
    numbers |= {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (numbers | {"logit_bias": {"17": -100}}, numbers | {"logit_bias": {17: -100}}),
        ({}, {"temperature": 1.0}),
        ({"top_k": -1, "repeat_penalty": 8.0}, {"temperature": 1.0, "top_k": 0, "repetition_penalty": 8.0}),
        ({"repeat_penalty": 1.0, "repetition_penalty": 8.0}, {"temperature": 1.0, "repetition_penalty": 8.0}),
    ]
    for sent, taken in cases:
        asked = read_asked(json.dumps(body | sent).encode(), chat=chat)
        assert asked.sampling == taken
        asked.params(0)  # the sampler knows them


def test_no_top_p_is_the_likeliest_token(http: httpx.Client) -> None:
    greedy, narrow = (http.post(CHAT, json=HELLO | how).json() for how in
                      ({"temperature": 0}, {"temperature": 2, "top_p": 0}))  # fmt: skip
    assert greedy["choices"][0]["message"] == narrow["choices"][0]["message"]


def test_clients_do_not_repeat_what_would_end_in_the_same_way() -> None:
    """OpenAI's clients repeat a request after every status from 500 on, unless the header says no."""
    final = refusal_of(MissingDependencyError("x")), too_long(600.0), RefusedError(507, "", "slots_full")
    assert [(one.status, one.reason) for one in final[:2]] == [(501, "not_installed"), (504, "timeout")]
    assert all(one.headers["x-should-retry"] == "false" for one in final)
    passing = refusal_of(BusyError("x"), 7), draining(), stopped(), refusal_of(ValueError("a bug"))
    assert not any("x-should-retry" in one.headers for one in passing)
    assert [one.headers.get("retry-after") for one in passing] == ["7", "5", None, None]


def test_who_is_turned_away_may_come_when_a_place_is_likely_to_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four run at once. A reply takes 1 s on average, and after one of 26 s 6 s; so do four that wait."""
    service, answer = Service(None, None, None, Limits(parallel=4)), Mock(scores={}, streaming=False)
    monkeypatch.setattr("balcony_runtime.serve.work.service.time", SimpleNamespace(monotonic=lambda: 126.0))
    service._loaded, answer.jobs, answer.asked_s = Mock(), [Job(0, 0, [1], None)], 100.0
    assert service.retry_s == 1
    service._closed(answer, "tiny", "")
    assert service._mean_s == pytest.approx(6.0)
    for waiting, seconds in ((0, 2), (3, 6), (4, 8), (200, 60)):
        service._jobs = {key: Job(key, 0, [1], None) for key in range(waiting)}
        assert service.retry_s == seconds


def test_a_refusal_does_not_repeat_a_large_value(http: httpx.Client) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    for body in (
        {"messages": [{"role": "user", "content": picture}]},
        HELLO | {"logit_bias": {"1": 1000, "2": "x" * 999}},
    ):
        refused = http.post(CHAT, json=body)
        assert refused.status_code == 400 and len(refused.text) < 500


def test_logits_that_are_not_finite_are_no_mistake_of_the_client(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A router may try another server, and the log has the cause."""

    def broken(sampler: Sampler, logits: FloatArray) -> IntArray:
        raise not_finite()

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "pick", broken)
        found = http.post(CHAT, json=HELLO)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "device")
    assert "a reply failed: the logits hold NaN or infinity" in caplog.text
    assert http.post(CHAT, json=HELLO).status_code == 200


def test_a_number_longer_than_python_reads(http: httpx.Client) -> None:
    assert http.get("/slots/" + "9" * 5000).status_code == 404


def test_a_check_of_health_without_a_host(server: Server) -> None:
    """As some balancers speak HTTP/1.0."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 10) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_wrong_method_is_told_the_right_one(http: httpx.Client) -> None:
    assert http.get(CHAT).status_code == 405 and http.get(CHAT).headers["allow"] == "POST"


def test_the_log_has_addresses_and_no_texts_of_a_client(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """Uvicorn takes the address from a header, as a proxy on this machine sends it."""
    with caplog.at_level(logging.INFO, logger="balcony_runtime.serve.requests"):
        for told in ("203.0.113.9", "x" * 1000, "fe80::1%" + "x" * 1000, "::ffff:203.0.113.9"):
            http.request("Y" * 1000, "/nothing", headers={"x-forwarded-for": told})
        until(lambda: len(caplog.records) == 4)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["client"] for line in lines] == ["203.0.113.9", "", "fe80::1", "203.0.113.9"]
    assert {line["method"] for line in lines} == {"Y" * 20}


@pytest.mark.parametrize("path", [CHAT, TEXT, "/health"])
def test_a_path_with_a_slash_too_many_is_not_redirected(http: httpx.Client, path: str) -> None:
    """Not to ``http://``, as a proxy with TLS has it, and clients would follow."""
    found = http.post(f"{path}/", json=HELLO)
    assert (found.status_code, found.json()["error"]["code"]) == (404, "not_found")


def test_a_device_that_fails_before_a_reply_begins_has_its_cause_in_the_log(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a kept prefix finds no memory for its rows."""

    def full(*_: Any) -> None:
        raise DeviceError("CUDA: out of memory (2): end other programs")

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "_prepare", full)
        found = http.post(CHAT, json=HELLO)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "device")
    assert f"{CHAT} failed: CUDA: out of memory (2)" in caplog.text


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n"],
    ids=["tls", "half a line", "another version", "no end"],
)
def test_rubbish_is_answered_and_the_server_goes_on(data: bytes, server: Server, http: httpx.Client) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 10) as connection:
        connection.settimeout(10)
        connection.sendall(data)
        answer = connection.recv(2000)
    assert answer.startswith(b"HTTP/1.1 4")
    if answer.startswith(b"HTTP/1.1 400"):  # another version is a request, which h11 lets through
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert http.get("/health").json() == {"status": "ok"}
