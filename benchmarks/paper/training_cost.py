"""Cost of the paper's training runs: FLOPs of a step, counted by PyTorch, and the time that they take on GPUs.

    python -m benchmarks.paper.training_cost [--peak 989] [--utilization 0.4]

The models have shapes and no weights (PyTorch's meta device); passes, products and Muon's orthogonalization run on them under
``torch.utils.flop_counter``, which counts causal attention as a full square. A step is the trainer's: one pass of the frozen
backbone, forward and backward through each balcony, and the LM head for the full model (forward) and for each exit (forward and
backward), on ``--vocabulary`` tokens or all. Time is FLOPs / (peak × utilization); the share of the peak that a GPU reaches is
an assumption, and nothing of this has run on one. It cannot hold for steps of 1,024 tokens, whose launches take longer.

The last line is JSON: ``peak_tflops``, ``utilization``, and for each setting ``gflop_per_token`` (by part), ``tokens``,
``gpu_hours`` and ``days`` on one and on eight GPUs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from balcony_export.model.balcony import init_balconies
from balcony_export.model.exits import call_layer
from balcony_export.train.schedule import OptimizerKind, make_optimizers
from benchmarks.nvidia.gpu import SHAPES

SMALL: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    # the paper's LLM-1B: Llama 3.2 1B, 973M parameters without the token table (Table 4)
    "LLM-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Setting:
    """A training run."""

    shape: dict[str, Any]
    exits: tuple[int, ...]
    rows: int  # of a step
    seq_len: int
    tokens: float
    optimizer: OptimizerKind
    vocabulary: int  # 0: all


SETTINGS = {
    "SmolLM2-135M, our recipe": Setting(SMALL["SmolLM2-135M"], (14, 17, 20), 2, 512, 1e9, "muon", 8192),
    "SmolLM2-135M, 64 sequences a step": Setting(SMALL["SmolLM2-135M"], (14, 17, 20), 64, 512, 1e9, "muon", 8192),
    "LLM-1B, the paper": Setting(SMALL["LLM-1B"], (4, 8, 12), 256, 2048, 15.7e9, "adamw", 0),
    "LLM-1B, 8,192 of the vocabulary": Setting(SMALL["LLM-1B"], (4, 8, 12), 256, 2048, 15.7e9, "adamw", 8192),
    "LLaMA3-8B, the paper": Setting(SHAPES["llama-3-8b"], (15, 18, 21), 256, 4096, 31.5e9, "adamw", 0),
    "LLaMA3-8B, 8,192 of the vocabulary": Setting(SHAPES["llama-3-8b"], (15, 18, 21), 256, 4096, 31.5e9, "adamw", 8192),
}


def gflop_per_token(setting: Setting) -> dict[str, float]:
    """GFLOP of a training token by part: backbone, balconies, heads, optimizer."""
    config = transformers.LlamaConfig(**setting.shape)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        hidden = torch.zeros(1, setting.seq_len, config.hidden_size)
        rotary = model.model.rotary_emb(hidden, torch.arange(setting.seq_len)[None])
        compared = torch.zeros(setting.vocabulary or config.vocab_size, config.hidden_size)
    balcony = init_balconies(model, (1,))[1].requires_grad_(True)
    arguments = {"attention_mask": None, "position_embeddings": rotary}
    exits, row, step = len(setting.exits), setting.seq_len, setting.rows * setting.seq_len
    with FlopCounterMode(display=False) as layer, torch.no_grad():
        call_layer(model.model.layers[-1], hidden, None, rotary, None)
    with FlopCounterMode(display=False) as exit_:
        out = balcony(hidden, **arguments)
        out.backward(torch.zeros_like(out))
    with FlopCounterMode(display=False) as head, torch.no_grad():
        hidden[0] @ compared.T
    with FlopCounterMode(display=False) as optimizer:
        for one in make_optimizers(balcony.parameters(), setting.optimizer, 1e-3, 1e-3, 0.0, torch.float32):
            one.step()
    flops = {
        "backbone": config.num_hidden_layers * layer.get_total_flops() / row,
        "balconies": exits * exit_.get_total_flops() / row,
        "heads": (1 + 2 * exits) * head.get_total_flops() / row,  # an exit's logits, and their gradient in its state
        "optimizer": exits * optimizer.get_total_flops() / step,
    }
    return {part: value / 1e9 for part, value in flops.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of a GPU (an H100's)")
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of the peak that is reached, an assumption"
    )
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        parts = gflop_per_token(setting)
        hours = setting.tokens * sum(parts.values()) * 1e9 / (options.peak * 1e12 * options.utilization) / 3600
        results[name] = {
            "gflop_per_token": {part: round(value, 3) for part, value in parts.items()},
            "tokens": setting.tokens,
            "gpu_hours": round(hours, 1),
            "days": {"1": round(hours / 24, 2), "8": round(hours / 8 / 24, 2)},
        }
        by_part = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        print(f"{name:36} {sum(parts.values()):7.2f} GFLOP a token ({by_part}); {setting.tokens / 1e9:.1f}B tokens:")
        print(f"{'':36} {hours:7.1f} GPU hours, {hours / 24:.1f} days on one GPU, {hours / 8 / 24:.1f} on eight")
    print(
        json.dumps(
            {
                "benchmark": "training_cost",
                "peak_tflops": options.peak,
                "utilization": options.utilization,
                "settings": results,
            }
        )
    )


if __name__ == "__main__":
    main()
