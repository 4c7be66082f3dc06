"""The session file: the tokens of one sequence and what the graphs have made of them.

Owns the format, which is that of safetensors (https://github.com/huggingface/safetensors): 8 bytes with the length of a header,
the header (JSON), and the tensors one after another. They are ``tokens`` int64 (1, n), and those of
:meth:`balcony_runtime.backends.base.State.parts` under their names. With ``int8`` each row of keys and values is stored as
whole numbers, with its scale as the tensor ``NAME.scale``.

Every byte is covered by BLAKE2b: the header's ``__metadata__`` begins with the hash of the header itself (computed with zeros
in its place) and has the hash of each tensor, so two threads check them at once. Nothing is used before it was checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from balcony_edge.closing import Closing
from balcony_edge.errors import InputError
from balcony_edge.files import atomic_file, require_path
from balcony_runtime.backends.base import Array, IntArray, at_once
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from balcony_runtime.tokens import refuse_foreign

#: Names of types in safetensors. The bits of bfloat16 come and go as unsigned integers.
_TYPES = {"F32": np.float32, "F16": np.float16, "U16": np.uint16, "I8": np.int8, "I64": np.int64}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_HASH_BYTES = 32
_NO_HASH = "0" * (2 * _HASH_BYTES)
#: Beginning of every header; the hash of the header follows.
_BEGIN = b'{"__metadata__":{"balcony_session":"'
_PLACE = slice(len(_BEGIN), len(_BEGIN) + len(_NO_HASH))
#: Longest header: tensors of a hundred layers take 20 kB, and a conversation some hundred. Reading takes 24 times as much.
_MOST_HEADER = 4 << 20
#: Most dimensions of a tensor, and the largest of one.
_MOST_DIMENSIONS, _LARGEST = 4, 1 << 40
_SCALE = ".scale"
#: Most levels of messages: pydantic reads 200 with the one around them, and writes more.
_MOST_LEVELS = 199


class Notes(BaseModel):
    """What a session says of itself.

    Attributes:
        fingerprint: fingerprint of the bundle.
        graphs: name of the graphs that made the rows (:class:`balcony_runtime.backends.base.Backend`).
        stage_rows, balcony_rows: number of rows that each stage and each balcony had taken in.
        messages: messages of the conversation; None for a prefix.
        system: number of these that belong to the system.
        hashes: name of each tensor → its hash.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    fingerprint: str
    graphs: str
    stage_rows: list[NonNegativeInt]
    balcony_rows: list[NonNegativeInt]
    messages: list[dict[str, Any]] | None = None
    system: NonNegativeInt = 0
    hashes: dict[str, str] = {}


class Session(NamedTuple):
    """A session file that was checked, as far as it was read.

    Attributes:
        notes: what it says of itself.
        tokens: tokens, (B, n).
    """

    notes: Notes
    tokens: IntArray


def place(path: str | os.PathLike[str]) -> Path:
    """Where a session is, as a caller gives it.

    Raises:
        InputError: it is no path.
    """
    require_path(path, "session", InputError, "give the path of a file")
    return Path(path)


def save(
    path: Path,
    sequence: TokenSequence,
    *,
    rows: int | None = None,
    messages: list[dict[str, Any]] | None = None,
    system: int = 0,
    int8: bool = False,
) -> int:
    """Write a sequence to a file, which is replaced as a whole or not at all; returns its bytes.

    Args:
        path: file to write or replace; missing parent directories are made.
        sequence: sequence of one member; it is locked meanwhile.
        rows: number of its first rows to save; all by default.
        messages: messages of the conversation.
        system: number of these that belong to the system.
        int8: whether to store keys and values in 8 bits, with a scale for each row, and for each head if
            caches have an axis of heads (those of portable graphs do not).

    Raises:
        InputError: the file cannot be written, or the engine's rows are of a type that has no name in the format, or the
            messages are not JSON.
    """
    if not _survives(messages or []):
        raise InputError(
            "the messages cannot be saved as JSON (a key is not a text, a number is NaN or infinite, or there are too many "
            "levels): leave out what is not text or numbers"
        )
    with sequence.lock:
        rows = sequence.length if rows is None else rows
        stages, balconies, parts = sequence.parts(rows)
        tensors = _Tensors({"tokens": sequence.tokens[:, :rows], **parts}, int8)
        notes = Notes(
            fingerprint=sequence.engine.manifest.fingerprint,
            graphs=sequence.engine.backend.graphs,
            stage_rows=stages,
            balcony_rows=balconies,
            messages=messages,
            system=system,
            hashes=dict.fromkeys(tensors.shapes, _NO_HASH),
        )
        with atomic_file(path, InputError, "choose another place") as file:
            file.write(_header(notes, tensors))
            for name, array in tensors:
                notes.hashes[name] = _hash(array)
                file.write(_bytes(array))
            size = file.tell()
            file.seek(0)
            file.write(_header(notes, tensors))
    return size


