"""Marks of calls that are tokens of their own, as in Qwen 2.5 and 3: texts show them, and a grammar names them by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import balcony_edge
from balcony_runtime.structure.calls import read
from balcony_runtime.structure.formats import formats
from balcony_runtime.structure.grammar import Grammars
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


def test_a_request_knows_the_tokens_of_marks(bundle_copy: Path, tagged: str) -> None:
    with balcony_edge.load(bundle_copy) as llm:
        (bundle_copy / "tokenizer.json").write_text(tagged, encoding="utf-8")
        llm._requests._codec = write_template(bundle_copy, TEMPLATES["hermes"])
        box = llm._requests.box(TOOLS, "required")
    assert box is not None and box.tags == TAGS
