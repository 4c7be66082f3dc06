"""Several ONNX graphs joined into one, on a device without the ONNX library.

A session's run costs some 100 µs besides its kernels when every pass sweeps the weights through the caches, and a decode step
runs up to six sessions. The joined graph needs one run. The files are joined as protobuf messages (onnx.proto3 of ONNX 1.20):
nodes, initializers and value infos are copied with unique names, and inputs and outputs of the parts are connected by name.
Weights are not touched: external data, also in packed form, stay in the files of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

#: Field numbers of onnx.proto3.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO = 1, 2, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME = 1, 2, 3
_TENSOR_NAME, _VALUE_NAME = 8, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Part(NamedTuple):
    """One graph to join: its serialized model, a prefix for its inner names, and new names of its inputs in the whole."""

    model: bytes
    name: str
    passed: Mapping[str, str]


def join(parts: Iterable[Part], keep: Iterable[str]) -> bytes:
    """Join the parts in their order into one serialized model.

    Inputs and outputs of a part keep their names (or take those of ``passed``) and are connected across parts. An input that no
    earlier part makes becomes an input of the whole. Fields outside the graphs are those of the first part.

    Args:
        parts: graphs in the order of execution; their files are in one directory, which the whole must also be written to.
        keep: prefixes of the names of outputs that the whole keeps.
    """
    body, head = bytearray(), b""
    produced: set[str] = set()
    asked: set[str] = set()
    kept = tuple(keep)
    for part in parts:
        outside = [
            (number, kind, value) for number, kind, value in message_fields(part.model) if number != _MODEL_GRAPH
        ]
        head = head or b"".join(encoded_field(*field) for field in outside)
        fields = list(
            message_fields(next(value for number, _, value in message_fields(part.model) if number == _MODEL_GRAPH))
        )
        ports = {_name(v, _VALUE_NAME) for number, _, v in fields if number in (_GRAPH_INPUT, _GRAPH_OUTPUT)}

        def renamed(name: str, part: Part = part, ports: set[str] = ports) -> str:
            return part.passed.get(name, name) if name in ports or not name else f"{part.name}.{name}"

        made = set()
        for number, kind, value in fields:
            if number == _GRAPH_NODE:
                names = {_NODE_INPUT: renamed, _NODE_OUTPUT: renamed, _NODE_NAME: lambda n, p=part: f"{p.name}.{n}"}
                body += encoded_field(number, kind, _with_names(value, names))
            elif number == _GRAPH_INITIALIZER:
                body += encoded_field(number, kind, _with_names(value, {_TENSOR_NAME: renamed}))
            elif number in (_GRAPH_VALUE_INFO, _GRAPH_INPUT, _GRAPH_OUTPUT):
                name = renamed(_name(value, _VALUE_NAME))
                new = number == _GRAPH_VALUE_INFO
                if number == _GRAPH_INPUT and name not in produced | asked:
                    asked.add(name)
                    new = True
                elif number == _GRAPH_OUTPUT:
                    made.add(name)
                    new = name.startswith(kept)
                if new:
                    body += encoded_field(number, kind, _with_names(value, {_VALUE_NAME: renamed}))
        produced |= made
    body += encoded_field(_GRAPH_NAME, _BYTES, b"joined")
    return head + encoded_field(_MODEL_GRAPH, _BYTES, bytes(body))


def _with_names(message: bytes, renames: Mapping[int, Callable[[str], str]]) -> bytes:
    """A copy of a message in which the text fields of some numbers are renamed."""
    result = bytearray()
    for number, kind, value in message_fields(message):
        if number in renames:
            value = renames[number](value.decode()).encode()  # noqa: PLW2901
        result += encoded_field(number, kind, value)
    return bytes(result)


def _name(message: bytes, number: int) -> str:
    return next(value.decode() for found, _, value in message_fields(message) if found == number)


def message_fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """``(number, wire type, value)`` of each field; a varint stays encoded."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind, begin = key >> 3, key & 7, at
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, begin = _varint(message, at)
            at = begin + size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field has wire type {kind}, which is not known")
        if at > len(message):
            raise ValueError("a field ends after its message")
        yield number, kind, message[begin:at]


def encoded_field(number: int, kind: int, value: bytes) -> bytes:
    """One field of a message; the value of a varint is already encoded."""
    size = encoded_varint(len(value)) if kind == _BYTES else b""
    return encoded_varint(number << 3 | kind) + size + value


def decoded_varint(encoded: bytes) -> int:
    """The signed number of 64 bits that a varint encodes."""
    value = _varint(encoded, 0)[0]
    return value - (1 << 64) if value >> 63 else value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def encoded_varint(value: int) -> bytes:
    """A number of at least 0 as a varint."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)
