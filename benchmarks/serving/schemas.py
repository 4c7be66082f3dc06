"""JSON schemas made at random: supported ones, ones with keywords that are refused by name, and hostile ones.

Owns the generator that :mod:`.structured` and tests/runtime/structure/test_structure.py share. Every supported schema has short
instances: texts and lists are bounded, so that a random model comes to an end.
"""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "score", "active", "price", "born", "note", "id")
PATTERNS = ("^[A-Z]{3}-[0-9]{2}$", "^(yes|no|maybe)$", "^[a-z]{1,6}@[a-z]{2,5}\\.org$", "^#[0-9a-f]{6}$")
FORMATS = ("ipv4", "uuid", "date", "time", "date-time", "email")
#: Keywords that llguidance does not have → a schema with each, besides a type.
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
}


def schema(make: random.Random) -> dict[str, Any]:
    """A supported schema of at most three levels, an object at its top."""
    made = _object(make, 3)
    if make.random() < 0.2:  # by reference, of a list that may hold itself
        made["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 99},
                    "next": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        }
        made["properties"]["list"] = {"$ref": "#/$defs/node"}
        made["required"].append("list")
    return made


def unsupported(make: random.Random) -> tuple[str, dict[str, Any]]:
    """``(keyword, schema)``: a schema with one keyword that is refused, at a random place."""
    keyword = make.choice(sorted(UNSUPPORTED))
    made = _object(make, 2)
    made["properties"]["refused"] = UNSUPPORTED[keyword]
    made["required"].append("refused")
    return keyword, made


