"""Check of a graph's file before ONNX Runtime reads it: no loops, no functions, no files except the listed ones.

The graphs that export writes are chains of operators; a recurrence is a ``Scan``, which ends with the rows that it is given. A
loop could run for ever inside one call that cannot be interrupted. Weights in a file that the manifest does not list would be
neither checked nor part of the fingerprint.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from balcony_edge.errors import BundleError
from balcony_runtime.backends.graph_files import protobuf as proto
from balcony_runtime.backends.graph_files.protobuf import decoded_varint, message_fields

_SPARSE = "contains a sparse tensor, which no export writes"


def check_graph(path: Path, files: Collection[str]) -> None:
    """Refuse a graph that is more than a chain of operators over listed files.

    Args:
        path: path of the graph.
        files: names of the files that the manifest lists; external data must be in one of them.

    Raises:
        BundleError: one line that names the forbidden part.
    """
    try:
        problem = next(_problems(path.read_bytes(), files), None)
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{path}: not readable as a graph ({error}): export the bundle again") from error
    if problem is not None:
        raise BundleError(f"{path}: {problem}: use bundles that `balcony-edge export` made, or export it again")


def nodes_of(path: Path, operator: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Number of inputs, and attribute → number, of each node of an operator; other attributes are left out.

    Args:
        path: path of a graph that :func:`check_graph` has passed.
        operator: type of the nodes.
    """
    graph = next(value for number, _, value in message_fields(path.read_bytes()) if number == proto.MODEL_GRAPH)
    for number, _, node in message_fields(graph):
        parts = list(message_fields(node)) if number == proto.GRAPH_NODE else []
        if (proto.NODE_OPERATOR, operator.encode()) in ((part, value) for part, _, value in parts):
            named = [
                {part: value for part, _, value in message_fields(v)} for p, _, v in parts if p == proto.NODE_ATTRIBUTE
            ]
            numbers = {
                one[proto.ATTRIBUTE_NAME].decode(): decoded_varint(one[proto.ATTRIBUTE_INT])
                if proto.ATTRIBUTE_INT in one
                else struct.unpack("<f", one[proto.ATTRIBUTE_FLOAT])[0]
                for one in named
                if proto.ATTRIBUTE_INT in one or proto.ATTRIBUTE_FLOAT in one
            }
            yield sum(part == proto.NODE_INPUT for part, _, _ in parts), numbers


def _problems(model: bytes, files: Collection[str]) -> Iterator[str]:
    for number, _, value in message_fields(model):
        if number == proto.MODEL_FUNCTION:
            yield "contains a function, which no export writes"
        elif number == proto.MODEL_GRAPH:
            yield from _of_graph(value, files, scans=True)


def _of_graph(graph: bytes, files: Collection[str], *, scans: bool) -> Iterator[str]:
    for part, _, content in message_fields(graph):
        if part == proto.GRAPH_NODE:
            yield from _of_node(content, files, scans)
        elif part == proto.GRAPH_INITIALIZER:
            yield from _of_tensor(content, files)
        elif part == proto.GRAPH_SPARSE:
            yield _SPARSE


def _of_node(node: bytes, files: Collection[str], scans: bool) -> Iterator[str]:
    parts = list(message_fields(node))
    operators = [value.decode(errors="replace") for number, _, value in parts if number == proto.NODE_OPERATOR]
    if len(operators) != 1:  # readers of the format take the last one
        yield f"has an operator with {len(operators)} names"
        return
    operator = operators[0]
    for number, _, attribute in parts:
        if number != proto.NODE_ATTRIBUTE:
            continue
        for part, _, value in message_fields(attribute):
            if part == proto.ATTRIBUTE_GRAPH and operator == "Scan" and scans:
                yield from _of_graph(value, files, scans=False)
            elif part in (proto.ATTRIBUTE_GRAPH, proto.ATTRIBUTE_GRAPHS):
                yield f"contains a graph inside an operator ({operator[:40]}), which could run without end"
            elif part in (proto.ATTRIBUTE_TENSOR, proto.ATTRIBUTE_TENSORS):
                yield from _of_tensor(value, files)
            elif part in proto.ATTRIBUTE_SPARSE:
                yield _SPARSE


def _of_tensor(tensor: bytes, files: Collection[str]) -> Iterator[str]:
    for number, _, entry in message_fields(tensor):
        if number == proto.TENSOR_EXTERNAL:
            # readers of the format skip what is of another type than a text
            texts = ((part, value) for part, kind, value in message_fields(entry) if kind == proto.BYTES)
            pair = {part: value.decode(errors="replace") for part, value in texts}
            if pair.get(proto.ENTRY_KEY) == "location" and pair.get(proto.ENTRY_VALUE) not in files:
                yield f"has weights in {pair.get(proto.ENTRY_VALUE, '')[:60]!r}, which the manifest does not list"
