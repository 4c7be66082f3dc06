"""From a language model with exits to a bundle on disk.

Owns the order of the steps and that the result is atomic: everything is written into a directory of a temporary name next to
the target, which is renamed when it is complete. Tracing, cutting and external data are :mod:`balcony_export.graph`;
comparing the result with the model is :mod:`.verify`.
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
from balcony_edge.bundle.manifest import WEIGHTS, Manifest, ModelSpec, is_state
from balcony_edge.errors import CheckpointError, InputError
from balcony_export.graph import head, lower, passes
from balcony_export.graph import trace as graph
from balcony_export.graph.experts import interleave, spell_out
from balcony_export.graph.ir_tools import graph_spec
from balcony_export.graph.recurrent.passes import tidy_mixers, write_in_standard_operators
from balcony_export.graph.weights import WeightFile
from balcony_export.graph.widen import stand_ins, tensor_as, widen
from balcony_export.model.architecture import describe, embedding_scale
from balcony_export.model.exits import ExitModel
from balcony_export.model.experts import mixture
from balcony_export.output import fresh_directory
from balcony_export.quantize.blocks import Blocks, Quantizer, Scheme, quantize_graph
from balcony_export.quantize.experts import SMALLEST_BLOCK, can_round_experts
from balcony_export.quantize.gptq import second_moments
from balcony_export.quantize.kv_cache import cache_scales, quantize_caches
from balcony_runtime.backends.installed import installed_packages, refuse_too_old

#: Called with the step that begins and the share of the work done before it (0 to 1).
ProgressCallback = Callable[[str, float], None]
#: Names of tokens that end a turn. Many files name only the token that ends a text (Gemma's GGUF files, fine-tunes of base
#: models); llama.cpp also goes by these names (``llama-vocab.cpp``).
_TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>")


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle shall be.

    Attributes:
        name: Name of the model.
        trained: Whether the balconies were trained.
        precision: Type of weights, hidden states and KV cache; norms compute in float32 in any case. A scheme quantizes the
            weights and leaves hidden states in float32, and the KV cache as well unless it has ``kv_bits`` 8.
        calibration: Rows of tokens; with them a scheme rounds by GPTQ.
        context_length: Largest number of rows of a sequence; None for the model's own, at most 8,192.
    """

    name: str
    trained: bool
    precision: Literal["float32", "float16"] | Scheme = "float32"
    calibration: Sequence[Sequence[int]] = ()
    context_length: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the graphs before anything is quantized, whatever type the model is held in."""
        return torch.float16 if self.precision == "float16" else torch.float32

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of a quantized bundle, None for a float one."""
        return self.precision if isinstance(self.precision, Scheme) else None


@dataclass(frozen=True)
class Traced:
    """A model's graphs before they are written: the portable set, and the lowered set, which may be empty."""

    graphs: Mapping[str, ir.Model]
    lowered: Mapping[str, ir.Model]


def trace(exits: ExitModel, options: ExportOptions, progress: ProgressCallback = lambda step, done: None) -> Traced:
    """Trace a model with its balconies and cut it at the exits; errors as for :func:`export_bundle`.

    Of the options only name, context length and float type count: the graphs are the same for float32 and every scheme.
    """
    with stand_ins(exits.modules, options.dtype) as weights:
        traced = _trace(exits, options, progress)
        models = (*traced.graphs.values(), *traced.lowered.values())
        widen(models, weights, options.dtype)
        interleave(models)
    return traced


def _trace(exits: ExitModel, options: ExportOptions, progress: ProgressCallback) -> Traced:
    spec, layers = describe(exits.model, options.name, options.context_length), exits.exit_layers
    progress("tracing the backbone", 0.0)
    backbone = graph.trace_backbone(exits, spec)
    _tidy(backbone)
    graphs = {"backbone": backbone}
    for index, (first, last) in enumerate(zip((0, *layers), layers, strict=False)):
        graphs[f"stage_{index}"] = _cut_stage(backbone, spec, index, first, last)
    balconies: dict[int, ir.Model] = {}
    for count, exit_layer in enumerate(exits.balconies):
        progress(f"tracing balcony {exit_layer}", 0.5 + 0.2 * count / len(exits.balconies))
        balconies[exit_layer] = graph.trace_balcony(exits, exit_layer, spec, balconies)
        traced = balconies[exit_layer].clone()
        _tidy(traced, f"balcony_{exit_layer}.")
        traced.graph.name = f"balcony_{exit_layer}"
        graphs[f"balcony_{exit_layer}"] = traced
    graphs["norm"] = head.build_norm(exits)
    graphs["lm_head"] = head.build_head(exits)
    lowered = lower.lower_all(graphs, spec) if lower.can_lower(spec, exits.rotated) else {}
    for one in graphs.values():
        spell_out(one)
        write_in_standard_operators(one)
    return Traced(graphs, lowered)


