"""Several ONNX graphs joined into one, on a device without the ONNX library.

A session's run costs some 100 µs besides its kernels when every pass sweeps the weights through the caches, and a decode step
runs one session for each stage, the balcony and the head. The joined graph needs one run. The files are joined as protobuf
messages: nodes, initializers and value infos are copied with unique names, and inputs and outputs of the parts are
connected by name. Weights are not touched: external data, also in packed form, stay in the files of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from balcony_runtime.backends.graph_files import protobuf as proto
from balcony_runtime.backends.graph_files.protobuf import encoded_field, message_fields


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
        model = list(message_fields(part.model))
        head = head or b"".join(encoded_field(*field) for field in model if field[0] != proto.MODEL_GRAPH)
        fields = list(message_fields(next(value for number, _, value in model if number == proto.MODEL_GRAPH)))
        ports = {_name(v) for number, _, v in fields if number in (proto.GRAPH_INPUT, proto.GRAPH_OUTPUT)}

        def renamed(name: str, part: Part = part, ports: set[str] = ports) -> str:
            return part.passed.get(name, name) if name in ports or not name else f"{part.name}.{name}"

        made = set()
        for number, kind, value in fields:
            if number == proto.GRAPH_NODE:
                names = {
                    proto.NODE_INPUT: renamed,
                    proto.NODE_OUTPUT: renamed,
                    proto.NODE_NAME: lambda n, p=part: f"{p.name}.{n}",
                }
                body += encoded_field(number, kind, _with_names(value, names))
            elif number == proto.GRAPH_INITIALIZER:
                body += encoded_field(number, kind, _with_names(value, {proto.TENSOR_NAME: renamed}))
            elif number in (proto.GRAPH_VALUE_INFO, proto.GRAPH_INPUT, proto.GRAPH_OUTPUT):
                name = renamed(_name(value))
                new = number == proto.GRAPH_VALUE_INFO
                if number == proto.GRAPH_INPUT and name not in produced | asked:
                    asked.add(name)
                    new = True
                elif number == proto.GRAPH_OUTPUT:
                    made.add(name)
                    new = name.startswith(kept)
                if new:
                    body += encoded_field(number, kind, _with_names(value, {proto.VALUE_NAME: renamed}))
        produced |= made
    body += encoded_field(proto.GRAPH_NAME, proto.BYTES, b"joined")
    return head + encoded_field(proto.MODEL_GRAPH, proto.BYTES, bytes(body))


def _with_names(message: bytes, renames: Mapping[int, Callable[[str], str]]) -> bytes:
    """A copy of a message in which the text fields of some numbers are renamed."""
    result = bytearray()
    for number, kind, value in message_fields(message):
        if number in renames:
            value = renames[number](value.decode()).encode()  # noqa: PLW2901
        result += encoded_field(number, kind, value)
    return bytes(result)


def _name(port: bytes) -> str:
    return next(value.decode() for number, _, value in message_fields(port) if number == proto.VALUE_NAME)
