"""Formats of calls: how model families write calls of tools, from the table ``formats.toml``.

Owns the choice of a format for a chat template, and the messages for templates that know no tools, write no calls, or have an
unknown format.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from balcony_edge.errors import InputError

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

#: The calls of a message, as a template reads them; SmolLM3's and Falcon-H1's read none, Mixtral 8x22B's a role of this name.
_READS_CALLS = re.compile(r"""(\.|[\[(]\s*['"])tool_calls\b""")


class CallFormat(NamedTuple):
    """How a model family writes calls; ``formats.toml`` describes the fields."""

    name: str
    knows: Sequence[str]
    lacks: Sequence[str] = ()
    marker: str = ""
    each: bool = False
    first: str = ""
    head: str = ""
    middle: str = ""
    tail: str = ""
    between: str = ""
    last: str = ""
    several: bool = True
    written: bool = False  # not of the table: whether the chat template writes the calls of earlier turns


@cache
def formats() -> Mapping[str, CallFormat]:
    """All formats by name, in the order in which they are tried."""
    text = files("balcony_runtime.structure").joinpath("formats.toml").read_text(encoding="utf-8")
    return {name: CallFormat(name, **keys) for name, keys in tomllib.loads(text).items()}


def format_of(template: str) -> CallFormat | None:
    """The format that a chat template's text shows, or None."""
    for one in formats().values():
        if all(text in template for text in one.knows) and not any(text in template for text in one.lacks):
            return one._replace(written=_READS_CALLS.search(template) is not None)
    return None


def plain_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], form: CallFormat
) -> list[dict[str, Any]]:
    """The conversation for a template that writes no calls: calls and results become text.

    Args:
        messages: messages whose contents are texts.
        tools: functions that the system message shows, because the template does not; may be empty.
        form: how the model writes calls.
    """
    found: list[dict[str, Any]] = []
    for is_result, group in itertools.groupby(messages, lambda one: one["role"] == "tool"):
        if is_result:  # results of one turn: many templates want turns to alternate
            texts = (f"<tool_response>\n{one['content']}\n</tool_response>" for one in group)
            found.append({"role": "user", "content": "\n".join(texts)})
            continue
        for message in group:
            calls = _written(message.get("tool_calls") or (), form)
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            found.append(rest | {"content": "\n".join(filter(None, [message["content"], calls]))})
    if tools:
        listed = "\n".join(_json(tool["function"]) for tool in tools)
        instruction = _INSTRUCTION.format(tools=listed)
        if found[0]["role"] in ("system", "developer"):
            found[0] = found[0] | {"content": f"{found[0]['content']}\n\n{instruction}"}
        else:
            found.insert(0, {"role": "system", "content": instruction})
    return found


def one_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with one system message, at its beginning: later ones become words of the user."""
    first = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return _joined([*messages[:first], *map(_of_user, messages[first:])])


def without_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with all system messages in turns of the user, for templates that have none."""
    return _joined([*map(_of_user, messages)])


def _of_user(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "role": "user"} if message["role"] == "system" else message


def _joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with one message for neighbours of the system or of the user: templates want turns to alternate."""
    found: list[dict[str, Any]] = []
    # The texts of each message are joined at the end: adding to a growing text takes quadratic time.
    texts: list[list[str]] = []
    for message in messages:
        if found and message["role"] == found[-1]["role"] and message["role"] in ("system", "user"):
            texts[-1].append(message["content"])
        else:
            found.append(dict(message))
            texts.append([message["content"]])
    return [one | {"content": "\n\n".join(parts)} for one, parts in zip(found, texts, strict=True)]


def _written(calls: Sequence[Mapping[str, Any]], form: CallFormat) -> str:
    functions = [call["function"] for call in calls]
    texts = (f"{form.head}{one['name']}{form.middle}{_json(one['arguments'])}{form.tail}" for one in functions)
    joined = (form.between + (form.marker if form.each else "")).join(texts)
    return joined and f"{form.marker}{form.first}{joined}{form.last}"


def _json(value: Any) -> str:
    """A value of a caller as JSON; Python has values that JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"tools, tool_calls: not JSON ({error}): give texts, numbers, lists and mappings") from None
