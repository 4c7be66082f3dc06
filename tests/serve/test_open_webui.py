"""The requests that Open WebUI makes of an OpenAI-compatible server, replayed; the answers are read as it reads them.

They were written down from the source of Open WebUI 0.6, not captured from one that ran: in ``backend/open_webui``,
``routers/openai.py`` at 671f577264ed (connections, models, chat completions), ``routers/tasks.py`` at 884bb3f44c64 (tasks), and
``utils/middleware.py`` and ``utils/payload.py`` of 0.6 (parameters, tools, the reading of a stream). What its source does:

- It takes its own fields (``chat_id``, ``features``, ``metadata``, …) out of a body before it sends it. Filters and pipelines
  of users can put them back, and ``user`` is an object for a pipeline.
- ``max_completion_tokens`` becomes ``max_tokens`` for every server that is not OpenAI's. The front end's slider begins at -2,
  which is Ollama's *no bound*.
- Parameters that a user sets are put into the body flat, Ollama's included; ``stop`` is a list, ``logit_bias`` an object.
- The key of a connection without one is empty, so that the header ends after ``Bearer``.
- Images are parts of type ``image_url``; files are text inside the message.
- The stop button closes the connection.
"""

from __future__ import annotations

import http.client
import json
from typing import Any

import httpx
import pytest

from balcony_runtime.serve.http.server import Server
from tests.serve.client import is_free, until

HELLO = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"stream": True, "model": "tiny", "messages": HELLO}
TASK: dict[str, Any] = {"model": "tiny", "messages": HELLO, "stream": False}
#: Its parameter for it; without one the first token of a model with random weights is sometimes the end.
SEED = {"seed": 7}
#: Headers of every request; the last five only with ENABLE_FORWARD_USER_INFO_HEADERS.
HEADERS = {
    "Content-Type": "application/json",
    "Authorization": "Bearer none",
    "X-OpenWebUI-User-Name": "Ada%20Lovelace",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "0b3c",
}
#: Its own fields, as a filter puts them back.
OWN: dict[str, Any] = {
    "chat_id": "0b3c",
    "session_id": "Yh1",
    "id": "a2f7",
    "parent_id": "c9",
    "params": {},
    "tool_servers": [],
    "tool_ids": None,
    "files": None,
    "filter_ids": [],
    "features": {"voice": False, "image_generation": False, "code_interpreter": False, "web_search": False},
    "variables": {"{{USER_NAME}}": "Ada", "{{CURRENT_DATE}}": "2026-11-27"},
    "model_item": {"id": "tiny", "object": "model", "owned_by": "openai", "openai": {"id": "tiny"}, "urlIdx": 0},
    "background_tasks": {"title_generation": True, "tags_generation": True, "follow_up_generation": True},
    "metadata": {"user_id": "1", "chat_id": "0b3c", "features": {}},
    "user": {"name": "Ada", "id": "1", "email": "ada@example.org", "role": "user"},
}
#: All parameters of its panel of advanced parameters that go into the body.
PARAMETERS: dict[str, Any] = {
    "seed": 7,
    "stop": ["fox\n", "dog"],
    "temperature": 0.8,
    "reasoning_effort": "medium",
    "logit_bias": {"5": -100, "17": 3},
    "max_tokens": 4,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "repeat_last_n": 64,
    "tfs_z": 1,
    "repeat_penalty": 1.1,
    "use_mmap": True,
    "use_mlock": True,
    "think": True,
    "format": "json",
    "keep_alive": "5m",
    "num_keep": 24,
    "num_ctx": 2048,
    "num_batch": 512,
    "num_thread": 2,
    "num_gpu": 0,
}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": ""},  # stopped before its first word
    {"role": "user", "content": "again"},
]


class Reply:
    """What Open WebUI keeps of a stream."""

    def __init__(self, answer: httpx.Response) -> None:
        self.content, self.usage, self.errors = "", {}, []  # type: str, dict[str, Any], list[Any]
        self.calls: list[dict[str, Any]] = []
        for line in answer.iter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            data = json.loads(line.removeprefix("data:"))
            usage = data.get("usage", {}) or {}
            usage.update(data.get("timings", {}))  # null would be an error
            self.usage.update(usage)
            if not data.get("choices"):
                self.errors += [data["error"]] if data.get("error") else []
                continue
            delta = data["choices"][0].get("delta", {})
            self.content += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                known = [one for one in self.calls if one["index"] == call["index"]]
                if known:
                    known[0]["function"]["arguments"] += call["function"]["arguments"]
                else:
                    self.calls.append(call)


def streamed(server: Server, body: dict[str, Any]) -> Reply:
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return Reply(answer)


