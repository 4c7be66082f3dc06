"""The paper's limitations (section 6): balconies together with cuts in width, low rank and int4, against each of them alone.

    python -m benchmarks.paper.compression small --data TEXT.jsonl --work DIR [--steps 200] [--threads 1] [--plot FILE]
    python -m benchmarks.paper.compression demo --data TEXT.jsonl --work DIR --steps 16

``small`` is the Llama of :mod:`.ablations`, which is trained on the text first, and whose balconies begin as copies of its last
layer. ``demo`` is SmolLM2-135M-Instruct with the shipped balconies, which are cut with the model and go on learning.

The teacher is always the uncut model, and every method takes the same number of steps in all. A cut backbone is tuned
(``balcony_export.train.tune``) for all of them if it is used alone, and for half of them before balconies learn on it for the
other half. int4 alone is GPTQ without training.

    depth                  balconies on the uncut backbone
    width W, rank R        MLPs of W neurons, or with every matrix as a product of rank R, which reads as many bytes as a width
    int4                   the full depth of the int4 bundle
    int4 + depth           balconies that learn on the rounded backbone; ``depth, then int4``: those of ``depth``, rounded
    width W + depth, width W + int4, width W + int4 + depth

All are exported. KL and agreement to the uncut model and cross-entropy with the text are those of the bundles, on held-out
rows; bytes are what a token reads. Speed is decoding after 32 tokens, in interleaved rounds of all bundles and exits; the uncut
full depth is 1. A method that ``DIR`` has already is not made again, and ``--rounds 0`` leaves speed out.

The last line is JSON: ``model``, ``steps``, ``points``: method → exit → ``bytes``, ``kl``, ``kl_error`` (standard error),
``agreement``, ``cross_entropy``, ``speedup``, ``best`` (no other point reads at most as many bytes at a KL that is at most as
large).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.machine import cpu_name
from balcony_edge.errors import InputError
from balcony_edge.files import write_atomically
from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.evaluate.scorer import BundleScorer, TorchScorer
from balcony_export.evaluate.text import evaluate_text
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, load_balconies
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer, load_trainable, save_checkpoint
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import Scheme
from balcony_export.quantize.gptq import second_moments
from balcony_export.train.config import TrainConfig
from balcony_export.train.trainer import Start, Trainer
from balcony_export.train.tune import RATE, tune
from balcony_export.variants.cut import narrow, round_backbone
from balcony_runtime.engine import Engine
from benchmarks.nvidia.gpu import tokens_per_second
from benchmarks.paper import ablations
from benchmarks.paper.backbones import make_backbone, train_backbone
from benchmarks.rounds import Neighbours, aligned, interleave, ratio

#: Decoded tokens of a round, with the prompt.
TOKENS = 64
FULL = "depth"

Points = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """One bundle: how the backbone is cut, and whether there are exits below the full depth."""

    width: int | None = None
    rank: int | None = None
    int4: bool = False
    depth: bool = False
    learn_first: bool = False  # balconies learn on the float backbone, and everything is rounded afterwards

    @property
    def cut(self) -> bool:
        """Whether the backbone has other shapes than the uncut one."""
        return self.width is not None or self.rank is not None

    def __str__(self) -> str:
        if self.learn_first:
            return "depth, then int4"
        sizes = ("width", self.width), ("rank", self.rank)
        parts = [f"{name} {size}" for name, size in sizes if size is not None]
        parts += [name for name, given in (("int4", self.int4), ("depth", self.depth)) if given]
        return " + ".join(parts)

    def steps(self, total: int) -> tuple[int, int]:
        """Steps in which the cut backbone is tuned, and in which the balconies learn."""
        tuning = 0 if not self.cut else total // 2 if self.depth else total
        return tuning, total - tuning if self.depth else 0


@dataclass
class Subject:
    """A model, its text, and the recipe of its trainings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    exits: tuple[int, ...]
    balconies: Path | None  # to start from; None for copies of the last layer
    widths: tuple[int, ...]
    rank: int
    scheme: Scheme
    tune_rate: float
    recipe: dict[str, Any]  # fields of TrainConfig
    compiled: bool | None = None
    calibration_tokens: int = 8192
    tuned: dict[tuple[Method, int], ExitModel] = field(default_factory=dict)

    @property
    def calibration(self) -> list[list[int]]:
        """The first tokens of the training text, as rows."""
        count = self.calibration_tokens // self.corpus.train.tokens.shape[1]
        rows = self.corpus.train.take(count)
        return [row[:length].tolist() for row, length in zip(rows.tokens, rows.lengths, strict=True)]

    @property
    def judged(self) -> list[tuple[int, ...]]:
        """The held-out rows."""
        held = self.corpus.held_out
        return [tuple(row[:length].tolist()) for row, length in zip(held.tokens, held.lengths, strict=True)]


