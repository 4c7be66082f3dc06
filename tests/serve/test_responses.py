"""OpenAI's responses: the same replies as a chat's, in items and events that OpenAI's own types accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from balcony_edge.control.decision import Decision
from balcony_runtime.reply import Token
from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.bodies.responses import read_response
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work import answers
from balcony_runtime.serve.work.energy import EnergyMeter
from balcony_runtime.serve.work.events import ResponseShapes
from balcony_runtime.serve.work.jobs import Job
from balcony_runtime.structure.calls import CallReader
from balcony_runtime.structure.formats import DEFAULT, formats
from balcony_runtime.structure.marks import ThoughtReader
from balcony_runtime.structure.tools import Tool, Toolbox
from tests.serve.client import CHAT, HELLO
from tests.serve.conftest import with_template
from tests.serve.test_reach import THINKS
from tests.serve.test_tools import QUESTION, TOOLS, Weather

PATH = "/v1/responses"
BODY: dict[str, Any] = {"input": "hello", "max_output_tokens": 6, "temperature": 0}
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


def events_of(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each of which has its type as its name; OpenAI's types accept all of them."""
    text = httpx.post(f"{server.url}{PATH}", json=body | {"stream": True}, timeout=60).text
    *blocks, end = text.split("\n\n")
    assert end == "" and "[DONE]" not in text
    found = []
    for block in blocks:
        name, data = (line for line in block.split("\n") if line != ": waiting")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        EVENT.validate_python(found[-1])
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def bare(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs between two answers to one request."""
    kept = {key: value for key, value in response.items() if key not in ("id", "timings", "balcony", "usage")}
    own = ("id", "call_id")
    kept["output"] = [{key: value for key, value in item.items() if key not in own} for item in response["output"]]
    return kept | {"created_at": 0, "completed_at": 0}


def told(events: list[dict[str, Any]], kind: str) -> str:
    """The text that the deltas of one kind add up to."""
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


def test_a_response_is_a_chat_s_reply(server: Server, http: httpx.Client) -> None:
    found = http.post(PATH, json=BODY).json()
    Response.model_validate(found)
    chat = http.post(CHAT, json=HELLO).json()
    (item,) = found["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = {key: found["usage"][key] for key in ("input_tokens", "output_tokens", "total_tokens")}
    assert list(usage.values()) == [chat["usage"]["prompt_tokens"], 6, chat["usage"]["total_tokens"]]
    assert found["balcony"]["tokens_per_exit"] == {"5": 6} and found["timings"]["predicted_n"] == 6
    assert (found["model"], found["store"], found["object"]) == ("tiny", False, "response")


def test_events(server: Server) -> None:
    events = events_of(server, BODY)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [events[0]["response"][key] for key in ("status", "output", "usage")] == ["in_progress", [], None]
    assert events[2]["item"]["content"] == [] and events[3]["part"]["text"] == ""
    whole = httpx.post(f"{server.url}{PATH}", json=BODY).json()
    assert bare(events[-1]["response"]) == bare(whole)
    assert told(events, "output_text") == whole["output"][0]["content"][0]["text"] == events[-4]["text"]
    assert events[-1]["response"]["usage"]["output_tokens"] == 6
    assert events[-1]["response"]["balcony"]["tokens_per_exit"] == {"5": 6}


def test_openai_s_client(client: openai.OpenAI) -> None:
    """Text, instructions, a budget, its own reader of streams, and the items sent back as they came."""
    options: dict[str, Any] = {"model": "tiny:exit-2", "temperature": 0, "max_output_tokens": 6}
    first = client.responses.create(input="hello", instructions="brown", **options)
    messages: list[Any] = [{"role": "system", "content": "brown"}, {"role": "user", "content": "hello"}]
    chat: dict[str, Any] = {"model": "tiny:exit-2", "temperature": 0, "max_tokens": 6}
    second = client.chat.completions.create(messages=messages, **chat)
    assert first.output_text == second.choices[0].message.content and first.instructions == "brown"
    history: list[Any] = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "fox"}]
    with client.responses.stream(input=history, instructions="brown", **options) as stream:
        for _ in stream:
            pass
    with pytest.raises(RuntimeError, match="completed"):  # as the client does for one that is incomplete
        stream.get_final_response()
    answered = client.responses.create(input=history, instructions="brown", **options)
    messages += [{"role": "assistant", "content": first.output_text}, {"role": "user", "content": "fox"}]
    second = client.chat.completions.create(messages=messages, **chat)
    assert answered.output_text == second.choices[0].message.content
    assert second.usage is not None and answered.usage is not None
    assert answered.usage.input_tokens == second.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="keeps no answers") as refused:
        client.responses.create(input="hello", previous_response_id=first.id, **options)
    assert refused.value.param == "previous_response_id"


def test_the_loop_of_a_tool(tool_server: Server) -> None:
    """A call, its result, and an answer; the prompt is that of a chat with the same messages."""
    asked = {"input": "the fox", "tools": FLAT, "max_output_tokens": 120, "seed": 3}
    named = {"type": "function", "name": "Weather"}
    url = f"{tool_server.url}{PATH}"
    found = httpx.post(url, json=asked | {"tool_choice": named}, timeout=60).json()
    Response.model_validate(found)
    (call,) = found["output"]
    assert (found["status"], call["type"], call["name"]) == ("completed", "function_call", "Weather")
    assert Weather.model_validate_json(call["arguments"])
    history = [*QUESTION, call, {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]
    answer = httpx.post(url, json=asked | {"input": history, "tool_choice": "none"}, timeout=60).json()
    function = {"name": call["name"], "arguments": call["arguments"]}
    calls = [{"id": call["call_id"], "type": "function", "function": function}]
    told = {"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"}
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}, told]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 120, "seed": 3, "tool_choice": "none"}
    chat = httpx.post(f"{tool_server.url}{CHAT}", json=body, timeout=60).json()
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_calls_in_events(tool_server: Server) -> None:
    body = {"input": "the fox", "tools": FLAT, "max_output_tokens": 120, "tool_choice": "required", "seed": 1}
    body["temperature"] = 2.0
    whole = httpx.post(f"{tool_server.url}{PATH}", json=body, timeout=60).json()
    events = events_of(tool_server, body)
    assert bare(events[-1]["response"]) == bare(whole)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == list(range(len(whole["output"])))
    assert all(event["item"]["arguments"] == "" for event in added)
    for event, item in zip(added, events[-1]["response"]["output"], strict=True):
        own = [one for one in events if one.get("item_id") == item["id"]]
        assert told(own, "function_call_arguments") == item["arguments"] == own[-1]["arguments"]
        assert own[-1]["name"] == item["name"] == event["item"]["name"]


def test_a_call_that_a_stop_string_cuts_is_none_to_run(tool_server: Server) -> None:
    body = {
        "input": "the fox",
        "tools": FLAT,
        "max_output_tokens": 120,
        "tool_choice": "required",
        "stop": ["city", "}}"],
    }
    found = httpx.post(f"{tool_server.url}{PATH}", json=body | {"parallel_tool_calls": False}, timeout=60).json()
    (call,) = found["output"]
    assert found["status"] == call["status"] == "incomplete" and found["incomplete_details"] is None


def test_tools_that_only_openai_could_run_are_left_out_next_to_functions() -> None:
    """Codex always offers web_search. The answer repeats what the model was offered; alone, such a tool is refused."""
    asked = read_response(json.dumps(BODY | {"tools": [{"type": "web_search"}, *FLAT]}).encode())
    assert asked.response is not None
    assert asked.tooling["tools"] == TOOLS and asked.response["tools"] == FLAT
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}, FLAT[0]]}
    allowed = read_response(
        json.dumps(BODY | {"tools": [{"type": "web_search"}, *FLAT], "tool_choice": choice}).encode()
    )
    named = allowed.tooling["tool_choice"]["allowed_tools"]["tools"]
    assert [tool["function"]["name"] for tool in named] == [FLAT[0]["name"]]
    with pytest.raises(RefusedError, match="web_search"):
        read_response(json.dumps(BODY | {"tools": [{"type": "web_search"}]}).encode())
    with pytest.raises(RefusedError, match="custom"):
        read_response(json.dumps(BODY | {"tools": [{"type": "custom", "name": "x"}, *FLAT]}).encode())


def test_a_format(client: openai.OpenAI, http: httpx.Client) -> None:
    parsed = client.responses.parse(model="tiny", input="hello", text_format=Weather, max_output_tokens=120)
    assert isinstance(parsed.output_parsed, Weather)
    named = {"type": "json_schema", "name": "yes", "schema": {"const": "yes"}}
    found = http.post(PATH, json=BODY | {"text": {"format": named}}).json()
    assert found["output"][0]["content"][0]["text"] == '"yes"' and found["status"] == "completed"


def test_log_probabilities(server: Server, http: httpx.Client) -> None:
    body = BODY | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = http.post(PATH, json=body).json()
    Response.model_validate(found)
    chat = http.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 2}).json()
    expected = chat["choices"][0]["logprobs"]["content"]
    assert found["output"][0]["content"][0]["logprobs"] == expected and len(expected) == 6
    events = events_of(server, body)
    pieces = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [one for piece in pieces for one in piece] == expected and found["top_logprobs"] == 2


def test_thoughts_are_items(serve: Callable[..., Server], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    thinker = serve(path=with_template(tiny.path, tmp_path_factory.mktemp("thinks"), THINKS), name="tiny")
    (text,) = httpx.post(f"{thinker.url}{PATH}", json=BODY).json()["output"]
    assert text["type"] == "reasoning" and text["content"][0]["type"] == "reasoning_text"
    events = events_of(thinker, BODY)
    assert told(events, "reasoning_text") == text["content"][0]["text"]
    assert events[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": 6}
    (plain,) = httpx.post(f"{thinker.url}{PATH}", json=BODY | {"reasoning": {"effort": "none"}}).json()["output"]
    assert plain["type"] == "message"
    # The tiny model never closes its thought, so what it says is given here.
    codec, ids = thinker.service.llm.codec, thinker.service.llm.encode("hello")
    shapes = ResponseShapes(read_response(b'{"input": "hello"}'), "tiny", codec, [""], EnergyMeter(tuple))
    job, made = Job(0, 0, ids, None), []
    for text, reason in (("hm", None), ("</thi", None), ("nk>", None), ("y", None), ("es", "stop")):
        made += shapes.token(job, Token(7, text, 5, 1.0, None, None, 0, 0, Decision(5), finish_reason=reason))
    kinds = [event["type"].removeprefix("response.").removeprefix("output_") for event in made]
    part = ["content_part.done", "item.done"]
    begin = ["item.added", "content_part.added"]
    thought = [*begin, "reasoning_text.delta", "reasoning_text.done", *part]
    assert kinds == [*thought, *begin, "text.delta", "text.delta", "text.done", *part, "completed"]
    assert [event["output_index"] for event in made[:-1]] == [0] * 6 + [1] * 7
    items = made[-1]["response"]["output"]
    assert [item["content"][0]["text"] for item in items] == ["hm", "yes"]
    assert [item["status"] for item in items] == ["completed"] * 2
    assert shapes.whole([job], [None])["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize("end", [("1", "length"), ("1}\n</tool_call>", "stop")])
def test_white_space_before_a_call_is_no_item_after_it(end: tuple[str, str]) -> None:
    """A model that may think begins with it, and the bound cuts the call."""
    box = Toolbox((Tool("f", "{}"),), False, True, formats()[DEFAULT], {}, "abcdefg")
    codec: Any = SimpleNamespace(thought_reader=lambda ids: ThoughtReader(False))
    shapes = ResponseShapes(read_response(b'{"input": "hello"}'), "tiny", codec, [""], EnergyMeter(tuple))
    job: Any = Job(0, 0, [1], None)
    job.stream = SimpleNamespace(call_reader=lambda: CallReader(box))
    begin: list[tuple[str, Any]] = [("\n", None), ('<tool_call>\n{"name": "f", "arguments": {"a":', None)]
    for text, reason in (*begin, end):
        shapes.token(job, Token(7, text, 5, 1.0, None, None, 0, 0, Decision(5), finish_reason=reason))
    (call,) = shapes._items
    assert call["arguments"] == '{"a":' + end[0].partition("\n")[0]
    assert call["status"] == ("incomplete" if end[1] == "length" else "completed")


def test_log_probabilities_of_a_message_are_not_those_of_its_thought() -> None:
    codec: Any = SimpleNamespace(thought_reader=lambda ids: ThoughtReader(False), name=str)
    asked = read_response(b'{"input": "hello", "include": ["message.output_text.logprobs"]}')
    shapes = ResponseShapes(asked, "tiny", codec, [""], EnergyMeter(tuple))
    job, texts = Job(0, 0, [1], None), ("<think>", "hm", "</think>", "yes")
    for place, text in enumerate(texts):
        shapes.token(job, Token(place, text, 5, 1.0, None, None, 0, 0, Decision(5), logprob=-1.0))
    assert [entry["token"] for entry in shapes._items[1]["content"][0]["logprobs"]] == ["3"]


def test_a_failure_is_an_event(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "OPENING_S", 0.0)
    monkeypatch.setattr(server.service, "limits", server.service.limits.__class__(request_s=0.5))
    events = events_of(server, BODY | {"max_output_tokens": 100, "budget": {"max_pace_tps": 5}, "ignore_eos": True})
    failed = events[-1]["response"]
    assert (events[-1]["type"], failed["status"]) == ("response.failed", "failed")
    assert failed["error"]["code"] == "server_error" and "longer than 0.5 s" in failed["error"]["message"]


def test_a_failure_before_the_first_token_follows_the_first_events() -> None:
    """OpenAI's reader of streams raises an error of its own for a stream that begins with another event."""
    for begun, words in ((False, ["created", "in_progress", "failed"]), (True, ["failed"])):
        codec: Any = None
        shapes = ResponseShapes(read_response(b'{"input": "hello"}'), "tiny", codec, [""], EnergyMeter(tuple))
        if begun:
            shapes.opening(Job(0, 0, [1], None), None)
        made = shapes.failure(RefusedError(504, "too long", "timeout"))
        assert [event["type"] for event in made] == [f"response.{word}" for word in words]
        assert [event["response"]["status"] for event in made] == ["in_progress"] * (len(made) - 1) + ["failed"]
        assert made[-1]["sequence_number"] == 2


def test_comments_come_before_names(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEEPALIVE_S", 0.005)  # a token comes every 25 ms
    paced = BODY | {"budget": {"max_pace_tps": 40}}
    assert told(events_of(server, paced), "output_text")  # its numbers have no gap


def messages(*items: Any) -> Any:
    return read_response(json.dumps({"input": items}).encode()).prompts[0]


def test_an_item_that_only_its_id_names_is_refused_with_a_way_out() -> None:
    """So Vercel's AI SDK names the answers of earlier turns, unless it is told that nothing is stored."""
    with pytest.raises(RefusedError, match=r"keeps no items.*store = false") as refused:
        messages({"role": "user", "content": "x"}, {"type": "item_reference", "id": "msg_1"})
    assert (refused.value.status, refused.value.param) == (400, "input")


def test_items_of_a_turn_are_one_message() -> None:
    """Thought, text and calls of a turn, and a turn after it."""
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    say = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    gave = {"type": "function_call_output", "call_id": "a", "output": "1"}
    asked = {"role": "user", "content": "x"}
    called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    found = messages(asked, thought, say, call, call, gave, thought, call, gave, say, thought, say, say)
    turn = {"role": "assistant", "content": say["content"], "reasoning_content": "hm"}
    result = {"role": "tool", "tool_call_id": "a", "content": "1"}
    assert found == [
        asked,
        turn | {"tool_calls": [called, called]},
        result,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [called]},
        result,
        {"role": "assistant", "content": say["content"]},
        turn,
        {"role": "assistant", "content": say["content"]},
    ]
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "x"}
    assert messages(summary, say)[0]["reasoning_content"] == "so"
    assert messages({"type": "reasoning", "summary": [], "encrypted_content": "x"}, say) == [
        {"role": "assistant", "content": say["content"]}
    ]


