"""Tools: functions that a model may call, and the grammar by which a call's arguments follow their schema.

Owns the checks of ``tools`` and ``tool_choice``, in OpenAI's shapes, and the grammar of a reply that may have calls. The texts
around a call are :mod:`.formats`; :mod:`.calls` reads the calls in a reply.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from balcony_edge.errors import InputError, shown
from balcony_runtime.structure.asked import JSON_FORM, Structure, checked, closed, lenient, schema_text
from balcony_runtime.structure.formats import CallFormat

#: Most tools of one request.
MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_ANY_TEXT = r"/(.|\n)*/"


class Tool(NamedTuple):
    """A function that a model may call.

    Attributes:
        name: its name.
        schema: JSON schema of its arguments, as JSON.
    """

    name: str
    schema: str


def tools_of(given: Any) -> tuple[Tool, ...]:
    """The tools of a list in OpenAI's shape: ``{"type": "function", "function": {"name", "parameters"}}``.

    Raises:
        InputError: a tool is not a function, or its name or schema cannot be used.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > MOST_TOOLS:
        raise InputError(f"tools = {shown(given)}: must be a list of at most {MOST_TOOLS} functions: give a list")
    found = [_tool(one) for one in given]
    names = [tool.name for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tools: two functions are called {name!r}: give each a name of its own")
    return tuple(found)


def _tool(given: Any) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) and given.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise InputError(
            f"tools: {shown(given)}: must be a function: give {{'type': 'function', 'function': {{'name': ..., "
            "'parameters': ...}}"
        )
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"tools: name = {shown(name)}: must have 1 to 64 letters, digits, '_', '-' and '.': rename it")
    schema = schema or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InputError(
            f"tools: parameters of {name}: must be a JSON schema of an object: give {{'type': 'object', ...}}"
        )
    schema = closed({**schema, "type": "object"})
    try:
        return Tool(name, schema_text(_with_form(schema) if function.get("strict") is True else lenient(schema)))
    except RecursionError:
        raise InputError(f"tools: parameters of {name}: are nested too deeply: give fewer levels") from None
    except InputError as error:
        raise InputError(f"tools: {name}: {error}") from None


