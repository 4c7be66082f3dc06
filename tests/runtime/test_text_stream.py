"""Streams of text without broken characters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.text.stream import TextStream
from tests.support.properties import examples
from tests.support.templates import manifest_of


@pytest.fixture(scope="module")
def codec(tiny: Any) -> TextCodec:
    return TextCodec(Bundle.open(tiny.path))


def byte_fallback() -> Tokenizer:
    """A tokenizer as in Llama 2, Mistral and Gemma: pieces with their space, and single bytes for other characters."""
    pieces = ["<unk>", "▁text", "▁the", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(list(steps))
    return tokenizer


@examples(500)
@given(st.lists(st.sampled_from([1, 2, *(3 + byte for byte in b"\na\xe2\x82\xac\xf0\x9f\x98\x80")]), max_size=14))
def test_bytes_that_never_become_a_character_end_no_stream(tokens: list[int]) -> None:
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer)
    streamed = "".join([*(stream.push(token) for token in tokens), stream.flush()])
    whole = tokenizer.decode(tokens)
    # A byte that was already returned may become an unknown character of the whole text; it cannot be taken back.
    assert re.findall(" ?text| ?the", streamed) == re.findall(" ?text| ?the", whole)
    assert len(streamed.encode()) <= len(whole.encode())


def test_a_word_after_a_prompt_keeps_its_space(bundle_copy: Path) -> None:
    """Tokenizers as in Llama 2 drop the space in front of a text's first word."""
    (bundle_copy / "tokenizer.json").write_text(byte_fallback().to_str())
    codec = TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))
    assert (codec.decode([1]), codec.name(1), codec.name(3 + ord("b"))) == ("text", " text", "b")
    assert [codec.stream().push(1), codec.stream([1] * 9 + [2]).push(1)] == ["text", " text"]
    khmer = [3 + byte for byte in "កខគ".encode()]  # the last eight bytes begin within a character
    stream = codec.stream(khmer)
    assert [stream.push(token) for token in (*khmer[:3], 2)] == ["", "", "ក", " the"]


def test_a_reply_completes_the_end_of_its_prompt_and_does_not_repeat_it(codec: TextCodec) -> None:
    """A replacement character may be half of a character, or one that the prompt has."""
    fox, (first, second) = codec.encode("fox", chat=False), codec.encode("\u0101", chat=False)
    for before in (codec.encode("a\ufffd", chat=False), codec.encode("\ufffd" * 9, chat=False), [*fox, first]):
        stream = codec.stream(before)
        assert "".join(map(stream.push, fox)) + stream.flush() == "fox"
    assert codec.stream([*fox, first]).push(second) == "\u0101"


def test_control_tokens_in_a_row_are_not_decoded_again_and_again(codec: TextCodec) -> None:
    """As after ``ignore_eos``: of 8,000 in a row the last took 0.3 ms, in the thread that makes the tokens of all replies."""
    stream, (end, _), fox = codec.stream(), codec.added["<end>"], codec.encode("fox", chat=False)
    assert not any(stream.push(end) for _ in range(100)) and not stream._open
    assert "".join(map(stream.push, [fox[0], end, *fox[1:]])) + stream.flush() == "fox"


def test_bytes_that_are_no_character_are_not_decoded_again_and_again(codec: TextCodec) -> None:
    """As of a model that repeats a byte: of 8,000 in a row the last took 2.6 ms, and none of them was shown before the end."""
    (_, second), broken, fox = (codec.encode(text, chat=False) for text in ("\u0101", "\ufffd", "fox"))
    for row in ([second], broken):
        stream, tokens = codec.stream(), [*row * 100, *fox]
        pieces, most = [], 0
        for token in tokens:
            pieces.append(stream.push(token))
            most = max(most, len(stream._open))
        assert most < 40 and any(pieces[:50])
        assert "".join(pieces) + stream.flush() == codec.decode(tokens)


@examples(1000)
@given(st.lists(st.integers(0, 319), max_size=40))
def test_streamed_text_is_the_text_decoded_at_once(codec: TextCodec, tokens: list[int]) -> None:
    stream = codec.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == codec.decode(tokens)


@examples(100)
@given(st.text(max_size=30))
def test_no_piece_of_real_text_holds_half_a_character(codec: TextCodec, text: str) -> None:
    stream = codec.stream()
    pieces = [stream.push(token) for token in codec.encode(text, chat=False)] if text.strip() else []
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.flush() == (text if text.strip() else "")


@pytest.mark.parametrize(
    "text",
    [
        "🦊👩‍👩‍👧‍👦🏳️‍🌈 and 🇯🇵",
        "مرحبا بالعالم، كيف حالك؟",
        "שלום עולם",
        "牛乳とパンを買う",
        "é̂ ñ ö",
        "a" * 5000,
        "\u200b\u202e x",
    ],
    ids=["emoji", "arabic", "hebrew", "japanese", "combining", "a very long word", "invisible"],
)
def test_text_of_every_script_streams_whole(codec: TextCodec, text: str) -> None:
    stream = codec.stream()
    pieces = [stream.push(token) for token in codec.encode(text, chat=False)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


def test_a_structured_text_keeps_its_first_space(bundle_copy: Path) -> None:
    """Tokenizers like Llama 2's drop it from a text's beginning, and a regex may ask for it."""
    document = json.loads((bundle_copy / "tokenizer.json").read_text())
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [document["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    (bundle_copy / "tokenizer.json").write_text(json.dumps(document))
    codec = TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))
    (token,) = codec.encode(" the", chat=False)[:1]
    assert codec.stream().push(token) + "|" != codec.stream(literal=True).push(token) + "|"
    assert codec.stream(literal=True).push(token).startswith(" ")
