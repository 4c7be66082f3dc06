"""Messages as other services and clients have them, and thoughts in replies."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcony_edge.errors import InputError
from balcony_runtime.structure.formats import formats, plain_messages, without_system
from balcony_runtime.structure.marks import ThoughtReader, one_of, overlap
from balcony_runtime.structure.tools import tools_of
from tests.support.properties import examples
from tests.support.templates import write_template


def said(*turns: str) -> list[dict[str, Any]]:
    """Messages of roles: "su" is a system's and a user's, with the contents 0 and 1."""
    roles = {"s": "system", "u": "user", "a": "assistant", "d": "developer"}
    return [{"role": roles[role], "content": str(place)} for place, role in enumerate("".join(turns))]


SHOWN = "{% for m in messages %}{{ m.role[0] }}{{ m.content | replace('\\n\\n', '+') }} {% endfor %}"
#: Qwen3.5's rule, and Gemma 2's, which also wants turns to alternate.
FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('not first') }}{% endif %}"
    "{% endfor %}"
)
NONE = (
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('none') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("rule", "turns", "shown"),
    [
        ("", "susu", "s0 u1 s2 u3"),  # a template that takes them gets them as they are
        (FIRST, "suau", "s0 u1 a2 u3"),
        (FIRST, "ssu", "s0+1 u2"),
        (FIRST, "suasu", "s0 u1 a2 u3+4"),
        (FIRST, "suas", "s0 u1 a2 u3"),
        (FIRST, "udu", "u0+1+2"),
        (FIRST, "us", "u0+1"),
        (NONE, "ssua", "u0+1+2 a3"),
        (NONE, "sau", "u0 a1 u2"),
        (NONE, "s", "u0"),
        (NONE, "uu", "u0+1"),
    ],
)
def test_system_messages_where_a_template_takes_them(bundle_copy: Path, rule: str, turns: str, shown: str) -> None:
    codec = write_template(bundle_copy, rule + SHOWN)
    assert codec.decode(codec.encode(said(turns))).strip() == shown


@pytest.mark.parametrize(
    ("role", "joined"),
    [("user", without_system), ("tool", lambda messages: plain_messages(messages, (), formats()["hermes"]))],
)
def test_many_messages_are_joined_in_linear_time(role: str, joined: Callable[[Any], list[dict[str, Any]]]) -> None:
    begin = time.thread_time()
    (one,) = joined([{"role": role, "content": "x" * 40}] * 60_000)
    assert one["role"] == "user" and one["content"].count("x") == 40 * 60_000
    assert time.thread_time() - begin < 1


def test_a_reply_that_stopped_before_its_first_word_comes_back(bundle_copy: Path) -> None:
    """Vercel's AI SDK gives its empty text as null; other clients leave the key out."""
    codec = write_template(bundle_copy, SHOWN)
    told = [codec.encode([*said("u"), {"role": "assistant", **empty}, *said("u")])
            for empty in ({"content": ""}, {"content": None}, {})]  # fmt: skip
    assert told[0] == told[1] == told[2]


def test_the_refusal_is_about_the_messages_that_were_given(bundle_copy: Path) -> None:
    rule = "{{ raise_exception(messages | map(attribute='role') | join(' ')) }}"
    with pytest.raises(InputError, match=r"the chat template refuses these messages \(system user system\)"):
        write_template(bundle_copy, rule).encode(said("sus"))


def test_parts_and_calls_as_clients_send_them_back(bundle_copy: Path) -> None:
    codec = write_template(bundle_copy, SHOWN)
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": "text", "text": "c"},
             {"type": "refusal", "refusal": "d"}]  # fmt: skip
    assert codec.decode(codec.encode([{"role": "user", "content": parts}])).split() == ["ua", "b", "c", "d"]
    for wrong in ({"type": "image_url", "image_url": {}}, {"type": "refusal", "text": "d"}, {"type": ["text"]}, {}):
        with pytest.raises(InputError, match="a list may hold only"):
            codec.encode([{"role": "user", "content": [wrong]}])
    calls = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}{# tools #}"
    )
    codec = write_template(bundle_copy, calls)
    for empty in (None, "", "null", "{}", {}):
        call = {"type": "function", "function": {"name": "stop", "arguments": empty}}
        assert "{}" in codec.decode(codec.encode([*said("u"), {"role": "assistant", "tool_calls": [call]}]))


@pytest.mark.parametrize(
    ("shown", "calls"),
    [
        ("<tool_call>", '<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'),
        (
            "[AVAILABLE_TOOLS]{% if messages[0].role == 'tool_calls' %}[TOOL_CALLS]{% endif %}",
            '[TOOL_CALLS][{"name": "stop", "arguments": {"a": 1}}]',
        ),
    ],
)
def test_a_template_that_leaves_calls_out_gets_them_as_text(bundle_copy: Path, shown: str, calls: str) -> None:
    """SmolLM3's shows the tools, and of a message with calls the content: the model would call again.

    Mistral's first one has a role for them. Calls are in the form in which the next ones are read.
    """
    codec = write_template(bundle_copy, f"{{% if tools %}}{shown}{{{{ tools[0].function.name }}}} {{% endif %}}{SHOWN}")
    call = {"type": "function", "function": {"name": "stop", "arguments": '{"a": 1}'}}
    messages = [*said("u"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "done"}]
    text = codec.decode(codec.encode(messages, tools=[{"type": "function", "function": {"name": "stop"}}])).strip()
    assert text.partition("stop ")[2] == f"u0 a{calls} u<tool_response>\ndone\n</tool_response>"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_comes_back_under_any_of_its_names(bundle_copy: Path, name: str) -> None:
    """LFM2.5's template reads the second one, and we send the first, as llama.cpp; vLLM sends the third."""
    codec = write_template(
        bundle_copy, "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }} {% endfor %}"
    )
    messages = [{"role": "assistant", "content": "a", "reasoning_content": None, name: "the fox"}, *said("u")]
    assert codec.decode(codec.encode(messages)).strip() == "the fox|the fox |"


