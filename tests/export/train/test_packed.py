"""A packed text on disk: it is the text that packing makes, and only that of the same files, tokenizer and settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from balcony_edge.errors import InputError
from balcony_export.data import packed as packed_module
from balcony_export.data.corpus import build_corpus, separator
from balcony_export.data.packed import PackedText


def test_a_packed_text_is_read_again_unless_something_changed(
    text_file: Path, make_tokenizer: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, copied, packs = tmp_path / "run" / "corpus.safetensors", tmp_path / "text.jsonl", 0
    copied.write_bytes(text_file.read_bytes())

    def counted(*given: Any, **settings: Any) -> Any:
        nonlocal packs
        packs += 1
        return build_corpus(*given, **settings)

    def packed(*, keep: bool = True, **settings: Any) -> Any:
        given: dict[str, Any] = {"seq_len": 24, "seed": 0, "held_out_rows": 4, "mix": {}}
        text = PackedText(path, [copied], make_tokenizer(), **given | settings)
        if keep:
            text.keep()
        return text.corpus

    monkeypatch.setattr(packed_module, "build_corpus", counted)
    first, again = packed(mix={"text.jsonl": 0.5}), packed(mix={"text.jsonl": 0.5})
    assert packs == 1 and (again.digest, again.sources) == (first.digest, first.sources)
    for name in ("train", "held_out"):
        for part in ("tokens", "lengths"):
            ours, theirs = (getattr(getattr(corpus, name), part) for corpus in (again, first))
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert packed().digest != first.digest and packs == 2  # another share
    path.write_bytes(path.read_bytes()[:-8])
    assert packed(keep=False).digest == packed().digest and packs == 4  # damaged
    copied.write_text(copied.read_text() + json.dumps({"text": "the quick brown fox"}) + "\n")
    packed()
    copied.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        packed()


@pytest.mark.parametrize("part", ["train.tokens", "train.lengths", "held_out.lengths"])
def test_a_packed_text_with_one_wrong_number_is_packed_again(
    part: str, text_file: Path, make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    path, names = (
        tmp_path / "corpus.safetensors",
        [f"{a}.{b}" for a in ("train", "held_out") for b in ("tokens", "lengths")],
    )

    def packed() -> PackedText:
        return PackedText(path, [text_file], make_tokenizer(), seq_len=24, held_out_rows=4)

    whole = packed()
    whole.keep()
    with safe_open(path, "np") as file:
        arrays, facts = {name: file.get_tensor(name).copy() for name in names}, file.metadata()
    arrays[part].flat[0] += 1
    path.write_bytes(save(arrays, facts))
    found = packed().corpus
    for rows in ("train", "held_out"):
        for kind in ("tokens", "lengths"):
            assert np.array_equal(*(getattr(getattr(one, rows), kind) for one in (found, whole.corpus)))


@pytest.mark.parametrize("change", ["tokens", "template"])
def test_a_text_is_packed_again_for_another_tokenizer(
    change: str, text_file: Path, make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "corpus.safetensors"
    settings: dict[str, Any] = {"seq_len": 24, "held_out_rows": 4}
    first, other = PackedText(path, [text_file], make_tokenizer(), **settings), make_tokenizer()
    first.keep()
    if change == "tokens":
        other.add_tokens(["balcony"])
    else:
        other.chat_template += "."
    found = PackedText(path, [text_file], other, **settings).corpus
    assert found.digest == build_corpus([text_file], other, **settings).digest != first.corpus.digest


def test_a_pipe_is_read_once(make_tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    """As in bash: `train MODEL --data <(zcat text.jsonl.gz)`."""
    reads, writes = os.pipe()
    os.write(writes, b"".join(b'{"text": "the quick brown fox %d"}\n' % number for number in range(60)))
    os.close(writes)
    text = PackedText(tmp_path / "corpus.safetensors", [Path(f"/dev/fd/{reads}")], make_tokenizer(), seq_len=24)
    os.close(reads)
    assert text.corpus.train.num_tokens > 0
    (facts,) = text.corpus.sources.values()
    assert set(facts) == {"documents", "tokens"}, "the hash of what is left in it is not that of the text"
    text.keep()
    assert not (tmp_path / "corpus.safetensors").exists(), "another text may come through a pipe of this name"


def test_every_plain_document_ends_with_the_separator(make_tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    """Several share a row: without it, each would seem to go on with the next one."""
    tokenizer, path = make_tokenizer(), tmp_path / "text.jsonl"
    texts = [f"the quick brown fox number {number}" for number in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert separator(tokenizer) == [tokenizer.eos_token_id]
    corpus = build_corpus([path], tokenizer, seq_len=64, held_out_rows=1)
    assert corpus.sources["text.jsonl"]["tokens"] == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    rows = zip(corpus.train.tokens, corpus.train.lengths, strict=True)
    assert {int(row[length - 1]) for row, length in rows} == {tokenizer.eos_token_id}
    tokenizer.add_tokens(["<|endoftext|>"])  # as in instruction models, whose end of a turn is another one
    assert separator(tokenizer) == [tokenizer.convert_tokens_to_ids("<|endoftext|>")] != [tokenizer.eos_token_id]
