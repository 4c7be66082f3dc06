"""Tools: grammars of every call format, reading calls as they arrive, prompts, and replies of the Python API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer

import balcony_edge
from balcony_edge.errors import InputError
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.structure.asked import Structure
from balcony_runtime.structure.calls import CallReader, Piece, read
from balcony_runtime.structure.formats import CallFormat, format_of, formats
from balcony_runtime.structure.grammar import Grammars, Guide
from balcony_runtime.structure.tools import Toolbox, toolbox, tools_of
from balcony_runtime.text.stream import TextStream
from tests.support.templates import write_template

END, MARK_ID = 0, 298


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": parameters}}


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"function": tool["function"] | {"strict": True}}


WEATHER = function(
    "weather", city={"type": "string", "maxLength": 8}, days={"type": "integer", "minimum": 1, "maximum": 9}
)
TOOLS = [
    WEATHER,
    function("weather_now", spot={"enum": ["here", "}\n</tool_call>", 'a "quoted" \\ {text']}),
    function("stop"),
]
CHECKS = {
    tool["function"]["name"]: jsonschema_rs.validator_for(
        {**tool["function"]["parameters"], "additionalProperties": False}
    )
    for tool in TOOLS
}


@pytest.fixture(scope="module")
def marked(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny tokenizer with another control token, ``[TOOL_CALLS]``."""
    found = json.loads((tiny.path / "tokenizer.json").read_text(encoding="utf-8"))
    found["added_tokens"].append(found["added_tokens"][0] | {"id": MARK_ID, "content": "[TOOL_CALLS]"})
    text = json.dumps(found)
    assert Tokenizer.from_str(text).token_to_id("[TOOL_CALLS]") == MARK_ID
    return text


@pytest.fixture(scope="module")
def grammars(marked: str) -> Grammars:
    return Grammars(lambda: marked, 320, (END,))


def box_of(form: CallFormat, choice: Any = None, *, parallel: bool = True, tools: Any = TOOLS) -> Toolbox:
    found = toolbox(tools, choice, parallel, lambda: (form, {form.marker: MARK_ID} if form.name == "mistral" else {}))
    assert found is not None
    return found


def walk(grammars: Grammars, guide: Guide, random: np.random.Generator, begin: list[int]) -> list[int]:
    """Random allowed tokens after a beginning, until the end."""
    found: list[int] = []
    for token in begin:
        guide.accept(token)
        found.append(token)
    while (allowed := guide.allowed()) is not None and len(found) < 400:
        choices = np.flatnonzero(allowed)
        found.append(END if allowed[END] and random.random() < 0.3 else int(random.choice(choices)))
        guide.accept(found[-1])
        if found[-1] == END:
            break
    return found


def texts_of(marked: str, tokens: list[int]) -> list[tuple[int, str]]:
    stream = TextStream(Tokenizer.from_str(marked))
    return [(token, stream.push(token)) for token in tokens if token != END]


@pytest.mark.parametrize("form", formats().values(), ids=lambda form: form.name)
@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_calls_follow_their_schemas_by_construction(
    grammars: Grammars, marked: str, form: CallFormat, choice: Any
) -> None:
    """Random walks through the grammar end in calls whose arguments are valid, in whatever pieces they are read."""
    random, several, names = np.random.default_rng(1), 0, set()
    for number in range(25):
        box = box_of(form, choice, parallel=number % 3 > 0)
        guide = grammars.guide(box.structure(None))
        begin: list[int] = []
        if choice == "auto":
            tokenizer = Tokenizer.from_str(marked)
            opening = form.marker or form.head
            begin = tokenizer.encode(("Well, <tool> [TOOL: " if form.marker else "") + opening).ids
        tokens = walk(grammars, guide, random, begin)
        if tokens[-1] != END:
            continue
        found = read(box, texts_of(marked, tokens))
        assert found.content == ("Well, <tool> [TOOL: " if begin and form.marker else "")
        assert found.calls and all(len(call.id) == 9 for call in found.calls)
        for call in found.calls:
            CHECKS[call.name].validate(json.loads(call.arguments))
        several = max(several, len(found.calls))
        assert len(found.calls) == 1 or (number % 3 > 0 and isinstance(choice, str))
        names |= {call.name for call in found.calls}
        pieces, reader, text = [], CallReader(box), texts_of(marked, tokens)
        for token, one in text:  # letter by letter
            for letter in one or [""]:
                pieces += reader.push(token, letter)
        pieces += reader.finish()
        assert reader.calls == found.calls and reader.content == found.content
        assert "".join(piece.text for piece in pieces if piece.call is None) == found.content
        begun = [piece.call for piece in pieces if piece.begun is not None]
        assert begun == list(range(len(found.calls)))
    assert names == (set(CHECKS) if isinstance(choice, str) else {"weather"})
    assert several > 1 or not isinstance(choice, str) or not form.several


