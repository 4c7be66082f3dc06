"""From documents to rows of tokens: the chat template, held-out documents, packing.

Reading is :mod:`.documents`. All rows have one length and begin where a document (or the next piece of a long one) begins, so
that the model sees the same beginnings as in use. Short documents share a row, best fit first, and attention runs across
them as in the base models' own pretraining.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from balcony_edge.errors import InputError
from balcony_export.data.documents import CHAT_FORMS, Document, files_in, read_documents, require_two_tokens

_BATCH = 512  # documents per call of the tokenizer: bounds its memory and keeps its threads busy


@dataclass(frozen=True)
class Rows:
    """Packed tokens. Row r has ``lengths[r]`` tokens; the rest of it is padding, which no loss may include."""

    tokens: npt.NDArray[np.int32]  # (R, T)
    lengths: npt.NDArray[np.int32]  # (R,)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def take(self, count: int) -> Rows:
        return Rows(self.tokens[:count], self.lengths[:count])


@dataclass(frozen=True)
class Corpus:
    """Training rows in a seeded order, rows of held-out documents, and their sources."""

    train: Rows
    held_out: Rows
    sources: dict[str, dict[str, Any]]  # file name -> documents, tokens, sha256 (a pipe has none)
    digest: str  # SHA-256 of the rows, which a resumed run compares


class Order:
    """Order of the rows of a run: whole epochs, the later ones shuffled anew (the corpus is already shuffled).

    Args:
        count: Number of rows of the corpus.
        batch_rows: Rows per step.
        seed: Seed of the later epochs.
        first: Number of rows that earlier runs have learned from; the run begins after them.
    """

    def __init__(self, count: int, batch_rows: int, seed: int, first: int = 0) -> None:
        self.count, self.batch_rows, self.seed, self.first = count, batch_rows, seed, first

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Indices in the corpus of the rows of a step  # (B,)"""
        places = self.first + step * self.batch_rows + np.arange(self.batch_rows)
        epochs, rows = np.divmod(places, self.count)
        for epoch in set(epochs.tolist()) - {0}:
            here = epochs == epoch
            rows[here] = _shuffled(self.count, self.seed, epoch)[rows[here]]
        return rows

    def learned(self, steps: int) -> int:
        """Number of rows, repeats counted, that this run and earlier ones have learned from after ``steps`` of its steps."""
        return self.first + steps * self.batch_rows


