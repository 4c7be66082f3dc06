"""Mixtures of experts: every graph computes what transformers does, whichever router and shared expert the model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import UnsupportedModelError
from balcony_export.export import ExportOptions, Traced, export_bundle, trace
from balcony_export.graph.experts import interleaved, router_operator, separated
from balcony_export.model.balcony import init_balconies
from balcony_export.model.exits import ExitModel
from balcony_export.verify import TOLERANCE, verify
from balcony_runtime.engine import Engine
from tests.conftest import Exported, tiny_tokenizer
from tests.export.experts import MIXTURES, tiny_mixture

EXITS = (2, 3)
PROMPT = "the quick brown fox jumps over the lazy dog and the balcony"


def mixture_exits(name: str, **overrides: Any) -> ExitModel:
    """A tiny mixture with balconies that are unlike its last layer."""
    model = tiny_mixture(name, **overrides)
    balconies = init_balconies(model, EXITS)
    generator = torch.Generator().manual_seed(7)
    for balcony in balconies.values():
        for parameter in balcony.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return ExitModel(model, balconies)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a tiny mixture in float32, once."""
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            exits, tokenizer, options = mixture_exits(name), tiny_tokenizer(), ExportOptions(name, trained=True)
            traced: Traced = trace(exits, options)
            path = tmp_path_factory.mktemp("mixtures") / name
            export_bundle(exits, tokenizer, path, options, traced=traced)
            made[name] = Exported(path, exits, tokenizer, traced)
        return made[name]

    return export


@pytest.mark.parametrize("name", MIXTURES)
def test_every_set_computes_what_the_model_does(mixture: Callable[[str], Exported], name: str) -> None:
    """Prefill and decode, at every exit, in both sets; the full depth is also compared with the model's own forward pass."""
    made = mixture(name)
    checks = verify(made.path, made.exits, made.tokenizer, [PROMPT])
    assert {check.phase.partition(",")[2].strip() for check in checks} == {"", "portable"}
    assert all(check.passed for check in checks), checks
    ids = made.tokenizer(PROMPT).input_ids
    with torch.no_grad():
        want = made.model(torch.tensor([ids])).logits[0].numpy()
    with Engine.open(made.path) as engine:
        got = engine.new_sequence(max_length=len(ids)).advance(4, ids, num_logits=len(ids))[0]
    assert np.abs(got - want).max() <= TOLERANCE["float32"] * np.abs(want).max()


def test_one_operator_for_each_mixture_and_one_copy_of_each_weight(mixture: Callable[[str], Exported]) -> None:
    made = mixture("qwen2-moe")  # every second layer is a mixture, and so are the balconies
    for key, graph in made.traced.lowered.items():
        found = [node.op_type for node in graph.graph if node.op_type == "MoE"]
        assert len(found) == {"stage_0": 1, "stage_1": 0, "stage_2": 1}.get(key, int(key in ("balcony_2", "balcony_3")))
    for graph in made.traced.graphs.values():
        assert {node.domain for node in graph.graph} == {""}
    parameters = {id(p): p.numel() for module in made.exits.modules for p in module.parameters()}
    weights = (made.path / "weights.bin").stat().st_size
    assert weights < 4 * sum(parameters.values()) * 1.01 + 20_000  # 20 kB of rope tables and alignment


def test_a_row_reads_the_chosen_experts_only(mixture: Callable[[str], Exported]) -> None:
    manifest = Bundle.open(mixture("olmoe").path).manifest
    portable, lowered = manifest.graphs["stage_0"], manifest.cpu["stage_0"]
    experts = 2 * 8 * 3 * 32 * 64 * 4  # 2 layers, 8 experts, three matrices of 32 x 64 float32
    assert portable.weight_bytes - lowered.weight_bytes == pytest.approx(experts * 6 / 8, abs=100)
    assert lowered.parameters == pytest.approx(portable.parameters, abs=100)
    assert manifest.bytes_per_token(2) < manifest.bytes_per_token(4)


def test_gate_and_up_rows_alternate_and_come_back() -> None:
    weight = np.arange(2 * 6 * 2, dtype=np.float32).reshape(2, 6, 2)
    mixed = np.asarray(interleaved(weight), np.float32)
    assert mixed[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    np.testing.assert_array_equal(separated(mixed), weight)
