"""A bfloat16 model exports to the same bytes as in float32, without being converted to float32 in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.errors import CheckpointError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.graph import widen
from balcony_export.model.architecture import cast_weights, parts_of
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, load_balconies, save_balconies
from balcony_export.model.checkpoint import load_model
from balcony_export.model.exits import ExitModel
from balcony_export.quantize import blocks
from balcony_export.quantize.blocks import parse_precision
from balcony_export.tensorrt.integers import Rounding, _int4, _quantized


def exported(model: Any, tokenizer: Any, path: Path, precision: str) -> dict[str, bytes]:
    options = ExportOptions("x", trained=False, precision=parse_precision(precision))
    export_bundle(ExitModel.open(model, (1,)), tokenizer, path, options)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("gemma3", "fp32"),
        ("qwen2", "int4,asym"),
        pytest.param("llama", "fp32", marks=pytest.mark.deep),
        pytest.param("llama", "int8", marks=pytest.mark.deep),
    ],
)
def test_the_bytes_are_those_of_the_widened_model(
    architecture: str,
    precision: str,
    make_tiny: Any,
    make_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 2}
    if architecture == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    narrow, wide = (make_tiny(architecture, **sizes) for _ in range(2))
    for model, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        for parameter in model.parameters():  # not the buffers, which a checkpoint does not have
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    wanted = exported(wide, make_tokenizer(), tmp_path / "wide", precision)
    before = {name: (id(weight), weight.clone()) for name, weight in narrow.named_parameters()}
    monkeypatch.setattr(widen, "PIECE_BYTES", 1000)  # every weight in several pieces
    monkeypatch.setattr(widen, "SMALL", 1024)  # every matrix is reserved memory, so its trace is its own
    assert exported(narrow, make_tokenizer(), tmp_path / "narrow", precision) == wanted
    assert MANIFEST in wanted
    after = dict(narrow.named_parameters())
    assert after.keys() == before.keys()  # the model is as it was
    for name, (identity, weight) in before.items():
        assert id(after[name]) == identity and after[name].dtype == torch.bfloat16 and torch.equal(after[name], weight)


def test_a_transposed_view_is_found_by_its_address(monkeypatch: Any) -> None:
    monkeypatch.setattr(widen, "SMALL", 8)
    linear = torch.nn.Linear(6, 6, dtype=torch.bfloat16)  # square, so the shape does not show a transposition
    with widen.stand_ins([linear], torch.float32) as weights:
        array = linear.weight.detach().numpy()
        values = [ir.Value(name=name, const_value=ir.tensor(view)) for name, view in (("a", array), ("b", array.T))]
        model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=11)
        widen.widen([model], weights, torch.float32)
    exact = linear.weight.detach().float().numpy()
    for value, wanted in zip(values, (exact, exact.T), strict=True):
        tensor = value.const_value
        assert isinstance(tensor, widen.Widened)
        assert np.array_equal(tensor.numpy(), wanted)
        assert np.array_equal(np.concatenate(list(widen.row_pieces(tensor))), wanted)


def test_a_matrix_that_tracing_computes_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(widen, "SMALL", 8)
    linear = torch.nn.Linear(6, 4, dtype=torch.bfloat16)
    with widen.stand_ins([linear], torch.float32) as weights:
        with np.errstate(invalid="ignore"):  # a stand-in may hold anything
            value = ir.Value(name="layers.0.sum", const_value=ir.tensor(linear.weight.detach().numpy() + 1))
        model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], name="g"), ir_version=11)
        words = r"weight layers\.0\.sum: tracing computes it .* load it in float32 \(export without --no-verify\)"
        with pytest.raises(CheckpointError, match=words):
            widen.widen([model], weights, torch.float32)


def test_multipliers_of_a_half_precision_checkpoint_are_not_rounded(make_tiny: Any, tmp_path: Path) -> None:
    """Falcon-H1's are made in the type in which the weights are loaded; the export computes in float32."""
    multipliers = [0.35355, 0.25, 0.1767, 0.5, 0.3333]
    make_tiny("falcon-h1", ssm_multipliers=multipliers).to(torch.bfloat16).save_pretrained(tmp_path)
    kept, whole = (parts_of(load_model(tmp_path, keep_dtype=keep)).layers[0].mamba for keep in (True, False))
    assert kept.in_proj.weight.dtype == torch.bfloat16
    assert kept.mup_vector.dtype == torch.float32 and torch.equal(kept.mup_vector, whole.mup_vector)
    assert set(kept.mup_vector.flatten().tolist()) == {float(np.float32(value)) for value in multipliers}


def test_multipliers_of_balconies_that_are_loaded_in_half_precision_are_not_rounded(
    make_tiny: Any, tmp_path: Path
) -> None:
    model = make_tiny("falcon-h1", ssm_multipliers=[0.35355, 0.25, 0.1767, 0.5, 0.3333])
    save_balconies(tmp_path, init_balconies(model, (2,)), fingerprint(model))
    cast_weights(model, torch.bfloat16)
    loaded = load_balconies(tmp_path, model)[2].layer.mamba
    assert loaded.in_proj.weight.dtype == torch.bfloat16 and loaded.mup_vector.dtype == torch.float32
    assert torch.equal(loaded.mup_vector, parts_of(model).layers[-1].mamba.mup_vector)


@pytest.mark.parametrize("turned", [False, True])
def test_engines_round_a_large_matrix_in_pieces(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding takes several times the size of what it is given, and a head of 128,256 x 4,096 has 2 GB."""
    array = np.random.default_rng(4).normal(size=(64, 64)).astype(np.float32)
    rows, sizes, quantize = array.T if turned else array, [], blocks.quantize
    whole = _int4("w", rows, 32)

    def counted(weight: torch.Tensor, *given: Any, **options: Any) -> Any:
        sizes.append(len(weight))
        return quantize(weight, *given, **options)

    monkeypatch.setattr(blocks, "quantize", counted)
    monkeypatch.setattr(widen, "PIECE_BYTES", 20 * 64 * 4)
    pieces = _int4("w", rows, 32)
    assert sizes == [20, 20, 20, 4]
    for one, other in zip(whole, pieces, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_engines_round_to_the_nearest_of_the_whole_range(precision: Any, rows_first: bool) -> None:
    """The largest weight of an output is the largest number of the type; the others are half a step away at most."""
    rows = (np.random.default_rng(5).normal(size=(24, 64)) * np.arange(1, 25)[:, None]).astype(np.float32)
    values, scales, attributes = _quantized("w", rows if rows_first else rows.T, rows_first, precision, Rounding(32))
    assert attributes == {"axis": 0 if rows_first else 1} and scales.shape == (24,)
    found = (values if rows_first else values.T).astype(np.float32)
    assert (np.abs(found).max(axis=1) == (127 if precision == "int8" else 448)).all()
    # fp8 has three bits after the leading one, and steps of 2**-9 below its normal numbers
    steps = np.ones_like(found) if precision == "int8" else np.maximum(np.abs(rows / scales[:, None]) / 8, 2.0**-9)
    assert (np.abs(found - rows / scales[:, None]) <= 0.501 * steps).all()
