"""Structure of a reply in the body of a request: the fields of OpenAI, vLLM and llama.cpp.

Owns which field asks for what. :mod:`balcony_runtime.structure` checks and compiles it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from balcony_runtime.serve.bodies.fields import Fields
from balcony_runtime.serve.bodies.refusal import bad
from balcony_runtime.structure.asked import lenient

#: Field → parameter of ``SamplingParams``.
_PLAIN = {
    "guided_json": "json_schema",
    "json_schema": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "grammar": "grammar",
}
_OUTPUTS = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
#: vLLM's options next to them that ask for nothing here: there is one compiler, and JSON has one form.
_OPTIONS = {"disable_fallback", "disable_any_whitespace"}
_ANY_OBJECT = {"type": "object"}


def structure_of(fields: Fields) -> dict[str, Any]:
    """The structure that a body asks for, as keywords of ``SamplingParams``; empty for none.

    Raises:
        RefusedError: a field is wrong, or there are two structures.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, parameter in _PLAIN.items():
        value = fields.get(name)
        if value is not None and value != "":
            found[name] = parameter, value
    if (choice := fields.get("guided_choice")) is not None:
        found["guided_choice"] = "grammar", _choices("guided_choice", choice)
    if (asked := _response_format(fields.get("response_format"))) is not None:
        found["response_format"] = "json_schema", asked
    if (outputs := fields.get("structured_outputs")) is not None:
        found["structured_outputs"] = _outputs(outputs)
    if len(found) > 1:
        first, second, *_ = found
        raise bad(second, fields.get(second), f"a reply has one structure, and {first} asks for another; send one")
    return dict(found.values())


def _response_format(value: Any) -> Any:
    """The schema that it asks for, or None for plain text."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's
        return _ANY_OBJECT if schema is None else schema
    asked: Any = value.get("json_schema") if kind == "json_schema" else None
    schema = asked.get("schema") if isinstance(asked, Mapping) else None
    if schema is None:
        allowed = "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': {'schema': ...}}"
        raise bad("response_format", value, f"must be {allowed}")
    return schema if asked.get("strict") is True else lenient(schema)


def _outputs(value: Any) -> tuple[str, Any]:
    allowed = "must have exactly one of json, regex, choice, grammar and json_object, e.g. {'regex': '[0-9]+'}"
    # Clients of vLLM send the options that they leave out as false or null.
    named = value.items() if isinstance(value, Mapping) else ()
    given = {key: one for key, one in named if key not in _OPTIONS and one not in (None, False)}
    if len(given) != 1:
        raise bad("structured_outputs", value, allowed)
    ((key, one),) = given.items()
    if key == "choice":
        return "grammar", _choices("structured_outputs", one)
    if key == "json_object" and one is True:
        return "json_schema", _ANY_OBJECT
    if key not in _OUTPUTS:
        raise bad("structured_outputs", value, allowed)
    return _OUTPUTS[key], one


def _choices(name: str, texts: Any) -> str:
    """A grammar of texts of which the reply is one."""
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or not texts or not all(isinstance(text, str) and text for text in texts):
        raise bad(name, texts, "must be a list of texts that are not empty, e.g. ['yes', 'no']")
    # As one expression: a rule may have 2,000 choices.
    return "start: TEXT\nTEXT: " + " | ".join(json.dumps(text) for text in texts)