def methods(widths: tuple[int, ...], rank: int) -> list[Method]:
    """All methods; combinations take the first width, and the second one with int4 as well."""
    first, *others = widths
    return [
        Method(depth=True),
        Method(int4=True, depth=True),
        Method(int4=True, depth=True, learn_first=True),
        *(Method(width=width) for width in widths),
        Method(width=first, depth=True),
        Method(width=first, int4=True),
        Method(width=first, int4=True, depth=True),
        *(Method(width=width, int4=True) for width in others[:1]),
        Method(rank=rank),
    ]


@torch.no_grad()
def factorize(exits: ExitModel, rank: int, rows: list[list[int]]) -> None:
    """Replace every matrix W of the backbone's MLPs by the product of rank ``rank`` whose outputs on the text differ least.

    With the second moments C = L Lᵀ of the inputs, it is the truncated SVD of W L, times the inverse of L.
    """
    moments = second_moments(exits, rows)
    for index, layer in enumerate(exits.parts.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear: nn.Linear = getattr(layer.mlp, name)
            moment = moments[f"layers.{index}.mlp.{name}.weight"].clone()
            moment.diagonal().add_(1e-4 * moment.diagonal().mean())
            root = torch.linalg.cholesky(moment)
            u, s, v = torch.linalg.svd(linear.weight @ root, full_matrices=False)
            inner = nn.Linear(linear.in_features, rank, bias=False)
            outer = nn.Linear(rank, linear.out_features, bias=False)
            inner.weight.copy_(torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False))
            outer.weight.copy_(u[:, :rank] * s[:rank])
            setattr(layer.mlp, name, nn.Sequential(inner, outer))


def learned(subject: Subject, method: Method, steps: int, output: Path) -> ExitModel:
    """The model of a method after its training; balconies are written into ``output``."""
    tuning, learning = method.steps(steps)
    exits = backbone(subject, method, tuning)
    if method.int4 and not method.learn_first:
        round_backbone(exits, subject.scheme, subject.calibration)
    if not method.depth:
        return ExitModel(exits.model)
    started = exits.balconies or init_balconies(exits.model, subject.exits)
    # the paper's loss: cut and tuned models learn by the KL alone, too
    alone = {"state_weight": 0.0} | subject.recipe
    config = TrainConfig(exits=subject.exits, steps=learning, evaluate_every=learning, **alone)
    teacher = subject.model if method.cut or (method.int4 and not method.learn_first) else None
    start = Start(started) if subject.balconies else None
    if not output.exists():
        scratch = output.with_name("unfinished")  # an interrupted training is not taken for a result
        shutil.rmtree(scratch, ignore_errors=True)
        trainer = Trainer(
            copy.deepcopy(exits.model), subject.corpus, config, scratch, start=start, teacher=teacher,
            compiled=subject.compiled,
        )  # fmt: skip
        trainer.run()
        scratch.rename(output)
    return ExitModel(exits.model, load_balconies(output, exits.model))