def look(path: Path, engine: Engine, *, whole: bool = False) -> Session:
    """Read the notes and the tokens of a file, and check these; ``whole``: and all that it has.

    Raises:
        InputError: the file cannot be read, is damaged, or is of another bundle.
    """
    with _Reader(path, engine) as reader:
        reader.check(list(reader.tensors) if whole else ["tokens"])
        return Session(reader.notes, reader.tokens)


def load(path: Path, sequence: TokenSequence) -> Session:
    """Fill an empty sequence with a file's rows.

    Raises:
        InputError: the file cannot be read, is damaged, or is of another bundle or other graphs.
        ContextLengthError: the sequence is too short for it.
    """
    with _Reader(path, sequence.engine) as reader:
        reader.check(list(reader.tensors))
        notes, tokens = reader.notes, reader.tokens
        try:
            sequence.fill(tokens, notes.stage_rows, notes.balcony_rows, _Parts(reader))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return Session(notes, tokens)


class _Tensors:
    """Tensors in the order of the file, each made when it is written."""

    def __init__(self, arrays: Mapping[str, Array], int8: bool) -> None:
        self._arrays, self._int8 = arrays, int8
        #: Name → type and shape.
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, array in arrays.items():
            if (kind := _NAMES.get(array.dtype)) is None:
                raise InputError(f"rows of type {array.dtype} cannot be saved: use an engine with float32 or float16")
            if self._shrinks(name, array):
                self.shapes[name] = "I8", array.shape
                self.shapes[name + _SCALE] = kind, (*array.shape[:-1], 1)
            else:
                self.shapes[name] = kind, array.shape

    def _shrinks(self, name: str, array: Array) -> bool:
        return self._int8 and (".past_key" in name or ".past_value" in name) and array.dtype.kind in "fu"

    def __iter__(self) -> Iterator[tuple[str, Array]]:
        for name, array in self._arrays.items():
            if not self._shrinks(name, array):
                yield name, np.ascontiguousarray(array)
                continue
            values = _floats(array)
            scale = _typed(np.abs(values).max(-1, keepdims=True) / 127, array.dtype)
            steps = np.rint(values / np.where(scale == 0, 1, _floats(scale)))
            yield name, np.clip(steps, -127, 127).astype(np.int8)
            yield name + _SCALE, scale


