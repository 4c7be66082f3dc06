"""ONNX graphs as protobuf messages: fields are read and written one by one, without the ONNX library.

Owns the wire format and the field numbers of onnx.proto3 (ONNX 1.20).
"""

from __future__ import annotations

from collections.abc import Iterator

#: Wire types.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
#: Field numbers, by message.
MODEL_IR_VERSION, MODEL_GRAPH, MODEL_OPSET, MODEL_FUNCTION = 1, 7, 8, 25
OPSET_DOMAIN, OPSET_VERSION = 1, 2
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT = 1, 2, 5, 11
GRAPH_OUTPUT, GRAPH_VALUE_INFO, GRAPH_SPARSE = 12, 13, 15
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 1, 2, 3, 5, 6
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_TYPE, ATTRIBUTE_SPARSE = 10, 11, 20, (22, 23)
TENSOR_NAME, TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 8, 13, 1, 2
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_ELEMENT = 1, 2, 1, 1


def message_fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """``(number, wire type, value)`` of each field; a varint stays encoded."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key >> 32:  # the readers of C++ drop the bits above, and would see another field than this one
            raise ValueError("the number of a field has more than 32 bits")
        number, kind, begin = key >> 3, key & 7, at
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind == BYTES:
            size, begin = _varint(message, at)
            at = begin + size
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field has wire type {kind}, which is not known")
        if at > len(message):
            raise ValueError("a field ends after its message")
        yield number, kind, message[begin:at]


def encoded_field(number: int, kind: int, value: bytes) -> bytes:
    """One field of a message; the value of a varint is already encoded."""
    size = encoded_varint(len(value)) if kind == BYTES else b""
    return encoded_varint(number << 3 | kind) + size + value


def decoded_varint(encoded: bytes) -> int:
    """The signed number of 64 bits that a varint encodes."""
    value = _varint(encoded, 0)[0]
    return value - (1 << 64) if value >> 63 else value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:  # a long run of such bytes would take time with its square
            raise ValueError("a number has more than ten bytes")
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
