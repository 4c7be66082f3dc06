"""Figures 2 and 4 of the paper on our runtime: the speed of models cut in depth or width, and their loss of quality.

    python -m benchmarks.paper.depth_vs_width [--rounds 5] [--tokens 96] [--text TEXT.jsonl --balconies DIR] [--plot FILE]

Speed (figure 2): random models of the demo model's shape are exported in float32 as bundles of the full depth alone. They
decode ``--tokens`` (the paper: 2,048) after 32 in interleaved rounds. A cut in depth removes layers. A cut in width reduces
the MLP's inner size to the hidden size, then the number of heads (Flextron nests both, MatFormer the MLPs only). Parameters
are those that a token reads, the LM head included.

Quality (figure 4, with ``--text``): KL and top-1 agreement to the full model on held-out documents, for five methods:

- the exits of the shipped balconies
- early exit (the first layers, then the final norm)
- dropping a run of layers in the middle
- merging this run into the layer before it (LaCo: Yang et al., 2024)
- keeping the MLP's most active neurons, fitted by least squares (``balcony-edge cut``)

Only the balconies are trained. With ``--tune-steps`` all methods (the balcony starts fresh) are also shown before and after
the same few documents of distillation.

The last line is JSON: ``tokens``, ``speed`` (cut → parameters, ``tokens_per_s``, ``speedup``), ``quality`` (method →
parameters, ``kl``, ``agreement``).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from balcony_edge.device.machine import cpu_name
from balcony_edge.errors import InputError
from balcony_export.data.documents import read_documents
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer
from balcony_export.model.exits import ExitModel
from balcony_export.variants.cut import narrow
from balcony_export.variants.extract import submodel
from balcony_runtime.engine import Engine
from benchmarks.nvidia.gpu import PROMPT_TOKENS, tokens_per_second
from benchmarks.rounds import Neighbours, interleave, ratio

#: Cut → changes of the demo model's configuration.
CUTS: dict[str, dict[str, int]] = {
    "full": {},
    **{f"depth {layers}": {"num_hidden_layers": layers} for layers in (25, 21, 18, 15, 10)},
    **{f"width: MLP {size}": {"intermediate_size": size} for size in (1152, 768, 576)},
    **{f"width: MLP 576, {heads} heads": {"intermediate_size": 576, "num_attention_heads": heads} for heads in (6, 3)},
}
#: Number of documents for measuring quality, and tokens of each.
DOCUMENTS, DOCUMENT_TOKENS = 24, 128
#: Exit and MLP size of the tuned sub-models, which have about equally many parameters, and their learning rate.
TUNE_EXIT, TUNE_MLP, TUNE_RATE = 17, 576, 2e-4


def export_cut(changes: dict[str, int], directory: Path, context_length: int) -> Path:
    """Export a random model of a cut shape as a bundle."""
    config = copy.deepcopy(load_model(demo_model_path()).config)
    config.head_dim = config.hidden_size // config.num_attention_heads
    for key, value in changes.items():
        setattr(config, key, value)
    if "num_hidden_layers" in changes and getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: changes["num_hidden_layers"]]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = directory / "-".join(f"{key}{value}" for key, value in changes.items() or [("full", 0)])
    options = ExportOptions("cut", trained=False, context_length=context_length)
    export_bundle(ExitModel(model), load_tokenizer(demo_model_path()), path, options)
    return path


def measure_speed(rounds: int, tokens: int) -> dict[str, Any]:
    """Cut → parameters read by a token, tokens a second, speed-up within a round."""
    with tempfile.TemporaryDirectory() as scratch:
        context = max(256, PROMPT_TOKENS + tokens)
        engines = {name: Engine.open(export_cut(changes, Path(scratch), context)) for name, changes in CUTS.items()}
        runs = {
            name: partial(tokens_per_second, engine, engine.exit_layers[-1], 1, tokens)
            for name, engine in engines.items()
        }
        samples = interleave(runs, rounds)
        found = {}
        for name, engine in engines.items():
            graphs = engine.manifest.path_graphs(engine.exit_layers[-1])
            found[name] = {
                "parameters": sum(engine.manifest.runnable[graph].parameters for graph in graphs),
                "tokens_per_s": round(median(samples[name]), 1),
                "speedup": round(ratio(samples[name], samples["full"]), 3),
            }
            engine.close()
        return found


def dropped(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model without the ``count`` layers before the last four, which change the state least."""
    return _without_run(copy.deepcopy(model), count)