def export_bundle(
    exits: ExitModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    options: ExportOptions,
    *,
    traced: Traced | None = None,
    check: Callable[[Path], object] | None = None,
    progress: ProgressCallback = lambda step, done: None,
) -> Manifest:
    """Write the bundle of a model, with one exit per balcony and the full depth.

    Args:
        exits: The model with its balconies, held in any float type; converted in place only to float16, or to float32 for a
            calibration.
        tokenizer: The model's tokenizer.
        output: Directory to make; it must not exist.
        options: What the bundle shall be.
        traced: Graphs of an earlier :func:`trace` of the same model.
        check: Called with the finished directory before it takes its final name; an error that it raises undoes the export.
        progress: Called at the start of each step.

    Raises:
        InputError: The output exists, or the scheme does not suit the model.
        CheckpointError: The model cannot be exported, or has weights that are not finite.
        MissingDependencyError: ONNX Runtime is too old to check the bundle or to measure its keys and values.
    """
    scheme, dtype, parts = options.scheme, options.dtype, exits.parts
    _refuse_not_finite(exits, "holds NaN or infinity: use a checkpoint whose weights are finite")
    if dtype == torch.float16 or options.calibration:
        exits.cast(dtype)
    if dtype == torch.float16:
        _refuse_not_finite(exits, "is too large for fp16: export with fp32")
    spec = describe(exits.model, options.name, options.context_length)
    _refuse_misfits(exits, spec, scheme, checked=check is not None)
    template = _chat_template(tokenizer)
    spec = _with_turn_ends(spec, tokenizer, template)
    with fresh_directory(output) as directory:
        traced = traced or trace(exits, options, progress)
        # quantizing and writing change a graph's weights; the traced graphs stay as they are
        graphs = {key: model.clone() for key, model in traced.graphs.items()} if scheme is None else {}
        lowered = {key: model.clone() for key, model in traced.lowered.items()}
        with WeightFile(directory) as weights:
            blocks = None
            if scheme is not None:
                progress("quantizing", 0.7)
                quantizer = Quantizer(scheme, second_moments(exits, options.calibration) if options.calibration else {})
                blocks = _quantize_all(lowered, weights, quantizer, exits)
                del quantizer  # the moments can be as large as the model
            progress("writing weights", 0.75)
            table = _write_table(weights, tensor_as(parts.embed.weight, dtype), blocks)
            for one in (*graphs.values(), *lowered.values()):
                weights.externalize(one)
        for prefix, traced_set in (("", graphs), ("cpu_", lowered)):
            for key, one in traced_set.items():
                passes.strip_metadata(one)
                ir.save(one, directory / f"{prefix}{key}.onnx")
        _write_tokenizer(exits.model, tokenizer, template, directory)
        document: dict[str, Any] = {
            "model": spec.model_dump(mode="json"),
            "precision": options.precision if scheme is None else f"int{scheme.bits}",
            "exits": [_exit_entry(exits, e, options.trained) for e in exits.exit_layers],
            "embedding": {
                **table,
                "dtype": "float16" if dtype == torch.float16 else "float32",
                "shape": list(parts.embed.weight.shape),
                "scale": embedding_scale(parts, dtype),
                "tied": parts.head.weight is parts.embed.weight,
            },
            "graphs": {key: graph_spec(key, one) for key, one in graphs.items()},
            "cpu": {key: graph_spec(f"cpu_{key}", one) for key, one in lowered.items()},
            "quantization": None if scheme is None else _quantization(scheme, options.calibration),
            "tools": _tool_versions(),
        }
        if scheme is not None and scheme.kv_bits == 8:
            progress("measuring keys and values", 0.78)
            _quantize_caches(directory, document, lowered, options.calibration, exits.rotated)
        progress("hashing", 0.8)
        manifest = write_manifest(directory, document)
        if check is not None:
            progress("verifying", 0.85)
            check(directory)
        progress("done", 1.0)
    return manifest


def _exit_entry(exits: ExitModel, exit_layer: int, trained: bool) -> dict[str, Any]:
    """An exit's entry in the manifest."""
    balcony = exits.balconies.get(exit_layer)
    return {
        "exit_layer": exit_layer,
        "kind": "full" if balcony is None else "balcony",
        "trained": trained or balcony is None,
        "module": "decoder" if balcony is None else balcony.kind,
        "layer": None if balcony is None else balcony.copies,
    }


def _refuse_not_finite(exits: ExitModel, problem: str) -> None:
    for prefix, module in zip(("", *(f"balcony_{e}." for e in exits.balconies)), exits.modules, strict=True):
        for name, parameter in module.named_parameters():
            # A sum is finite iff all of its terms are: finite float32 weights do not overflow float64. Summing piece by
            # piece keeps the float64 copies small.
            parts = parameter.detach().flatten().split(1 << 22)
            if not all(torch.isfinite(part.sum(dtype=torch.float64)) for part in parts):
                raise CheckpointError(f"weight {prefix}{name}: {problem}")


def _quantize_all(lowered: dict[str, ir.Model], weights: WeightFile, quantizer: Quantizer, exits: ExitModel) -> Blocks:
    """Quantize every lowered graph and write its blocks, graph by graph; returns the token table's blocks."""
    parts = exits.parts
    tied = parts.head.weight is parts.embed.weight
    name = "lm_head.weight" if tied else "embed_tokens.weight"
    waiting = list(lowered.values())
    while waiting:
        traced = waiting.pop(0)
        quantize_graph(traced, quantizer)
        weights.externalize(traced)
        wanted = {weight for other in waiting for weight in other.graph.initializers} | {name}
        quantizer.done = {key: blocks for key, blocks in quantizer.done.items() if key in wanted}
    return quantizer.table(name, tensor_as(parts.embed.weight, torch.float32))


