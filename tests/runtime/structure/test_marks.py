"""Marks of calls that are tokens of their own, as in Qwen 2.5 and 3: texts show them, and a grammar names them by number."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import balcony_edge
from balcony_edge.budget import Budget
from balcony_runtime.structure.calls import CallReader, read
from balcony_runtime.structure.formats import formats
from balcony_runtime.structure.grammar import Grammars
from balcony_runtime.telling import StopStrings, told
from tests.runtime.structure.test_structure import guide_of
from tests.runtime.structure.test_tools import END, MARK_ID, TEMPLATES, TOOLS, box_of, function, texts_of, walk
from tests.support.templates import write_template

TAGS = {name: MARK_ID + place for place, name in enumerate(("<tool_call>", "</tool_call>", "<think>"))}


@pytest.fixture(scope="module")
def tagged(tiny: Any) -> str:
    """The tiny tokenizer with these tokens, which are no control tokens."""
    found = json.loads((tiny.path / "tokenizer.json").read_text(encoding="utf-8"))
    first = found["added_tokens"][0]
    found["added_tokens"] += [first | {"id": id_, "content": name, "special": False} for name, id_ in TAGS.items()]
    text = json.dumps(found)
    assert {name: Tokenizer.from_str(text).token_to_id(name) for name in TAGS} == TAGS
    return text


@pytest.mark.parametrize(("choice", "before"), [("required", ""), ("auto", ""), ("auto", "<think>So")])
def test_a_call_has_the_tokens_of_its_marks(tagged: str, choice: str, before: str) -> None:
    box = box_of(formats()["hermes"], choice, parallel=False, tools=[function("stop")])._replace(tags=TAGS)
    grammars = Grammars(lambda: tagged, 320, (END,))
    begin = Tokenizer.from_str(tagged).encode(f"{before}<tool_call>").ids
    tokens = walk(grammars, grammars.guide(box.structure(None)), np.random.default_rng(1), begin)
    assert tokens[-1] == END and tokens.count(TAGS["<tool_call>"]) == tokens.count(TAGS["</tool_call>"]) == 1
    found = read(box, texts_of(tagged, tokens))
    assert found.content == before and [(call.name, call.arguments) for call in found.calls] == [("stop", "{}")]


def test_a_marker_that_other_tokens_spell_is_text() -> None:
    """The grammar lets any text follow it, so it begins no call and stays in the content."""
    reader = CallReader(box_of(formats()["hermes"], "auto")._replace(tags=TAGS))
    for letter in "Write <tool_call> first.":
        reader.push(7, letter)
    reader.push(TAGS["<tool_call>"], "<tool_call>")
    reader.push(7, '\n{"name": "stop", "arguments": {}}\n')
    assert reader.content == "Write <tool_call> first." and [call.name for call in reader.calls] == ["stop"]


@pytest.mark.parametrize("family", ["hermes", "falcon"])
def test_a_request_knows_the_tokens_of_marks(bundle_copy: Path, tagged: str, family: str) -> None:
    with balcony_edge.load(bundle_copy) as llm:
        (bundle_copy / "tokenizer.json").write_text(tagged, encoding="utf-8")
        llm._requests._codec = write_template(bundle_copy, TEMPLATES[family])
        box = llm._requests.box(TOOLS, "required")
    assert box is not None and box.tags == TAGS and box.form.name == family


def test_calls_are_read_where_texts_do_not_show_their_marks(bundle_copy: Path, tagged: str) -> None:
    """A reader that looked for the end of a call in the text alone would not find the next call."""
    found = json.loads(tagged)
    for token in found["added_tokens"]:
        token["special"] = token["special"] or token["content"] in TAGS
    with balcony_edge.load(bundle_copy) as llm:
        (bundle_copy / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
        llm._requests._codec = write_template(bundle_copy, TEMPLATES["hermes"])
        box = llm._requests.box([function("stop")], "required")
    assert box is not None and box.marker_id == TAGS["<tool_call>"] and box.tags == TAGS
    grammars, counts = Grammars(lambda: json.dumps(found), 320, (END,)), set()
    for seed in range(8):
        tokens = walk(grammars, grammars.guide(box.structure(None)), np.random.default_rng(seed), [])
        if tokens[-1] == END:
            calls = read(box, texts_of(json.dumps(found), tokens)).calls
            assert len(calls) == tokens.count(TAGS["<tool_call>"])
            counts.add(len(calls) > 1)
    assert True in counts


def test_a_thought_ends_with_its_token_where_calls_have_none(tagged: str) -> None:
    """As in DeepSeek-R1-Distill-Llama: its tokenizer has the marks of thoughts, and not those of calls."""
    box = box_of(formats()["hermes"], "auto", parallel=False, tools=[function("stop")])
    box = box._replace(tags={"<think>": TAGS["<think>"]})
    text = tagged.replace('tool_call>"', 'another>"')
    grammars, tokenizer = Grammars(lambda: text, 320, (END,)), Tokenizer.from_str(text)
    begin = [*tokenizer.encode("So ").ids, TAGS["<think>"], *tokenizer.encode("a ").ids]
    begin += [id_ for letter in "<tool_call>" for id_ in tokenizer.encode(letter).ids]
    tokens = walk(grammars, grammars.guide(box.structure(None)), np.random.default_rng(1), begin)
    found = read(box, texts_of(text, tokens))
    assert found.content == "So <think>a " and [call.name for call in found.calls] == ["stop"]


@pytest.mark.parametrize(("shown", "stop"), [(True, ">>>"), (False, "\n\n")])
def test_no_stop_string_goes_over_the_mark_of_a_call(shown: bool, stop: str) -> None:
    """Text that may become a stop string comes with the mark after it, or the next call would not be found."""
    box = box_of(formats()["hermes"], "auto", tools=[function("stop")])._replace(tags=TAGS)
    begin, end = ((TAGS[name], name if shown else "") for name in ("<tool_call>", "</tool_call>"))
    call = [begin, (7, '\n{"name": "stop", "arguments": {}}\n'), end]
    said = [*call, (7, "\n"), *call]
    texts = iter([text for _, text in said])
    watch = SimpleNamespace(token=lambda *_, **__: None)
    asked: Any = SimpleNamespace(
        text=SimpleNamespace(push=lambda _: next(texts), flush=str), stop=StopStrings([stop]), watch=watch, box=box,
        cancelled=SimpleNamespace(is_set=bool), max_new_tokens=99, ends=(), logprobs=None,
    )  # fmt: skip
    decision, budget = SimpleNamespace(exit_layer=3, predicted_ms=None), Budget()
    steps: Any = [(np.array(token), None, decision, None, 1.0, 0, budget, (), 0.0, False) for token, _ in said]
    decoder: Any = SimpleNamespace(kept_rows=0, sequence=SimpleNamespace(pending_rows=0))
    tokens = [(token.id, token.text) for token in told(iter(steps), decoder, asked, tuple)]
    assert [call.name for call in read(box, tokens).calls] == ["stop", "stop"]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"regex": "<think>no</think>yes"}, "<think>no</think>yes"),
        ({"json_schema": {"const": "<think>"}}, '"<think>"'),
        ({"grammar": 'start: "<think>no"'}, "<think>no"),
    ],
)
def test_a_text_may_spell_a_mark(tagged: str, asked: dict[str, Any], wanted: str) -> None:
    """Other tokens spell it: the mark's own is no text."""
    grammars = Grammars(lambda: tagged, 320, (END,))
    tokens = walk(grammars, guide_of(grammars, **asked), np.random.default_rng(1), [])
    assert tokens[-1] == END and not set(TAGS.values()) & set(tokens)
    assert Tokenizer.from_str(tagged).decode(tokens) == wanted


def test_a_grammar_may_name_a_mark(tagged: str) -> None:
    guide = guide_of(Grammars(lambda: tagged, 320, (END,)), grammar='start: <think> "no"')
    assert guide.permits(TAGS["<think>"])