def backbone(subject: Subject, method: Method, tuning: int) -> ExitModel:
    """The cut backbone, tuned and in floating point, with the balconies to start from if there are any."""
    key = (Method(width=method.width, rank=method.rank), tuning)
    if key not in subject.tuned:
        model = copy.deepcopy(subject.model)
        given = subject.exits if subject.balconies is not None and method.depth else ()
        exits = ExitModel.open(model, given, subject.balconies if given else None)
        if method.width is not None:
            narrow(exits, method.width, subject.calibration)
        if method.rank is not None:
            factorize(exits, method.rank, subject.calibration)
        if method.cut:
            uncut = ExitModel(subject.model)
            rows = subject.recipe["batch_rows"]
            losses = tune(exits, uncut, subject.corpus, tuning, rate=subject.tune_rate, batch_rows=rows)
            print(f"  tuned for {tuning} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
        subject.tuned[key] = exits
    return subject.tuned[key].copy()


def judged(subject: Subject, bundle: Path) -> dict[str, dict[str, Any]]:
    """Exit → bytes that a token reads, and the bundle's quality compared with the uncut model on the held-out rows."""
    reference = TorchScorer(ExitModel(subject.model), subject.tokenizer)
    opened = Bundle.open(bundle, verify_hashes=False)
    with closing(BundleScorer(opened)) as scorer:
        found = evaluate_text(scorer, subject.judged, reference=reference)
    return {
        str(e): {
            "bytes": opened.manifest.bytes_per_token(e),
            "kl": round(quality.kl.value, 4),
            "kl_error": round(quality.kl.stderr or 0.0, 4),
            "agreement": round(quality.agreement.value, 4),
            "cross_entropy": round(math.log(quality.perplexity.value), 4),
        }
        for e, quality in found.items()
    }


def make(subject: Subject, work: Path, steps: int, only: list[str] | None) -> Points:
    """Train, export and judge what ``work`` does not have yet, or ``only`` some methods of it; returns all points.

    Raises:
        InputError: ``only`` names no method, or ``work`` has points of another model, number of steps or text.
    """
    named = {str(method): method for method in methods(subject.widths, subject.rank)}
    if unknown := set(only or ()) - named.keys():
        raise InputError(f"--only {min(unknown)!r}: is not a method: give some of {', '.join(map(repr, named))}")
    record = work / "points.json"
    origin = {"model": fingerprint(subject.model), "steps": steps, "data": subject.corpus.digest}
    made: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"of": origin, "points": {}}
    if made.get("of") != origin:
        raise InputError(
            f"{record}: is of another model, --steps or --data: name another --work, or give the same ones"
        )
    points: Points = made["points"]

    def keep() -> None:
        write_atomically(record, json.dumps(made).encode(), InputError, "name another --work")

    keep()  # now: balconies that a killed run leaves before its first point are also of this origin
    for name, method in named.items():
        if name in points or (only is not None and name not in only):
            continue
        begin = time.monotonic()
        place = work / name.replace(" ", "_").replace(",", "")
        of = work / FULL if method.learn_first else place
        exits = learned(subject, method, steps, of / "balconies")
        options = ExportOptions(name, trained=True, context_length=256)
        if method.int4:
            options = replace(options, precision=subject.scheme, calibration=subject.calibration)
        shutil.rmtree(place / "bundle", ignore_errors=True)  # of a run that was killed before it was judged
        export_bundle(exits, subject.tokenizer, place / "bundle", options)
        points[name] = judged(subject, place / "bundle")
        keep()
        cells = [f"{e}: {p['bytes'] / 1e6:.1f} MB {p['kl']:.3f} {p['agreement']:.1%}" for e, p in points[name].items()]
        print(f"{name:<28} {'  '.join(cells)}  ({time.monotonic() - begin:.0f} s)", flush=True)
    return points


def measure_speed(points: Points, work: Path, rounds: int, threads: int) -> None:
    """Add the speed-up over the uncut full depth to every point: the median over the rounds of the ratio within a round."""
    engines = {
        name: Engine.open(work / name.replace(" ", "_").replace(",", "") / "bundle", threads=threads) for name in points
    }
    runs = {
        (name, e): partial(tokens_per_second, engines[name], int(e), 1, TOKENS) for name in points for e in points[name]
    }
    samples = interleave(runs, rounds)
    uncut = samples[FULL, list(points[FULL])[-1]]
    for (name, e), found in samples.items():
        points[name][e]["speedup"] = round(ratio(found, uncut), 3)
    for engine in engines.values():
        engine.close()


def mark_best(points: Points) -> None:
    """Set ``best``: whether no other point reads at most as many bytes at a KL that is at most as large."""
    flat = [point for exits in points.values() for point in exits.values()]
    for one in flat:
        others = (other for other in flat if (other["bytes"], other["kl"]) != (one["bytes"], one["kl"]))
        one["best"] = not any(other["bytes"] <= one["bytes"] and other["kl"] <= one["kl"] for other in others)


