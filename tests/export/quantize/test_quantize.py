"""Quantized bundles: grids and packing against ONNX Runtime, GPTQ, verification, schedules, and the choice of a precision."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, CheckpointError, InputError, VerificationError
from balcony_export import precision as precisions
from balcony_export import verify as verify_module
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.graph.ir_tools import MICROSOFT
from balcony_export.model.exits import ExitModel
from balcony_export.precision import CANDIDATES, Judge, QualityBudget, export_within, parse_budget
from balcony_export.quantize import blocks as quantize
from balcony_export.quantize.blocks import Quantizer, Scheme, parse_precision
from balcony_export.quantize.experts import EXPERT_ROWS
from balcony_export.quantize.gptq import calibration_rows, factors_of, round_with_compensation, second_moments
from balcony_export.verify import verify
from balcony_runtime.backends import token_table
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.token_table import TokenTable
from balcony_runtime.engine import Engine
from tests.export.graph.experts import mixture_exits, tiny_mixture


def product(blocks: quantize.Blocks, inputs: int, level: int, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """rows @ weight.T as ONNX Runtime's MatMulNBits computes it."""
    names = ["x", "blocks", "scales", *(["zeros"] if blocks.zeros is not None else [])]
    arrays = [blocks.packed, blocks.scales, *([blocks.zeros] if blocks.zeros is not None else [])]
    values = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", inputs]))]
    for name, array in zip(names[1:], arrays, strict=True):
        values.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    attributes = {
        "K": inputs,
        "N": len(blocks.packed),
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": level,
    }
    node = ir.Node(MICROSOFT, "MatMulNBits", values, ir.convenience.convert_attributes(attributes))
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        values[:1],
        node.outputs,
        nodes=[node],
        initializers=values[1:],
        opset_imports={"": 21, MICROSOFT: 1},
        name="product",
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "product.onnx"
        ir.save(ir.Model(graph, ir_version=10), path)
        (out,) = open_session(path).run(None, {"x": rows})  # on the process's shared pool
    return np.asarray(out)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "block_size"), [(64, 32), (80, 32), (96, 64), (33, 32), (160, 128)])
