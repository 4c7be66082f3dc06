"""Bodies of OpenAI's responses, read as chats.

Owns the translation: items become messages, and tools, choices and formats get the form that a chat has. The rules of a chat
(``asked``) hold for everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import to_json

from balcony_runtime.serve.bodies.asked import Asked, asked_by
from balcony_runtime.serve.bodies.fields import CHAT, FOREIGN, RESPONSE, Fields
from balcony_runtime.serve.bodies.refusal import RefusedError, bad

#: Fields that need answers or prompts of earlier requests, of which the server keeps none → values that ask for nothing.
_KEPT: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": ("",),
    "conversation": (),
    "prompt": (),
    "background": (False,),
}
#: Fields of a chat that would change the answer → their names here. OpenAI refuses them, too.
_RENAMED = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
#: Tools that OpenAI's servers run.
_HOSTED = ("web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation")
#: Fields that mean here what they mean in a chat.
_SAME = (RESPONSE.keys() | FOREIGN.keys()) & (CHAT.keys() | FOREIGN.keys()) - {"tools", "tool_choice"}
_LOGPROBS = "message.output_text.logprobs"
#: Most bytes of a field that comes back with the answer and that nothing else bounds; it is kept until the answer ends.
MOST_REPEATED = 1 << 16


def read_response(body: bytes) -> Asked:
    """Read the body of a response.

    Raises:
        RefusedError: the body cannot be used.
    """
    fields = Fields(body, RESPONSE)
    for name, harmless in _KEPT.items():
        if (value := fields.get(name)) is not None and value not in harmless:
            raise bad(name, value, "the server keeps no answers; send the whole conversation as input instead")
    for name, here in _RENAMED.items():
        if (value := fields.get(name)) is not None:
            raise bad(name, value, f"is a field of chats; give {here} instead")
    include, tools = fields.get("include"), _offered(fields.get("tools"))
    chat = {name: fields.get(name) for name in _SAME}
    chat |= {
        "messages": _messages(fields),
        "max_completion_tokens": fields.whole("max_output_tokens"),
        "tools": [_nested(one) for one in functions(tools)] if isinstance(tools, list) else tools,
        "tool_choice": _choice(fields.get("tool_choice")),
        "response_format": _format(fields.get("text")),
        "reasoning_effort": _object(fields, "reasoning").get("effort"),
        "logprobs": bool(chat["top_logprobs"]) or (isinstance(include, list) and _LOGPROBS in include),
    }
    return replace(asked_by(Fields(chat, CHAT), chat=True), response=_repeated(fields, tools))


def _offered(tools: Any) -> Any:
    """The tools that the model may call: next to functions, those that only OpenAI could run are left out."""
    if not isinstance(tools, list):
        return tools  # a chat refuses it
    return [tool for tool in tools if not _hosted(tool)] or tools


def _hosted(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("type") in _HOSTED


def _object(fields: Fields, name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad(name, value, "must be an object")
    return value or {}


def _repeated(fields: Fields, tools: Any) -> dict[str, Any]:
    """What an answer says again, with OpenAI's defaults; ``tools`` are those that a chat has taken.

    Raises:
        RefusedError: an answer cannot say it.
    """
    found = {
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": _object(fields, "metadata"),
        "parallel_tool_calls": fields.truth_or_none("parallel_tool_calls") is not False,
        "reasoning": {"effort": None, "summary": None} | _object(fields, "reasoning"),
        "temperature": 1.0 if (temperature := fields.get("temperature")) is None else temperature,
        "text": {"format": {"type": "text"}} | _object(fields, "text"),
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": tools or [],
        "top_logprobs": fields.get("top_logprobs") or 0,
        "top_p": 1.0 if (top_p := fields.get("top_p")) is None else top_p,
        "background": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
    }
    for name, value in found.items():
        _refuse_unwritable(name, value, bounded=name in ("instructions", "text", "tools"))
    # The prompt bounds functions, but no prompt has the other fields of a namespace.
    _refuse_unwritable("tools", [tool | {"tools": None} for tool in found["tools"] if tool["type"] == "namespace"])
    return found


def _refuse_unwritable(name: str, value: Any, *, bounded: bool = False) -> None:
    """Refuse a value that JSON has no words for, though Python reads it, or one without bounds that would fill every event."""
    allowed = "it comes back with the answer: give Unicode, finite numbers and fewer levels"
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
        to_json([[value]])  # it has a bound of levels, and events put two around a value
    except (ValueError, RecursionError):
        pass
    else:
        if bounded or size <= MOST_REPEATED:
            return
        allowed = f"it comes back with the answer: at most {MOST_REPEATED} bytes are kept"
    raise RefusedError(400, f"{name}: {allowed}", "invalid_value", param=name)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise bad("input", given, "must be a text or a list of items, e.g. [{'role': 'user', 'content': 'Hello'}]")
    instructions = fields.text("instructions")
    found: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        _add(found, item)
    return found


def _add(messages: list[dict[str, Any]], item: Any) -> None:
    """Add an item. Thought, text and calls of one turn become one message, as templates expect it."""
    kind = item.get("type") or "message" if isinstance(item, dict) else None
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message" and isinstance(item.get("role"), str):
        if item["role"] == "assistant" and last is not None and last["content"] is None and "tool_calls" not in last:
            last["content"] = item.get("content")  # the answer after a thought
        else:
            messages.append({"role": item["role"], "content": item.get("content")})
    elif kind == "reasoning":
        if thought := _text(item.get("content")) or _text(item.get("summary")):
            messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
    elif kind == "function_call":
        if last is None:
            messages.append(last := {"role": "assistant", "content": None})
        function = {"name": name_of(item), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "item_reference":
        raise bad("input", item, "the server keeps no items; send the item itself, as clients do with store = false")
    else:
        allowed = "messages (with a role and a content), function_call, function_call_output and reasoning"
        raise bad("input", item, f"items may be {allowed}; leave others out")


def _text(parts: Any) -> str:
    """Text of the parts of a thought."""
    listed = parts if isinstance(parts, Sequence) else ()
    texts = [part.get("text") for part in listed if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def functions(tools: Any) -> list[dict[str, Any]]:
    """The functions of ``tools``; those of a namespace have it as a field."""
    found: list[dict[str, Any]] = []
    for tool in tools:
        inner: Any = [tool]
        space: dict[str, str] = {}
        if isinstance(tool, dict) and tool.get("type") == "namespace" and isinstance(tool.get("name"), str):
            inner, space = tool.get("tools"), {"namespace": tool["name"]}
        for one in inner if isinstance(inner, list) else [None]:
            if not isinstance(one, dict) or one.get("type") != "function":
                raise bad("tools", tool, "only functions and namespaces of functions are there; leave others out")
            found.append(one | space)
    return found


def name_of(function: Mapping[str, Any]) -> Any:
    """The name by which the model knows a function: that of its namespace comes before its own."""
    space, name = function.get("namespace"), function.get("name")
    return f"{space}__{name}" if space and isinstance(space, str) and isinstance(name, str) else name


def _nested(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function as a chat has it: all but the type is one level down."""
    rest = {key: value for key, value in function.items() if key not in ("type", "namespace")}
    return {"type": "function", "function": rest | {"name": name_of(function)}}


def _choice(given: Any) -> Any:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "function":
        return _nested(given)
    tools = given.get("tools") if kind == "allowed_tools" else None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        kept = [_nested(tool) for tool in tools if not _hosted(tool)]
        return {"type": kind, kind: {"mode": given.get("mode"), "tools": kept}}
    return given  # a chat refuses what it does not know


def _format(text: Any) -> dict[str, Any] | None:
    """The format that a chat has; what its schema says is checked there."""
    if text is None:
        return None
    asked: Any = text.get("format") or {"type": "text"} if isinstance(text, dict) else None
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema" or asked.get("schema") is None:
        allowed = "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'schema': ...}"
        raise bad("text", text, f"must be an object whose format is {allowed}")
    return {"type": kind, kind: {"schema": asked["schema"], "strict": asked.get("strict")}}
