"""Second moments for GPTQ by hand: of the LM head's inputs at every exit, and of both matrices of an expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from balcony_export.quantize.experts import EXPERT_ROWS
from balcony_export.quantize.gptq import second_moments
from tests.export.graph.experts import mixture_exits


def limited(x: torch.Tensor) -> torch.Tensor:
    """Rows larger than the median, scaled down to it  # (n, K)"""
    sizes = x.norm(dim=1, keepdim=True)
    return x * (sizes.median() / sizes).clamp(max=1.0)


@torch.no_grad()
def test_the_head_has_the_inputs_of_every_exit(tiny: Any) -> None:
    rows = [[(7 * i + 13 * j) % 120 + 1 for i in range(48)] for j in range(2)]
    exits = tiny.exits.copy()
    total, count = torch.zeros(32, 32), 0
    for row in rows:
        states = exits.run(torch.tensor([row]), exits.exit_layers)
        for exit_layer in exits.exit_layers:
            x = limited(exits.normed(exit_layer, states)[0])
            x[0] *= 10
            total, count = total + x.T @ x, count + len(x)
    torch.testing.assert_close(second_moments(exits, rows)["lm_head.weight"], total / count, rtol=1e-4, atol=1e-5)


def test_no_position_is_after_the_context(tiny: Any) -> None:
    """Nobody has trained the model there. Rows of text have 512 tokens, and small models take 256 or 128."""
    row, longest = [(7 * i) % 120 + 1 for i in range(400)], tiny.model.config.max_position_embeddings
    found, wanted = (second_moments(tiny.exits, [one])["lm_head.weight"] for one in (row, row[:longest]))
    assert longest < len(row) and torch.equal(found, wanted)


@torch.no_grad()
def test_an_expert_has_the_inputs_of_its_own_rows() -> None:
    """Its down projection takes what its own gate lets through, of the rows as the model has them."""
    exits, seen, random = mixture_exits("mixtral"), [], np.random.default_rng(5)
    experts: Any = exits.parts.layers[2].get_submodule("mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    moments = second_moments(exits, [random.integers(0, 320, 64).tolist() for _ in range(8)])
    handle.remove()
    found = 0
    for expert in range(8):
        parts: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for hidden, index in seen:
            chosen = (index == expert).any(dim=1)
            if not chosen.any():
                continue
            factor = torch.ones(len(hidden), 1)
            factor[0] = 10
            gate, up = (hidden[chosen] @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
            parts["gate_up_proj"].append((limited(hidden) * factor)[chosen])
            parts["down_proj"].append(limited(torch.nn.functional.silu(gate) * up) * factor[chosen])
        for name, rows in parts.items():
            x = torch.cat(rows)
            if len(x) >= EXPERT_ROWS:
                found += 1
                moment = moments[f"layers.2.mlp.experts.{name}.{expert}"]
                torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
    assert found
