"""What a reply must look like, as it is asked for: a JSON schema, a regular expression or a grammar.

Owns the forms that a schema may have, and the checks that need no compiler. :mod:`.grammar` compiles the result.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from itertools import chain
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from balcony_edge.errors import InputError, shown

Kind = Literal["json_schema", "regex", "grammar", "tools"]
#: Longest text of a schema or grammar, in characters. Compiling one of this length takes up to 3 s and 300 MB.
MOST_CHARACTERS = 256_000
#: Largest product of all numerators or denominators of ``multipleOf``. An automaton has a state for each remainder, and
#: where a number is a multiple of several, for each combination: 1,234,567 took 15 s and 700 MB, 10,000 takes a millisecond.
MOST_REMAINDERS = 10_000
#: Most digits of a value of ``multipleOf``, and of its power of ten: nobody must compute 10 to the power of 999,999,999.
MOST_DIGITS = 40
#: Most patterns of a schema that joins some, and most ``&`` of a grammar. The automaton is their product, which the compiler
#: builds before it counts: 20 patterns took 3 s and 300 MB, 13 operands 4 s, and each further one 2.3 times as long.
MOST_JOINED = 12
#: JSON is written as ``json.dumps`` writes it, which is the form that models were trained on; a schema's own
#: ``x-guidance`` comes first. No character is a number: ``"\\u0061"`` would be a second property ``a``, of any value.
JSON_FORM: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
_YEAR, _FOURS = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})", "(0[48]|[2468][048]|[13579][26])"
_DAY = f"({_YEAR}-(0[13-9]|1[0-2])-[0-9]{{2}}|{_YEAR}-02-([01][0-9]|2[0-8])|([0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29)"
#: Format → what llguidance writes of it and readers refuse is left out: the year 0, 29 February in years that have none, leap
#: seconds at any time of the day, and addresses whose parts are longer than RFC 5321 allows.
_READABLE: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{_DAY}$"},
    "time": {"pattern": "^.{6}[0-5]"},
    "date-time": {"pattern": f"^{_DAY}.{{7}}[0-5]"},
    "email": {"pattern": "^[^@]{1,64}@([^@.]{1,63}\\.)*[^@.]{1,63}$", "maxLength": 254},
}
#: Whole numbers from which the compiler's floats are not exact: it would write another ``const``.
MOST_EXACT = 2**53
#: Characters that JSON writes as numbers only: the compiler would leave them out.
_NUMBERED = re.compile(r"[^\x20-\x7e\x80-\U0010ffff\b\t\n\f\r]")
_INEXACT = re.compile(r"[0-9]{16}|\\u00|\x7f")
#: Keywords whose values are not schemas.
VALUES = ("const", "default", "enum", "examples")
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([0-9.eE+-]+)')
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
#: Keywords by which other schemas hold as well, and with those of schemas that hold only where they are named.
_JOINING = ("allOf", "anyOf", "oneOf", "$ref")
_ELSEWHERE = {*_JOINING, "$defs", "definitions"}
#: A rule ``root`` marks llama.cpp's GBNF.
GBNF = re.compile(r"^[^\S\n]*root\s*::=", re.MULTILINE)
#: Texts and expressions of a grammar; escapes outside of them are skipped as a whole, so that it takes linear time.
_QUOTED = re.compile(r'\\.|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')


class Structure(NamedTuple):
    """What a reply must look like.

    Attributes:
        kind: name of the parameter that asks for it.
        text: JSON schema as JSON, regular expression, or grammar (also of tools).
    """

    kind: Kind
    text: str


def structure_of(*, json_schema: Any = None, regex: str | None = None, grammar: str | None = None) -> Structure | None:
    """The one structure that is asked for, or None.

    Args:
        json_schema: a JSON schema as a mapping or as JSON text, or a pydantic model class.
        regex: a regular expression for the whole reply, in Rust's syntax.
        grammar: a grammar in llguidance's variant of Lark, or in llama.cpp's GBNF.

    Raises:
        InputError: there is more than one, or it is of a wrong type or too large.
    """
    given: dict[Kind, Any] = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    asked = {kind: value for kind, value in given.items() if value is not None}
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)}: a reply has one structure: give one of them")
    if not asked:
        return None
    ((kind, value),) = asked.items()
    text = schema_text(value) if kind == "json_schema" else value
    if not isinstance(text, str) or not text:
        raise InputError(f"{kind} = {shown(text)}: must be a text that is not empty: give a {kind}, or leave it out")
    return checked(Structure(kind, text))


def schema_text(schema: Any) -> str:
    """A JSON schema as one line of JSON.

    Raises:
        InputError: it is not a schema, or is nested too deeply; or a class has none.
    """
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):  # a class of pydantic
        try:
            schema = schema.model_json_schema()
        except Exception as error:  # a field that JSON does not have, a name that is not defined
            why = str(error).partition("\n")[0]
            raise InputError(
                f"json_schema: {schema.__name__} has no JSON schema ({why}): change its fields, or give the schema as a dict"
            ) from error
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if schema is True:
            schema = {}
        if isinstance(schema, Mapping):
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False, default=dict)
            found = json.loads(text)
            if _INEXACT.search(text):
                _refuse_inexact(found)
            if '"discriminator"' in text:
                text = json.dumps(_tagged(found), ensure_ascii=False)
            # A longer one is refused for its length.
            if len(text) <= MOST_CHARACTERS and text.count('"pattern"') > MOST_JOINED:
                _refuse_joined(found)
            return json.dumps(_readable(found), ensure_ascii=False) if '"format"' in text else text
    except RecursionError:
        raise InputError("json_schema: is nested too deeply: give a schema of at most 60 levels") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"json_schema: is not JSON ({error}): give a schema as a dict, JSON text or class") from None
    raise InputError(f"json_schema = {shown(schema)}: must be a JSON object: give e.g. {{'type': 'object'}}")


def _tagged(schema: Any) -> Any:
    """A schema whose unions are told apart by a property that each branch requires, instead of by ``discriminator``.

    pydantic does not list one that has a default, and refuses objects without it. The compiler refuses branches that it cannot
    tell apart without it, and a discriminator of branches that hold such unions themselves.
    """
    for part in _reached([schema], _inside):
        if not isinstance(part, dict) or not isinstance(part.get("discriminator"), dict) or "anyOf" in part:
            continue
        name, found = part["discriminator"].get("propertyName"), [_leaves(schema, one) for one in _branches(part)]
        tags = [[_values(_held(one, "properties", dict).get(name)) for one in leaves] for leaves in found]
        known = [key for leaves in tags for key in {json.dumps(value) for values in leaves for value in values}]
        if all(map(all, tags)) and len(known) == len(set(known)) > 0:
            part["anyOf"] = part.pop("oneOf")
            del part["discriminator"]
            for one in chain.from_iterable(found):
                one["required"] = list(dict.fromkeys([*(one.get("required") or ()), name]))
    return schema


def _leaves(schema: Any, branch: Any) -> list[dict[str, Any]]:
    """The objects of a branch, which may be a union itself."""
    found = (_target(schema, branch) or branch) if isinstance(branch, dict) else {}
    inner = [] if "properties" in found else _branches(found)
    return [leaf for one in inner for leaf in _leaves(schema, one)] or [found]


def _branches(union: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = _held(union, "oneOf", list) or _held(union, "anyOf", list)
    return found


def _held(part: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key, empty if it is of another kind, which the compiler refuses."""
    value = part.get(key)
    return value if isinstance(value, kind) else kind()