def test_nothing_but_a_call_follows_the_marker(grammars: Grammars, marked: str) -> None:
    """In ``auto`` any text is allowed up to the marker, and only the format's next letters after it."""
    tokenizer = Tokenizer.from_str(marked)
    guide = grammars.guide(box_of(formats()["hermes"], "auto").structure(None))
    for token in tokenizer.encode("a <tool_cal").ids:
        guide.accept(token)
    allowed = guide.allowed()
    assert allowed is not None and allowed[END] and allowed.sum() > 200 and not allowed[MARK_ID]
    for token in tokenizer.encode("l>").ids:
        guide.accept(token)
    allowed = guide.allowed()
    assert allowed is not None
    assert [tokenizer.decode([int(token)])[:1] for token in np.flatnonzero(allowed)] == ["\n"]
    with pytest.raises(InputError):
        guide.accept(tokenizer.encode("x").ids[0])


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_a_schema_is_the_content_next_to_tools(grammars: Grammars, marked: str, name: str) -> None:
    """With a JSON schema and ``auto``, a reply is either calls or a document of the schema."""
    random, kinds, form = np.random.default_rng(5), set(), formats()[name]
    schema = {"type": "object", "properties": {"name": {"enum": ["a/b", "weather"]}}, "required": ["name"],
              "additionalProperties": False}  # fmt: skip
    for content in (Structure("json_schema", json.dumps(schema)), Structure("regex", "[a-z]/[0-9]")):
        box = box_of(form)
        for _ in range(60):
            tokens = walk(grammars, grammars.guide(box.structure(content)), random, [])
            found = read(box, texts_of(marked, tokens))
            kinds.add((content.kind, bool(found.calls)))
            if not found.calls and content.kind == "json_schema":
                jsonschema_rs.validator_for(schema).validate(json.loads(found.content))
    assert len(kinds) == 4
    with pytest.raises(InputError, match="grammar with tools: only a JSON schema or a regex"):
        box_of(form).structure(Structure("grammar", "start: /a/"))
    with pytest.raises(InputError, match="regex with tools: calls of this model's family are documents themselves"):
        box_of(formats()["llama"]).structure(Structure("regex", "a"))


