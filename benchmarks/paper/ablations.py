"""The paper's ablations and Table 4 on a small model that is trained here, in an hour or less on two cores.

    python -m benchmarks.paper.ablations --data TEXT.jsonl [--steps 600] [--plot docs/pictures/ablations.png]

A Llama of eight layers (3.5M parameters, a vocabulary of 2,048 made from the text) is trained on the text. Then each variant
is trained on half as many steps: balconies as in the paper; from random weights; only the MLP, the attention or the norm; with
the text as the target (``ce``) and the paper's mix (``kl+ce``); with an unfrozen backbone; sorted fine-tuning. Two variants are
trained from scratch with as many steps as the base model (Table 4): balconies with the averaged loss, and the sorted objective.
Every exit is scored on the same held-out rows: cross-entropy on the text (nats a token), KL and top-1 agreement to the
variant's own full depth.

The last line is JSON: ``steps``, ``parameters``, ``base_cross_entropy``, ``variants`` (name → exit → ``cross_entropy``,
``kl``, ``agreement``), ``seconds``.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.model.balcony import Balcony
from balcony_export.train.config import TrainConfig
from balcony_export.train.trainer import Start, Trainer
from benchmarks.paper.joint import ExitScore, JointConfig, JointTrainer

EXITS = (3, 4, 5)
SEQ_LEN, ROWS = 128, 8
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
#: Variant → changes of the recipe of the paper's balconies.
FROZEN: dict[str, dict[str, Any]] = {
    "balcony (decoder, from the last layer, KL, frozen)": {},
    "random initialisation": {"start": "random"},
    "MLP alone": {"module": "mlp"},
    "attention alone": {"module": "attention"},
    "norm alone (early exit)": {"module": "none"},
    "cross-entropy": {"loss": "ce"},
    "KL + cross-entropy": {"loss": "kl+ce"},
}

Scores = dict[int, ExitScore]


def make_tokenizer(data: Path) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in data.open(encoding="utf-8")), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def joint(
    model: PreTrainedModel, corpus: Corpus, objective: Any, steps: int, balconies: dict[int, Balcony] | None = None
) -> JointTrainer:
    """Train backbone and exits together; with ``steps`` 0 the trainer only scores."""
    module: Any = "none" if objective == "sorted" else "decoder"
    config = JointConfig(EXITS, objective, module, max(steps, 1), ROWS, rate=2e-3)
    trainer = JointTrainer(model, corpus, config, balconies)
    if steps:
        trainer.run()
    return trainer


def distilled(
    base: PreTrainedModel, corpus: Corpus, steps: int, balconies: dict[int, Balcony] | None = None, **changes: Any
) -> Scores:
    """Balconies on the frozen base model: AdamW and the paper's cosine, at a rate that suits a small model.

    Args:
        base: The base model, which stays as it is.
        corpus: Rows to train on and held-out rows.
        steps: Number of steps.
        balconies: Untrained balconies; by default those of the recipe.
        changes: Changes of the recipe.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "optimizer": "adamw",
            "rate": 2e-3,
            "vector_rate": 2e-3,
            "average": 0.0,
            "schedule": "cosine",
            "precision": "fp32",
            "state_weight": 0.0,
            **changes,
        }
        config = TrainConfig(
            exits=EXITS, steps=steps, seq_len=SEQ_LEN, batch_rows=ROWS, micro_rows=ROWS, positions=0,
            warmup_steps=max(steps // 20, 1), evaluate_every=steps, **options,
        )  # fmt: skip
        start = Start(balconies) if balconies else None
        trainer = Trainer(copy.deepcopy(base), corpus, config, Path(scratch), start=start, compiled=False)
        trainer.run()
        return joint(trainer.exits.model, corpus, "unfrozen", 0, trainer.balconies).evaluate()


def variants(base: PreTrainedModel, corpus: Corpus, steps: int) -> dict[str, Callable[[], Scores]]:
    """Variant → function that gives its scores; ``steps`` is the length of the base model's training."""
    half = max(steps // 2, 1)
    runs: dict[str, Callable[[], Scores]] = {
        name: lambda changes=changes: distilled(base, corpus, half, **changes)  # type: ignore[misc]
        for name, changes in FROZEN.items()
    }
    runs["unfrozen backbone"] = lambda: joint(copy.deepcopy(base), corpus, "unfrozen", half).evaluate()
    runs["sorted fine-tuning"] = lambda: joint(copy.deepcopy(base), corpus, "sorted", half).evaluate()
    runs["from scratch: balconies"] = lambda: joint(copy.deepcopy(base), corpus, "scratch", steps).evaluate()

    def sorted_from_scratch() -> Scores:
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        model.apply(model._init_weights)
        return joint(model, corpus, "sorted", steps).evaluate()

    runs["from scratch: sorted"] = sorted_from_scratch
    return runs


def plot(found: dict[str, Scores], output: Path) -> None:
    """Draw the cross-entropy of every exit and the full depth, a line for each variant."""
    from matplotlib import color_sequences  # noqa: PLC0415 - only the plot needs it
    from matplotlib.figure import Figure  # noqa: PLC0415 - likewise

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    depths = list(next(iter(found.values())))
    # each line has its own colour and marker; later markers are smaller, so that equal lines are both visible
    colors = color_sequences["tab20"]
    for index, (name, scores) in enumerate(found.items()):
        style = "-" if index == 0 else ("--" if index < len(FROZEN) else ":")
        axes.plot(
            depths,
            [scores[depth].cross_entropy for depth in depths],
            style,
            color=colors[(2 * index + 2 * index // len(colors)) % len(colors)],
            marker="osD^vPX*<>p"[index % 11],
            markersize=11 - 0.6 * index,
            linewidth=2.5 if index == 0 else 1.3,
            label=name,
        )
    axes.set_xlabel("exit layer (the last is the full depth)")
    axes.set_ylabel("held-out cross-entropy, nats a token")
    axes.set_xticks(depths)
    figure.legend(fontsize=8, loc="outside right center")  # inside the axes it would hide lines
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with a text each")
    parser.add_argument("--steps", type=int, default=600, help="steps of the base model; variants get half")
    parser.add_argument("--only", nargs="+", help="variants to run")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    begin = time.monotonic()
    tokenizer = make_tokenizer(options.data)
    corpus = build_corpus([options.data], tokenizer, seq_len=SEQ_LEN, seed=0, held_out_rows=48)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = "sdpa"
    base = transformers.LlamaForCausalLM(config)
    runs = variants(base, corpus, options.steps)
    if unknown := set(options.only or ()) - set(runs):
        parser.error(f"--only {sorted(unknown)[0]!r}: is not a variant: give some of {', '.join(map(repr, runs))}")
    depth = SIZES["num_hidden_layers"]
    # the base model: the averaged loss over a single sub-model, the model itself
    alone = JointTrainer(base, corpus, JointConfig((), "scratch", "none", options.steps, ROWS, rate=2e-3))
    alone.run()
    found: dict[str, Scores] = {}
    print(f"base model: cross-entropy {alone.evaluate()[depth].cross_entropy:.3f}", flush=True)
    for name, run in runs.items():
        if options.only and name not in options.only:
            continue
        found[name] = run()
        cells = "  ".join(f"{e}: {s.cross_entropy:.3f} ({s.agreement:.0%})" for e, s in found[name].items())
        print(f"{name:<52} {cells}", flush=True)
    document = {
        "benchmark": "ablations",
        "steps": options.steps,
        "parameters": sum(p.numel() for p in base.parameters()),
        "base_cross_entropy": alone.evaluate()[depth].cross_entropy,
        "variants": {name: {str(e): asdict(score) for e, score in scores.items()} for name, scores in found.items()},
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(document))
    if options.plot is not None:  # last: a picture that cannot be written costs no figures
        plot(found, options.plot)


if __name__ == "__main__":
    main()
