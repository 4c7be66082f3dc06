"""The small graphs that move rows on a WebGPU device, made without the ONNX library.

WebGPU's buffers are handles: Python can neither allocate one nor address a part of one. Graphs of a few operators do that work
on the device. B, S, T, D: members, rows of a buffer, rows of a pass, width; N, H, d: query heads, KV heads, size of a head.

======  =============================================  =====================================================
graph   inputs                                         outputs
======  =============================================  =====================================================
zeros   ``zero`` scalar; ``shape`` int64 (n)           ``new`` of that shape
take    ``rows`` (B, S, D); ``at`` int64 (T)           ``taken`` (B, T, D)
put     ``rows_i`` (B, S, D); ``new_i`` (B, T, D);     ``kept_i`` (B, S, D), bound to the buffer of ``rows_i``
        ``at`` int64 (B, T, 2): member and row
pick    ``logits`` (B, T, V)                           ``picked`` float32 (B, T, 2): the likeliest token, and
                                                       the sum of all logits
attend  ``query`` (B, T, N·d);                         ``attended`` (B, T, N·d);
        ``key``, ``value`` (B, T, H·d);                ``present_key``, ``present_value`` (B, H, S, d), bound
        ``past_key``, ``past_value`` (B, H, S, d);     to the buffers of the past
        ``last`` int32 (B); ``total`` int32 scalar;
        ``cos``, ``sin`` (S, d/2) if it rotates;
        ``sink`` (N) if it has one
======  =============================================  =====================================================
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from balcony_edge.bundle.manifest import DType
from balcony_runtime.backends.graph_files import protobuf as proto
from balcony_runtime.backends.graph_files.protobuf import encoded_field, encoded_varint

#: Element types and attribute types of onnx.proto3.
_ELEMENTS: dict[str, int] = {"float32": 1, "int32": 6, "int64": 7, "float16": 10}
_FLOAT_ATTRIBUTE, _INT_ATTRIBUTE = 1, 2
_FUSED = "com.microsoft"
#: Place of the softmax's sink among the inputs of ``GroupQueryAttention``.
SINK_INPUT = 11
#: An opset that has all operators used here, and the file format that belongs to it.
_OPSET, _IR_VERSION = 21, 10


def zeros(dtype: DType) -> bytes:
    """The graph that allocates a buffer of zeros."""
    node = _node("Expand", ["zero", "shape"], ["new"])
    return _model([node], {"zero": dtype, "shape": "int64"}, {"new": dtype})


def take(dtype: DType) -> bytes:
    """The graph that copies rows out of a buffer."""
    node = _node("Gather", ["rows", "at"], ["taken"], axis=1)
    return _model([node], {"rows": dtype, "at": "int64"}, {"taken": dtype})


def put(dtype: DType, count: int) -> bytes:
    """The graph that writes rows to ``count`` buffers, at the same places in each."""
    nodes = [_node("ScatterND", [f"rows_{i}", "at", f"new_{i}"], [f"kept_{i}"]) for i in range(count)]
    inputs: dict[str, DType] = {"at": "int64"}
    for i in range(count):
        inputs |= {f"rows_{i}": dtype, f"new_{i}": dtype}
    return _model(nodes, inputs, {f"kept_{i}": dtype for i in range(count)})


def pick() -> bytes:
    """The graph that picks the likeliest token. The sum is NaN or infinite if any logit is, and is read with the token."""
    nodes = [
        _node("ArgMax", ["logits"], ["best"], axis=-1),
        _node("Cast", ["best"], ["token"], to=_ELEMENTS["float32"]),  # exact: a vocabulary has fewer than 2^24 tokens
        _node("ReduceSum", ["logits"], ["sum"], keepdims=1),
        _node("Concat", ["token", "sum"], ["picked"], axis=-1),
    ]
    return _model(nodes, {"logits": "float32"}, {"picked": "float32"})


def attend(dtype: DType, sink: bool, **attributes: float) -> bytes:
    """The graph that tests fused attention: one node with the inputs and attributes of a bundle's."""
    inputs: dict[str, DType] = {"query": dtype, "key": dtype, "value": dtype, "past_key": dtype, "past_value": dtype}
    outputs: dict[str, DType] = {"attended": dtype, "present_key": dtype, "present_value": dtype}
    inputs |= {"last": "int32", "total": "int32"}
    if attributes.get("do_rotary"):
        inputs |= {"cos": dtype, "sin": dtype}
    ports = list(inputs)
    if sink:
        inputs["sink"] = dtype
        ports += [""] * (SINK_INPUT - len(ports)) + ["sink"]
    node = _node("GroupQueryAttention", ports, list(outputs), domain=_FUSED, **attributes)
    return _model([node], inputs, outputs)


def _model(nodes: Sequence[bytes], inputs: Mapping[str, DType], outputs: Mapping[str, DType]) -> bytes:
    graph = b"".join(_message(proto.GRAPH_NODE, node) for node in nodes) + _text(proto.GRAPH_NAME, "small")
    graph += b"".join(_message(proto.GRAPH_INPUT, _value(name, dtype)) for name, dtype in inputs.items())
    graph += b"".join(_message(proto.GRAPH_OUTPUT, _value(name, dtype)) for name, dtype in outputs.items())
    opsets = b"".join(
        _message(proto.MODEL_OPSET, _text(proto.OPSET_DOMAIN, name) + _number(proto.OPSET_VERSION, version))
        for name, version in (("", _OPSET), (_FUSED, 1))
    )
    return _number(proto.MODEL_IR_VERSION, _IR_VERSION) + opsets + _message(proto.MODEL_GRAPH, graph)


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: float) -> bytes:
    ports = b"".join(_text(proto.NODE_INPUT, name) for name in inputs)
    ports += b"".join(_text(proto.NODE_OUTPUT, name) for name in outputs)
    parts = b"".join(_message(proto.NODE_ATTRIBUTE, _attribute(name, value)) for name, value in attributes.items())
    return ports + _text(proto.NODE_OPERATOR, operator) + _text(proto.NODE_DOMAIN, domain) + parts


def _attribute(name: str, value: float) -> bytes:
    named = _text(proto.ATTRIBUTE_NAME, name)
    if isinstance(value, int):
        return named + _number(proto.ATTRIBUTE_INT, value) + _number(proto.ATTRIBUTE_TYPE, _INT_ATTRIBUTE)
    number = encoded_field(proto.ATTRIBUTE_FLOAT, proto.FIXED32, struct.pack("<f", value))
    return named + number + _number(proto.ATTRIBUTE_TYPE, _FLOAT_ATTRIBUTE)


def _value(name: str, dtype: DType) -> bytes:
    """A ValueInfo: a name and a tensor type without a shape."""
    element = _number(proto.TENSOR_ELEMENT, _ELEMENTS[dtype])
    return _text(proto.VALUE_NAME, name) + _message(proto.VALUE_TYPE, _message(proto.TYPE_TENSOR, element))


def _message(number: int, content: bytes) -> bytes:
    return encoded_field(number, proto.BYTES, content)


def _text(number: int, content: str) -> bytes:
    return encoded_field(number, proto.BYTES, content.encode())


def _number(number: int, value: int) -> bytes:
    return encoded_field(number, proto.VARINT, encoded_varint(value % (1 << 64)))  # a negative number has 64 bits