class Toolbox(NamedTuple):
    """The tools of one reply.

    Attributes:
        tools: functions that it may call.
        must: whether it must call one.
        several: whether it may call more than one.
        form: how the model writes calls.
        tags: marks of calls and thoughts that are tokens, such as Qwen's ``<tool_call>``, and these tokens.
        key: seven letters and digits that begin the ids of its calls.
        document: whether a reply without calls has a structure of its own; calls are then at its very beginning.
    """

    tools: tuple[Tool, ...]
    must: bool
    several: bool
    form: CallFormat
    tags: Mapping[str, int]
    key: str
    document: bool = False

    @property
    def marker_id(self) -> int | None:
        """Token of the format's marker; None if it is a text."""
        return self.tags.get(self.form.marker)

    @property
    def marks(self) -> frozenset[int]:
        """Tokens of the marks of calls: the marker, and those at the ends."""
        form = self.form
        return frozenset(token for name, token in self.tags.items() if name in form.marker + form.tail + form.last)

    def structure(self, content: Structure | None) -> Structure:
        """The structure of the reply: calls, or a content instead unless a call is a must.

        Args:
            content: structure of a reply without calls; None for any text.

        Raises:
            InputError: the content cannot be told from a call, or all is too large.
        """
        form, text = self.form, self._text
        marker = text(form.marker)
        again = f"{text(form.between)} {marker if form.each else ''} call"
        rules = {
            "calls": f"{text(form.first)} call {f'({again})*' if self.several else ''} {text(form.last)}",
            "call": " | ".join(f"call_{number}" for number in range(len(self.tools))),
        }
        for number, tool in enumerate(self.tools):
            rules[f"call_{number}"] = f"{text(form.head + tool.name + form.middle)} args_{number} {text(form.tail)}"
            rules[f"args_{number}"] = f"%json {tool.schema}"
        lines = (f"{name}: {rule}\n" for name, rule in (self._entry(marker, content) | rules).items())
        return checked(Structure("tools", "%llguidance {}\n" + "".join(lines)))

    def _text(self, text: str) -> str:
        """A fixed text in the grammar: to llguidance tags that are tokens are control tokens, which no text matches."""
        names = [name for name in self.tags if name in text]
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return " ".join(
            f"<[{self.tags[part]}]>" if part in self.tags else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def _entry(self, marker: str, content: Structure | None) -> dict[str, str]:
        """Rules from the start to the first call."""
        if self.must:
            return {"start": f"{marker} calls"}
        if content is not None:
            if content.kind not in ("json_schema", "regex"):
                raise InputError(f"{content.kind} with tools: only a JSON schema or a regex can be combined with them")
            if not marker:  # the lexer would have to look ahead to tell a call from a document
                raise InputError(
                    f"{content.kind} with tools: calls of this model's family are documents themselves: give one of the two, "
                    "or tool_choice = 'required'"
                )
            text = f"/{_regex(content.text)}/"
            if content.kind == "json_schema":
                text = f"%json {schema_text(_with_form(json.loads(content.text)))}"
            return {"start": f"{marker} calls | content", "content": text}
        # the other tags may come in the text
        others = " | ".join(f"<[{id_}]>" for name, id_ in self.tags.items() if name != self.form.marker)
        before = f"(TEXT? ({others}))* " if others else ""
        if self.marker_id is not None:
            return {"start": f"{before}TEXT ({marker} calls)?", "TEXT": _ANY_TEXT}
        if marker:  # the shortest text that ends in the marker, after which calls must come
            return {"start": f"{before}(entry calls | TEXT)", "entry[lazy]": f"TEXT {marker}", "TEXT": _ANY_TEXT}
        return {"start": "calls | TEXT", "TEXT": r"/([^{](.|\n)*)?/"}


def toolbox(
    given: Any, choice: Any, parallel: bool, written: Callable[[], tuple[CallFormat, Mapping[str, int]]]
) -> Toolbox | None:
    """The tools that a reply may call; None if it may call none.

    Args:
        given: ``tools`` of the request, or None.
        choice: ``tool_choice`` of the request: ``none``, ``auto``, ``required``, a function by name, ``allowed_tools``, None.
        parallel: whether a reply may have several calls.
        written: gives how the model writes calls, and the marks that are tokens.

    Raises:
        InputError: the tools or the choice cannot be used.
    """
    tools = () if given is None else tools_of(given)
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice)
    name = _named(choice)
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InputError(f"tool_choice = {shown(choice)}: there are no tools: give tools, or leave it out")
        return None
    if choice == "none":
        return None
    (form, tags), key = written(), uuid.uuid4().hex[:7]
    if name is not None:
        chosen = tuple(tool for tool in tools if tool.name == name)
        if not chosen:
            raise InputError(f"tool_choice: {name}: tools has no such function: name one of them")
        return Toolbox(chosen, True, False, form, tags, key)
    if choice not in (None, "auto", "required"):
        allowed = (
            "must be 'none', 'auto', 'required', {'type': 'function', 'function': {'name': ...}} or {'type': "
            "'allowed_tools', 'allowed_tools': {'mode': ..., 'tools': [...]}}: give one of them"
        )
        raise InputError(f"tool_choice = {shown(choice)}: {allowed}")
    return Toolbox(tools, choice == "required", parallel and form.several, form, tags, key)


def _allowed(tools: Sequence[Tool], choice: Mapping[str, Any]) -> tuple[tuple[Tool, ...], Any]:
    """The tools that OpenAI's ``allowed_tools`` leaves, and its mode as a choice."""
    given = choice.get("allowed_tools")
    listed, mode = (given.get("tools"), given.get("mode")) if isinstance(given, Mapping) else (None, None)
    names = [_named(one) for one in listed] if isinstance(listed, Sequence) and not isinstance(listed, str) else []
    if mode not in ("auto", "required") or not names or not {tool.name for tool in tools} >= set(names):
        raise InputError(
            f"tool_choice = {shown(choice)}: allowed_tools must have the mode 'auto' or 'required', and list only functions "
            "that tools has: give {'mode': 'auto', 'tools': [{'type': 'function', 'function': {'name': ...}}]}"
        )
    return tuple(tool for tool in tools if tool.name in names), mode


def _named(choice: Any) -> str | None:
    """Name of the one function that a choice asks for, or None."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _with_form(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"x-guidance": JSON_FORM, **schema}


def _regex(text: str) -> str:
    """A regular expression between the slashes of a grammar."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", text).replace("\n", "\\n")
