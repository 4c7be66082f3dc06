"""The state of a structure without a model: which texts it takes, where it ends, and what is kept of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import numpy as np
import pydantic
import pytest
from tokenizers import Tokenizer, normalizers

import balcony_edge
from balcony_edge import SamplingParams
from balcony_edge.errors import InputError
from balcony_runtime.structure.asked import (
    MOST_CHARACTERS,
    MOST_JOINED,
    MOST_REMAINDERS,
    Structure,
    lenient,
    structure_of,
)
from balcony_runtime.structure.grammar import Grammars
from balcony_runtime.structure.tools import tools_of
from tests.runtime.structure.test_structure import END, PERSON, PROMPT, guide_of
from tests.support.command import printed


def test_the_end_is_allowed_exactly_where_the_structure_ends(grammars: Grammars) -> None:
    """Brute force over all texts of up to five letters: prefixes may go on, and whole texts may end."""
    letter = {text: token for token in range(320) if len(text := grammars.tokenizer.decode_str([token])) == 1}
    texts = {"ab", "abab", "ababab", "c"}
    begun = [""]
    for text in begun:
        guide = guide_of(grammars, regex="(ab){1,3}|c")
        for one in text:
            guide.accept(letter[one])
        allowed = guide.allowed()
        assert allowed is not None and bool(allowed[END]) == (text in texts), text
        more = [text + one for one in "abc" if allowed[letter[one]]]
        assert more == [text + one for one in "abc" if any(whole.startswith(text + one) for whole in texts)]
        begun += more
    assert len(begun) == 8


def test_after_the_end_everything_goes(grammars: Grammars) -> None:
    """A draft, or a member of a batch, may go on after its end; what it makes there is never shown."""
    guide = guide_of(grammars, regex="a|ab")
    for token in (grammars.tokenizer.tokenize_str("a")[0], END, 7, 8):
        guide.accept(token)
    assert guide.allowed() is None and guide.permits(9) and guide.forced(5) == [] and guide.fork().allowed() is None


def test_what_the_handler_of_a_signal_raises_is_no_refusal(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the soft time limit of a task of Celery's, which the task waits for; the first structure takes the longest."""

    class SoftTimeLimitExceeded(Exception): ...  # noqa: N818 - Celery's name

    def interrupted(*_: Any, **__: Any) -> None:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr("llguidance.LLTokenizer", interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        _ = Grammars(grammars._text, 320, [END]).tokenizer


def test_the_end_is_forced_where_a_model_has_several(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 3, Qwen and Gemma 3 do: the mask after the last token then has all of them."""
    monkeypatch.setattr("balcony_runtime.structure.grammar.SLOW_S", 60.0)  # every mask is a fast one
    text = (tiny.path / "tokenizer.json").read_text(encoding="utf-8")
    grammars = Grammars(lambda: text, 320, (END, 9))
    guide = guide_of(grammars, json_schema={"type": "array", "items": {"const": 1}, "maxItems": 1})
    for token in (grammars.tokenizer.tokenize_str(letter)[0] for letter in "[]"):
        assert guide.allowed() is not None and guide.permits(token)
        guide.accept(token)
    assert guide.forced(5) == [END]


def test_a_tokenizer_may_have_more_tokens_than_there_are_logits(tiny: Any) -> None:
    """As that of Gemma 3 1B, whose last token is for images."""
    text = (tiny.path / "tokenizer.json").read_text(encoding="utf-8")
    grammars = Grammars(lambda: text, 280, (END,))
    assert grammars.tokenizer.vocab_size > 288  # the mask is a word longer than the logits need
    letters = [grammars.tokenizer.tokenize_str(letter)[0] for letter in "ab"]
    guide = guide_of(grammars, regex="[ab]")
    for one in (guide, guide.fork()):
        allowed = one.allowed()
        assert allowed is not None and len(allowed) == 280 and np.flatnonzero(allowed).tolist() == letters
        assert one.permits(letters[0]) and not one.permits(END)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0004-02-29", "2023-12-31"],
         ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01"]),
        ("time", ["23:59:59.5+01:00"], ["10:20:60Z"]),
        ("date-time", ["2024-02-29T10:20:59Z"], ["2024-02-29T10:20:60Z", "2023-02-29T10:20:59Z", "0000-01-01T10:20:59Z"]),
        ("email", ["a@b.org", "a" * 64 + "@b.org"], ["a" * 65 + "@b.org", "a@" + "b" * 64 + ".org"]),
    ],
)  # fmt: skip
def test_formats_are_those_that_readers_take(grammars: Grammars, form: str, good: list[str], bad: list[str]) -> None:
    """Python's own readers, and the validator of JSON schemas, agree."""
    schema = {"type": "object", "properties": {"format": {"format": form, "default": {"format": form}}}}
    text = json.loads(structure_of(json_schema=schema).text)["properties"]["format"]
    assert text["format"] == form and text["default"] == {"format": form}, "a value is left as it is"
    validator = jsonschema_rs.validator_for({"format": form}, validate_formats=True)
    for one in (*good, *bad):
        assert validator.is_valid(one) == (one in good or one.startswith("0000")), one  # the validator knows a year 0
        guide = guide_of(grammars, json_schema={"type": "string", "format": form})
        tokens = [*grammars.tokenizer.tokenize_str(json.dumps(one)), END]
        assert all(guide.permits(token) and guide.accept(token) is None for token in tokens) == (one in good), one


CODES: dict[str, Any] = {
    "type": "object",
    "properties": {f"c{i}": {"type": "string", "pattern": f"^[a-z]{{{i + 1}}}$"} for i in range(13)},
}


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [CODES, {"type": "null"}], "discriminator": {"propertyName": "kind"}},  # pydantic's unions
        {"allOf": [{"$ref": "#/$defs/codes"}, {"description": "as in OpenAPI"}], "$defs": {"codes": CODES}},
        {"allOf": [CODES, {"type": "object", "properties": {"id": {"type": "integer"}}}]},
        CODES | {"anyOf": [{"required": ["c1"]}, {"required": ["c2"]}]},
    ],
    ids=["discriminator", "a described reference", "a base", "one of two is required"],
)
def test_patterns_of_different_texts_are_not_joined(grammars: Grammars, schema: dict[str, Any]) -> None:
    assert guide_of(grammars, json_schema=schema).allowed() is not None