def plot(points: Mapping[str, Mapping[str, Mapping[str, Any]]], output: Path, title: str) -> None:
    """Draw KL over bytes per token, a line for each method."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only the plot needs it

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, exits) in enumerate(points.items()):
        rows = [point for point in exits.values() if point["kl"] > 0]
        axes.plot(
            [row["bytes"] / 1e6 for row in rows],
            [row["kl"] for row in rows],
            "--" if "int4" in name else "-",
            marker="osD^vPX*<>p"[index % 11],
            label=name,
        )
    axes.set_xlabel("bytes that a token reads, MB")
    axes.set_ylabel("KL to the uncut model, nats a token")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(output, dpi=110)


def small(data: Path, work: Path, base_steps: int) -> Subject:
    """The small Llama, trained on the text or read from ``work``."""
    tokenizer = ablations.make_tokenizer(data)
    corpus = build_corpus([data], tokenizer, seq_len=ablations.SEQ_LEN, seed=0, held_out_rows=48)
    if not (work / "model").exists():
        trained = make_backbone("llama")
        print(f"the small model: cross-entropy {train_backbone(trained, corpus, base_steps):.3f}", flush=True)
        save_checkpoint(trained, tokenizer, work / "model")
    recipe = {
        "seq_len": ablations.SEQ_LEN, "batch_rows": ablations.ROWS, "micro_rows": ablations.ROWS, "optimizer": "adamw",
        "rate": 2e-3, "vector_rate": 2e-3, "average": 0.0, "schedule": "cosine", "precision": "fp32", "warmup_steps": 10,
    }  # fmt: skip
    model = load_trainable(work / "model", ablations.SEQ_LEN)
    scheme = Scheme(bits=4, block_size=64, head_bits=4)
    return Subject(
        model, tokenizer, corpus, ablations.EXITS, None, (256, 128), 64, scheme, 1e-3, recipe, compiled=False
    )


def demo(data: Path, balconies: Path) -> Subject:
    """The demo model with its shipped balconies."""
    seq_len = 128
    tokenizer = load_tokenizer(demo_model_path())
    corpus = build_corpus([data], tokenizer, seq_len=seq_len, seed=0, held_out_rows=24)
    recipe = {
        "seq_len": seq_len, "batch_rows": 2, "micro_rows": 2, "optimizer": "adamw", "rate": 3e-4, "vector_rate": 3e-4,
        "average": 0.9, "schedule": "cosine", "warmup_steps": 2, "precision": "fp32", "vocabulary": 4096,
    }  # fmt: skip
    model = load_model(demo_model_path(), attn_implementation="sdpa")
    scheme = Scheme(bits=4, block_size=64, down_block_size=256, head_bits=4)
    return Subject(
        model, tokenizer, corpus, (14, 17, 20), balconies, (1024,), 272, scheme, RATE, recipe, calibration_tokens=4096
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("small", "demo"))
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with a text each, or for demo a directory")
    parser.add_argument("--work", type=Path, required=True, help="directory for models and bundles")
    parser.add_argument("--steps", type=int, default=200, help="steps of every method")
    parser.add_argument("--only", nargs="+", help="methods to make now; default: all")
    parser.add_argument("--base-steps", type=int, default=1200, help="steps of the small model itself")
    parser.add_argument("--balconies", type=Path, default=Path("balconies/smollm2-135m-instruct"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of training, judging and speed")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    record = options.work / "points.json"
    made = json.loads(record.read_text()).get("points", {}) if record.exists() else {}
    if options.rounds and options.only is not None and FULL not in (*options.only, *made):
        parser.error(
            f"--only without {FULL!r}: there is no uncut model to compare speed with: add it, or give --rounds 0"
        )
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    is_small = options.model == "small"
    subject = (
        small(options.data, options.work, options.base_steps) if is_small else demo(options.data, options.balconies)
    )
    points = make(subject, options.work, options.steps, options.only)
    document: dict[str, Any] = {"benchmark": "compression", "model": options.model, "steps": options.steps}
    if options.rounds:
        neighbours = Neighbours()
        measure_speed(points, options.work, options.rounds, options.threads)
        document |= {"cpu": cpu_name(), "rounds": options.rounds, **neighbours.report()}
    mark_best(points)
    table: list[list[Any]] = [["method", "exit", "MB", "speed-up", "KL", "agreement", "cross-entropy", ""]]
    for name, exits in points.items():
        for e, row in exits.items():
            cells = [f"{row['bytes'] / 1e6:.1f}", row.get("speedup", ""), row["kl"], f"{row['agreement']:.1%}"]
            table.append([name, e, *cells, row["cross_entropy"], "best" if row["best"] else ""])
    print("\n".join(aligned(table)))
    print(json.dumps({**document, "points": points}))
    if options.plot is not None:  # last: a picture that cannot be written costs no figures
        plot(points, options.plot, options.model)


if __name__ == "__main__":
    main()