def test_a_marker_inside_a_document_is_text(grammars: Grammars, marked: str) -> None:
    """With a structure of its own a reply has calls at its very beginning only."""
    box = box_of(formats()["hermes"])._replace(document=True)
    for text in ('{"doc": "Wrap it in <tool_call> tags."}', "<tool", "<tool_cats>"):
        reader = CallReader(box)
        pieces = [piece for letter in text for piece in reader.push(7, letter)] + reader.finish()
        assert "".join(piece.text for piece in pieces) == reader.content == text and not reader.calls
    reader = CallReader(box)
    reader.push(7, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert [call.name for call in reader.calls] == ["stop"] and reader.content == ""


def test_text_before_a_marker_stays_before_it() -> None:
    """A stop string may hold text back until the marker's token, which then carries it."""
    reader = CallReader(box_of(formats()["mistral"]))
    assert reader.push(7, "Sure.") == [Piece("Sure.")]
    assert reader.push(MARK_ID, "\n") == [Piece("\n")]
    reader.push(7, '[{"name": "stop", "arguments": {}}]')
    assert reader.content == "Sure.\n" and [call.name for call in reader.calls] == ["stop"]


def test_bounds_of_tools_come_before_the_compiler(llm: LLM, monkeypatch: Any) -> None:
    compiled: list[Structure] = []
    monkeypatch.setattr(Grammars, "_compile", lambda _, asked: compiled.append(asked))
    tools = [function("f", x={"type": "integer", "multipleOf": 1_234_567}), function("g", x={"type": "integer"})]
    with pytest.raises(InputError, match=r"tools: multipleOf = .* the automaton would be too large"):
        llm.generate([5, 9], tools=tools)
    assert not compiled


def test_schemas_of_tools(grammars: Grammars) -> None:
    """Branches have properties of their own, and a schema's own form of JSON comes first."""
    branches = [
        {"properties": {"kind": {"const": kind}, kind: {"type": "boolean"}}, "required": ["kind", kind],
         "additionalProperties": False}
        for kind in "ab"
    ]  # fmt: skip
    compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    parameters = {"type": "object", "oneOf": branches, "x-guidance": compact}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    box = toolbox(tools, "required", False, lambda: (formats()["hermes"], {}))
    assert box is not None
    guide = grammars.guide(box.structure(None))
    forced = grammars.tokenizer.decode_str(guide.forced(200))
    assert forced.endswith('"arguments": {"kind":"'), forced


def test_pieces_of_a_call() -> None:
    """The name first, then the arguments as they come; text that might become a call is held back and given at the end."""
    reader = CallReader(box_of(formats()["hermes"]))
    assert reader.push(7, "Hi <tool") == [Piece("Hi ")]
    assert reader.push(7, '_call>\n{"name": "weather"') == []  # another function's name begins alike
    (piece,) = reader.push(7, ', "arguments": ')
    assert piece.begun is not None and (piece.call, piece.begun.name, piece.begun.id) == (
        0,
        "weather",
        reader._key + "00",
    )
    assert reader.push(7, '{"city": "}') == [Piece('{"city": "}', 0)]
    assert reader.push(7, '\\""}}') == [Piece('\\""}', 0)]
    assert reader.push(7, "\n</tool_call>\n<tool_call>\n") == []
    assert [piece.call for piece in reader.push(7, '{"name": "stop", "arguments": {}}\n</tool_call>')] == [1, 1]
    assert [call.arguments for call in reader.calls] == ['{"city": "}\\""}', "{}"]
    reader = CallReader(box_of(formats()["hermes"]))
    assert reader.push(7, "a <tool") + reader.finish() == [Piece("a "), Piece("<tool")]
    assert CallReader(box_of(formats()["hermes"])).push(7, "\ue0c2") == [Piece("\ue0c2")]  # Powerline's


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tools>{% endif %}<tool_call>", "hermes"),
        ("{{ 'You are a Falcon assistant skilled in function calling' }}{{ tools }}<tool_call>[</tool_call>", "falcon"),
        ("{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}{{ tools }}", "mistral"),
        ('{{ tools }} {"name": x, "parameters": dictionary of argument name and its value}.', "llama"),
        ("{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}name[ARGS]{{ tools }}", None),
        ("{{ tools }}<|tool_call_start|>[name(city='Ulm')]<|tool_call_end|>", None),
        ("{{ tools }}<tools><tool_calls><tool_call>name\n```json\n{}\n```</tool_call></tool_calls>", None),  # Hunyuan
        (r'{{ tools }}{{ "\n<tool_call>{\"name\": function_1_name}</tool_call>" }}', "exaone"),
        ("{{ messages }}", None),
    ],
)
def test_a_template_shows_its_format(template: str, name: str | None) -> None:
    found = format_of(template)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": 3}, "tools = 3: must be a list of at most 128 functions"),
        ({"tools": [{}]}, "tools: {}: must be a function: give {'type': 'function'"),
        ({"tools": [function("a b")]}, "tools: name = 'a b': must have 1 to 64 letters"),
        ({"tools": [WEATHER, WEATHER]}, "tools: two functions are called 'weather'"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice = 'maybe': must be 'none', 'auto'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice: x: tools"),
        ({"tool_choice": "required"}, "tool_choice = 'required': there are no tools"),
        ({"tools": [strict(function("f", a={"type": "array", "uniqueItems": True}))]}, "tools: f: .*uniqueItems"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools: parameters of f: must be a JSON schema of an object",
        ),
        ({"documents": [{"text": "a"}]}, "documents: this bundle's chat template has no use for them"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs = {'messages': \\[\\]}: must be an object"),
    ],
)
def test_tools_that_are_none(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate([{"role": "user", "content": "hi"}] if "tools" not in options else [5, 9], **options)


def test_a_format_with_one_call_a_message_gets_one() -> None:
    """The templates of Llama 3 refuse a message with several."""
    assert not box_of(formats()["llama"]).several and box_of(formats()["hermes"]).several


def test_a_message_without_calls_has_no_list_of_them(bundle_copy: Path) -> None:
    codec = write_template(bundle_copy, "{% for m in messages %}{{ 'tool_calls' in m }}{% endfor %}")
    for calls in ([], None):
        ids = codec.encode([{"role": "assistant", "content": "x", "tool_calls": calls}])
        assert codec.decode(ids) == "False"


@pytest.fixture(scope="module")
def llm(tiny: Any) -> Iterator[LLM]:
    with balcony_edge.load(tiny.path) as loaded:
        yield loaded


def test_a_reply_has_its_calls(llm: LLM) -> None:
    question = [5, 9, 17]  # the context of 256 has no room for the default format's system message
    for seed in range(6):
        params = SamplingParams(temperature=1.0, seed=seed)
        stream = llm.stream(
            question, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, sampling=params
        )
        forced = sum(token.forced for token in stream)
        reply = stream.reply
        assert stream.reply.tool_calls == reply.tool_calls  # ids and all
        (call,) = reply.tool_calls
        CHECKS[call.name].validate(json.loads(call.arguments))
        assert reply.text == "" and reply.finish_reason == "stop" and forced > 10
        assert call.to_dict()["function"] == {"name": "weather", "arguments": call.arguments}


def test_templates_without_tools_are_told(llm: LLM) -> None:
    """The default format: tools in the system message, calls and results as text."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm", "days": 2}'}},
            {"id": "b", "type": "function", "function": {"name": "stop", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "ok"}]},
    ]  # fmt: skip
    text = llm.decode(llm.encode(messages, tools=[WEATHER]))
    listed = json.dumps(WEATHER["function"])
    assert text.startswith(f"<system>Be brief.\n\nYou can call these functions:\n<tools>\n{listed}\n</tools>")
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'
    stopped = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert f"<assistant>{called}\n{stopped}\n<user><tool_response>\nsun\n</tool_response>\n" in text
    assert text.endswith("<tool_response>\nok\n</tool_response>\n<assistant>") and text.count("<user>") == 2
    assert "You can call" not in llm.decode(llm.encode(messages, tools=[WEATHER], tool_choice="none"))
    assert llm.decode(llm.encode("hi", tools=[WEATHER])).startswith("<system>You can call these functions:")


def test_a_conversation_remembers_its_calls(bundle_copy: Path) -> None:
    template = (
        "{% for one in tools or [] %}{{ one.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}{% endfor %}{% endfor %}"
    )
    # as in Qwen 3.5: no conversation without a message of the user
    users = "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
    with balcony_edge.load(bundle_copy) as llm:
        llm.codec = llm._requests._codec = write_template(bundle_copy, users + template)
        chat = llm.chat(system="be brief")
        stream = chat.send("hi", tools=[function("stop")], tool_choice="required", parallel_tool_calls=False)
        for _ in stream:
            pass
        assert [call.name for call in stream.reply.tool_calls] == ["stop"] and stream.reply.text == ""
        assert chat.messages[-1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [stream.reply.tool_calls[0].to_dict()],
        }
        call = stream.reply.tool_calls[0]
        results = [{"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "done"}]
        said = chat.send(results, max_new_tokens=3)
        list(said)
        shown = llm.decode(llm.encode(chat.messages[:4]))
        assert shown.endswith("<assistant><tool_call>stop<tool>done") and llm.decode(
            chat.sequence.tokens[0]
        ).startswith(shown)
        assert chat.messages[3] == results[0] and chat.messages[4]["role"] == "assistant"
        list(chat.send({"role": "user", "content": "go on"}, max_new_tokens=2))
        roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
        assert [one["role"] for one in chat.messages] == roles
        for wrong, message in (
            (3, "message of type int"),
            ([], "no messages were given"),
            ([{"role": "tool"}], "content"),
        ):
            with pytest.raises(InputError, match=message):
                chat.send(wrong)
        assert len(chat.messages) == 7
        chat.reset()
        assert chat.messages == [{"role": "system", "content": "be brief"}]
        assert chat.sequence.length <= 1  # every message begins with the same mark


#: Parts of templates of three families that show tools, calls and results.
TEMPLATES = {
    "hermes": (
        "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}{% endfor %}{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ mood | default('calm') }}"
    ),
    "mistral": "{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}[TOOL_CALLS]",
    "falcon": "You are a Falcon assistant skilled in function calling{{ tools }}<tool_call>\n[]\n</tool_call>",
}


def test_templates_get_tools_documents_and_variables(bundle_copy: Path) -> None:
    codec = write_template(bundle_copy, TEMPLATES["hermes"])
    assert codec.call_format.name == "hermes"
    call = {"type": "function", "function": {"name": "stop", "arguments": '{"a": [1]}'}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    options: dict[str, Any] = {"documents": [{"text": "fact"}], "template_kwargs": {"mood": "wild"}}
    for literal in (True, False):
        ids = codec.encode(messages, tools=[WEATHER], control_tokens=not literal, **options)
        assert codec.decode(ids) == (
            f"<tools>{json.dumps(WEATHER)}</tools><user>hi<assistant><tool_call>\n"
            '{"name": "stop", "arguments": {"a": [1]}}\n</tool_call>[fact]wild'
        )
    assert codec.decode(codec.encode(messages)).endswith("</tool_call>calm")
    assert write_template(bundle_copy, TEMPLATES["mistral"]).call_format.name == "mistral"


def test_a_template_of_an_unknown_format_is_told_the_default(bundle_copy: Path) -> None:
    """What the prompt teaches is what the reader of calls expects."""
    shown = "{% if tools %}<|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}"
    codec = write_template(bundle_copy, shown + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    text = codec.decode(codec.encode([{"role": "user", "content": "hi"}], tools=[WEATHER]))
    assert "tool_list_start" not in text and json.dumps(WEATHER["function"]) in text
    assert codec.call_format.marker in text


def test_a_template_that_writes_calls_as_tags_is_told_the_default(bundle_copy: Path) -> None:
    """Qwen 3.5 has the marker of Hermes, but its calls are no JSON."""
    tags = "{% if tools %}{{ tools | tojson }}<tool_call>\n<function=name>\n<parameter=key>{% endif %}"
    codec = write_template(bundle_copy, tags + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    text = codec.decode(codec.encode([{"role": "user", "content": "hi"}], tools=[WEATHER]))
    assert "<function=" not in text and json.dumps(WEATHER["function"]) in text and codec.call_format.marker in text


def test_a_template_without_a_system_message_gets_tools_in_the_first_turn(bundle_copy: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    text = write_template(bundle_copy, template)
    assert text.decode(text.encode("hi", tools=[WEATHER])).startswith("<user>You can call these functions:")


def test_a_call_that_was_cut_does_not_end_a_conversation(bundle_copy: Path) -> None:
    template = (
        "{% for one in tools or [] %}{{ one.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    with balcony_edge.load(bundle_copy) as llm:
        llm.codec = llm._requests._codec = write_template(bundle_copy, template)
        chat = llm.chat()
        with chat.send("hi", tools=[WEATHER], tool_choice="required") as stream:
            for _ in stream:
                if (calls := stream.reply.tool_calls) and not calls[-1].whole:
                    break
        assert not calls[0].whole and [one["role"] for one in chat.messages] == ["user", "assistant"]
        assert "tool_calls" not in chat.messages[1]
        list(chat.send("again", max_new_tokens=2))
        cut = {
            "role": "assistant",
            "tool_calls": [calls[0].to_dict() | {"function": {"name": "f", "arguments": '{"a'}}],
        }
        assert '{\\"a' in llm.decode(llm.encode([{"role": "user", "content": "a"}, cut]))  # a client sends it back


def test_a_tool_that_is_not_strict_may_have_what_no_grammar_enforces(llm: LLM) -> None:
    parts = {
        "many": {"type": "array", "items": {"type": "integer", "format": "int32"}, "uniqueItems": True},
        "text": {"type": "string", "format": "jinja2", "pattern": "^(?!x)"},
        "default": {"type": "string", "pattern": "^(?!x)"},
        "table": {"type": "object", "propertyNames": {"pattern": "a"}},
        "number": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "pattern": {"const": "(?=a property and a value of that name)"},
    }
    choice = {"tools": [function("f", **parts)], "tool_choice": "required"}
    assert llm.generate([5, 9], max_new_tokens=2, **choice).tokens
    (tool,) = tools_of(choice["tools"])
    kept = json.loads(tool.schema)["properties"]
    assert "pattern" not in kept["text"] and kept["table"] == parts["table"] and kept["pattern"] == parts["pattern"]


@pytest.mark.parametrize(
    "calls",
    [
        3,
        [3],
        [{"function": {"arguments": "{}"}}],
        [{"function": {"name": "f", "arguments": "[1]"}}],
        [{"function": {"name": "f", "arguments": "3"}}],
    ],
    ids=str,
)
def test_calls_in_a_prompt_that_are_none(llm: LLM, calls: Any) -> None:
    with pytest.raises(InputError, match=r"message tool_calls: .*: must have a function with a name"):
        llm.encode([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}])


def test_calls_and_tools_that_json_does_not_have(llm: LLM) -> None:
    call = {"function": {"name": "f", "arguments": {"days": {1, 2}}}}
    with pytest.raises(InputError, match=r"tools, tool_calls: not JSON \(.*set"):
        llm.encode([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}])
    tool = {"type": "function", "function": {"name": "f", "description": b"To do f."}}
    with pytest.raises(InputError, match=r"tools, tool_calls: not JSON \(.*bytes"):
        llm.encode("a", tools=[tool])
