"""From a Hugging Face causal LM and its balconies to a bundle on disk.

Owns the order of the work and that it is atomic: everything is written into a directory of a temporary name beside the
target, which is renamed when it is complete. Tracing, cutting and the external data are :mod:`balcony_export.graph`'s; checking
the result against the model is :mod:`.verify`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.bundle.bundle import Bundle, write_manifest
from balcony_edge.bundle.manifest import WEIGHTS, Manifest, ModelSpec
from balcony_edge.errors import CheckpointError, InputError
from balcony_export.graph import head, lower, passes
from balcony_export.graph import trace as graph
from balcony_export.graph.ir_tools import graph_spec
from balcony_export.graph.weights import WeightFile
from balcony_export.graph.widen import held, stand_ins, widen
from balcony_export.model.architecture import cast_weights, describe, embedding_scale, parts_of
from balcony_export.model.balcony import Balcony
from balcony_export.output import fresh_directory
from balcony_export.quantize.blocks import Blocks, Quantizer, Scheme, quantize_graph
from balcony_export.quantize.gptq import second_moments
from balcony_export.quantize.kv_cache import cache_scales, quantize_caches

#: Told what is being done and which share of the work is done (0 to 1).
Progress = Callable[[str, float], None]


def _silent(step: str, done: float) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Traced:
    """A model's graphs before they are written: the portable set and the lowered one, empty where there is none."""

    spec: ModelSpec
    layers: tuple[int, ...]
    graphs: Mapping[str, ir.Model]
    lowered: Mapping[str, ir.Model]


def trace(
    model: PreTrainedModel,
    balconies: dict[int, Balcony],
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
    progress: Progress = _silent,
) -> Traced:
    """Trace a model and its balconies and cut it at the exits; arguments and errors as for :func:`export_bundle`.

    ``dtype`` is the graphs', whatever type the model is held in.
    """
    with stand_ins((model, *balconies.values()), dtype) as weights:
        traced = _trace(model, balconies, name, context_length, progress)
        widen((*traced.graphs.values(), *traced.lowered.values()), weights, dtype)
    return traced


def _trace(
    model: PreTrainedModel, balconies: dict[int, Balcony], name: str, context_length: int | None, progress: Progress
) -> Traced:
    parts = parts_of(model)
    spec = describe(model, name, context_length)
    layers = (*sorted(balconies), spec.num_layers)
    progress("tracing the backbone", 0.0)
    backbone = graph.trace_backbone(model, parts, layers, spec.context_length)
    _tidy(backbone)
    graphs = {"backbone": backbone}
    for index, (first, last) in enumerate(zip((0, *layers), layers, strict=False)):
        graphs[f"stage_{index}"] = _cut_stage(backbone, index, first, last)
    for count, exit_layer in enumerate(sorted(balconies)):
        progress(f"tracing balcony {exit_layer}", 0.5 + 0.2 * count / len(balconies))
        traced = graph.trace_balcony(model, parts, balconies[exit_layer], spec.context_length)
        _tidy(traced, f"balcony_{exit_layer}.")
        traced.graph.name = f"balcony_{exit_layer}"
        graphs[f"balcony_{exit_layer}"] = traced
    graphs["norm"] = head.build_norm(parts)
    graphs["lm_head"] = head.build_head(model, parts)
    lowers = next(model.parameters()).dtype == torch.float32 and lower.can_lower(spec)
    return Traced(spec, layers, graphs, lower.lower_all(graphs, spec) if lowers else {})