def _quantize_caches(
    directory: Path,
    document: dict[str, Any],
    lowered: dict[str, ir.Model],
    calibration: Sequence[Sequence[int]],
    rotated: int,
) -> None:
    """Rewrite the graphs of a bundle whose caches are float32 so far, and their tables in ``document``."""
    as_float = {**document, "quantization": {**document["quantization"], "kv_bits": 32}}
    scales = cache_scales(Bundle(directory, write_manifest(directory, as_float)), calibration, rotated)
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


def _cut_stage(backbone: ir.Model, spec: ModelSpec, index: int, first: int, last: int) -> ir.Model:
    pasts = graph.past_names(spec, range(first, last))
    presents = [name.replace("past", "present") for name in pasts]
    rows = next((name for name in pasts if not is_state(name)), pasts[0])
    dims = dict.fromkeys(graph.past_names(spec, range(spec.num_layers)), rows)
    dims["hidden_0"] = f"hidden_{first}"
    inputs = [f"hidden_{first}", "start", *pasts]
    return passes.cut(backbone, f"stage_{index}", inputs, [f"hidden_{last}", *presents], dims)


def _tidy(traced: ir.Model, prefix: str = "") -> None:
    passes.note_windows(traced)
    passes.plain_products(traced)
    passes.name_weights(traced, prefix)
    passes.collapse_reshapes(traced)
    tidy_mixers(traced, prefix)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer that can be exported.

    Raises:
        CheckpointError: It has no tokenizers backend, or several templates of which none is for chats.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError("the tokenizer has no tokenizers backend: export needs a fast tokenizer (tokenizer.json)")
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name, of which one is for chats
        if "default" not in template:
            raise CheckpointError(
                f"the tokenizer has chat templates {', '.join(template)} and none called 'default': give the one for chats "
                "that name"
            )
        template = template["default"]
    return template if isinstance(template, str) else None


def _refuse_misfits(exits: ExitModel, spec: ModelSpec, scheme: Scheme | None, *, checked: bool) -> None:
    """Refuse a precision that does not fit the model, and an ONNX Runtime that cannot run the bundle, before the work."""
    if scheme is None:
        if checked:
            refuse_too_old(spec, None)
        return
    if scheme.kv_bits == 8 and not spec.num_attention_heads:
        raise InputError(f"--precision {scheme}: the model has no attention, so no keys and values: leave kv=8 out")
    if not lower.can_lower(spec, exits.rotated):
        raise InputError(
            f"--precision {scheme}: the model's heads have {spec.head_dim} values, of which {exits.rotated} are rotated, and "
            "ONNX Runtime's fused attention, which quantized bundles use, takes multiples of 16: export with fp32"
        )
    if scheme.bits == 8 and scheme.accuracy_level == 1 and mixture(exits.model.config):
        raise InputError(
            f"--precision {scheme}: ONNX Runtime rounds the inputs of 8-bit experts to int8 at every level: give level=4, "
            "or int4 with level=1"
        )
    if not can_round_experts(exits.model):
        raise InputError(
            f"--precision {scheme}: ONNX Runtime's quantized experts take widths that are multiples of {SMALLEST_BLOCK}, and "
            "those of the model have others: export with fp32"
        )
    # Without a check, only the ranges of an int8 cache are measured, with float caches.
    if checked or scheme.kv_bits == 8:
        refuse_too_old(spec, scheme.kv_bits if checked else 32)


def _with_turn_ends(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, template: str | None) -> ModelSpec:
    """The description of a model whose replies also end at the tokenizer's end of text and at the end of a turn of a chat."""
    names = [tokenizer.eos_token, *(name for name in _TURN_ENDS if name in (template or ""))]
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[name] for name in names if vocabulary.get(name, spec.vocab_size) < spec.vocab_size]
    return spec.model_copy(update={"eos_token_ids": tuple(dict.fromkeys((*spec.eos_token_ids, *ends)))})


def _write_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None, directory: Path
) -> None:
    backend: Any = tokenizer.backend_tokenizer
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    # a bundle's reader takes no others, such as the image_thumbnail of LFM2-VL's tokenizer
    named = {key: value for key, value in tokenizer.special_tokens_map.items() if key.endswith("_token")}
    special = {key: str(value) for key, value in named.items() if isinstance(value, str)}
    (directory / "special_tokens.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    generation: Any = model.generation_config
    document = generation.to_diff_dict() if generation is not None else {}
    (directory / "generation_config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _tool_versions() -> dict[str, str]:
    tools = ("balcony-edge", "torch", "transformers", "onnx-ir", "onnxscript")
    versions = {tool: importlib.metadata.version(tool) for tool in tools}
    return versions | installed_packages()  # ONNX Runtime comes in packages of several names