def test_what_is_packed_is_what_onnx_runtime_multiplies(
    symmetric: bool, bits: Any, inputs: int, block_size: Any
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, inputs, generator=generator)
    blocks = quantize.quantize(weight, bits, block_size, symmetric=symmetric)
    stored = blocks.dequantized(inputs)
    assert stored.shape == (24, inputs)
    # a step of the grid is about a seventh (4 bits) or a 127th of the largest value of a block; half a step is the error
    largest = np.abs(weight.numpy()).max()
    assert np.abs(stored - weight.numpy()).max() <= largest / (6 if bits == 4 else 100)
    rows = torch.randn(5, inputs, generator=generator).numpy()
    wanted = rows @ stored.T
    assert np.abs(product(blocks, inputs, 1, rows) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(product(blocks, inputs, 4, rows) - wanted).max() <= 0.04 * np.abs(wanted).max()


def test_rounding_keeps_what_the_grid_has(tmp_path: Path) -> None:
    integers = torch.arange(-8, 8).repeat(4, 2).float()  # (4, 32): every value of a symmetric 4-bit grid
    blocks = quantize.quantize(integers * 0.25, 4, 32, symmetric=True)
    assert np.array_equal(blocks.dequantized(32), integers.numpy() * 0.25)
    assert blocks.packed[0, 0, :2].tolist() == [0x10, 0x32]  # low bits first
    zeros = quantize.quantize(torch.zeros(2, 32), 4, 32, symmetric=False)
    assert not zeros.dequantized(32).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_of_one_sign_keeps_its_values(sign: int) -> None:
    """Its zero point is among the integers, so its range includes zero: steps of 0.1, whose half is the error."""
    weight = sign * torch.linspace(1, 1.5, 32)[None]
    found = quantize.quantize(weight, 4, 32, symmetric=False).dequantized(32)
    assert np.abs(found - weight.numpy()).max() <= 0.06


@pytest.mark.parametrize("inputs", [128, 96, 256])
def test_gptq_changes_the_outputs_less(inputs: int) -> None:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    sizes = 0.01 * torch.randn(inputs, generator=generator).exp()  # a small scale: damping must follow it
    x = torch.randn(2000, inputs, generator=generator) @ mixing * sizes
    weight = torch.randn(48, inputs, generator=generator)
    moment = x.T @ x / len(x)

    def error(blocks: quantize.Blocks) -> float:
        return float((x @ (torch.from_numpy(blocks.dequantized(inputs)) - weight).T).square().mean())

    nearest, compensated = (
        quantize.quantize(weight, 4, 128, symmetric=True, factors=f) for f in (None, partial(factors_of, moment))
    )
    assert error(compensated) < 0.3 * error(nearest)


def test_gptq_of_inputs_that_do_not_correlate_is_rounding_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(6)
    weight, sizes = torch.randn(8, 96, generator=generator), torch.rand(96, generator=generator)
    values, scales, zeros = round_with_compensation(
        weight, factors_of(sizes.diag()), lambda _: (torch.full((8, 3), 0.3), torch.full((8, 3), 8.0)), levels=16
    )
    assert torch.equal(values, (torch.round(weight / 0.3) + 8).clamp(0, 15))
    assert scales.shape == zeros.shape == (8, 3)


def test_a_grid_serves_the_columns_that_count() -> None:
    weight = torch.tensor([[0.62] * 31 + [8.0]])  # one outlier, whose grid of sixteen values has steps of 1
    moment = torch.tensor([1.0] * 31 + [1e-9]).diag()
    plain, weighed = (
        quantize.quantize(weight, 4, 32, symmetric=True, factors=f) for f in (None, partial(factors_of, moment))
    )
    assert abs(weighed.scales[0, 0]) == pytest.approx(0.62)
    assert abs(plain.scales[0, 0]) > 0.8


def exported(tiny: Any, path: Path, precision: Scheme | Literal["float32", "float16"], **options: Any) -> Path:
    traced = options.pop("traced", tiny.traced)
    wanted = ExportOptions("q", True, precision, **options)
    export_bundle(tiny.exits.copy(), tiny.tokenizer, path, wanted, traced=traced)
    return path


ROWS = [[(7 * i + 13 * j) % 120 + 1 for i in range(48)] for j in range(40)]


#: Architecture → a product of a layer that is not called ``mlp.up_proj``.
_FIRST_PRODUCT = {
    "lfm2": "feed_forward.w3",
    "granite-hybrid": "shared_mlp.input_linear",
    "falcon-h1": "feed_forward.up_proj",
}


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("llama", "int4"),
        ("llama", "int8,asym"),
        ("llama-mha", "int4,asym,block=64,head=4"),
        ("qwen2", "int4,level=1"),
        ("qwen3", "int8,block=128"),
        ("gemma3", "int4,head=4,level=1"),
        ("smollm3", "int4,asym"),
        ("qwen2", "int4,positive,head=4"),
        ("llama", "int8,level=1,kv=8"),
        ("lfm2", "int4,level=1"),
        ("granite-hybrid", "int4,asym"),
        ("falcon-h1", "int4,level=1"),
    ],
)
def test_a_quantized_bundle_is_the_model_with_its_weights_rounded(
    architecture: str,
    precision: str,
    export_tiny: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_table, "RECENT_ROWS", 50)
    source = export_tiny(architecture)
    scheme = parse_precision(precision)
    assert isinstance(scheme, Scheme)
    path = exported(
        source, tmp_path / "bundle", scheme, calibration=ROWS if "sym" in precision or "kv" in precision else ()
    )
    manifest = Bundle.open(path).manifest
    assert manifest.quantization is not None and manifest.precision == f"int{scheme.bits}"
    assert manifest.quantization.method == ("gptq" if "asym" in precision or "kv" in precision else "nearest")
    checks = verify(path, source.exits.copy(), source.tokenizer)
    assert [check for check in checks if not check.passed] == []
    other = source.exits.copy()
    up = _FIRST_PRODUCT.get(architecture, "mlp.up_proj")
    other.parts.layers[1].get_submodule(up).weight.data.neg_()
    with pytest.raises(
        VerificationError, match=rf"layers\.1\.{re.escape(up)}\.weight differs from the model's by 2 of its size"
    ):
        verify(path, other, source.tokenizer)
    phases = {check.phase for check in checks}
    exact = {"prefill", "decode"} if scheme.accuracy_level == 1 else {"prefill, level 1", "decode, level 1"}
    if scheme.kv_bits == 8:
        assert phases == {"prefill, int8 cache", "decode, int8 cache"} and not any(check.exact for check in checks)
        assert max(check.max_difference for check in checks) < 0.05
        decode = verify_module._decode
        with monkeypatch.context() as patch:
            patch.setattr(verify_module, "_decode", lambda *given: decode(*given)[..., ::-1].copy())
            wrong = verify(path, source.exits.copy(), source.tokenizer)
        assert {check.phase for check in wrong if not check.passed} == {"decode, int8 cache"}
    else:
        assert exact <= phases and (scheme.accuracy_level == 1 or "decode, level 4" in phases)
    with Engine.open(path) as apart, Engine.open(path, packed=tmp_path / "packed") as joined:
        sequences = apart.new_sequence(max_length=32), joined.new_sequence(max_length=32)
        for sequence in sequences:
            sequence.advance(apart.exit_layers[-1], [5, 4, 3])
        for index in range(20):
            layer, ids = apart.exit_layers[index // 4 % len(apart.exit_layers)], np.array([index])
            assert np.array_equal(*(sequence.step(layer, ids) for sequence in sequences))
    # the token table gives the values of its blocks, which are near the weights; GPTQ moves single values by some steps
    table = TokenTable(Bundle.open(path))
    wanted = source.model.get_input_embeddings().weight.detach().numpy() * manifest.embedding.scale
    found = table[np.arange(len(wanted))]
    for token in (5, 3, 5, *range(len(wanted))):  # more rows than are kept, some of them twice
        assert np.array_equal(table.row(token), found[token])
    steps = 1 if manifest.quantization.method == "nearest" else 6  # late columns compensate the errors of many
    assert np.abs(found - wanted).max() <= steps * np.abs(wanted).max() / (6 if scheme.head_bits == 4 else 100)
    share = np.abs(found - wanted).mean() / np.abs(wanted).mean()
    assert share <= (0.12 if scheme.head_bits == 4 else 0.01)


@pytest.mark.parametrize("factors", [None, partial(factors_of, torch.eye(64))], ids=["nearest", "gptq"])
def test_scales_above_zero_cost_a_level_and_no_more(factors: Any) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    weight[7] *= 1e-6  # tiny values, whose scale is too small for half precision
    how = {"bits": 4, "size": 32, "symmetric": True, "factors": factors}
    signed, positive = quantize.quantize(weight, **how), quantize.quantize(weight, **how, positive=True)
    assert (signed.scales < 0).any() and (positive.scales >= 2.0**-14 * 0.6).all()
    near, far = (np.abs(blocks.dequantized(64) - weight.numpy()).mean() for blocks in (signed, positive))
    assert near < far < 1.2 * near
    assert not positive.dequantized(64)[7].any()


def test_down_projections_may_have_blocks_of_their_own(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = parse_precision("int4,block=32,down=128")
    assert isinstance(scheme, Scheme) and str(scheme) == "int4,block=32,down=128,sym,head=8,level=4"
    path = exported(tiny, tmp_path / "bundle", scheme)
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    for graph in path.glob("cpu_*.onnx"):
        for node in ir.load(graph).graph:
            if node.op_type == "MatMulNBits":
                sizes["down_proj" in str(node.inputs[1])].add(node.attributes["block_size"].as_int())
    assert sizes == {True: {128}, False: {32}}
    quantization = Bundle.open(path).manifest.quantization
    assert quantization is not None and (quantization.block_size, quantization.down_block_size) == (32, 128)
    # The form at level 1 is linked next to the bundle, and not copied to a disk that may be memory.
    monkeypatch.setattr("shutil.copyfile", lambda *_: pytest.fail("the weights may be as large as the memory"))
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    checks = verify(path, tiny.exits.copy(), tiny.tokenizer)
    assert all(check.passed for check in checks) and [one.name for one in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["llama", "phi3", "arcee"])
def test_every_quantized_weight_has_moments_of_its_inputs(make_tiny: Any, name: str) -> None:
    """Phi-3 has one matrix for several projections, and the MLP of Arcee has no gate."""
    exits = ExitModel.open(make_tiny(name), (2, 3))
    moments = second_moments(exits, ROWS[:4])
    roots: dict[str, Any] = {"": exits.parts.decoder, **{f"balcony_{e}.": one for e, one in exits.balconies.items()}}
    for root, module in roots.items():
        for path, part in module.named_modules():
            assert not isinstance(part, torch.nn.Linear) or f"{root}{path}.weight" in moments
    x = moments["lm_head.weight"]
    assert torch.allclose(x, x.T) and bool((torch.linalg.eigvalsh(x) > -1e-5 * x.diagonal().max()).all())


def test_moments_by_hand(tiny: Any) -> None:
    """Rows larger than the median are scaled down to it, and the first of a text counts as a hundred."""
    exits, seen = tiny.exits.copy(), []
    module = exits.parts.layers[1].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, -2)))
    found = second_moments(exits, ROWS[:2])["layers.1.self_attn.o_proj.weight"]
    handle.remove()
    total = torch.zeros_like(found)
    for given in seen:
        sizes = given.norm(dim=1, keepdim=True)
        x = given * (sizes.median() / sizes).clamp(max=1.0)
        x[0] *= 10
        total += x.T @ x
    torch.testing.assert_close(found, total / sum(map(len, ROWS[:2])), rtol=1e-4, atol=1e-6)


