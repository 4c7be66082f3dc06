"""Balconies on a dense backbone, a mixture of experts and two hybrids of about the same active size, trained here from scratch.

    python -m benchmarks.paper.backbones --data TEXT.jsonl [--only llama,lfm2] [--steps 250] [--threads 1]

Each backbone has eight layers and is trained on the text for the same number of steps. Then balconies are trained on it, for
half as many steps, and all exits are scored on the same held-out rows.

    llama     attention and an MLP in every layer
    mixtral   eight experts of half the MLP's width instead of the MLP, of which two run for each row
    lfm2      attention in the third and the sixth layer, convolutions of three rows in the others
    bamba     attention in the third and the sixth layer, Mamba-2's state space in the others

Balconies are copies of the last layer that attends (``decoder``). On the mixture there are also such copies with a dense MLP
that begins as the most used experts (``dense``), and on the hybrids also copies of the last layer, which does not attend
(``decoder, last layer``). The mixture's router is trained without an auxiliary loss, so ``busiest`` says how even its
choice is.

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
from balcony_export.model.balcony import init_balconies
from balcony_export.model.experts import Use, experts_in, mixture
from benchmarks.paper.ablations import EXITS, ROWS, SEQ_LEN, SIZES, Scores, distilled, make_tokenizer
from benchmarks.paper.joint import JointConfig, JointTrainer

EXPERTS, CHOSEN = 8, 2
DEPTH: int = SIZES["num_hidden_layers"]
LAST_LAYER = "decoder, last layer"
#: Name → balconies that are trained on the backbone.
BALCONIES: dict[str, tuple[str, ...]] = {
    "llama": ("decoder",),
    "mixtral": ("decoder", "dense"),
    "lfm2": ("decoder", LAST_LAYER),
    "bamba": ("decoder", LAST_LAYER),
}


def _config(name: str) -> Any:
    """Configuration of a backbone. The experts that run for a row are together as wide as the dense model's MLP."""
    width = SIZES["intermediate_size"]
    if name == "llama":
        return transformers.LlamaConfig(**SIZES)
    if name == "mixtral":
        mixed = {"intermediate_size": width // CHOSEN, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
        return transformers.MixtralConfig(**{**SIZES, **mixed}, sliding_window=None)
    attending = [index for index in range(DEPTH) if index % 3 == 2]
    if name == "bamba":
        inner = {
            "mamba_n_heads": 12,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 32,
        }
        return transformers.BambaConfig(**{**SIZES, **inner}, attn_layer_indices=attending)
    layers = ["full_attention" if index in attending else "conv" for index in range(DEPTH)]
    return transformers.Lfm2Config(**SIZES, layer_types=layers, block_auto_adjust_ff_dim=False, pad_token_id=None)


def make_backbone(name: str) -> PreTrainedModel:
    """A random model, one of :data:`BALCONIES`."""
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(_config(name))
    model.config._attn_implementation = "sdpa"
    return model


def distilled_as(balcony: str, model: PreTrainedModel, corpus: Corpus, steps: int) -> Scores:
    """Scores of all exits after training one of the kinds of balconies in :data:`BALCONIES`."""
    if balcony == LAST_LAYER:
        return distilled(model, corpus, steps, init_balconies(model, EXITS, layer=DEPTH - 1))
    return distilled(model, corpus, steps, module=balcony)


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
    parser.add_argument("--only", default=",".join(BALCONIES), help="backbones, separated by commas; default: all")
    parser.add_argument("--steps", type=int, default=250, help="steps of the backbones; balconies get half")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in BALCONIES]:
        parser.error(f"--only {options.only}: '{unknown[0]}' is not a backbone: give some of {', '.join(BALCONIES)}")
    torch.set_num_threads(options.threads)
    begin = time.monotonic()
    corpus = build_corpus([options.data], make_tokenizer(options.data), seq_len=SEQ_LEN, seed=0, held_out_rows=48)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        model = make_backbone(name)
        print(f"{name}: cross-entropy {train_backbone(model, corpus, options.steps):.3f}", flush=True)
        busiest = busiest_share(model, corpus)
        for balcony in BALCONIES[name]:
            scores = distilled_as(balcony, model, corpus, max(options.steps // 2, 1))
            entry = found[f"{name}, {balcony}"] = described(model, busiest, scores)
            cells = [f"{e}: {s['cross_entropy']:.3f} ({s['retention']:.1%})" for e, s in entry["exits"].items()]
            print(f"{name}, {balcony}: {'  '.join(cells)}", flush=True)
    document = {
        "benchmark": "backbones",
        "steps": options.steps,
        "seconds": round(time.monotonic() - begin),
        "variants": found,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