@pytest.mark.parametrize("key", ["", "none"], ids=["no key", "a key"])
def test_a_connection_is_verified_and_its_models_are_listed(server: Server, key: str) -> None:
    """One request for both; written by hand, because httpx refuses to end a header after ``Bearer``."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    headers = HEADERS | {"Authorization": f"Bearer {key}", "Connection": "close"}
    connection.request("GET", "/v1/models", headers=headers)
    answer = connection.getresponse()
    found = json.load(answer)
    assert answer.status == 200 and "error" not in found
    assert {"tiny", "tiny:voice"} <= {model["id"] for model in found["data"]}
    assert all(
        model["object"] == "model" and model["owned_by"] and not model["id"].isspace() for model in found["data"]
    )


@pytest.mark.parametrize(
    ("extra", "tokens"),
    [
        ({"max_tokens": 4}, 4),
        ({"max_tokens": 4, "stream_options": {"include_usage": True}}, 4),
        ({"max_tokens": 4, "messages": TURNS}, 4),
        (PARAMETERS, 4),
        (OWN | {"max_tokens": 4}, 4),
        ({"max_tokens": -1}, None),
        ({"max_tokens": -2}, None),
        ({"max_tokens": 4, "model": "tiny:shallow"}, 4),
    ],
    ids=["plain", "usage", "turns", "parameters", "own fields", "-1", "-2", "a budget by name"],
)
def test_chats(server: Server, extra: dict[str, Any], tokens: int | None) -> None:
    """A reply in pieces; its tokens are counted in llama.cpp's timings even where no usage was asked for."""
    reply = streamed(server, CHAT | SEED | extra)
    assert not reply.errors and reply.usage["predicted_n"] > 0 and reply.usage["predicted_per_second"] > 0
    if "stop" not in extra:
        assert reply.content
    if tokens is not None:
        assert reply.usage["predicted_n"] <= tokens
    if "stream_options" in extra:
        assert reply.usage["completion_tokens"] == tokens and reply.usage["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("task", "extra"),
    [
        ("title", {"max_tokens": 1000}),
        ("emoji", {"max_tokens": 4}),
        ("tags, follow-ups, queries, autocompletion", {}),
        ("title for a pipeline", {"max_tokens": 1000, "user": OWN["user"], "metadata": {"task": "title_generation"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tasks(server: Server, task: str, extra: dict[str, Any]) -> None:
    """Whole answers, of which the text is taken; without ``max_tokens`` they end where the context does."""
    body = TASK | SEED | extra
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
    found = answer.json()
    assert answer.status_code == 200 and "error" not in found
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]


def test_answers_side_by_side_are_merged_as_a_stream(server: Server) -> None:
    """Its mixture of agents is the one task that may stream."""
    assert streamed(server, TASK | SEED | {"stream": True, "max_tokens": 4}).usage["predicted_n"] == 4


def test_native_function_calling(tool_server: Server) -> None:
    """Tools go without a choice. The call comes back as its pieces were merged, with their index, next to an empty text."""
    spec = {"name": "Stop", "description": "To stop.", "parameters": {"type": "object", "properties": {}}}
    body = CHAT | {"tools": [{"type": "function", "function": spec}], "max_tokens": 100}
    streamed(tool_server, body)
    reply = streamed(tool_server, body | {"tool_choice": "required", "parallel_tool_calls": False})
    (call,) = reply.calls
    assert call["index"] == 0 and call["id"] and call["type"] == "function"
    assert call["function"] == {"name": "Stop", "arguments": "{}"}
    turns = [
        *HELLO,
        {"role": "assistant", "content": reply.content, "tool_calls": reply.calls},
        {"role": "tool", "tool_call_id": call["id"], "content": ""},
    ]
    assert streamed(tool_server, body | {"messages": turns, "max_tokens": 4}).usage["predicted_n"] <= 4


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        ({"model": "gone"}, 404, "gone"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "what is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                        ],
                    }
                ]
            },
            400,
            "'type': 'text'",
        ),
    ],
    ids=["a model that is gone", "an image"],
)
def test_refusals_reach_the_user(server: Server, extra: dict[str, Any], status: int, message: str) -> None:
    """It shows ``error.message`` of an answer that is not a stream."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | extra, headers=HEADERS)
    assert answer.status_code == status and "text/event-stream" not in answer.headers["content-type"]
    assert message in answer.json()["error"]["message"]


def test_the_stop_button(server: Server) -> None:
    body = CHAT | {"model": "tiny:slow"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=HEADERS) as answer:
        next(answer.iter_lines())
    until(lambda: is_free(server))