def export_bundle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    balconies: dict[int, Balcony],
    output: Path,
    *,
    name: str,
    trained: bool,
    precision: Literal["float32", "float16"] | Scheme = "float32",
    calibration: Sequence[Sequence[int]] = (),
    context_length: int | None = None,
    traced: Traced | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress = _silent,
) -> Manifest:
    """Write the bundle of ``model`` with one exit per balcony and the full depth.

    Args:
        model: the base model, held in any float type; converted in place only to float16, or to float32 for ``calibration``.
        tokenizer: its tokenizer.
        balconies: exit layer → balcony, for exits below the full depth.
        output: the directory to make; it must not exist.
        name: what to call the model.
        trained: whether the balconies were trained.
        precision: of weights, hidden states and KV cache; norms compute in float32 either way. A scheme quantizes the
            weights and leaves the others in float32.
        calibration: rows of tokens; with them a scheme rounds by GPTQ.
        context_length: rows that a sequence may hold.
        traced: the graphs, where they were traced before: they are the same for float32 and every scheme.
        check: called with the finished directory before it takes its final name; what it raises undoes the export.
        progress: told about each step.

    Raises:
        InputError: the output exists.
        CheckpointError: the model is not exportable or holds weights that are not finite.
    """
    scheme = precision if isinstance(precision, Scheme) else None
    dtype = torch.float16 if precision == "float16" else torch.float32
    if dtype == torch.float16 or calibration:
        for module in (model, *balconies.values()):
            cast_weights(module, dtype)
    _refuse_not_finite(model, balconies)
    parts = parts_of(model)
    spec = describe(model, name, context_length)
    if scheme is not None and not lower.can_lower(spec):
        raise InputError(
            f"--precision {scheme}: the model's heads have {spec.head_dim} values, and ONNX Runtime's fused attention, "
            "which quantized bundles use, takes multiples of 16: export with fp32"
        )
    with fresh_directory(output) as directory:
        traced = traced or trace(
            model, balconies, name=name, dtype=dtype, context_length=context_length, progress=progress
        )
        # quantizing and writing change a graph's weights; those that were traced stay as they are
        graphs = {key: model_.clone() for key, model_ in traced.graphs.items()} if scheme is None else {}
        lowered = {key: model_.clone() for key, model_ in traced.lowered.items()}
        with WeightFile(directory) as weights:
            blocks = None
            if scheme is not None:
                progress("quantizing", 0.7)
                blocks = _quantize_all(lowered, weights, scheme, model, balconies, calibration)
            progress("writing weights", 0.75)
            table = _write_table(weights, held(parts.embed.weight, dtype), blocks)
            for one in (*graphs.values(), *lowered.values()):
                weights.externalize(one)
        for prefix, traced_set in (("", graphs), ("cpu_", lowered)):
            for key, one in traced_set.items():
                passes.strip_metadata(one)
                ir.save(one, directory / f"{prefix}{key}.onnx")
        _write_tokenizer(model, tokenizer, directory)
        document: dict[str, Any] = {
            "model": spec.model_dump(mode="json"),
            "precision": precision if scheme is None else f"int{scheme.bits}",
            "exits": [
                {
                    "exit_layer": e,
                    "kind": "balcony" if e in balconies else "full",
                    "trained": trained or e not in balconies,
                    "module": balconies[e].kind if e in balconies else "decoder",
                }
                for e in traced.layers
            ],
            "embedding": {
                **table,
                "dtype": "float16" if dtype == torch.float16 else "float32",
                "shape": list(parts.embed.weight.shape),
                "scale": embedding_scale(parts, dtype),
                "tied": parts.head.weight is parts.embed.weight,
            },
            "graphs": {key: graph_spec(key, one) for key, one in graphs.items()},
            "cpu": {key: graph_spec(f"cpu_{key}", one) for key, one in lowered.items()},
            "quantization": None if scheme is None else _quantization(scheme, calibration),
            "tools": _tool_versions(),
        }
        if scheme is not None and scheme.kv_bits == 8:
            progress("measuring keys and values", 0.78)
            _quantize_caches(directory, document, lowered, calibration)
        progress("hashing", 0.8)
        manifest = write_manifest(directory, document)
        if check is not None:
            progress("verifying", 0.85)
            check(directory)
        progress("done", 1.0)
    return manifest


def _refuse_not_finite(model: PreTrainedModel, balconies: dict[int, Balcony]) -> None:
    for prefix, module in (("", model), *((f"balcony_{e}.", balcony) for e, balcony in balconies.items())):
        for name, parameter in module.named_parameters():
            # a sum is finite iff all of its parts are (of finite float32 weights it does not overflow in float64); the
            # parts keep the copies in float64 that it makes small
            parts = parameter.detach().flatten().split(1 << 22)
            if not all(torch.isfinite(part.sum(dtype=torch.float64)) for part in parts):
                raise CheckpointError(
                    f"weight {prefix}{name}: holds NaN or infinity: use a checkpoint whose weights are finite"
                )


