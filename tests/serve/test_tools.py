"""Tools over HTTP: OpenAI's own client and its tool loop, streams, and an agent framework."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.shapes import _deltas
from balcony_runtime.structure.calls import Piece, ToolCall

QUESTION: list[Any] = [{"role": "user", "content": "the fox"}]


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: Literal["Ulm", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


class Stop(pydantic.BaseModel):
    """To stop."""


TOOLS: list[Any] = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Stop)]


@pytest.fixture(scope="module")
def server(tool_server: Server) -> Server:
    return tool_server


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, "max_tokens": 120, "seed": 3} | options
    return client.chat.completions.create(**options)


def test_the_loop_of_a_tool(client: openai.OpenAI) -> None:
    """A call, its result, and an answer: the messages go back as the client got them."""
    named = {"type": "function", "function": {"name": "Weather"}}
    (choice,) = ask(client, tool_choice=named).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "Weather" and Weather.model_validate_json(call.function.arguments)
    history = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    (choice,) = ask(client, messages=history, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.message.content
    (choice,) = ask(client, messages=history, tool_choice="required", parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls) == 1


def test_a_call_that_a_stop_string_cuts_is_none_to_run(client: openai.OpenAI) -> None:
    for stream in (False, True):
        found = ask(client, tool_choice="required", parallel_tool_calls=False, stop=["city", "}}"], stream=stream)
        reason = [piece.choices[0].finish_reason for piece in found][-1] if stream else found.choices[0].finish_reason
        assert reason == "stop"


def test_tokens_of_a_conversation_with_tools(client: openai.OpenAI, server: Server) -> None:
    body = {"messages": QUESTION, "tools": TOOLS}
    counted = httpx.post(f"{server.url}/tokenize", json=body).json()["count"]
    assert counted == ask(client, max_tokens=1).usage.prompt_tokens
    assert counted > httpx.post(f"{server.url}/tokenize", json={"messages": QUESTION}).json()["count"]


def test_several_calls(client: openai.OpenAI) -> None:
    counts, ids = set(), set()
    for seed in range(24):
        (choice,) = ask(client, tool_choice="required", seed=seed, temperature=2.0).choices
        if choice.finish_reason == "length":
            continue
        counts.add(len(choice.message.tool_calls))
        ids |= {call.id for call in choice.message.tool_calls}
        for call in choice.message.tool_calls:
            {"Weather": Weather, "Stop": Stop}[call.function.name].model_validate_json(call.function.arguments)
    assert max(counts) > 1 and len(ids) >= sum(counts)


def test_calls_in_pieces(client: openai.OpenAI) -> None:
    """As OpenAI streams them: index, id and name first, then the arguments; the reason is on the last piece."""
    options: dict[str, Any] = {"tool_choice": "required", "seed": 1, "temperature": 2.0}
    whole = ask(client, **options).choices[0]
    pieces = [piece.choices[0] for piece in ask(client, stream=True, **options)]
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.finish_reason]
    begun: list[Any] = []
    texts: list[str] = []
    for piece in pieces:
        for call in piece.delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(begun) and call.type == "function" and call.function.name
                begun.append(call)
                texts.append("")
            assert call.index == len(begun) - 1
            texts[call.index] += call.function.arguments
    wanted = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert [(call.function.name, text) for call, text in zip(begun, texts, strict=True)] == wanted
    assert len(pieces) > 3 * len(begun)


def test_a_token_that_ends_a_head_and_begins_arguments_makes_two_pieces() -> None:
    """Such as Qwen's token of a space, a brace and a quote. Some clients look for no arguments next to a name."""
    found = _deltas([Piece("so"), Piece("", 0, ToolCall("a00", "Stop", "")), Piece('{"', 0)])
    named, arguments = (delta["tool_calls"][0] for delta in found)
    assert found[0]["content"] == "so" and named["id"] == "a00" and named["function"]["arguments"] == ""
    assert arguments == {"index": 0, "function": {"arguments": '{"'}}
    assert _deltas([]) == [{}]