def _values(schema: Any) -> Sequence[Any]:
    """All values that a ``const`` or ``enum`` allows; none where there is neither."""
    if not isinstance(schema, dict):
        return ()
    if "const" in schema:
        return (schema["const"],)
    values = schema.get("enum")
    return values if isinstance(values, list) else ()


def _refuse_inexact(schema: Any) -> None:
    """Refuse a schema whose values have whole numbers or characters that would come as others, or not at all."""

    def look(part: Mapping[str, Any]) -> Mapping[str, Any]:
        for held in _reached([list(_values(part))], _inside):
            for value in _inside(held):
                if type(value) is int and abs(value) > MOST_EXACT:
                    why = "whole numbers beyond 2^53 are not exact: give it as a text"
                elif isinstance(value, str) and _NUMBERED.search(value):
                    why = "control characters without a short escape are not written: leave them out"
                else:
                    continue
                raise InputError(f"json_schema: const, enum: {shown(value)}: {why}")
        return part

    _each(schema, look)


def _refuse_joined(schema: Any) -> None:
    """Refuse a schema in which a text may have to follow too many patterns at once.

    All those count that a part reaches in two ways that hold together.
    """

    def inside(part: Any) -> Sequence[Any]:
        return part if isinstance(part, list) else [*part.values(), _target(schema, part)]

    parts, users = _reached([schema], inside), defaultdict[int, list[Any]](list)
    for part in parts:
        for one in inside(part):
            users[id(one)].append(part)
    found = {id(part) for part in _reached(filter(_has_pattern, parts), lambda part: users[id(part)])}

    def ways(part: Mapping[str, Any]) -> int:
        """Number of ways in which a part reaches patterns that all hold."""
        both, others = part.get("allOf"), [part.get("anyOf"), part.get("oneOf"), _target(schema, part)]
        others += both if isinstance(both, list) else []
        own = (value for key, value in part.items() if key not in _ELSEWHERE)
        return sum(id(one) in found for one in others) + (_has_pattern(part) or any(id(one) in found for one in own))

    joins = [part for part in parts if isinstance(part, dict) and ways(part) > 1]
    patterns = {part["pattern"] for part in _reached(joins, inside) if _has_pattern(part)}
    if len(patterns) > MOST_JOINED:
        raise InputError(
            f"json_schema: a text may have to follow several of its {len(patterns)} patterns: the automaton would be too "
            f"large: give at most {MOST_JOINED}, or leave allOf and keywords next to anyOf, oneOf and $ref out"
        )


