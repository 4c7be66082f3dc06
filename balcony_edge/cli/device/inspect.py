"""``balcony-edge inspect``: the content of a bundle, and the bytes that a token at each exit reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.cli.console import stdout
from balcony_edge.cli.show import show_engines
from balcony_edge.errors import InputError


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    tables: Annotated[bool, typer.Option("--io", help="Also show the inputs and outputs of every graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show exits, parameters and bytes read per token, ideal speed-up, files, and I/O tables."""
    manifest = Bundle.open(bundle).manifest
    exits = [exit_facts(manifest, exit_layer) for exit_layer in manifest.exit_layers]
    if as_json:
        if tables:
            raise InputError("--io with --json: the document has the tables anyway: leave --io out")
        known = [spec.model_dump(mode="json") for spec in manifest.exits]
        document = {
            **manifest.model_dump(mode="json"),
            "exits": [{**a, **b} for a, b in zip(known, exits, strict=True)],
        }
        print(json.dumps(document))  # noqa: T201 - programs read this
        return
    _show(bundle, manifest, exits, tables)


def exit_facts(manifest: Manifest, exit_layer: int) -> dict[str, Any]:
    """Parameters and bytes that one token at an exit reads, and the speed-up if only bytes cost time.

    Of a mixture of experts the parameters are those of all experts, and the bytes those of the experts that run.
    """
    graphs = [manifest.runnable[name] for name in manifest.path_graphs(exit_layer)]
    spec = next(exit_ for exit_ in manifest.exits if exit_.exit_layer == exit_layer)
    depth = exit_layer + (spec.kind == "balcony" and spec.module != "none")
    bytes_read = manifest.bytes_per_token(exit_layer)
    return {
        "exit_layer": exit_layer,
        "kind": spec.kind,
        "trained": spec.trained,
        "depth_factor": round(depth / manifest.model.num_layers, 3),
        "parameters_read": sum(graph.parameters for graph in graphs),
        "non_embedding_parameters": sum(graph.parameters for graph in graphs) - manifest.runnable["lm_head"].parameters,
        "bytes_read": bytes_read,
        "ideal_speedup": round(manifest.bytes_per_token(manifest.exit_layers[-1]) / bytes_read, 3),
    }


def _show(path: Path, manifest: Manifest, exits: list[dict[str, Any]], tables: bool) -> None:
    model = manifest.model
    size = sum(file.bytes for file in manifest.files.values())
    heads = f"{model.num_attention_heads} heads, {model.num_kv_heads} KV heads"
    stdout.print(
        f"[bold]{escape(str(path))}[/]: {escape(model.name)} ({escape(model.architecture)}), "
        f"{model.num_layers} layers, hidden {model.hidden_size}, "
        f"{heads if model.num_attention_heads else 'no attention'}, vocabulary {model.vocab_size}, "
        f"context {model.context_length}, {manifest.precision}, {len(manifest.files)} files, {size / 1e6:.1f} MB"
    )
    tools = ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())
    stdout.print(f"fingerprint {manifest.fingerprint[:16]}, made with {escape(tools)}")
    if model.layers:
        kinds = {
            "attend": sum(layer.attention for layer in model.layers),
            "convolve": sum(layer.inputs is not None for layer in model.layers),
            "have a recurrent state": sum(layer.state is not None for layer in model.layers),
        }
        stdout.print("layers: " + ", ".join(f"{count} {what}" for what, count in kinds.items() if count))
    parameters = "parameters read"
    if model.mixture is not None:
        stdout.print(f"mixture of {model.mixture.experts} experts, of which {model.mixture.chosen} run for each row")
        parameters = "parameters, all experts"
    agreement = manifest.agreement
    evaluated = any(value is not None for value in list(agreement.values())[:-1])
    table = Table("exit", "depth", "kind", parameters, "MB read a token", "ideal speed-up", *["agrees"] * evaluated)
    for facts in exits:
        kind = facts["kind"] if facts["trained"] else f"{facts['kind']} [yellow](untrained)[/]"
        table.add_row(
            str(facts["exit_layer"]),
            f"{facts['depth_factor']:.2f}×",
            kind,
            f"{facts['parameters_read'] / 1e6:.1f} M",
            f"{facts['bytes_read'] / 1e6:.1f}",
            f"{facts['ideal_speedup']:.2f}×",
            *[("" if (share := agreement[facts["exit_layer"]]) is None else f"{share:.1%}")] * evaluated,
        )
    stdout.print(table)
    if (thresholds := manifest.confidence) is not None:
        known = ", ".join(f"exit {layer} from {one.threshold:.3f}" for layer, one in thresholds.thresholds.items())
        stdout.print(f"confidence exits ({thresholds.measure}): {known or 'none keeps the promise'}", markup=False)
    listed = [*manifest.graphs.items(), *((f"cpu {n}", g) for n, g in manifest.cpu.items())]
    for name, engines in manifest.engines.items():
        show_engines(name, engines)
        listed += [(f"tensorrt/{name} {n}", g) for n, g in engines.graphs.items()]
    for name, graph in listed if tables else ():
        listing = Table("tensor", "", "dtype", "shape", title=escape(f"{name} ({graph.file})"), title_justify="left")
        for role, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                shape = " × ".join(map(str, tensor.shape))
                listing.add_row(escape(tensor.name), role, tensor.dtype, escape(shape))
        stdout.print(listing)
