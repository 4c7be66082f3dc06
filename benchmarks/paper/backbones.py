"""Balconies on a dense backbone and on a mixture of experts of the same active size, both trained here from scratch.

    python -m benchmarks.paper.backbones --data TEXT.jsonl [--steps 250] [--threads 1]

A Llama of eight layers and a Mixtral with the same layers are trained on the text for the same number of steps. The Mixtral's
layers have eight experts of half the Llama's MLP, of which two run for each row. Then balconies are trained on each, for half
as many steps: copies of the last layer on the dense model, and on the mixture copies of the last layer with its experts
(``decoder``) and with a dense MLP that begins as the most used experts (``dense``). All exits are scored on the same held-out
rows. The router is trained without an auxiliary loss, so ``busiest`` says how even its choice is.

The last line is JSON: ``steps``, ``seconds``, and ``variants``: name → ``parameters``, ``active`` (parameters that a row reads
at the full depth), ``busiest`` (largest share of a layer's choices that fall on one expert: 0.125 if the choice is even, 0.5 at
most) and ``exits``: exit → ``cross_entropy`` (nats a token), ``kl`` and ``agreement`` to the full depth, ``retention``
(perplexity of the full depth divided by that of the exit).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.model.architecture import parts_of
from balcony_export.model.experts import Use, experts_in, mixture
from benchmarks.paper.ablations import ROWS, SEQ_LEN, SIZES, Scores, distilled, make_tokenizer
from benchmarks.paper.joint import JointConfig, JointTrainer

EXPERTS, CHOSEN = 8, 2
#: Name → kinds of balconies that are trained on the backbone.
KINDS: dict[str, tuple[str, ...]] = {"llama": ("decoder",), "mixtral": ("decoder", "dense")}


def make_backbone(name: str) -> PreTrainedModel:
    """A random model; the experts that run for a row are as wide as the dense model's MLP."""
    torch.manual_seed(0)
    if name == "llama":
        config: Any = transformers.LlamaConfig(**SIZES)
        model: PreTrainedModel = transformers.LlamaForCausalLM(config)
    else:
        width = SIZES["intermediate_size"] // CHOSEN
        mixed = {**SIZES, "intermediate_size": width, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
        config = transformers.MixtralConfig(**mixed, sliding_window=None)
        model = transformers.MixtralForCausalLM(config)
    model.config._attn_implementation = "sdpa"
    return model


def train_backbone(model: PreTrainedModel, corpus: Corpus, steps: int) -> float:
    """Train a model from scratch on the text; returns its held-out cross-entropy, nats a token."""
    trainer = JointTrainer(model, corpus, JointConfig((), "scratch", "none", steps, ROWS, rate=2e-3))
    trainer.run(lambda step, loss, left_s: print(f"  step {step}: {loss:.3f}", flush=True) if step % 50 == 0 else None)
    return trainer.evaluate()[trainer.exits.depth].cross_entropy


@torch.no_grad()
def busiest_share(model: PreTrainedModel, corpus: Corpus) -> float | None:
    """Largest share of the choices of a layer that fall on one expert; None for a dense model."""
    blocks = [layer.mlp for layer in parts_of(model).layers if any(experts_in(layer))]
    if not blocks:
        return None
    uses = [Use(block) for block in blocks]
    model(torch.from_numpy(corpus.held_out.tokens[:16]).long(), use_cache=False)
    for use in uses:
        use.close()
    return max(float(use.rows.max() / use.rows.sum()) for use in uses)


def described(model: PreTrainedModel, busiest: float | None, scores: Scores) -> dict[str, Any]:
    """One entry of the result."""
    sizes = mixture(model.config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for module in experts_in(model) for p in module.parameters())
    idle = 0 if sizes is None else experts * (sizes.experts - sizes.chosen) // sizes.experts
    full = scores[max(scores)].cross_entropy
    exits = {
        str(e): {**asdict(score), "retention": math.exp(full - score.cross_entropy)} for e, score in scores.items()
    }
    return {"parameters": total, "active": total - idle, "busiest": busiest, "exits": exits}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with a text each")
    parser.add_argument("--steps", type=int, default=250, help="steps of the backbones; balconies get half")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.monotonic()
    corpus = build_corpus([options.data], make_tokenizer(options.data), seq_len=SEQ_LEN, seed=0, held_out_rows=48)
    found: dict[str, dict[str, Any]] = {}
    for name, kinds in KINDS.items():
        model = make_backbone(name)
        print(f"{name}: cross-entropy {train_backbone(model, corpus, options.steps):.3f}", flush=True)
        busiest = busiest_share(model, corpus)
        for kind in kinds:
            scores = distilled(model, corpus, max(options.steps // 2, 1), module=kind)
            entry = found[f"{name}, {kind}"] = described(model, busiest, scores)
            cells = [f"{e}: {s['cross_entropy']:.3f} ({s['retention']:.1%})" for e, s in entry["exits"].items()]
            print(f"{name}, {kind:<8} {'  '.join(cells)}", flush=True)
    document = {
        "benchmark": "backbones",
        "steps": options.steps,
        "seconds": round(time.monotonic() - begin),
        "variants": found,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