def _quantize_all(
    lowered: dict[str, ir.Model],
    weights: WeightFile,
    scheme: Scheme,
    model: PreTrainedModel,
    balconies: dict[int, Balcony],
    calibration: Sequence[Sequence[int]],
) -> Blocks:
    """Quantize every lowered graph and write its blocks, graph by graph; returns the token table's blocks."""
    quantizer = Quantizer(scheme, second_moments(model, balconies, calibration) if calibration else {})
    parts = parts_of(model)
    tied = parts.head.weight is parts.embed.weight
    name = "lm_head.weight" if tied else "embed_tokens.weight"
    waiting = list(lowered.values())
    while waiting:
        traced = waiting.pop(0)
        quantize_graph(traced, quantizer)
        weights.externalize(traced)
        wanted = {weight for other in waiting for weight in other.graph.initializers} | {name}
        quantizer.done = {key: blocks for key, blocks in quantizer.done.items() if key in wanted}
    return quantizer.table(name, held(parts.embed.weight, torch.float32))


def _quantize_caches(
    directory: Path, document: dict[str, Any], lowered: dict[str, ir.Model], calibration: Sequence[Sequence[int]]
) -> None:
    """Rewrite the graphs of a bundle whose caches are float32 so far, and their tables in ``document``."""
    as_float = {**document, "quantization": {**document["quantization"], "kv_bits": 32}}
    scales = cache_scales(Bundle(directory, write_manifest(directory, as_float)), calibration)
    for key, found in scales.items():
        quantize_caches(lowered[key], found)
        ir.save(lowered[key], directory / f"cpu_{key}.onnx")
        document["cpu"][key] = graph_spec(f"cpu_{key}", lowered[key])


def _write_table(weights: WeightFile, table: ir.TensorProtocol, blocks: Blocks | None) -> dict[str, Any]:
    """Write the token table; returns its place for the manifest."""
    if blocks is None:
        return {"file": WEIGHTS, "offset": weights.offset_of(table)}
    zeros = None if blocks.zeros is None else weights.offset_of(ir.tensor(blocks.zeros))
    return {
        "file": WEIGHTS,
        "offset": weights.offset_of(ir.tensor(blocks.packed)),
        "blocks": {
            "bits": blocks.bits,
            "block_size": blocks.block_size,
            "scales_offset": weights.offset_of(ir.tensor(blocks.scales)),
            "zero_points_offset": zeros,
        },
    }


def _quantization(scheme: Scheme, calibration: Sequence[Sequence[int]]) -> dict[str, Any]:
    tokens = sum(len(row) for row in calibration)
    return {**asdict(scheme), "method": "gptq" if tokens else "nearest", "calibration_tokens": tokens}


def _cut_stage(backbone: ir.Model, index: int, first: int, last: int) -> ir.Model:
    pasts = graph.past_names(range(first, last))
    presents = [name.replace("past", "present") for name in pasts]
    dims = dict.fromkeys(graph.past_names(range(len(backbone.graph.inputs) // 2 - 1)), f"past_key_{first}")
    dims["hidden_0"] = f"hidden_{first}"
    inputs = [f"hidden_{first}", "start", *pasts]
    return passes.cut(backbone, f"stage_{index}", inputs, [f"hidden_{last}", *presents], dims)


def _tidy(traced: ir.Model, prefix: str = "") -> None:
    passes.note_windows(traced)
    passes.name_weights(traced, prefix)
    passes.collapse_reshapes(traced)


def _write_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError("the tokenizer has no tokenizers backend: export needs a fast tokenizer (tokenizer.json)")
    backend.save(str(directory / "tokenizer.json"))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name, of which one is for chats
        if "default" not in template:
            raise CheckpointError(
                f"the tokenizer has chat templates {', '.join(template)} and none called 'default': keep one of them"
            )
        template = template["default"]
    if isinstance(template, str):
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        (directory / "special_tokens.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")
    generation: Any = model.generation_config
    document = generation.to_diff_dict() if generation is not None else {}
    (directory / "generation_config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _tool_versions() -> dict[str, str]:
    tools = ("balcony-edge", "torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime")
    return {tool: importlib.metadata.version(tool) for tool in tools}