@pytest.mark.parametrize(
    "schema", [{"const": 2**53 + 1}, {"enum": [5, 1234567890123456789]}, {"const": {"id": [2**60]}}]
)
def test_numbers_that_would_come_as_others_are_refused(schema: dict[str, Any]) -> None:
    """As the ids of messages and users often are; the compiler knows floats."""
    for form in (schema, lenient({"type": "object", "properties": {"id": schema}})):
        with pytest.raises(
            InputError, match=r"json_schema: const, enum: \d+: whole numbers beyond 2\^53 are not exact"
        ):
            structure_of(json_schema=form)
    assert structure_of(json_schema={"const": 2**53, "minimum": -(10**17)}) is not None
    named = {"type": "object", "properties": {"const": {"maximum": 2**60}}}
    assert structure_of(json_schema=named) is not None


@pytest.mark.parametrize("schema", [{"const": "a\x01b"}, {"enum": ["\t", "\x1f"]}, {"const": {"a": ["\x7f"]}}])
def test_characters_that_would_not_come_are_refused(schema: dict[str, Any]) -> None:
    for form in (schema, lenient({"type": "object", "properties": {"delimiter": schema}})):
        with pytest.raises(InputError, match=r"json_schema: const, enum: .*: control characters without a short"):
            structure_of(json_schema=form)
    assert structure_of(json_schema={"const": "\b\f\n\r\té\x85 \\u0001"}) is not None


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    """Its schema is read like any other, and what a keyword holds as a value is not."""
    date = {"type": "string", "format": "date"}
    schema = {"type": "object", "properties": {"default": date, "const": date}, "enum": [{"properties": {"a": date}}]}
    found = json.loads(structure_of(json_schema=schema).text)
    assert "pattern" in found["properties"]["default"] and "pattern" in found["properties"]["const"]
    assert found["enum"] == schema["enum"]


class Leaf(pydantic.BaseModel):
    kind: Literal["leaf"] = "leaf"
    value: int


class Branch(pydantic.BaseModel):
    kind: Literal["branch"] = "branch"
    parts: list[Annotated[Branch | Leaf, pydantic.Field(discriminator="kind")]]