def test_moments_of_experts_by_hand() -> None:
    """As those of other layers: large rows are scaled down, and the first of a text counts as a hundred."""
    exits, seen = mixture_exits("mixtral"), []
    experts = exits.parts.layers[2].get_submodule("mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    random = np.random.default_rng(5)
    moments = second_moments(exits, [random.integers(0, 320, 64).tolist() for _ in range(8)])
    handle.remove()
    for expert in range(8):
        own = []
        for hidden, index in seen:
            sizes = hidden.norm(dim=1, keepdim=True)
            x = hidden * (sizes.median() / sizes).clamp(max=1.0)
            x[0] *= 10
            own.append(x[(index == expert).any(dim=1)])
        x = torch.cat(own)
        found = moments.get(f"layers.2.mlp.experts.gate_up_proj.{expert}")
        assert (found is None) == (len(x) < EXPERT_ROWS)
        if found is not None:
            torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "'int5' is not known"),
        ("int4,block=48", "'block=48' is not known"),
        ("int4,sym,asym", "sym and asym exclude each other"),
        ("int4,asym,positive", "positive and asym exclude each other"),
        ("int4,block=32,head=4,block=128", "'block=128' contradicts an earlier word"),
        ("", "'' is not known"),
    ],
)
def test_precisions_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_precision(text)