@functools.lru_cache(maxsize=2)  # a step may lie across two epochs
def _shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Order of an epoch. A million rows take 31 ms, as long as a step of 64 sequences on a GPU."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def build_corpus(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    seed: int = 0,
    held_out_rows: int = 64,
    mix: Mapping[str, float] | None = None,
) -> Corpus:
    """Read, tokenize and pack.

    Args:
        files: Files to train on; a directory stands for the .jsonl and .txt files in it.
        tokenizer: The base model's tokenizer, whose chat template renders chats.
        seq_len: Tokens per row.
        seed: Seed of the order of the rows.
        held_out_rows: Approximate number of rows of documents to keep out of training. Every file gives documents in
            proportion to its tokens, the first by a hash of their text. Files of one document count as one file if the part of
            each is less than a row, files of several if it is less than a sixteenth of one.
        mix: File name → share of its documents to use, above 0 and up to 1, the first by a hash of their text. Files that are
            not in it are used whole.

    Raises:
        InputError: A file cannot be used, a document has fewer than two tokens, there is too little text to hold a document
            out, or a share names an unknown file.
    """
    if not files:
        raise InputError(f"--data: no file is given: give {CHAT_FORMS}")
    once: dict[Path, Path] = {}
    for path in files_in(files):  # a file of a directory may be named as well
        once.setdefault(path.resolve(), path)
    read = _read(once.values(), tokenizer, mix or {})
    documents = [one for _, given in read.values() for one in given]
    total = sum(len(document.tokens) for document in documents)
    begin = start_tokens(tokenizer)
    learned: list[_KeyedDocument] = []
    held: list[_KeyedDocument] = []

    def target(given: list[_KeyedDocument]) -> int:
        tokens = sum(len(document.tokens) for document in given)
        return min(held_out_rows * seq_len * tokens // total, tokens // 10)

    def is_enough(given: list[_KeyedDocument]) -> bool:
        return target(given) >= (seq_len if len(given) == 1 else seq_len // 16)

    for given in _together((documents for _, documents in read.values()), is_enough):
        held_of_file = _held_out(given, target(given), begin)
        learned += held_of_file[0]
        held += held_of_file[1]
    # the same text may occur twice, in one file or in two
    judged = {document.key for document in held}
    learned = [document for document in learned if document.key not in judged]
    kept = [document.tokens for document in held]
    if held_out_rows and not kept:
        raise InputError(
            f"{', '.join(read)}: {len(documents)} document(s) of {total} tokens: too few to hold one out: give more text"
        )
    if not learned:
        raise InputError(f"{', '.join(read)}: all of it has the text of held-out documents: give more text")
    learned.sort(key=lambda document: document.key)
    generator = np.random.default_rng(seed)
    train = pack([document.tokens for document in learned], seq_len, generator, begin)
    held_out = pack(kept, seq_len, generator, begin).take(held_out_rows)
    sources = {name: facts for name, (facts, _) in read.items()}
    return Corpus(train, held_out, sources, digest_of(train, held_out))


def digest_of(train: Rows, held_out: Rows) -> str:
    """SHA-256 of the tokens of all rows."""
    digest = hashlib.sha256(train.tokens.data)
    digest.update(held_out.tokens.data)
    return digest.hexdigest()


class _KeyedDocument(NamedTuple):
    key: str  # SHA-256 of its text: an order that does not depend on file names or on places in a file
    tokens: npt.NDArray[np.int32]


def _read(
    paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase, mix: Mapping[str, float]
) -> dict[str, tuple[dict[str, Any], list[_KeyedDocument]]]:
    """``file name -> (entry for the record, documents in the order of their keys)``"""
    mix = {normalize("NFC", name): share for name, share in mix.items()}  # macOS may write names in another form
    read: dict[str, tuple[dict[str, Any], list[_KeyedDocument]]] = {}
    used: set[str] = set()
    for path in paths:
        documents = []
        for where, text, ids in _tokenized(path, tokenizer):
            require_two_tokens(where, ids)
            documents.append(_KeyedDocument(hashlib.sha256(text.encode()).hexdigest(), np.asarray(ids, dtype=np.int32)))
        if not documents:
            raise InputError(f"{path}: has no documents: give {CHAT_FORMS}")
        documents.sort(key=lambda document: document.key)
        facts: dict[str, Any] = {}
        if not path.is_fifo():  # a pipe is empty by now, and a named one would wait for a writer
            with path.open("rb") as file:
                facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if (name := normalize("NFC", path.name)) in mix:
            used.add(name)
            facts["share"] = mix[name]
            documents = documents[: math.ceil(mix[name] * len(documents))]
        facts |= {"documents": len(documents), "tokens": sum(len(document.tokens) for document in documents)}
        read[path.name if path.name not in read else str(path.resolve())] = facts, documents
    if absent := sorted(mix.keys() - used):
        raise InputError(f"--mix {absent[0]}: is not a file of --data: name one of {', '.join(read)}")
    return read


def _together(
    files: Iterable[list[_KeyedDocument]], is_enough: Callable[[list[_KeyedDocument]], bool]
) -> Iterator[list[_KeyedDocument]]:
    """The documents of each file, but those of all small files together.

    The part of such a file in the held-out rows may be a few tokens of one document, or none. A large file stays alone:
    next to it the smallest one would be all that is held out.
    """
    alone: list[_KeyedDocument] = []
    for documents in files:
        if is_enough(documents):
            yield documents
        else:
            alone += documents
    if alone:
        yield sorted(alone, key=lambda document: document.key)


def _held_out(
    documents: list[_KeyedDocument], target: int, begin: Sequence[int]
) -> tuple[list[_KeyedDocument], list[_KeyedDocument]]:
    """``(documents to learn from, held-out documents)`` of one file: its first documents, until ``target`` tokens are held out.

    A document is held out whole, even if only its beginning is judged, unless it is longer than both ``target`` and a
    hundredth of the file. If the others make less than half of ``target``, the beginning of the shortest long one is added.
    """
    longest = max(target, sum(len(document.tokens) for document in documents) // 100)
    learned: list[_KeyedDocument] = []
    kept: list[_KeyedDocument] = []
    room = target
    for document in documents:
        if room >= 2 and len(document.tokens) <= longest:
            kept.append(document._replace(tokens=document.tokens[:room]))
            room -= len(kept[-1].tokens)
        else:
            learned.append(document)
    if target >= 2 and room > target // 2:
        shortest = min(range(len(learned)), key=lambda index: len(learned[index].tokens))
        key, tokens = learned[shortest]
        kept.append(_KeyedDocument(key, tokens[:room]))
        rest = np.concatenate([_start_of(tokens, begin), tokens[room:]])
        learned[shortest] = _KeyedDocument(f"rest of {key}", rest)
    return learned, kept


def pack(
    documents: Sequence[npt.NDArray[np.int32]],
    seq_len: int,
    generator: np.random.Generator,
    begin: Sequence[int] = (),
) -> Rows:
    """Pack by best fit, longest piece first, then put the rows in a seeded order. Every token is packed once, except a
    tail of one token, which predicts nothing.

    Pieces of a document that begins with the model's start tokens (``begin``) all begin with them, as every text does in use.
    """
    pieces = [piece for document in documents for piece in _pieces(document, seq_len, begin)]
    pieces = [piece for piece in pieces if len(piece) >= 2]
    pieces.sort(key=len, reverse=True)
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # free tokens -> rows
    contents: list[list[npt.NDArray[np.int32]]] = []
    for piece in pieces:
        free = next((room for room in range(len(piece), seq_len + 1) if open_rows[room]), None)
        if free is None:
            contents.append([])
            row, free = len(contents) - 1, seq_len
        else:
            row = open_rows[free].pop()
        contents[row].append(piece)
        open_rows[free - len(piece)].append(row)
    tokens = np.zeros((len(contents), seq_len), dtype=np.int32)
    lengths = np.zeros(len(contents), dtype=np.int32)
    for target, row in enumerate(generator.permutation(len(contents))):
        # in the order of packing, the longest piece would always begin its row
        joined = np.concatenate([contents[row][index] for index in generator.permutation(len(contents[row]))])
        tokens[target, : len(joined)] = joined
        lengths[target] = len(joined)
    return Rows(tokens, lengths)


def _pieces(document: npt.NDArray[np.int32], seq_len: int, begin: Sequence[int]) -> Iterator[npt.NDArray[np.int32]]:
    first = _start_of(document, begin)
    size = seq_len - len(first)
    for start in range(len(first), len(document), size):
        yield np.concatenate([first, document[start : start + size]])


def _start_of(document: npt.NDArray[np.int32], begin: Sequence[int]) -> npt.NDArray[np.int32]:
    """The start tokens, if the document begins with them; else nothing."""
    return document[: len(begin)] if document[: len(begin)].tolist() == list(begin) else document[:0]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that a text begins with in use: a model that expects its start token fails without it."""
    whole, plain = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def _tokenized(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, list[int]]]:
    begin, end = start_tokens(tokenizer), separator(tokenizer)
    batch: list[tuple[str, str, bool]] = []

    def flush() -> Iterator[tuple[str, str, list[int]]]:
        encoded = tokenizer([text for _, text, _ in batch], add_special_tokens=False)["input_ids"]
        for (where, text, plain), ids in zip(batch, encoded, strict=True):
            yield where, text, [*begin, *ids, *end] if plain and len(ids) > 1 else ids
        batch.clear()

    for document in read_documents(path, chats=True):
        batch.append((document.where, *_rendered(document, tokenizer)))
        if len(batch) == _BATCH:
            yield from flush()
    if batch:
        yield from flush()


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token at the end of a plain document: ``<|endoftext|>`` if the vocabulary has it, else the end-of-sequence token."""
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return [vocabulary["<|endoftext|>"]]
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


#: A template's own function for today's date, which gives one day.
_ONE_DAY = "{%- macro strftime_now(form) -%}01 January 2025{%- endmacro +%}"


def _rendered(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """``(text to tokenize, whether it is plain text)``: a chat goes through the model's template."""
    if document.chat is None:
        return document.text, True
    if not tokenizer.chat_template:
        # a base model has no template: it is distilled on the words alone
        return "\n\n".join(message["content"] for message in document.chat), True
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:  # the same text on every day, or a run could not be resumed on the next
        template = _ONE_DAY + template
    try:
        rendered = tokenizer.apply_chat_template(document.chat, tokenize=False, chat_template=template)
    except TemplateError as error:  # templates refuse roles that they do not know, or in another order
        raise InputError(
            f"{document.where}: the model's chat template refuses it ({error}): change its roles, or give it as text"
        ) from error
    assert isinstance(rendered, str)
    return rendered, False
