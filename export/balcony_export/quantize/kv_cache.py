"""An int8 KV cache for quantized bundles: its scales, and the graphs that use it.

Owns the scale of a channel and the rewrite of lowered graphs. The scale comes from the largest value on calibration text,
measured with the bundle's float cache, so that it includes rope, norms and rounded weights. ``GroupQueryAttention`` itself
stores keys and values as int8; graphs that only write keys and values round them before the cache update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_export.graph.ir_tools import initializer
from balcony_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from balcony_runtime.engine import Engine

#: Factor on the largest measured value, and the smallest scale, for channels that never fired.
HEADROOM, LEAST = 1.1, 1e-6
#: Graph → cache input → scale of each channel  # (KV heads, head size)
Scales = Mapping[str, Mapping[str, npt.NDArray[np.float32]]]


def require_text(given: Sequence[object] | None) -> None:
    """Refuse an int8 cache without text to calibrate it on.

    Raises:
        InputError: There is no text.
    """
    if not given:
        raise InputError("--precision kv=8: needs --calibration, whose text gives the range of keys and values: add it")


def cache_scales(bundle: Bundle, rows: Sequence[Sequence[int]], rotated: int) -> Scales:
    """Scales of every cache, from the bundle's own passes over ``rows`` of tokens.

    Args:
        bundle: The bundle with a float cache.
        rows: Tokens of each row.
        rotated: Number of values of each head that the rotary embedding turns.

    Raises:
        InputError: There are no rows.
    """
    require_text(rows)
    largest: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    backend = OnnxRuntimeBackend(bundle)
    with Engine(backend) as engine:
        for row in (whole[: bundle.manifest.model.context_length] for whole in rows):
            state = backend.new_state(1, len(row))
            layers = engine.exit_layers
            state.embed(np.array([row], np.int64), 0)
            for stage in range(len(layers)):
                state.run_stage(stage, 0, len(row))
                if stage < len(layers) - 1:
                    state.run_exit(stage, 0, len(row), 0)
            for graph, caches in state.largest_cached(rotated).items():
                known = largest.setdefault(graph, dict(caches))
                for name, sizes in caches.items():
                    known[name] = np.maximum(known[name], sizes)
    return {
        graph: {name: np.maximum(sizes * HEADROOM / 127, LEAST).astype(np.float32) for name, sizes in caches.items()}
        for graph, caches in largest.items()
    }


def quantize_caches(model: ir.Model, scales: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Let a lowered graph store its keys and values as int8; what a short convolution keeps stays as it is.

    Precondition: caches are inputs ``past_*`` and outputs ``present_*`` of ``GroupQueryAttention`` or ``TensorScatter``.
    """
    names = {
        name: initializer(model, f"{name}.scale", array[:, None, :])  # (H, 1, d): broadcasts over (B, H, T, d)
        for name, array in scales.items()
    }
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            pasts = [node.inputs[3], node.inputs[4]]
            node.resize_inputs(14)
            node.replace_input_with(11, None)  # no sink: here the kernel's blocks are faster
            for index, past in zip((12, 13), pasts, strict=True):
                assert past is not None and past.name is not None
                node.replace_input_with(index, names[past.name])
            for part in ("k", "v"):
                node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        elif node.op_type == "TensorScatter":
            past = node.inputs[0]
            assert past is not None and past.name is not None
            if past.name in names:
                _round_before(model, node, names[past.name])
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).replace("present_", "past_", 1) in names:
            value.type = ir.TensorType(ir.DataType.INT8)


def _round_before(model: ir.Model, node: ir.Node, scale: ir.Value) -> None:
    update = node.inputs[1]
    bounds = [
        initializer(model, f"{scale.name}.{label}", np.array(bound, np.float32))
        for label, bound in (("least", -128), ("most", 127))
    ]
    steps = [ir.Node("", "Div", [update, scale])]
    steps.append(ir.Node("", "Round", [steps[-1].outputs[0]]))
    steps.append(ir.Node("", "Clip", [steps[-1].outputs[0], *bounds]))
    steps.append(ir.Node("", "Cast", [steps[-1].outputs[0]], [ir.AttrInt64("to", int(ir.DataType.INT8))]))
    model.graph.insert_before(node, steps)
    node.replace_input_with(1, steps[-1].outputs[0])
