"""Fields of the bodies: one table for each endpoint, and the reader that checks a body against it.

Owns the names, types and ranges of the fields, in the words of JSON Schema: the reader and ``/openapi.json`` both use them. It
also owns which foreign fields are refused because leaving them out would change the answer. All others are ignored, as vLLM
does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from balcony_runtime.serve.bodies.refusal import RefusedError, bad

#: Most replies of one request: prompts times ``n``.
MOST_CHOICES = 128
#: Most alternatives that are reported at each place.
MOST_LOGPROBS = 20
#: Largest number of a field, far beyond every range; integers in JSON have no bound.
LARGEST_NUMBER = 1e15
#: Fields that would change the answer and that the runtime does not have → values that ask for nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "n_predict": (-1,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_logprobs": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}

Schema = Mapping[str, Any]
Table = Mapping[str, Schema]


def _truth(about: str) -> Schema:
    return {"type": "boolean", "description": about}


def _whole(about: str, least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most, "description": about}


def _number(about: str) -> Schema:
    return {"type": "number", "minimum": -LARGEST_NUMBER, "maximum": LARGEST_NUMBER, "description": about}


def _text(about: str) -> Schema:
    return {"type": "string", "description": about}


_TOKENS: Schema = {"type": "array", "items": {"type": "integer"}}
_PARTS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "input_text", "output_text", "refusal"]},
            "text": {"type": "string"},
            "refusal": {"type": "string"},
        },
    },
}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string"},
            "content": {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
    "description": "The conversation.",
}
_SCHEMA: Schema = {"anyOf": [{"type": "object"}, {"type": "string"}]}
_CHOICE: Schema = {"type": "array", "minItems": 1, "items": {"type": "string"}}
_TOOLS: Table = {
    "tools": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "parameters": {"type": "object"},
                    },
                },
            },
        },
        "description": "Functions that the model may call.",
    },
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "required": ["type", "function"],
                "properties": {"type": {"const": "function"}, "function": {"type": "object", "required": ["name"]}},
            },
            {
                "type": "object",
                "required": ["type", "allowed_tools"],
                "properties": {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": {"type": "object", "required": ["mode", "tools"]},
                },
            },
        ],
        "description": "Whether it calls one; auto without it.",
    },
    "parallel_tool_calls": _truth("Whether a reply may have several calls; true without it."),
    "documents": {"type": "array", "items": {"type": "object"}, "description": "Documents for the chat template."},
    "chat_template_kwargs": {"type": "object", "description": "Further variables of the chat template."},
    "reasoning_effort": _text("A variable of the chat template; none switches thoughts off (enable_thinking = false)."),
}
_ADD_SPECIAL = _truth("Whether a text gets the tokens that the tokenizer puts around texts; true without it.")
_BUDGET: Table = {"budget": {"type": "object", "description": "Keys of a budget file (docs/budget-file.md)."}}
_COMMON: Table = {
    "model": _text("A name of /v1/models."),
    "n": _whole("Replies to each prompt.", 1, MOST_CHOICES),
    "best_of": _whole("Must be n.", 1, MOST_CHOICES),
    "max_tokens": _whole(
        "Most tokens of a reply; 0 needs echo in a completion; -1 and -2 for as many as the context holds.", -2, 2**31
    ),
    "stop": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Texts that end it.",
    },
    "ignore_eos": _truth("Whether to go on after the end-of-sequence token."),
    "min_tokens": _whole("Least tokens of a reply; needs ignore_eos, and no stop.", 0, 2**31),
    "parse_special": _truth(
        "Whether names of control tokens are those tokens; by default only in a completion's text."
    ),
    "return_tokens_as_token_ids": _truth("Whether reported tokens are named token_id:17."),
    "temperature": _number("0 is greedy; 1 without it."),
    "top_p": _number("Probability of the tokens that are kept."),
    "min_p": _number("Least probability of a token that is kept, as a share of the likeliest one's."),
    "top_k": _whole("Number of tokens that are kept; 0 and -1 keep all.", -1, 2**31),
    "repetition_penalty": _number("Penalty of tokens in prompt or reply; 1 is none."),
    "repeat_penalty": _number("The same, as llama.cpp has it; repetition_penalty goes before it."),
    "presence_penalty": _number("Penalty of tokens in the reply; 0 is none."),
    "frequency_penalty": _number("Penalty of a token for each time that the reply has it; 0 is none."),
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}, "description": "Token id to bias."},
    "seed": _whole(
        "Seed of the first reply to a prompt, the others count up; -1 takes a fresh one.", -(2**63), 2**63 - 1
    ),
    "stream": _truth("Whether the answer comes token by token, as server-sent events."),
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "timings_per_token": _truth("Whether every piece of a token in a stream carries timings and balcony."),
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": _SCHEMA}},
        },
        "description": "Structure of the reply, as OpenAI has it.",
    },
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": _SCHEMA,
            "regex": {"type": "string"},
            "choice": _CHOICE,
            "grammar": {"type": "string"},
            "json_object": {"type": "boolean"},
        },
        "description": "The same, as vLLM has it; exactly one of the keys, next to vLLM's options.",
    },
    "guided_json": {**_SCHEMA, "description": "A JSON schema (earlier versions of vLLM)."},
    "guided_regex": _text("A regular expression for the whole reply."),
    "guided_choice": {**_CHOICE, "description": "Texts of which the reply is one."},
    "guided_grammar": _text("A Lark or GBNF grammar."),
    "json_schema": {**_SCHEMA, "description": "A JSON schema (llama.cpp)."},
    "grammar": _text("A Lark or GBNF grammar (llama.cpp); empty for none."),
    **_BUDGET,
}
#: Bodies: field → what it may be.
CHAT: Table = {
    "messages": _MESSAGES,
    **_COMMON,
    **_TOOLS,
    "max_completion_tokens": _whole("The same as max_tokens, and goes before it.", -2, 2**31),
    "logprobs": _truth("Whether to report log-probabilities."),
    "top_logprobs": _whole("Likeliest tokens at each place; needs logprobs.", 0, MOST_LOGPROBS),
}
COMPLETION: Table = {
    "prompt": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKENS]}}, _TOKENS],
        "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
    },
    **_COMMON,
    "logprobs": _whole("Likeliest tokens at each place.", 0, MOST_LOGPROBS),
    "add_special_tokens": _ADD_SPECIAL,
    "echo": _truth("Whether the text begins with the prompt; with logprobs, the prompt is scored."),
}
_FORMATS = ("text", "json_object", "json_schema")
RESPONSE: Table = {
    "input": {
        "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}],
        "description": "A text, or items: messages, function_call, function_call_output and reasoning.",
    },
    "instructions": _text("Text of a system message before the input."),
    "max_output_tokens": _whole("Most tokens of the reply, those of a thought included.", 1, 2**31),
    "text": {
        "type": "object",
        "properties": {
            "format": {
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"enum": _FORMATS}, "schema": _SCHEMA, "strict": {"type": ["boolean", "null"]}},
            }
        },
        "description": "Structure of the reply; json_schema needs a schema.",
    },
    "reasoning": {
        "type": "object",
        "properties": {"effort": {"type": ["string", "null"]}},
        "description": "The effort is a variable of the chat template; none switches thoughts off.",
    },
    "tools": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "name"],
            "properties": {
                "type": {"enum": ["function", "namespace"]},
                "name": {"type": "string"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "tools": {"type": "array", "items": {"type": "object"}},
            },
        },
        "description": "Functions that the model may call, alone or in namespaces.",
    },
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "required": ["type", "name"],
                "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            },
            {
                "type": "object",
                "required": ["type", "mode", "tools"],
                "properties": {"type": {"const": "allowed_tools"}, "tools": {"type": "array"}},
            },
        ],
        "description": "Whether it calls one; auto without it.",
    },
    "include": {
        "type": "array",
        "items": {"type": "string"},
        "description": "message.output_text.logprobs reports log-probabilities; others are ignored.",
    },
    "top_logprobs": _whole("Likeliest tokens at each place.", 0, MOST_LOGPROBS),
    "metadata": {"type": "object", "description": "Comes back with the answer."},
    **{name: _TOOLS[name] for name in ("parallel_tool_calls", "documents", "chat_template_kwargs")},
    **{
        name: schema
        for name, schema in _COMMON.items()
        if name not in ("n", "best_of", "max_tokens", "response_format", "stream_options", "timings_per_token")
    },
}
TOKENIZE: Table = {
    "content": _text("A text."),
    "prompt": _text("The same, as vLLM has it."),
    "add_special": _truth("Whether content gets the tokens that the tokenizer puts around texts; false without it."),
    "add_special_tokens": {**_ADD_SPECIAL, "description": "The same for prompt; true without it."},
    "messages": _MESSAGES,
    **{name: schema for name, schema in _TOOLS.items() if name != "parallel_tool_calls"},
    "parse_special": _COMMON["parse_special"],
    "with_pieces": _truth("Whether tokens are objects with id and piece; false without it (llama.cpp)."),
}
DETOKENIZE: Table = {"tokens": {**_TOKENS, "description": "Token ids."}}
SLOT: Table = {**_BUDGET, "filename": _text("Name of a file, for the actions save and restore.")}


class Fields:
    """The fields of a JSON object, read by type; null means that a field is not there.

    Args:
        body: the object, or its bytes.
        table: the fields that may be read.

    Raises:
        RefusedError: the body is not a JSON object.
    """

    def __init__(self, body: bytes | Mapping[str, Any], table: Table) -> None:
        self._table = table
        found = _object_of(body) if isinstance(body, bytes) else body
        #: Names in the object, those of null included.
        self.names = found.keys()
        self._found: dict[str, Any] = {name: value for name, value in found.items() if value is not None}

    def get(self, name: str) -> Any:
        """A value as it is; None if it is not there."""
        return self._found.get(name)

    def truth(self, name: str) -> bool:
        """A truth value; False if it is not there."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad(name, value, "must be true or false")
        return bool(value)

    def truth_or_none(self, name: str) -> bool | None:
        """A truth value, or None if it is not there."""
        return None if self.get(name) is None else self.truth(name)

    def whole(self, name: str) -> int | None:
        """A whole number within the bounds of the table, or None."""
        value, least, most = self.get(name), self._table[name]["minimum"], self._table[name]["maximum"]
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # also a whole number in JSON Schema
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise bad(name, value, f"must be a whole number from {least} to {most}")
        return value

    def text(self, name: str) -> str | None:
        """A text, or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(name, value, "must be a text")
        return value

    def number(self, name: str) -> float | None:
        """A number, whose range the runtime checks, or None."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST_NUMBER:
            raise bad(name, value, f"must be a number within ±{LARGEST_NUMBER:g}")
        return value

    def tokens(self, name: str) -> list[int]:
        """A list of token ids; the runtime checks that they are in the vocabulary."""
        value: list[int] = self.get(name)
        if not is_tokens(value):
            raise bad(name, value, "must be a list of token ids")
        return value


def is_tokens(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and set(map(type, value)) <= {int}  # of 8 MB each further call would take 0.1 s


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON ({error}): send one object", "invalid_json") from None
    if not isinstance(found, dict):
        raise RefusedError(400, f"the body is a JSON {type(found).__name__}: send one object", "invalid_json")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