def test_branches_of_a_union_are_told_apart_by_their_tags(grammars: Grammars) -> None:
    """Also where the tag has a default, and where the union holds itself. pydantic refuses objects without a tag."""
    leaf, bare = '{"kind": "leaf", "value": 1}', '{"value": 1}'
    for schema in (Branch, Branch.model_json_schema(), lenient(Branch.model_json_schema())):
        guide = guide_of(grammars, json_schema=schema)
        for inner in (leaf, bare, f'{{"kind": "branch", "parts": [{leaf}]}}'):
            one, text = guide.fork(), f'{{"kind": "branch", "parts": [{inner}]}}'
            tokens = [*grammars.tokenizer.tokenize_str(text), END]
            assert all(one.permits(token) and one.accept(token) is None for token in tokens) == (inner != bare), text
            if inner != bare:
                Branch.model_validate_json(text)


@pytest.mark.parametrize("part", [{}, {"oneOf": 3}, {"oneOf": [True, {"properties": []}, {"oneOf": {}}]}])
def test_a_discriminator_of_nothing_is_left_to_the_compiler(part: dict[str, Any]) -> None:
    schema = {"discriminator": {"propertyName": "kind"}, **part}
    assert json.loads(structure_of(json_schema=schema).text) == schema


class Red(pydantic.BaseModel):
    kind: Literal["branch"] = "branch"
    colour: Literal["red"] = "red"


class Blue(pydantic.BaseModel):
    kind: Literal["branch"] = "branch"
    colour: Literal["blue"] = "blue"


def test_a_branch_of_a_union_may_be_a_union_with_tags(grammars: Grammars) -> None:
    inner = Annotated[Red | Blue, pydantic.Field(discriminator="colour")]
    model = pydantic.create_model("Tree", part=Annotated[inner | Leaf, pydantic.Field(discriminator="kind")])
    for schema in (model, lenient(model.model_json_schema())):
        guide = guide_of(grammars, json_schema=schema)
        for part in ('{"kind": "branch", "colour": "blue"}', '{"kind": "leaf", "value": 1}', '{"colour": "blue"}'):
            one, text = guide.fork(), f'{{"part": {part}}}'
            tokens = [*grammars.tokenizer.tokenize_str(text), END]
            assert all(one.permits(token) and one.accept(token) is None for token in tokens) == ("kind" in part), text


@pytest.mark.parametrize("name", ["age", "\\u0061ge"])
def test_no_property_comes_twice(grammars: Grammars, name: str) -> None:
    """Nor in other letters: readers take the last value, which could be anything."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    for form in (schema, lenient(schema)):
        guide = guide_of(grammars, json_schema=form)
        tokens = [*grammars.tokenizer.tokenize_str(f'{{"age": 3, "{name}": "old"}}'), END]
        assert not all(guide.permits(token) and guide.accept(token) is None for token in tokens)


@pytest.mark.parametrize("rule", ["start:", "?start:", "!start:"])
def test_the_rule_start_of_lark_may_have_marks(grammars: Grammars, rule: str) -> None:
    """As in the example of vLLM's documentation, which begins with ``?start``."""
    guide = guide_of(grammars, grammar=f'{rule} animal\nanimal: "ab" | "ac"')
    tokens = [*grammars.tokenizer.tokenize_str("ac"), END]
    assert all(guide.permits(token) and guide.accept(token) is None for token in tokens)


@pytest.mark.parametrize(
    "pattern",
    [r"\bfox\b", r"^(a)\1$", r"^(?!x)", r"^\\d\b", r"^(?>x)$", r"^(?P<a>x)(?P=a)?$", r"[^\uD800-\uDFFF]", r"^x{,5}$"],
)
def test_a_lenient_schema_may_have_patterns_that_no_grammar_has(grammars: Grammars, pattern: str) -> None:
    """Also as names of properties, whose values still follow their schema."""
    named = {"patternProperties": {pattern: {"const": 1}}, "additionalProperties": False}
    for schema, good, bad in (
        ({"type": "string", "pattern": pattern}, '"x"', "1"),
        ({"type": "object", **named}, '{"x": 1}', '{"x": 2}'),
    ):
        guide = guide_of(grammars, json_schema=lenient(schema))
        for text in (bad, good):
            one, tokens = guide.fork(), [*grammars.tokenizer.tokenize_str(text), END]
            taken = all(one.permits(token) and one.accept(token) is None for token in tokens)
            assert taken == (text == good), text
    mixed = {**named, "additionalProperties": {"const": 2}}
    for text in ('{"x": 1}', '{"x": 2}'):
        guide = guide_of(grammars, json_schema=lenient({"type": "object", **mixed}))
        tokens = [*grammars.tokenizer.tokenize_str(text), END]
        assert all(guide.permits(token) and guide.accept(token) is None for token in tokens), text
    # a backslash and the letter b; telephone numbers; neither brace
    for one in (r"^\\bfox$", r"^\(?([0-9]{3})\)?[-. ]?([0-9]{4})$", "^[^{,}]+$"):
        assert lenient({"type": "string", "pattern": one})["pattern"] == one


