"""From a Hugging Face causal LM and its balconies to a bundle on disk.

Owns the order of the work and that it is atomic: everything is written into a directory of a temporary name beside the
target, which is renamed when it is complete. Tracing is :mod:`.graph`, the cutting :mod:`.passes`, the external data
:mod:`.weights`; checking the result against the model is :mod:`.verify`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.bundle import MANIFEST, WEIGHTS, Manifest, write_manifest
from balcony_edge.errors import CheckpointError, InputError
from balcony_export import graph, head, passes
from balcony_export.architecture import describe, embedding_scale, parts_of
from balcony_export.balcony import Balcony
from balcony_export.weights import WeightFile

Precision = Literal["float32", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


#: Told what is being done and which share of the work is done (0 to 1).
Progress = Callable[[str, float], None]


def _silent(step: str, done: float) -> None:
    """No progress shown."""


def export_bundle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    balconies: dict[int, Balcony],
    output: Path,
    *,
    name: str,
    trained: bool,
    precision: Precision = "float32",
    context_length: int | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress = _silent,
) -> Manifest:
    """Write the bundle of ``model`` with one exit per balcony and the full depth.

    Args:
        model: the base model; converted to ``precision`` in place.
        tokenizer: its tokenizer.
        balconies: exit layer → balcony, for exits below the full depth.
        output: the directory to make; it must not exist.
        name: what to call the model.
        trained: whether the balconies were trained.
        precision: of weights, hidden states and KV cache; norms compute in float32 either way.
        context_length: rows that a sequence may hold.
        check: called with the finished directory before it takes its final name; what it raises undoes the export.
        progress: told about each step.

    Raises:
        InputError: the output exists.
        CheckpointError: the model is not exportable or holds weights that are not finite.
    """
    dtype = DTYPES[precision]
    model.to(dtype)  # type: ignore[arg-type]
    for balcony in balconies.values():
        balcony.to(dtype)
    parts = parts_of(model)
    spec = describe(model, name, context_length)
    layers = (*sorted(balconies), spec.num_layers)
    with fresh_directory(output) as directory:
        progress("tracing the backbone", 0.0)
        backbone = graph.trace_backbone(model, parts, layers, spec.context_length)
        passes.name_weights(backbone)
        passes.collapse_reshapes(backbone)
        graphs = {"backbone": backbone}
        for index, (first, last) in enumerate(zip((0, *layers), layers, strict=False)):
            graphs[f"stage_{index}"] = _cut_stage(backbone, index, first, last)
        for count, exit_layer in enumerate(sorted(balconies)):
            progress(f"tracing balcony {exit_layer}", 0.5 + 0.2 * count / len(balconies))
            traced = graph.trace_balcony(model, parts, balconies[exit_layer], spec.context_length)
            passes.name_weights(traced, f"balcony_{exit_layer}.")
            passes.collapse_reshapes(traced)
            traced.graph.name = f"balcony_{exit_layer}"
            graphs[f"balcony_{exit_layer}"] = traced
        graphs["norm"] = head.build_norm(parts)
        graphs["lm_head"] = head.build_head(model, parts)
        progress("writing weights", 0.7)
        with WeightFile(directory) as weights:
            table_offset = weights.offset_of(ir.tensor(parts.embed.weight.detach()))
            for traced in graphs.values():
                weights.externalize(traced)
        for key, traced in graphs.items():
            passes.strip_metadata(traced)
            ir.save(traced, directory / f"{key}.onnx")
        _write_tokenizer(model, tokenizer, directory)
        progress("hashing", 0.8)
        manifest = write_manifest(
            directory,
            {
                "model": spec.model_dump(mode="json"),
                "precision": precision,
                "exits": [
                    {
                        "exit_layer": e,
                        "kind": "balcony" if e in balconies else "full",
                        "trained": trained or e not in balconies,
                    }
                    for e in layers
                ],
                "embedding": {
                    "file": WEIGHTS,
                    "offset": table_offset,
                    "dtype": precision,
                    "shape": list(parts.embed.weight.shape),
                    "scale": embedding_scale(parts, dtype),
                    "tied": parts.head.weight is parts.embed.weight,
                },
                "graphs": {key: _graph_spec(key, traced) for key, traced in graphs.items()},
                "tools": _tool_versions(),
            },
        )
        if check is not None:
            progress("verifying", 0.85)
            check(directory)
        progress("done", 1.0)
    return manifest


def _cut_stage(backbone: ir.Model, index: int, first: int, last: int) -> ir.Model:
    pasts = graph.past_names(range(first, last))
    presents = [name.replace("past", "present") for name in pasts]
    dims = dict.fromkeys(graph.past_names(range(len(backbone.graph.inputs) // 2 - 1)), f"past_key_{first}")
    dims["hidden_0"] = f"hidden_{first}"
    inputs = [f"hidden_{first}", "start", *pasts]
    return passes.cut(backbone, f"stage_{index}", inputs, [f"hidden_{last}", *presents], dims)


_ONNX_TO_DTYPE = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}


def _graph_spec(key: str, traced: ir.Model) -> dict[str, Any]:
    def table(values: Sequence[ir.Value]) -> list[dict[str, Any]]:
        specs = []
        for value in values:
            assert value.dtype is not None and value.shape is not None
            shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
            specs.append({"name": value.name, "dtype": _ONNX_TO_DTYPE[value.dtype], "shape": shape})
        return specs

    # rope tables are gathered by row, not read whole; shapes are no weights
    tensors = [
        value.const_value
        for value in traced.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and not (value.name or "").startswith("rope_")
    ]
    return {
        "file": f"{key}.onnx",
        "inputs": table(traced.graph.inputs),
        "outputs": table(traced.graph.outputs),
        "parameters": sum(tensor.size for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def _write_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError("the tokenizer has no tokenizers backend: export needs a fast tokenizer (tokenizer.json)")
    backend.save(str(directory / "tokenizer.json"))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        (directory / "special_tokens.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")
    generation: Any = model.generation_config
    document = generation.to_diff_dict() if generation is not None else {}
    (directory / "generation_config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _tool_versions() -> dict[str, str]:
    tools = ("balcony-edge", "torch", "transformers", "onnx-ir", "onnxscript")
    return {tool: importlib.metadata.version(tool) for tool in tools}


def refuse_existing(output: Path) -> None:
    """Refuse an output that exists or has no directory to lie in; cheap, so that it comes before the work.

    Raises:
        InputError: one line.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already: name a directory that does not, or remove it first")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: there is no directory {output.absolute().parent}: make it first")


@contextmanager
def fresh_directory(output: Path) -> Iterator[Path]:
    """A directory of a temporary name beside ``output``, renamed to it at the end and removed when anything fails.

    Leftovers of an export into the same name that was killed are removed first.
    """
    refuse_existing(output)
    parent = output.absolute().parent
    prefix = f".{output.name}.partial-"
    for leftover in parent.glob(f"{prefix}*"):
        if not _alive(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    directory = parent / f"{prefix}{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}): name another place") from error
    try:
        yield directory
        if not (directory / MANIFEST).is_file():
            raise AssertionError("an export without a manifest must not take its final name")
        directory.rename(output)
    except OSError as error:
        raise InputError(f"{output}: writing failed ({error.strerror}): free space or name another place") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True
