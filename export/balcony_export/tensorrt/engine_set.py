"""Graphs for TensorRT in a bundle: ``tensorrt/<name>/``, from which engines are built here or on the device.

Owns the directory and its entry in the manifest. The graphs come from :mod:`.graphs`. Engines are built by
:mod:`balcony_runtime.backends.accelerator.tensorrt_builder`, which does not need this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from balcony_edge.bundle.bundle import Bundle, file_spec
from balcony_edge.bundle.manifest import EngineSet
from balcony_edge.errors import InputError
from balcony_export.graph.ir_tools import FAR_WEIGHTS, graph_spec, load_graph, relative_distance
from balcony_export.graph.weights import WeightFile
from balcony_export.tensorrt.graphs import Format, tensorrt_graphs
from balcony_export.tensorrt.integers import Rounding
from balcony_runtime.backends.accelerator.tensorrt_builder import MASK_STEP, Target
from balcony_runtime.backends.token_table import unpacked

_EXPORT_ONE = "export one with --precision int4,positive,block=64,head=4 --calibration TEXT"


def make_graphs(
    bundle: Bundle,
    directory: Path,
    target: Target,
    form: Format,
    *,
    batch_size: int = 1,
    rounding: Rounding | None = None,
) -> EngineSet:
    """Write the graphs of an engine set into an empty directory; returns their entry for ``bundle.json``.

    Args:
        bundle: Bundle with graphs in standard ONNX.
        directory: Directory of :func:`balcony_edge.bundle.engine_sets.new_engine_directory`.
        target: TensorRT edition that builds the engines.
        form: Precision, operators and capacity.
        batch_size: Most sequences of a pass.
        rounding: Integers of the weights; by default they are rounded to the nearest.

    Raises:
        BundleError: The bundle has no such graphs.
        InputError: The sizes do not fit the model.
        OSError: The directory cannot be written.
    """
    if bundle.manifest.model.recurrent:
        raise InputError(
            f"{bundle.path}: {bundle.manifest.model.architecture} has recurrent layers, for which there are no graphs for "
            "TensorRT: run it on the CPU"
        )
    context = bundle.manifest.model.context_length
    if context < MASK_STEP:
        raise InputError(f"{bundle.path}: its context of {context} rows is too short for a GPU: run it on the CPU")
    if not 1 <= form.capacity <= context:
        raise InputError(
            f"--context-length {form.capacity}: this bundle takes 1 to {context}: give a number in this range"
        )
    if form.capacity % MASK_STEP:
        raise InputError(
            f"--context-length {form.capacity}: must be a multiple of {MASK_STEP}, because kernels read masks in such steps: "
            f"give {max(form.capacity // MASK_STEP, 1) * MASK_STEP}"
        )
    graphs = tensorrt_graphs(bundle, form, rounding)
    with WeightFile(directory) as weights:
        for graph in graphs.values():
            weights.externalize(graph)
    for key, graph in graphs.items():
        ir.save(graph, directory / f"{key}.onnx")
    return EngineSet(
        target=target,
        precision=form.precision,
        operators=form.operators,
        context_length=form.capacity,
        batch_size=batch_size,
        block_size=(rounding or form).block_size if form.precision == "int4" else None,  # type: ignore[arg-type]
        rounded=rounding is not None,
        graphs={key: graph_spec(key, graph) for key, graph in graphs.items()},  # type: ignore[misc]
        files={path.name: file_spec(path) for path in sorted(directory.iterdir())},
    )


def rounding_of(quantized: Bundle, bundle: Bundle) -> Rounding:
    """The integers of a quantized bundle, for example from GPTQ, so that both engines of a model compute with the same weights.

    Args:
        quantized: Bundle in symmetric int4 with scales above 0, LM head included.
        bundle: Float bundle of the same model, exits and balconies.

    Raises:
        InputError: The two do not match, or TensorRT's kernels do not take integers of this kind.
    """
    scheme, manifest = quantized.manifest.quantization, bundle.manifest
    fits = scheme is not None and scheme.bits == scheme.head_bits == 4 and scheme.symmetric
    if scheme is None or not fits or scheme.down_block_size not in (None, scheme.block_size):
        raise InputError(
            f"--rounded-as {quantized.path}: must be int4,sym,head=4 with blocks of one size: {_EXPORT_ONE}"
        )
    same = {"name": manifest.model.name, "context_length": manifest.model.context_length}  # these may differ
    model = quantized.manifest.model.model_copy(update=same)
    if (model, quantized.manifest.exit_layers) != (manifest.model, manifest.exit_layers):
        raise InputError(
            f"--rounded-as {quantized.path}: is of another model than {bundle.path} or has other exits: give one that fits"
        )
    weights = _weights(bundle)
    rounding = Rounding(scheme.block_size)
    for spec in quantized.manifest.cpu.values():
        for node in load_graph(quantized, spec.file).graph:
            if node.op_type != "MatMulNBits":
                continue
            packed, scales = (value.const_value.numpy() for value in node.inputs[1:3])  # type: ignore[union-attr]
            if not (scales > 0).all():
                raise InputError(
                    f"--rounded-as {quantized.path}: has scales below 0, which TensorRT does not take: {_EXPORT_ONE}"
                )
            inputs = node.attributes["K"].as_int()
            if inputs % scheme.block_size:
                raise InputError(
                    f"--rounded-as {quantized.path}: {inputs} inputs are not a multiple of its blocks of {scheme.block_size}, "
                    f"and TensorRT takes only whole blocks: {_EXPORT_ONE}"
                )
            values = unpacked(packed, 4).reshape(len(packed), -1).astype(np.int8)[:, :inputs] - 8
            first = 0
            for part in str(node.inputs[1].name).removesuffix(".blocks").split("+"):  # type: ignore[union-attr]
                # a tied head's weight has the token table's name
                name = part if part in weights else "embed_tokens.weight"
                weight = weights[name]()
                rows = slice(first, first + len(weight))
                stored = values[rows] * np.repeat(scales[rows], scheme.block_size, axis=1)
                if not relative_distance(stored, weight) <= FAR_WEIGHTS:
                    raise InputError(
                        f"--rounded-as {quantized.path}: {name} differs too much from that of {bundle.path}: give a bundle of "
                        "the same model and balconies"
                    )
                rounding.given[name] = (values[rows], scales[rows])
                first = rows.stop
    return rounding


def _weights(bundle: Bundle) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Name of each weight of a product → function that reads it  # (N, K)"""
    found: dict[str, Callable[[], npt.NDArray[np.float32]]] = {}
    for spec in bundle.portable().manifest.graphs.values():
        for node in load_graph(bundle, spec.file).graph:
            weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
            if weight is not None and weight.const_value is not None:
                found[str(weight.name)] = partial(_rows, weight.const_value, node.op_type == "Gemm")
    return found


def _rows(weight: ir.TensorProtocol, rows_first: bool) -> npt.NDArray[np.float32]:
    array = weight.numpy().astype(np.float32)
    return array if rows_first else array.T