def merged(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model with the same layers merged into the layer before them.

    The merged weights are those of that layer plus the difference of each merged layer from it (LaCo).
    """
    small = copy.deepcopy(model)
    layers: Any = small.get_decoder().layers
    last = len(layers) - 4
    into, run = layers[last - count - 1], layers[last - count : last]
    with torch.no_grad():
        base = {name: value.clone() for name, value in into.named_parameters()}
        for layer in run:
            for name, value in layer.named_parameters():
                into.get_parameter(name).add_(value - base[name])
    return _without_run(small, count)


def _without_run(model: PreTrainedModel, count: int) -> PreTrainedModel:
    decoder: Any = model.get_decoder()
    last = len(decoder.layers) - 4
    del decoder.layers[last - count : last]
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(decoder.layers)
    return model


def narrowed(model: PreTrainedModel, size: int, documents: list[list[int]]) -> PreTrainedModel:
    """The model with the ``size`` neurons of every MLP that are most active on the documents: :func:`.cut.narrow`."""
    exits = ExitModel(copy.deepcopy(model))
    narrow(exits, size, documents)
    return exits.model


@torch.no_grad()
def quality(model: PreTrainedModel, small: PreTrainedModel, documents: list[list[int]]) -> dict[str, Any]:
    """Number of parameters, KL and agreement to the full model."""
    kl, agreed, count = 0.0, 0, 0
    for document in documents:
        tokens = torch.tensor([document])
        want, got = (torch.log_softmax(one(tokens, use_cache=False).logits[0].float(), -1) for one in (model, small))
        kl += float((want.exp() * (want - got)).sum())
        agreed += int((want.argmax(-1) == got.argmax(-1)).sum())
        count += len(document)
    return {
        "parameters": sum(p.numel() for p in small.parameters()),
        "kl": round(kl / count, 4),
        "agreement": round(agreed / count, 4),
    }


def tuned(model: PreTrainedModel, small: PreTrainedModel, rows: list[list[int]], steps: int) -> PreTrainedModel:
    """Distil the full model into the small one, a document per step; frozen parameters stay frozen."""
    parameters = [p for p in small.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=TUNE_RATE, weight_decay=0.0)
    small.train()
    for step in range(steps):
        tokens = torch.tensor([rows[step % len(rows)]])
        with torch.no_grad():
            want = torch.log_softmax(model(tokens, use_cache=False).logits[0].float(), -1)
        got = torch.log_softmax(small(tokens, use_cache=False).logits[0].float(), -1)
        loss = (want.exp() * (want - got)).sum(-1)[1:].mean()  # without the first position, an attention sink
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = TUNE_RATE * min(1.0, (step + 1) / 5) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    small.eval()
    return small


def before_tuning(
    model: PreTrainedModel, exit_layer: int, chosen: list[list[int]]
) -> dict[str, Callable[[], PreTrainedModel]]:
    """Method → sub-model of one size before training. In the balcony's sub-model only the balcony is trainable."""
    depth = model.config.num_hidden_layers

    def balcony() -> PreTrainedModel:
        small = submodel(ExitModel.open(model, (exit_layer,)), exit_layer).requires_grad_(False)
        decoder: Any = small.get_decoder()
        decoder.layers[-1].requires_grad_(True)
        decoder.norm.requires_grad_(True)
        return small

    count = depth - exit_layer - 1
    return {
        "balcony": balcony,
        "early exit": partial(submodel, ExitModel(model), exit_layer + 1),
        "drop": partial(dropped, model, count),
        "merge": partial(merged, model, count),
        "MLP": partial(narrowed, model, TUNE_MLP, chosen),
    }


def measure_quality(text: Path, directory: Path, tune_steps: int) -> dict[str, Any]:
    """Method → quality. The first half of the documents is for choosing neurons and tuning, the second for judging."""
    model, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
    documents = islice(read_documents(text), 2 * DOCUMENTS)
    rows = [tokenizer(document.text).input_ids[:DOCUMENT_TOKENS] for document in documents]
    chosen, judged = rows[:DOCUMENTS], rows[DOCUMENTS:]
    if not judged:
        raise InputError(f"{text}: has {len(rows)} documents: give more than {DOCUMENTS}: the later ones are judged")
    exits, bare = ExitModel.open(model, None, directory), ExitModel(model)
    depth = model.config.num_hidden_layers
    small: dict[str, Callable[[], PreTrainedModel]] = {"full": lambda: model}
    for exit_layer in exits.balconies:
        count = depth - exit_layer - 1  # layers that the exit saves
        small[f"balcony {exit_layer}"] = partial(submodel, exits, exit_layer)
        small[f"early exit {exit_layer + 1}"] = partial(submodel, bare, exit_layer + 1)
        small[f"drop {count} layers"] = partial(dropped, model, count)
        small[f"merge {count} layers"] = partial(merged, model, count)
    for size in (1152, 768, 576):
        small[f"MLP {size}"] = partial(narrowed, model, size, chosen)
    found = {}
    for name, make in small.items():
        found[name] = quality(model, make(), judged)
        print(f"{name:<20} {found[name]}", flush=True)
    for name, make in before_tuning(model, TUNE_EXIT, chosen).items() if tune_steps else ():
        for label, steps in (("untrained", 0), (f"{tune_steps} steps", tune_steps)):
            start = make()
            found[f"{name}, {label}"] = quality(model, tuned(model, start, chosen, steps) if steps else start, judged)
            print(f"{name + ', ' + label:<20} {found[f'{name}, {label}']}", flush=True)
    return found


def plot(speed: dict[str, Any], planes: dict[str, Any], output: Path) -> None:
    """Draw both figures next to each other."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only the plot needs it

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, marker in (("depth", "o"), ("width", "s")):
        rows = [speed["full"], *(row for name, row in speed.items() if name.startswith(kind))]
        left.plot(
            [row["parameters"] / 1e6 for row in rows],
            [row["speedup"] for row in rows],
            f"-{marker}",
            label=f"cut in {kind}",
        )
    left.set_xlabel("parameters that a token reads, millions")
    left.set_ylabel("speed-up of decoding")
    left.legend()
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in planes.items():
        if "," in name:
            continue
        groups.setdefault(name.split()[0], []).append(row)
    for kind, rows in groups.items():
        rows.sort(key=lambda row: row["parameters"])
        right.plot([row["parameters"] / 1e6 for row in rows], [row["agreement"] for row in rows], "-o", label=kind)
    right.set_xlabel("parameters, millions")
    right.set_ylabel("same next token as the full model")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to decode; the paper: 2048")
    parser.add_argument(
        "--text", type=Path, help="JSON Lines with a text in each line, not used for training the balconies"
    )
    parser.add_argument("--balconies", type=Path, default=Path("balconies/smollm2-135m-instruct"))
    parser.add_argument(
        "--tune-steps", type=int, default=0, help="also show each method after this many documents of training"
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    neighbours = Neighbours()
    planes = measure_quality(options.text, options.balconies, options.tune_steps) if options.text is not None else {}
    speed = measure_speed(options.rounds, options.tokens)
    for name, row in speed.items():
        print(
            f"{name:<24} {row['parameters'] / 1e6:6.1f} M  {row['tokens_per_s']:7.1f} tokens/s  {row['speedup']:.2f}×"
        )
    document = {"benchmark": "depth_vs_width", "cpu": cpu_name(), "rounds": options.rounds, **neighbours.report()}
    print(json.dumps({**document, "tokens": options.tokens, "speed": speed, "quality": planes}))
    if options.plot is not None:  # last: a picture that cannot be written costs no figures
        plot(speed, planes, options.plot)


if __name__ == "__main__":
    main()
