"""Formats of calls: how model families write calls of tools, from the table ``formats.toml``.

Owns the choice of a format for a chat template, and the messages for templates that know no tools or an unknown format.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

#: Format that a model is told whose template has none of the table's.
DEFAULT = "hermes"
_INSTRUCTION = """\
You can call these functions:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON, between these marks:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


class CallFormat(NamedTuple):
    """How a model family writes calls; ``formats.toml`` describes the fields."""

    name: str
    knows: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    marker: str = ""
    each: bool = False
    first: str = ""
    head: str = ""
    middle: str = ""
    tail: str = ""
    between: str = ""
    last: str = ""
    several: bool = True


@cache
def formats() -> Mapping[str, CallFormat]:
    """All formats by name, in the order in which they are tried."""
    text = files("balcony_runtime.structure").joinpath("formats.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text).items()
    return {
        name: CallFormat(name, **{**keys, "knows": tuple(keys["knows"]), "lacks": tuple(keys.get("lacks", ()))})
        for name, keys in found
    }


def format_of(template: str) -> CallFormat | None:
    """The format that a chat template's text shows, or None."""
    for one in formats().values():
        if all(text in template for text in one.knows) and not any(text in template for text in one.lacks):
            return one
    return None


def plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: calls and results as text, and tools in the system message.

    Args:
        messages: messages whose contents are texts.
        tools: functions that the model may call; may be empty.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if found and found[-1]["role"] == "user" and found[-1]["content"].startswith("<tool_response>"):
                found[-1]["content"] += f"\n{text}"  # results of one turn: many templates want turns to alternate
            else:
                found.append({"role": "user", "content": text})
            continue
        calls = [_written(call["function"]) for call in message.get("tool_calls") or ()]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        found.append(rest | {"content": "\n".join(filter(None, [message["content"], *calls]))})
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        instruction = _INSTRUCTION.format(tools=listed)
        if found[0]["role"] in ("system", "developer"):
            found[0] = found[0] | {"content": f"{found[0]['content']}\n\n{instruction}"}
        else:
            found.insert(0, {"role": "system", "content": instruction})
    return found


def without_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its system message in the first turn, for templates that have none."""
    first, *rest = (dict(message) for message in messages)
    if first["role"] != "system" or not rest:
        return [first, *rest]
    return [rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _written(function: Mapping[str, Any]) -> str:
    form = formats()[DEFAULT]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{form.marker}{form.head}{function['name']}{form.middle}{arguments}{form.tail}"