_LEG = {"type": "object", "properties": {"toes": {"const": 1}}, "required": ["toes"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"items": {"$ref": "#/$defs/L"}, "$defs": {"L": _LEG}}, ['[{"toes": 1}]'], ['[{"toes": 1, "x": 2}]']),
        ({"anyOf": [{"type": "null"}, _LEG]}, ["null", '{"toes": 1}'], ['{"toes": 1, "x": 2}']),
        # what the schema says, and objects that list nothing or not everything
        ({**_LEG, "additionalProperties": {"const": 2}}, ['{"toes": 1, "x": 2}'], ['{"toes": 1, "x": 3}']),
        ({"type": "object", "required": ["x"]}, ['{"x": 2}'], ["{}"]),
        ({**_LEG, "required": ["toes", "x"]}, ['{"toes": 1, "x": 2}'], ['{"toes": 1}']),
        # an object of two schemas has the properties of both
        ({"allOf": [_LEG, {"properties": {"x": {"const": 2}}}]}, ['{"toes": 1, "x": 2}'], ['{"toes": 2}']),
        ({"properties": {"x": {"const": 2}}, "anyOf": [_LEG, {}]}, ['{"x": 2, "toes": 1}'], ['{"x": 3}']),
        ({"$ref": "#/$defs/L", "required": ["x"], "$defs": {"L": _LEG}}, ['{"toes": 1, "x": 2}'], ['{"toes": 1}']),
    ],
)
def test_objects_have_what_they_list(
    grammars: Grammars, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """In a schema that is not strict, as pydantic and instructor write it: a small model would invent properties."""
    parameters = {"type": "object", "properties": {"leg": schema}, "$defs": schema.get("$defs", {})}
    (tool,) = tools_of([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    for form, texts in ((lenient(schema), "%s"), (tool.schema, '{"leg": %s}')):
        guide = guide_of(grammars, json_schema=form)
        for text in (*good, *bad):
            one, tokens = guide.fork(), [*grammars.tokenizer.tokenize_str(texts % text), END]
            taken = all(one.permits(token) and one.accept(token) is None for token in tokens)
            assert taken == (text in good), text
    tokens = grammars.tokenizer.tokenize_str(f'{{"leg": {good[0]}, "')
    assert not all(guide.permits(token) and guide.accept(token) is None for token in tokens), (
        "arguments are closed always"
    )


def test_a_tool_may_require_what_it_does_not_describe(grammars: Grammars) -> None:
    parameters = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a", "b"]}
    (tool,) = tools_of([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    guide = guide_of(grammars, json_schema=tool.schema)
    assert grammars.tokenizer.decode_str(guide.forced(100)).startswith('{"a": 1, ')


def test_what_a_grammar_does_not_join_is_not_counted(grammars: Grammars) -> None:
    """A document after a thought, each of whose texts has a pattern of its own; GBNF, where & is a character."""
    codes = {f"c{i}": {"type": "string", "pattern": f"^[a-z]{{{i + 1}}}$"} for i in range(13)}
    document = json.dumps({"type": "object", "properties": codes})
    assert guide_of(grammars, grammar=f'start: "<t>" /[^<]*/ "</t>" %json {document}').allowed() is not None
    rules = [f't{i} ::= "<{i}>" [^<&]* "</{i}>"' for i in range(13)]
    root = " | ".join(rule.partition(" ")[0] for rule in rules)
    assert guide_of(grammars, grammar="\n".join([f"root ::= {root}", *rules])).allowed() is not None


def test_a_tool_whose_patterns_are_joined_is_named() -> None:
    given = {"type": "object", "allOf": [{"properties": {"a": {"pattern": f"a.{{{i}}}b"}}} for i in range(13)]}
    tools = [{"type": "function", "function": {"name": name, "parameters": given}} for name in ("look", "see")]
    with pytest.raises(InputError, match="tools: look: json_schema: a text may have to follow several of its 13"):
        tools_of(tools)


def test_llama_cpps_grammars_may_have_numbers_of_characters(grammars: Grammars) -> None:
    r"""llguidance's reader drops the zeros of ``\u00e9``, and its grammars have no ``\U``."""
    grammar = 'root ::= [\\u00e8-\\u00ea] [^\\u0000-\\u001f] "\\u00df\\U0001F600" "\\\\u00df"'
    guide = guide_of(grammars, grammar=grammar)
    tokens = [*grammars.tokenizer.tokenize_str("éaß\U0001f600\\u00df"), END]
    assert all(guide.permits(token) and guide.accept(token) is None for token in tokens)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('root ::= Item item a-b a_b\nItem ::= "1"\nitem ::= "2"\na-b ::= "3"\na_b ::= "4"', "1234"),
        ('root ::= userId-kv user-id-kv\nuserId-kv ::= "1"\nuser-id-kv ::= "2"', "12"),
        ("root ::= .+", "a\nb"),
    ],
    ids=["names", "names of properties", "any character"],
)
def test_rules_of_llama_cpp_are_told_apart_by_their_letters(grammars: Grammars, grammar: str, text: str) -> None:
    """A dot is any character, line breaks included."""
    guide = guide_of(grammars, grammar=grammar)
    tokens = [*grammars.tokenizer.tokenize_str(text), END]
    assert all(guide.permits(token) and guide.accept(token) is None for token in tokens)


@pytest.mark.parametrize("text", ["1+2=3\n", "x*(a+b)=y\nz=3\n", "a=b \n\n"])
def test_space_at_the_end_of_a_rule_of_llama_cpp_leaves_what_must_follow(grammars: Grammars, text: str) -> None:
    """Its grammar of arithmetic: no reply would end, or have a second line."""
    grammar = r"""root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*"""
    guide = guide_of(grammars, grammar=grammar)
    tokens = [*grammars.tokenizer.tokenize_str(text), END]
    assert all(guide.permits(token) and guide.accept(token) is None for token in tokens)


def test_space_in_the_middle_of_a_rule_of_llama_cpp_is_a_part_of_its_expression(grammars: Grammars) -> None:
    """``title`` by itself would take the space, and no reply would reach the year."""
    grammar = r"""root  ::= movie+
movie ::= title ws "(" year ")\n"
title ::= [A-Za-z ]+
year  ::= [0-9]{4}
ws    ::= [ ]"""
    guide = guide_of(grammars, grammar=grammar)
    tokens = [*grammars.tokenizer.tokenize_str("Alien (1979)\nThe Thing (1982)\n"), END]
    assert all(guide.permits(token) and guide.accept(token) is None for token in tokens)


def test_a_grammar_of_llama_cpp_may_have_many_long_rules(grammars: Grammars) -> None:
    """As its converter writes them of a schema with hundreds of properties."""
    rules = [f'section-{i}-of-a-large-schema-kv ::= "{i}:" space' for i in range(700)]
    root = " | ".join(rule.partition(" ")[0] for rule in rules)
    assert guide_of(grammars, grammar="\n".join([f"root ::= {root}", *rules, 'space ::= " "?'])).allowed() is not None


@pytest.mark.parametrize("text", ["cafe\u0301", "5 k\u2126", "<table>", "<end>"])
def test_a_certain_text_is_the_one_that_was_asked_for(tiny: Any, text: str) -> None:
    """Qwen's tokenizer normalizes to NFC, Gemma's has marks of HTML among its pieces; ``<end>`` is a control token."""
    tokenizer = Tokenizer.from_file(str(tiny.path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    found = json.loads(tokenizer.to_str())
    found["model"]["vocab"]["<table>"] = id_ = len(found["model"]["vocab"])
    found["added_tokens"].append(found["added_tokens"][0] | {"id": id_, "content": "<table>", "special": False})
    guide = guide_of(Grammars(lambda: json.dumps(found), 320, (END,)), json_schema={"const": text})
    tokens = guide.forced(100)
    assert tokens[-1] == END and id_ not in tokens and tokenizer.decode(tokens) == f'"{text}"'


def test_names_of_tokens_are_found_in_linear_time(grammars: Grammars) -> None:
    """The search holds Python's lock, and so would hold up all replies."""
    marked, tokenizer = 'start: "\\\\" /[\\"]/ <end> # "\n', grammars.tokenizer
    assert grammars._tokenizer_of(Structure("grammar", marked)) is not tokenizer
    begin = time.thread_time()
    assert grammars._tokenizer_of(Structure("grammar", 'start: "' + '\\"' * 20_000)) is tokenizer
    assert time.thread_time() - begin < 1


def test_what_is_kept_is_bounded_in_length(grammars: Grammars, monkeypatch: Any) -> None:
    monkeypatch.setattr("balcony_runtime.structure.grammar.MOST_KEPT_CHARACTERS", 10)
    asked = [Structure("regex", text) for text in ("aaaa", "bbbb", "cccc", "dddddddddd", "eeeeeeeeeeeeee")]
    for one in asked[:3]:
        grammars.guide(one)
    assert list(grammars._kept) == asked[1:3]  # the one that was asked for longest ago is forgotten
    grammars.guide(asked[3])
    assert list(grammars._kept) == [asked[3]]
    assert grammars.guide(asked[4]).allowed() is not None and not grammars._kept  # it alone is too long to keep


class Calls(pydantic.BaseModel):
    back: Callable[[int], int]


class Later(pydantic.BaseModel):
    name: Unknown  # noqa: F821 - it is not defined


@pytest.mark.parametrize("model", [Calls, Later])
def test_a_class_without_a_schema_is_named(model: type[pydantic.BaseModel]) -> None:
    with pytest.raises(InputError, match=f"json_schema: {model.__name__} has no JSON schema") as caught:
        structure_of(json_schema=model)
    assert "\n" not in str(caught.value)


def test_a_structure_that_is_being_compiled_holds_up_no_other(grammars: Grammars, monkeypatch: Any) -> None:
    """Also two threads that ask for one new structure compile it once."""
    known, begun, go = Structure("regex", "known"), threading.Event(), threading.Event()
    grammars.guide(known)
    compile_, compiled = Grammars._compile, []

    def slow(self: Grammars, asked: Structure) -> Any:
        compiled.append(asked)
        begun.set()
        assert go.wait(30)
        return compile_(self, asked)

    monkeypatch.setattr(Grammars, "_compile", slow)
    threads = [threading.Thread(target=grammars.guide, args=(Structure("regex", "new"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    grammars.guide(known)  # would wait for ever
    go.set()
    for thread in threads:
        thread.join(30)
    assert compiled == [Structure("regex", "new")]


def test_a_structure_is_compiled_once(tiny: Any, monkeypatch: Any) -> None:
    compiled: list[Structure] = []
    compile_: Callable[..., Any] = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, asked: compiled.append(asked) or compile_(self, asked))
    with balcony_edge.load(tiny.path) as llm:
        for _ in range(3):
            llm.generate(PROMPT, sampling=SamplingParams(json_schema=PERSON), max_new_tokens=3)
        for number in range(33):
            llm.compile_grammar(SamplingParams(regex=f"{number}"))
        llm.compile_grammar(SamplingParams(json_schema=PERSON))  # 32 others were used since
        assert len(compiled) == 35


def test_the_page_of_structures_has_its_bounds() -> None:
    text = " ".join((Path(__file__).parents[3] / "docs" / "structured.md").read_text(encoding="utf-8").split())
    for words in (
        f"may have {MOST_CHARACTERS:,} characters",
        f"a product of at most {MOST_REMAINDERS:,}",
        f"at most {MOST_JOINED} patterns",
        f"may have {MOST_JOINED} `&`",
    ):
        assert words in text


def test_a_missing_package_is_named(tiny: Any) -> None:
    program = (
        "import sys; sys.modules['llguidance'] = None\n"
        "import balcony_edge\n"
        "llm = balcony_edge.load(sys.argv[1])\n"
        "llm.generate('the fox', max_new_tokens=2)\n"
        "try:\n    llm.generate('the fox', sampling=balcony_edge.SamplingParams(regex='a'))\n"
        "except balcony_edge.BalconyError as error:\n    print(error)\n"
    )
    said = printed(program, tiny.path)
    assert "pip install 'balcony-edge[structured]'" in said and said.count("\n") == 1