def hostile() -> dict[str, dict[str, Any]]:
    """Name → keywords of ``SamplingParams`` that ask for too much, for what cannot be, or for what is no schema."""

    def nested(levels: int) -> Any:
        found: Any = {"type": "integer"}
        for _ in range(levels):
            found = {"type": "array", "items": found}
        return found

    branches = [{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(3000)]
    schemas: dict[str, Any] = {
        "nested 200 levels": nested(200),
        "nested 5000 levels": nested(5000),
        "a reference to itself": {"$ref": "#"},
        "an object that holds itself": {
            "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}},
            "$ref": "#/$defs/n",
        },
        "an unknown reference": {"$ref": "#/$defs/nothing"},
        "a reference to the network": {"$ref": "http://localhost/schema.json"},
        "100,000 values": {"enum": [f"value {i}" for i in range(100_000)]},
        "3,000 open branches": {"anyOf": branches},
        "5,000 optional properties": {
            "type": "object",
            "properties": {f"k{i}": {"type": "string"} for i in range(5000)},
            "additionalProperties": False,
        },
        "a large divisor": {"type": "integer", "multipleOf": 1_234_567},
        "a small divisor": {"type": "number", "multipleOf": 0.000001},
        "a divisor hidden by 0": {"type": "integer", "multipleOf": 1_234_567, "default": {"multipleOf": 0}},
        "divisors that multiply": {"type": "integer", "allOf": [{"multipleOf": 499}, {"multipleOf": 491}]},
        "40 divisors": {
            "type": "array",
            "prefixItems": [{"type": "integer", "multipleOf": 9_921 + i} for i in range(40)],
        },
        "huge bounds": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
        "no value": {"type": "integer", "minimum": 5, "maximum": 4},
        "no choice": {"enum": []},
        "a look-ahead": {"type": "string", "pattern": "(?=a)b"},
        "an open bracket": {"type": "string", "pattern": "(a"},
        "an unknown type": {"type": "strin"},
        "an unknown format": {"type": "string", "format": "nonsense"},
        "false": False,
        "a text that is not JSON": "{",
        "a list": "[]",
        "40 patterns at once": {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(40)]},
        "40 patterns, each with the next": {
            "$defs": {f"d{i}": {"pattern": f"a.{{{i}}}b", "$ref": f"#/$defs/d{i + 1}"} for i in range(40)}
            | {"d40": {"type": "string"}},
            "$ref": "#/$defs/d0",
        },
    }
    found: dict[str, dict[str, Any]] = {name: {"json_schema": one} for name, one in schemas.items()}
    return found | {
        "a divisor in a grammar": {"grammar": 'start: %json {"type": "integer", "multiple\\u004ff": 64507}'},
        "a regex of a billion letters": {"regex": "((a{1000}){1000}){1000}"},
        "a regex with a back-reference": {"regex": r"(a)\1"},
        "a regex that matches nothing": {"regex": r"[^\s\S]"},
        "an empty regex": {"regex": ""},
        "a long list as a regex": {"regex": [0] * 100_000},
        "a grammar with an unknown rule": {"grammar": "start: nothing"},
        "a grammar that is none": {"grammar": "start ::: ="},
        "a power of ten in a grammar": {"grammar": 'start: %json {"multipleOf": 1e999999999}'},
        "a divisor with many digits in a grammar": {"grammar": 'start: %json {"multipleOf": 0.' + "0" * 40 + "1}"},
        "an open bracket in a grammar": {"grammar": "root ::= " + "[" * 100_000},
        "40 expressions at once": {"grammar": "start: X\nX: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(40))},
        "a grammar of blank lines": {"grammar": "\n" * 200_000 + "root"},
        "a chain of 20,000 rules": {
            "grammar": "root::=0\n" + "".join(f"{i:x}::={i + 1:x}\n" for i in range(20_000)) + '4e20::="x"'
        },
    }


def bounded() -> dict[str, dict[str, Any]]:
    """Name → keywords that look as hostile, and that must work in bounded time."""
    text = {"type": "string", "maxLength": 10**9}
    return {
        "a catastrophic regex": {"regex": "(a|a)*(a|a)*b"},
        "a nested regex": {"regex": "(a+)+b"},
        "a long repetition": {"regex": "(.{0,5000}x){0,5000}"},
        "a billion letters": {"json_schema": text},
        "a billion items": {"json_schema": {"type": "array", "items": {"type": "null"}, "maxItems": 10**9}},
        "10,000 values": {"json_schema": {"enum": [f"value {i}" for i in range(10_000)]}},
        "a left-recursive grammar": {"grammar": 'start: start "a" | "a"'},
        "an ambiguous grammar": {"grammar": 'start: e\ne: e e | e e e | "a" | "b"'},
        "a chain of 1,900 long rules": {
            "grammar": "root ::= r0\n"
            + "".join(f"r{i} ::= {'.' * 115}r{i + 1}\n" for i in range(1900))
            + 'r1900 ::= "x"'
        },
        "a text of 100,000 letters": {"json_schema": {"const": "x" * 100_000}},
        "500 optional properties": {
            "json_schema": {
                "type": "object",
                "properties": {f"k{i}": {"type": "integer"} for i in range(500)},
                "additionalProperties": False,
            }
        },
    }


def _object(make: random.Random, levels: int) -> dict[str, Any]:
    names = make.sample(WORDS, make.randint(1, 4))
    required = [name for name in names if make.random() < 0.8]
    return {
        "type": "object",
        "properties": {name: _value(make, levels - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _value(make: random.Random, levels: int) -> dict[str, Any]:
    low = make.randint(-1000, 1000)
    plain: list[dict[str, Any]] = [
        {"type": "string", "maxLength": make.randint(0, 8)},
        {"type": "string", "minLength": 1, "maxLength": 5},
        {"type": "string", "pattern": make.choice(PATTERNS)},
        {"type": "string", "format": make.choice(FORMATS)},
        {"type": "integer", "minimum": low, "maximum": low + make.randint(0, 5000)},
        {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": make.choice([2, 5, 7, 10])},
        {"type": "number", "minimum": low / 8, "maximum": low / 8 + make.randint(1, 50), "multipleOf": 0.25},
        {"type": "boolean"},
        {"type": "null"},
        {"const": make.choice(["fixed", 17, True, None, {"a": [1, "b"]}])},
        {"enum": make.sample(["red", "green", "blue", 1, 2, None, "a longer value", "größer"], 3)},
    ]
    if levels < 1:
        return make.choice(plain)
    nested: list[dict[str, Any]] = [
        _object(make, levels),
        {"type": "array", "items": _value(make, levels - 1), "maxItems": make.randint(0, 3)},
        {"type": "array", "prefixItems": [_value(make, 0), _value(make, 0)], "items": False, "minItems": 2},
        {"anyOf": [_value(make, levels - 1), {"type": "null"}]},
    ]
    return make.choice(plain + nested * 2)