def test_a_function_of_a_namespace_comes_back_with_it() -> None:
    """So Codex groups those of an MCP server, and it finds a call's function by both names."""
    space = {"type": "namespace", "name": "mcp", "description": "", "tools": [{"type": "function", "name": "f"}]}
    call = {"type": "function_call", "call_id": "a", "namespace": "mcp", "name": "f", "arguments": "{}"}
    gave = {"type": "function_call_output", "call_id": "a", "output": "1"}
    tools = [space, {"type": "function", "name": "f"}]
    asked = read_response(json.dumps({"input": [*QUESTION, call, gave], "tools": tools}).encode())
    assert [tool["function"]["name"] for tool in asked.tooling["tools"]] == ["mcp__f", "f"]
    assert "namespace" not in asked.tooling["tools"][0]["function"]
    assert asked.prompts[0][1]["tool_calls"][0]["function"]["name"] == "mcp__f"
    box = Toolbox((Tool("mcp__f", "{}"), Tool("f", "{}")), True, True, formats()[DEFAULT], {}, "abcdefg")
    codec: Any = SimpleNamespace(thought_reader=lambda ids: None)
    shapes = ResponseShapes(asked, "tiny", codec, [""], EnergyMeter(tuple))
    job: Any = Job(0, 0, [1], None)
    job.stream = SimpleNamespace(call_reader=lambda: CallReader(box))
    made = []
    for name, reason in (("mcp__f", None), ("f", "stop")):
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>\n'
        made += shapes.token(job, Token(7, text, 5, 1.0, None, None, 0, 0, Decision(5), finish_reason=reason))
    for event in made:
        EVENT.validate_python(event)
    assert [(item.get("namespace"), item["name"]) for item in made[-1]["response"]["output"]] == [
        ("mcp", "f"),
        (None, "f"),
    ]
    assert [event["name"] for event in made if event["type"].endswith("arguments.done")] == ["f", "f"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", '{"a": 1e999}'),
        ("metadata", '{"a": "\\ud800"}'),
        ("text", '{"verbosity": "\\ud800"}'),
        ("tools", '[{"type": "function", "name": "f", "parameters": {"minimum": 1e999}}]'),
        ("metadata", '{"a": ' + "[" * 300 + "]" * 300 + "}"),
        ("metadata", '{"a": "' + "x" * 70_000 + '"}'),
        ("tools", '[{"type": "namespace", "name": "n", "tools": [], "description": "' + "x" * 70_000 + '"}]'),
        ("tools", "[" + ", ".join(['{"type": "namespace", "name": "n", "tools": []}'] * 2_000) + "]"),
    ],
)
def test_what_no_answer_can_repeat_is_refused(field: str, value: str) -> None:
    """Else a whole answer is a bug (500), and a stream breaks off or is no JSON."""
    with pytest.raises(RefusedError, match=f"{field}: it comes back") as refused:
        read_response(f'{{"input": "hello", "{field}": {value}}}'.encode())
    assert (refused.value.status, refused.value.param) == (400, field)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "input", "must be a text or a list of items"),
        ({"input": []}, "input", "must be a text or a list of items"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "send the item itself"),
        ({"input": ["hello"]}, "input", "leave others out"),
        (BODY | {"background": True}, "background", "keeps no answers"),
        (BODY | {"prompt": {"id": "p"}}, "prompt", "keeps no answers"),
        (BODY | {"tools": [{"type": "web_search"}]}, "tools", "only functions and namespaces"),
        (
            BODY | {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
            "tools",
            "leave others out",
        ),
        (BODY | {"tools": [{"type": "namespace", "tools": FLAT}]}, "tools", "leave others out"),
        (BODY | {"tool_choice": {"type": "web_search"}}, None, "tool_choice"),
        (BODY | {"text": {"format": {"type": "json_schema"}}}, "text", "'schema'"),
        (BODY | {"text": "json"}, "text", "must be an object"),
        (BODY | {"reasoning": "low"}, "reasoning", "must be an object"),
        (BODY | {"metadata": [1]}, "metadata", "must be an object"),
        (BODY | {"max_output_tokens": 0}, "max_output_tokens", "from 1 to"),
        (BODY | {"modalities": ["audio"]}, "modalities", "not supported"),
        (BODY | {"max_tokens": 5}, "max_tokens", "give max_output_tokens"),
        (BODY | {"response_format": {"type": "json_object"}}, "response_format", "give text"),
        (BODY | {"max_tokens": 5}, "max_tokens", "give max_output_tokens"),
        (BODY | {"response_format": {"type": "json_object"}}, "response_format", "give text"),
        ({"input": "the quick brown fox " * 200}, "input", "context"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, body: dict[str, Any], field: str | None, words: str) -> None:
    answer = http.post(PATH, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and words in error["message"], error