def test_json_as_transformers_writes_it(bundle_copy: Path) -> None:
    codec = write_template(
        bundle_copy,
        "{{ {'b': 'fox', 'a': [1]} | tojson(ensure_ascii=False) }}|{{ [1, 2] | tojson(True, None, (';', '=')) }}|"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}",
    )
    assert codec.decode(codec.encode(said("u"))) == '{"b": "fox", "a": [1]}|[1;2]|{"a": 2, "b": 1}'
    with pytest.raises(InputError, match="longer than"):
        write_template(bundle_copy, "{{ ([1] * 9000) | tojson(separators=('x' * 90000, '')) }}").encode(said("u"))


@examples(200)
@given(st.text("<think>/ \na", max_size=30), st.lists(st.integers(0, 30)), st.booleans())
def test_a_thought_is_the_same_in_any_pieces(text: str, cuts: list[int], inside: bool) -> None:
    whole = ThoughtReader(inside)
    thought, answer = (a + b for a, b in zip(whole.push(text), whole.finish(), strict=True))
    reader, edges = ThoughtReader(inside), [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [reader.push(text[a:b]) for a, b in itertools.pairwise(edges)] + [reader.finish()]
    assert ("".join(one for one, _ in pieces), "".join(one for _, one in pieces)) == (thought, answer)
    opened = inside or text.lstrip().startswith("<think>")
    if not opened:
        assert (thought, answer) == ("", text)
    elif "</think>" not in text:
        assert answer == ""


@pytest.mark.parametrize(
    ("inside", "text", "thought", "answer"),
    [
        (False, "<think>\nwhy not\n</think>\n\nYes. ", "why not", "Yes. "),
        (False, " <think></think>Yes", "", "Yes"),
        (False, "  Yes <think>no</think>", "", "  Yes <think>no</think>"),
        (False, "<thin", "", "<thin"),
        (True, "because\n</think>\nYes\n</think>", "because", "Yes\n</think>"),
        (True, "a < b </thi", "a < b </thi", ""),
        (True, "\n a  b \n", "a  b", ""),
    ],
)
def test_where_a_thought_ends(inside: bool, text: str, thought: str, answer: str) -> None:
    reader = ThoughtReader(inside)
    pieces = [reader.push(letter) for letter in text] + [reader.finish()]
    assert ("".join(one for one, _ in pieces), "".join(one for _, one in pieces)) == (thought, answer)


def test_overlap() -> None:
    assert [overlap(text, "</a>") for text in ("", "x", "x<", "x</", "x</a", "x</a>", "</")] == [0, 0, 1, 2, 3, 0, 2]


def nested(levels: int) -> dict[str, Any]:
    """An object in an object in an object."""
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"properties": {"a": found}}
    return found


def test_what_is_nested_too_deeply_is_named(bundle_copy: Path) -> None:
    """Python 3.11 stops at a thousand calls, 3.13 later. The parser of JSON takes about as many, so clients can send that."""
    codec = write_template(bundle_copy, SHOWN + "{{ mood }}{% if tools %}<tool_call>{% endif %}")
    deep = {"function": {"name": "f", "arguments": nested(20_000)}}
    for options, calls in (({"template_kwargs": {"mood": nested(20_000)}}, {}), ({}, {"tool_calls": [deep]})):
        with pytest.raises(InputError, match="the prompt is nested too deeply"):
            codec.encode([*said("u"), {"role": "assistant", "content": "a", **calls}], **options)
    with pytest.raises(InputError, match="tools: parameters of f: are nested too deeply"):
        tools_of([{"type": "function", "function": {"name": "f", "parameters": nested(20_000)}}])


@examples(200)
@given(st.lists(st.text("<|ab1", min_size=1, max_size=6), min_size=1, unique=True), st.text("<|ab1", max_size=60))
def test_the_longest_mark_is_found_wherever_some_begin_alike(marks: list[str], text: str) -> None:
    choices = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    assert one_of(tuple(marks)).findall(text) == re.findall(choices, text)


def test_many_marks_that_begin_alike_take_the_time_of_one() -> None:
    """Llama 3's, in a body of 1 MB; the search holds Python's lock, which all other replies need."""
    spelled = one_of(tuple(f"<|reserved_special_token_{number}|>" for number in range(248)))
    begin_s = time.process_time()
    assert spelled.sub("", "<|reserved_special_token_" * 40_000) == "<|reserved_special_token_" * 40_000
    assert time.process_time() - begin_s < 0.3  # 0.01 s; 1.1 s if each is tried
