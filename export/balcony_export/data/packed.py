"""A packed text on disk, so that a run in pieces reads and tokenizes its text once.

Owns the file and what it depends on: the bytes and names of the text's files, the tokenizer, and the settings of the packing.
If one of them differs, or the file is damaged, the text is packed again. Packing itself is :mod:`.corpus`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

from balcony_edge.errors import InputError, TrainingError
from balcony_edge.files import write_atomically
from balcony_export.data.corpus import Corpus, Rows, build_corpus, digest_of
from balcony_export.data.documents import files_in

#: Changes whenever :mod:`.corpus` would make other rows of the same text.
_FORMAT = 5


class PackedText:
    """The corpus that :func:`build_corpus` makes, from a file if it is there.

    Args:
        path: The file.
        files: As for :func:`build_corpus`.
        tokenizer: As for :func:`build_corpus`.
        settings: The other arguments of :func:`build_corpus`.

    Raises:
        InputError: As :func:`build_corpus`.
    """

    def __init__(self, path: Path, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        self._path, self._key = path, _key(files, tokenizer, settings)
        kept = None if self._key is None else _read(path, self._key)
        self._is_kept = kept is not None
        #: The rows.
        self.corpus = kept or build_corpus(files, tokenizer, **settings)

    def keep(self) -> None:
        """Write the file, unless it is there or the disk is full: the next piece then packs again."""
        if self._key is not None and not self._is_kept:
            with contextlib.suppress(TrainingError):
                _write(self._path, self._key, self.corpus)


def _key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str | None:
    """SHA-256 of all that the rows depend on; None if a file cannot be read, which packing explains, or only once (a pipe)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python, which cannot be described
        return None
    known: list[Any] = [_FORMAT, settings, backend.to_str(), tokenizer.chat_template, tokenizer.eos_token_id]
    try:
        for file in files_in(files):
            if file.is_fifo():  # as `<(zcat FILE)`: packing would find nothing left in it
                return None
            with file.open("rb") as content:
                known.append([str(file.resolve()), hashlib.file_digest(content, "sha256").hexdigest()])
    except (InputError, OSError):
        return None
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path, key: str) -> Corpus | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            facts = json.loads(file.metadata()["facts"])
            if facts["key"] != key:
                return None
            train, held_out = (
                Rows(file.get_tensor(f"{name}.tokens"), file.get_tensor(f"{name}.lengths"))
                for name in ("train", "held_out")
            )
        corpus = Corpus(train, held_out, facts["sources"], facts["digest"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    intact = digest_of(train, held_out) == corpus.digest and _lengths(corpus) == facts.get("lengths")
    return corpus if intact else None


def _write(path: Path, key: str, corpus: Corpus) -> None:
    arrays = {
        f"{name}.{part}": getattr(rows, part)
        for name, rows in (("train", corpus.train), ("held_out", corpus.held_out))
        for part in ("tokens", "lengths")
    }
    facts = {"key": key, "sources": corpus.sources, "digest": corpus.digest, "lengths": _lengths(corpus)}
    write_atomically(path, save(arrays, {"facts": json.dumps(facts)}), TrainingError, "free space")


def _lengths(corpus: Corpus) -> str:
    """SHA-256 of the rows' lengths, which the digest of a corpus does not cover."""
    return hashlib.sha256(corpus.train.lengths.tobytes() + corpus.held_out.lengths.tobytes()).hexdigest()