def _has_pattern(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("pattern"), str)


def _reached(begin: Iterable[Any], after: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """The objects and lists among some values and those that come after them, each once."""
    left, found = list(begin), dict[int, Any]()
    while left:
        part = left.pop()
        if isinstance(part, dict | list) and id(part) not in found:
            found[id(part)] = part
            left += after(part)
    return list(found.values())


def _inside(part: Any) -> Iterable[Any]:
    """What an object or a list holds."""
    return part if isinstance(part, list) else part.values()


def _target(schema: Any, part: Mapping[str, Any]) -> Any:
    """What the reference of a part names: a JSON pointer, or the whole schema for another form; None without one."""
    if not isinstance(reference := part.get("$ref"), str):
        return None
    found = schema
    for key in unquote(reference).split("/")[1:]:
        found = found.get(key.replace("~1", "/").replace("~0", "~"), schema) if isinstance(found, dict) else schema
    return found


def _readable(schema: Any) -> Any:
    """A schema whose dates, times and addresses are those that readers take."""

    def with_pattern(schema: Mapping[str, Any]) -> Mapping[str, Any]:
        form = schema.get("format")
        if not isinstance(form, str) or form not in _READABLE or "pattern" in schema:
            return schema
        return {**_READABLE[form], **schema}

    return _each(schema, with_pattern)


#: As at OpenAI, a schema that is not ``strict`` may have keywords that the grammar cannot enforce: they are left out.
_LENIENT = {"lenient": True, "coerce_one_of": True}
#: What patterns may have and the grammar's expressions may not: look-around, atomic and conditional groups, comments, edges of
#: words, references back, halves of UTF-16 pairs, other escapes of JavaScript and Python, and ``{,5}``.
_FOREIGN = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?(?:<?[=!]|[>#(]|P=)|\\(?:[bBckZ0-9<>]|u[dD][89a-fA-F])|\{,\d+\})")
#: Keywords whose keys are names, which may be those of keywords.
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")


def lenient(schema: Any) -> Any:
    """A schema without the keywords that the grammar does not have, and with closed objects; anything else as it is."""
    if not isinstance(schema, Mapping):
        return schema
    return {"x-guidance": JSON_FORM | _LENIENT, **_all_closed(_without_foreign(schema))}


#: Keywords by which properties may follow that ``properties`` does not list.
_OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of an object without other properties than it lists, unless it says itself which may follow.

    A small model would go on to invent some. The grammars of llama.cpp and of xgrammar, which vLLM uses, are closed as well.
    """
    listed, required = schema.get("properties"), schema.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list | tuple) else set()
    if _OPEN & schema.keys() or not names <= set(listed if isinstance(listed, Mapping) else ()):
        return schema
    return {**schema, "additionalProperties": False}


def _all_closed(schema: Any) -> Any:
    """A schema whose objects are closed. It stays as it is where schemas are joined: no object might follow two closed ones."""
    joined = False

    def with_closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal joined
        parts = schema.get("allOf")
        joined |= isinstance(parts, list) and len(parts) > 1
        listing = not schema.keys().isdisjoint(("properties", "required"))
        joined |= listing and not schema.keys().isdisjoint(("allOf", "anyOf", "oneOf", "$ref"))
        return closed(schema) if isinstance(schema.get("properties"), Mapping) else schema

    found = _each(schema, with_closed)
    return schema if joined else found


def _without_foreign(schema: Any) -> Any:
    """A schema without the patterns that the grammar's regular expressions cannot have, such as those with look-around.

    Properties whose names such a pattern describes may have any name, and keep their schemas.
    """

    def foreign(pattern: Any) -> bool:
        return isinstance(pattern, str) and _FOREIGN.search(pattern) is not None

    def without(schema: Mapping[str, Any]) -> Mapping[str, Any]:
        left = {key: value for key, value in schema.items() if key != "pattern" or not foreign(value)}
        named = schema.get("patternProperties")
        if isinstance(named, Mapping) and (dropped := [one for pattern, one in named.items() if foreign(pattern)]):
            left["patternProperties"] = {pattern: one for pattern, one in named.items() if not foreign(pattern)}
            if (others := schema.get("additionalProperties", True)) is not True:
                left["additionalProperties"] = {"anyOf": dropped if others is False else [others, *dropped]}
        return left

    return _each(schema, without)


def _each(schema: Any, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], *, names: bool = False) -> Any:
    """A schema with each schema in it changed; ``names``: its keys are names, and only its values are schemas."""
    if isinstance(schema, list):
        return [_each(one, change) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in VALUES and not names else _each(value, change, names=not names and key in _NAMED)
        for key, value in (schema if names else change(schema)).items()
    }


def checked(asked: Structure) -> Structure:
    """The structure, if it is not too large to compile.

    Raises:
        InputError: it is.
    """
    if len(asked.text) > MOST_CHARACTERS:
        raise InputError(
            f"{asked.kind}: has {len(asked.text):,} characters; at most {MOST_CHARACTERS:,} are taken: give a smaller one"
        )
    text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), asked.text)  # a schema in a grammar may hide its keys
    if asked.kind == "grammar" and not GBNF.search(asked.text):  # there & is a character like others
        schemas_join = any(f'"{keyword}"' in text for keyword in _JOINING)
        joined = _QUOTED.sub("", asked.text).count("&") + schemas_join * text.count('"pattern"')
        if joined > MOST_JOINED:
            what = f"joins more than {MOST_JOINED} expressions or patterns"
            raise InputError(f'grammar: {what}: give fewer & and "pattern"')
    numbers = dict.fromkeys(_MULTIPLE.findall(text))
    if _remainders(numbers) > MOST_REMAINDERS:
        raise InputError(
            f"{asked.kind}: multipleOf = {shown(list(numbers))}: the automaton would be too large: give values from 0.0001 "
            f"whose product is at most {MOST_REMAINDERS:,}, or leave it out"
        )
    return asked


def _remainders(numbers: Iterable[str]) -> int:
    """The larger of the products of numerators and of denominators, or a number above the bound."""
    over, under, ratios = 1, 1, set[tuple[int, int]]()
    for number in numbers:
        try:
            value = Decimal(number).copy_abs()
        except InvalidOperation:
            continue  # the compiler refuses it
        if not value:  # it has no multiple but 0, and may stand where it is no keyword
            continue
        if len(number) > MOST_DIGITS or abs(value.adjusted()) > MOST_DIGITS:
            return MOST_REMAINDERS + 1
        ratios.add(value.as_integer_ratio())
    for numerator, denominator in ratios:
        over, under = min(over * numerator, MOST_REMAINDERS + 1), min(under * denominator, MOST_REMAINDERS + 1)
    return max(over, under)