def test_text_to_calibrate_on_may_be_short_pieces(tiny: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": "the quick brown fox " * 6}) + "\n" for _ in range(400)))
    rows = calibration_rows([short], tiny.tokenizer)
    assert sum(map(len, rows)) >= 4096 and all(len(row) >= 2 for row in rows)
    short.write_text(json.dumps({"text": "the quick brown fox"}) + "\n" + json.dumps({"text": "the fox jumps"}) + "\n")
    with pytest.raises(InputError, match=r"--calibration: the text has \d+ tokens, but 4096 are needed"):
        calibration_rows([short], tiny.tokenizer)


@pytest.mark.parametrize("where", ["embed", "norm", "balcony"])
def test_a_weight_that_is_not_a_number_is_named(where: str, tiny: Any, tmp_path: Path) -> None:
    model, balconies = copy.deepcopy(tiny.model), copy.deepcopy(tiny.balconies)
    name, parameter = {
        "embed": ("model.embed_tokens.weight", model.model.embed_tokens.weight),
        "norm": ("model.layers.1.input_layernorm.weight", model.model.layers[1].input_layernorm.weight),
        "balcony": ("balcony_3.norm.weight", balconies[3].norm.weight),
    }[where]
    parameter.data.flatten()[3] = float("nan")
    with pytest.raises(CheckpointError, match=f"weight {re.escape(name)}: holds NaN or infinity"):
        options = ExportOptions("q", True, Scheme(), ROWS)
        export_bundle(ExitModel(model, balconies), tiny.tokenizer, tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_lies_about_quantization_is_refused(tiny: Any, tmp_path: Path) -> None:
    path = exported(tiny, tmp_path / "bundle", Scheme())
    with pytest.raises(BundleError, match="has no graphs in standard ONNX: export with fp32"):
        Bundle.open(path).portable()
    manifest = json.loads((path / "bundle.json").read_text())
    for change, message in (
        ({"quantization": None}, "quantization and embedding.blocks must be present"),
        ({"precision": "int8"}, r"quantization.bits = 4 differs from the precision int8"),
        ({"quantization": {**manifest["quantization"], "accuracy_level": 1}}, "the fingerprint differs"),
    ):
        (path / "bundle.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)


def test_the_quality_budget_takes_the_fastest_that_is_good_enough(tiny: Any, tmp_path: Path) -> None:
    documents = {"text.jsonl": [tuple(ROWS[0]), tuple(ROWS[1])]}
    judge = Judge(tiny.exits, tiny.tokenizer, documents, name="tiny")
    kls = []

    def within(limit: float, out: Path, said: list[str]) -> None:
        budget, options = QualityBudget(limit, judge, said.append), ExportOptions("q", trained=True)
        export_within(
            budget, tiny.exits.copy(), tiny.tokenizer, out, options, traced=tiny.traced, progress=lambda *_: None
        )

    for precision in CANDIDATES:
        path = tmp_path / f"{precision}"
        exported(tiny, path, precision)
        quality = judge.measure(path)["text.jsonl"]
        kls.append(quality[5].kl.value)
        kept = Bundle.open(path).manifest.exits[-1].quality
        assert kept is not None and kept.reference == "tiny" and kept.text["text.jsonl"] == quality[5]
    assert kls[-1] < 1e-6 < kls[-2] < kls[0]
    for limit in (kls[0] * 1.01, kls[-2] * 1.01, kls[-2] * 0.5):
        said: list[str] = []
        out = tmp_path / f"chosen-{limit}"
        within(limit, out, said)
        first = next(index for index, kl in enumerate(kls) if kl <= limit)
        assert len(said) == first + 1 and said[-1].startswith(f"{CANDIDATES[first]}: KL")
        manifest = Bundle.open(out).manifest
        wanted = CANDIDATES[first]
        assert manifest.precision == (wanted if isinstance(wanted, str) else f"int{wanted.bits}")
        assert manifest.exits[-1].quality is not None
    # On some processors float32 is the model to the last digit, so nothing above 0 would be out of its reach.
    with pytest.raises(InputError, match=r"--quality-budget kl=-1: float32 itself is .* away because of rounding"):
        within(-1.0, tmp_path / "none", said)
    with pytest.raises(InputError, match=r"--quality-budget kl=0: must be kl= and nats above 0"):
        parse_budget("kl=0")
    with pytest.raises(InputError, match=r"--quality-budget 3: must be kl="):
        parse_budget("3")


def test_the_pieces_of_a_matrix_share_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(moment: torch.Tensor, padding: int) -> Any:
        made.append(padding)
        return factors_of(moment, padding)

    monkeypatch.setattr(quantize, "factors_of", counted)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 48, generator=generator)
    moment, weight = x.T @ x / 200, torch.randn(64, 48, generator=generator)
    whole = Quantizer(Scheme(), {"q": moment, "k": moment}).layer("q", weight.T.numpy())
    monkeypatch.setattr(quantize, "row_pieces", lambda tensor: np.split(tensor.numpy(), 4))
    made.clear()
    quantizer = Quantizer(Scheme(), {"q": moment, "k": moment})
    pieces = quantizer.layer("q", weight.T.numpy())
    quantizer.layer("k", weight.T.numpy())
    assert made == [16] and (pieces.packed == whole.packed).all() and (pieces.scales == whole.scales).all()


def test_a_weight_that_two_graphs_use_is_quantized_once(tiny: Any) -> None:
    quantizer = Quantizer(Scheme())
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    assert quantizer.layer("w", weight) is quantizer.layer("w", weight)


@pytest.mark.parametrize("name", ["mamba2", "falcon-h1"])
def test_products_that_a_balcony_enters_twice_are_quantized(
    name: str, make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """The tracer folds the transposition of a weight with more than 8,192 values only if one product reads it."""
    wide = {"hidden_size": 64, "num_hidden_layers": 2} | (
        {"mamba_d_ssm": 128} if name == "falcon-h1" else {"num_heads": 8}
    )
    exits = ExitModel.open(make_tiny(name, **wide), (1,))
    (layer,) = [module for key, module in exits.balconies[1].named_modules() if key.endswith("in_proj")]
    assert layer.weight.numel() > 8192
    export_bundle(exits, make_tokenizer(), tmp_path / "b", ExportOptions("q", False, Scheme(bits=8)))
    graphs = [ir.load(file).graph for file in sorted((tmp_path / "b").glob("cpu_balcony_1*.onnx"))]
    products = [node for graph in graphs for node in graph if any("in_proj" in str(v and v.name) for v in node.inputs)]
    assert products and {node.op_type for node in products} == {"MatMulNBits"}


@pytest.mark.parametrize(("width", "tried"), [(48, CANDIDATES), (24, ("float32",))])
def test_a_quality_budget_rounds_experts_whose_width_allows_it(
    width: int, tried: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No precision is tried twice, though a mixture of experts may have no dense down projections that tell two apart."""
    alike = {c if isinstance(c, str) else replace(c, down_block_size=None) for c in CANDIDATES}
    assert len(alike) == len(CANDIDATES)
    given: list[Any] = []
    any_: Any = SimpleNamespace(lowered=True)  # nothing looks at the judge and the tokenizer

    def too_far(*arguments: Any, **_: Any) -> None:
        given.append(arguments[3].precision)
        raise precisions._TooFarError(1.0)

    monkeypatch.setattr(precisions, "export_bundle", too_far)
    exits = ExitModel(tiny_mixture("mixtral", intermediate_size=width))
    budget = QualityBudget(1.0, any_, lambda line: None)
    with pytest.raises(InputError, match="float32 itself"):
        export_within(
            budget, exits, any_, tmp_path, ExportOptions("m", trained=True), traced=any_, progress=lambda *_: None
        )
    assert given == list(tried)


def test_rounded_logits_are_compared_by_their_divergence() -> None:
    """The mean over rows of KL(want ‖ got); a constant in all logits changes nothing."""
    want = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], np.float32))
    got = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], np.float32)) + 7
    assert verify_module._kl(got, want) == pytest.approx(0.25 * math.log(2) / 2, rel=1e-5)
