"""ExitModel: its states and logits are those of transformers, with and without caches, and it leaves no hook behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from balcony_edge.errors import CheckpointError, UnsupportedModelError
from balcony_export.model.architecture import SUPPORTED
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, save_balconies
from balcony_export.model.exits import ExitModel
from tests.conftest import ARCHITECTURES as MODELS
from tests.export.graph.experts import MIXTURES
from tests.support.hybrids import DENSE, HYBRIDS, SIMILAR

TOKENS = torch.tensor([[(7 * i + 3 * j) % 319 + 1 for i in range(20)] for j in range(2)])
ARCHITECTURES = (*DENSE, *HYBRIDS, *SIMILAR)


def test_every_supported_model_has_a_tiny_one_that_the_tests_take() -> None:
    """Messages say that what is not in the list is not covered by parity tests, so what is in it must be."""
    tiny = [config for config, *_ in (*MODELS.values(), *MIXTURES.values())]
    assert {getattr(transformers, config).model_type for config in tiny} == set(SUPPORTED)
    assert set(ARCHITECTURES) == MODELS.keys() - {
        "llama-small-heads"
    }  # Llama again, for the graphs that it does not get


def hooks_of(exits: ExitModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for root in exits.modules for m in root.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(architecture: str, make_tiny: Callable[..., Any]) -> None:
    model = make_tiny(architecture)
    exits = ExitModel(model, init_balconies(model, (2, 4), layer=4))
    wanted = exits.model(TOKENS, output_hidden_states=True, use_cache=False)
    before = hooks_of(exits)  # transformers records hidden states with hooks of its own
    states = exits.run(TOKENS, exits.exit_layers)
    assert exits.exit_layers == (2, 4, 5) and set(states.at) == {2, 4, 5}
    for exit_layer in (2, 4):
        first = 1 if "mamba" in architecture else 0  # whose hidden states begin after the first layer
        assert torch.equal(states.at[exit_layer], wanted.hidden_states[exit_layer - first])
    assert torch.equal(exits.normed(5, states), wanted.hidden_states[-1])
    logits = exits.logits(TOKENS)
    assert list(logits) == [2, 4, 5] and torch.equal(logits[5], wanted.logits)
    # a copy of the last layer after all layers but the last is the full model
    assert torch.equal(logits[4], wanted.logits) and not torch.allclose(logits[2], wanted.logits)
    assert hooks_of(exits) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_arguments_of_a_layer_need_no_pass_through_the_layers(
    architecture: str, make_tiny: Callable[..., Any]
) -> None:
    exits = ExitModel.open(make_tiny(architecture), (2,))
    wanted, before = exits.run(TOKENS[:1], ()).layer_arguments, hooks_of(exits)
    found = exits.layer_arguments(TOKENS.shape[1])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert hooks_of(exits) == before and not any("forward" in vars(layer) for layer in exits.parts.layers)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smollm3", "lfm2", *HYBRIDS])
@torch.no_grad()
def test_passes_with_caches_go_on_where_the_last_one_ended(architecture: str, make_tiny: Callable[..., Any]) -> None:
    exits = ExitModel.open(make_tiny(architecture), (2,))
    caches, rows = (exits.new_cache(), exits.new_cache()), []
    for first, last in ((0, 9), (9, 10), (10, 20)):
        states = exits.run(TOKENS[:, first:last], (2,), caches[0])
        rows.append(exits.head(exits.normed(2, states, caches[1])))
    torch.testing.assert_close(torch.cat(rows, dim=1), exits.logits(TOKENS)[2], rtol=1e-4, atol=1e-4)


def test_a_pass_that_fails_leaves_no_hook(make_tiny: Callable[..., Any]) -> None:
    exits = ExitModel(make_tiny("llama"))
    with pytest.raises(IndexError):
        exits.run(torch.tensor([[10**6]]), (2,))
    assert hooks_of(exits) == 0


def test_a_copy_shares_no_weight(make_tiny: Callable[..., Any]) -> None:
    exits = ExitModel.open(make_tiny("llama"), (2,))
    other = exits.copy()
    other.cast(torch.float16)
    for weight, copied in zip(exits.model.parameters(), other.model.parameters(), strict=True):
        assert weight.dtype == torch.float32 and copied.dtype == torch.float16
    assert other.balconies[2].norm.weight.dtype == torch.float16
    assert exits.parameters_read(5) == other.parameters_read(5) > exits.parameters_read(2) > 0


def test_balconies_come_from_a_directory_or_are_copies(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = make_tiny("llama")
    made = ExitModel.open(model, (2, 3), kind="mlp")
    save_balconies(tmp_path, made.balconies, fingerprint(model))
    assert ExitModel.open(model, None, tmp_path).exit_layers == (2, 3, 5)
    assert ExitModel.open(model, (3,), tmp_path).balconies[3].kind == "mlp"
    assert ExitModel.open(model, None).exit_layers == ExitModel(model).exit_layers == (5,)
    with pytest.raises(CheckpointError, match="has no balcony for exit layer 4"):
        ExitModel.open(model, (4,), tmp_path)
    model.config.model_type = "gpt2"
    with pytest.raises(UnsupportedModelError, match="model type 'gpt2'"):
        ExitModel(model)