def test_the_clients_own_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=QUESTION, tools=TOOLS, tool_choice="required", seed=4, parallel_tool_calls=False
    ) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert names == [call.function.name] and call.function.parsed_arguments is not None


def test_parse_with_tools_and_a_class(client: openai.OpenAI) -> None:
    """``auto`` with a ``response_format``: the answer is of the class, unless the model calls a tool."""

    def parsed(**options: Any) -> Any:
        """The first reply that the random model ends in time."""
        for seed in range(40):
            with contextlib.suppress(openai.LengthFinishReasonError):
                return client.chat.completions.parse(model="tiny", messages=QUESTION, tools=TOOLS, seed=seed, **options)
        raise AssertionError(options)

    found = parsed(response_format=Weather, temperature=1.5)
    message = found.choices[0].message
    assert isinstance(message.parsed, Weather) or message.tool_calls[0].function.parsed_arguments is not None
    found = parsed(tool_choice="required")
    assert isinstance(found.choices[0].message.tool_calls[0].function.parsed_arguments, Weather | Stop)


def test_documents_and_variables_reach_the_template(server: Server, client: openai.OpenAI) -> None:
    extra = {"documents": [{"text": "over"}], "chat_template_kwargs": {"mood": "lazy"}}
    found = ask(client, extra_body=extra, max_tokens=1)
    llm = server.service.llm
    text = "Weather Stop <user>the fox<assistant>lazyover"
    assert found.usage.prompt_tokens == len(llm.encode(text, chat=False))
    assert llm.decode(llm.encode(QUESTION, tools=TOOLS, documents=extra["documents"],
                                 chat_template_kwargs=extra["chat_template_kwargs"])) == text  # fmt: skip


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """OpenAI's choice of some tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_some_tools_are_allowed(client: openai.OpenAI) -> None:
    for seed in range(6):
        options: dict[str, Any] = {"parallel_tool_calls": False, "seed": seed, "temperature": 2.0}
        (call,) = ask(client, tool_choice=allowed("required", "Stop"), **options).choices[0].message.tool_calls
        assert call.function.name == "Stop"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tools": [{}]}, "tools: {}: must be a function"),
        ({"tool_choice": "required"}, "tool_choice = 'required': there are no tools"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "no_such")}, "allowed_tools must have the mode 'auto' or"),
        ({"tools": TOOLS, "tool_choice": allowed("any", "Stop")}, "allowed_tools must have the mode 'auto' or"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice = 'any': must be 'none', 'auto', 'required'"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls = 1: must be true or false"),
        ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "grammar with tools: only a JSON schema or a regex"),
        ({"documents": 3}, "documents = 3: must be a list of objects"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs = {'tools': 1}: must be an object without"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "message tool_calls: {}: must have a function"),
    ],
    ids=str,
)
def test_what_is_refused(server: Server, extra: dict[str, Any], message: str) -> None:
    found = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2} | extra)
    error = found.json()["error"]
    assert found.status_code == 400 and message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("shape", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(server: Server, shape: str) -> None:
    """An agent that calls a tool and then gives a typed result, which it asks for as a call, too."""
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim is not installed")
    import httpx2  # it comes with pydantic-ai
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    found: list[Any] = []

    async def asked(seed: int) -> Any:
        async with httpx2.AsyncClient() as client:  # the library's own is never closed
            provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none", http_client=client)
            settings = {"extra_body": {"seed": seed}, "temperature": 1.5}  # OpenAI's responses have no seed
            model = getattr(models, shape)("tiny", provider=provider)
            agent = pydantic_ai.Agent(model, output_type=Weather, model_settings=settings)

            @agent.tool_plain
            def stop() -> str:
                """To stop."""
                found.append("stopped")
                return "ok"

            return await agent.run("the fox")

    for seed in range(40):  # until the random model ends its calls in time
        found.clear()
        with contextlib.suppress(pydantic_ai.exceptions.AgentRunError):
            output = asyncio.run(asked(seed)).output
            if found == ["stopped"]:
                break
    assert isinstance(output, Weather) and found == ["stopped"]