class _Parts(Mapping[str, Array]):
    """The parts of a checked file, each made when it is asked for."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> Array:
        array = self._reader.array(name)
        if name + _SCALE not in self._reader.tensors:
            return array
        scale = self._reader.array(name + _SCALE)
        if scale.shape != (*array.shape[:-1], 1):
            raise self._reader.damaged(f"{name}{_SCALE} has the shape {scale.shape}")
        return _typed(array * _floats(scale), scale.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.tensors)

    def __len__(self) -> int:
        return len(self._reader.tensors)


class _Reader(Closing):
    """An open file. A context manager that closes it.

    It is not mapped into memory: a drive that fails, or a file that is cut meanwhile, would end the process (SIGBUS).

    Raises:
        InputError: the file cannot be read, its header is damaged, or it is of another bundle.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            if path.exists() and not path.is_file():
                raise self._unreadable("it is not a file")
            self._file = path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._read(engine)
        except BaseException:
            self.close()
            raise

    def _read(self, engine: Engine) -> None:
        if not (size := os.fstat(self._file.fileno()).st_size):
            raise self._unreadable("it is empty")
        head = self._at(0, min(size, 8 + len(_BEGIN))).tobytes()
        length = int.from_bytes(head[:8], "little")
        if head[8:] != _BEGIN:
            raise InputError(f"{self._path}: is not a session: give a file that Chat.save or save_prefix wrote")
        if length > min(_MOST_HEADER, size - 8):
            raise self.damaged("its header ends after the file")
        header = self._at(8, length).tobytes()
        if _hash_of_header(header) != header[_PLACE]:
            raise self.damaged("its header does not match its hash")
        try:
            values = json.loads(header)
            metadata = values.pop("__metadata__")
            self.notes = Notes.model_validate_json(metadata["notes"])
            self.tensors = {name: self._tensor(value) for name, value in values.items()}
            kind, shape, *_ = self.tensors["tokens"]
            if kind != "I64" or len(shape) != 2 or shape[0] != 1:
                raise ValueError(kind)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError) as error:
            raise self.damaged(f"its header is not that of a session: {type(error).__name__}") from error
        end = 0
        for kind, sizes, begin, stop in self.tensors.values():
            if begin != end or stop - begin != math.prod(sizes) * np.dtype(_TYPES[kind]).itemsize:
                raise self.damaged("its tensors do not follow one another")
            end = stop
        self._start = 8 + length
        if size != self._start + end:
            raise self.damaged(f"it has {size} bytes instead of {self._start + end}")
        self._refuse_foreign(engine, shape)

    @staticmethod
    def _tensor(value: Any) -> tuple[str, tuple[int, ...], int, int]:
        kind, shape, (begin, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(size, int) and 0 <= size < _LARGEST for size in (*shape, begin, stop))
        if kind not in _TYPES or not whole or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(kind)
        return kind, shape, begin, stop

    def _refuse_foreign(self, engine: Engine, shape: tuple[int, ...]) -> None:
        manifest, notes = engine.manifest, self.notes
        self._vocabulary = manifest.model.vocab_size
        if notes.fingerprint != manifest.fingerprint:
            raise InputError(
                f"{self._path}: was saved with another bundle (fingerprint {notes.fingerprint[:12]}, this one has "
                f"{manifest.fingerprint[:12]}): load that one, or begin anew"
            )
        if notes.graphs != engine.backend.graphs:
            raise InputError(
                f"{self._path}: was saved by other graphs of this bundle ({notes.graphs}, these are {engine.backend.graphs}): "
                "use the graphs that made it, or begin anew"
            )
        count, length = len(manifest.exit_layers), shape[1]
        stages, balconies = notes.stage_rows, notes.balcony_rows
        fits = len(stages) == count and len(balconies) == count - 1
        fits = fits and stages == sorted(stages, reverse=True) and stages[0] <= length
        if not fits or any(rows > before for rows, before in zip(balconies, stages, strict=False)):
            raise self.damaged("its rows do not fit its tokens")

    @property
    def tokens(self) -> IntArray:
        """Tokens, (1, n), once they were checked."""
        return self.array("tokens")

    def array(self, name: str) -> Array:
        """A tensor.

        Raises:
            InputError: it is not there, or cannot be read.
        """
        if name not in self.tensors:
            raise InputError(f"{name}: is not in the file: use the graphs that made it")
        kind, shape, begin, stop = self.tensors[name]
        return self._at(self._start + begin, stop - begin).view(_TYPES[kind]).reshape(shape)

    def _at(self, place: int, count: int) -> Array:
        """Bytes of the file."""
        found = np.empty(count, np.uint8)
        try:
            with self._lock:
                self._file.seek(place)
                read = self._file.readinto(found.data)
        except OSError as error:
            raise self._unreadable(error) from error
        if read < count:
            raise self.damaged("it was cut meanwhile")
        return found

    def check(self, names: list[str]) -> None:
        """Check the hashes of some tensors, in two threads.

        Raises:
            InputError: one does not match.
        """

        def matches(name: str) -> bool:
            return bool(_hash(self.array(name)) == self.notes.hashes.get(name))

        for name, right in zip(names, at_once(matches, names, 2), strict=True):
            if not right:
                raise self.damaged(f"{name} does not match its hash")
        if self.array("tokens").size:
            refuse_foreign(self.array("tokens"), self._vocabulary)

    def damaged(self, why: str) -> InputError:
        return InputError(f"{self._path}: is damaged ({why}): save it again")

    def _unreadable(self, why: object) -> InputError:
        words = why.strerror if isinstance(why, OSError) else why
        return InputError(f"{self._path}: cannot be read ({words}): give a file that was saved")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _floats(array: Array) -> Array:
    """Values in float32; unsigned integers are bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _typed(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values of float32 in the type of an array, rounded to the nearest."""
    if dtype != np.uint16:
        return values.astype(dtype, copy=False)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _survives(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Whether JSON keeps a value: it makes texts of keys, and null of NaN and infinity, and reads only so many levels."""
    if isinstance(value, Mapping):
        return levels > 0 and all(isinstance(key, str) and _survives(one, levels - 1) for key, one in value.items())
    if isinstance(value, list | tuple):
        return levels > 0 and all(_survives(one, levels - 1) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def _header(notes: Notes, tensors: _Tensors) -> bytes:
    try:
        metadata = {"balcony_session": _NO_HASH, "notes": notes.model_dump_json()}
    except ValueError as error:
        raise InputError(
            f"the messages cannot be saved as JSON ({error}): leave out what is not text or numbers"
        ) from error
    values: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, shape) in tensors.shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
        values[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(values, separators=(",", ":")).encode()
    if len(text) > _MOST_HEADER - 8:
        raise InputError(
            f"the messages take {len(text):,} bytes of the file's header, which has {_MOST_HEADER:,}: begin a new conversation"
        )
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    filled = bytearray(text)
    filled[_PLACE] = _hash_of_header(text)
    return len(text).to_bytes(8, "little") + bytes(filled)


def _hash_of_header(header: bytes) -> bytes:
    """The hash of a header, in hexadecimal, with zeros in place of a hash that it has already."""
    blank = header[: _PLACE.start] + _NO_HASH.encode() + header[_PLACE.stop :]
    return hashlib.blake2b(blank, digest_size=_HASH_BYTES).hexdigest().encode()


def _hash(array: Array) -> str:
    return hashlib.blake2b(_bytes(array), digest_size=_HASH_BYTES).hexdigest()


def _bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
