"""Mixtures of experts: every graph computes what transformers does, whichever router and shared expert the model has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError, MissingDependencyError, UnsupportedModelError, VerificationError
from balcony_export.data.corpus import Corpus, Rows
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.graph.experts import interleaved, router_operator, separated, symbolic_experts
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import fingerprint, load_balconies, save_balconies
from balcony_export.model.exits import ExitModel
from balcony_export.model.experts import Use, dense_from, experts_in
from balcony_export.quantize.blocks import Quantizer, parse_precision
from balcony_export.quantize.experts import EXPERT_ROWS, _block_size
from balcony_export.quantize.gptq import second_moments
from balcony_export.tensorrt.graphs import Format
from balcony_export.train.config import TrainConfig
from balcony_export.train.trainer import Trainer
from balcony_export.variants.extract import submodel
from balcony_export.verify import TOLERANCE, reference_logits, verify
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.shared_step import PoolMove
from tests.conftest import Exported, tiny_tokenizer
from tests.export.graph.experts import MIXTURES, mixture_exits, tiny_mixture
from tests.runtime.backends.test_conformance import BACKENDS
from tests.support.engine_sets import write_graphs
from tests.support.pools import check_step, new_pool
from tests.support.schedules import check_schedules

pytestmark = pytest.mark.model

EXITS = (2, 3)
PROMPT = "the quick brown fox jumps over the lazy dog and the balcony"


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mixtral", "int4"),
        ("qwen2-moe", "int4,asym,block=64"),  # a router without shares, a shared expert, blocks halved to 32
        ("granite-moe-shared", "int8"),
        ("qwen3-moe", "int4,level=1,positive"),
        ("lfm2-moe", "int4,level=1"),  # a router that chooses by sigmoids and biases
    ],
)
def test_quantized_experts_compute_with_what_they_store(
    mixture: Callable[[str], Exported], name: str, text: str, tmp_path: Path
) -> None:
    """Verification compares with the stored weights: exactly at level 1, statistically at level 4."""
    made = mixture(name)
    options = ExportOptions(name, trained=True, precision=parse_precision(text))
    export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)
    checks = verify(tmp_path / "b", made.exits, made.tokenizer, [PROMPT])
    assert all(check.passed for check in checks), checks
    levels = {check.phase.partition(", ")[2] for check in checks} - {"", "portable"}
    assert levels == (set() if "level=1" in text else {"level 4"} if text == "int8" else {"level 1", "level 4"})
    bundle = Bundle.open(tmp_path / "b")
    nodes = [node for graph in bundle.manifest.cpu.values() for node in ir.load(bundle.file(graph.file)).graph]
    assert {node.op_type for node in nodes} >= {"QMoE", "MatMulNBits", "MatMul"}  # the routers are float32
    assert not [node for node in nodes if node.op_type == "MoE"]
    quantized, plain = bundle.manifest.cpu["stage_1"], Bundle.open(made.path).manifest.cpu["stage_1"]
    assert quantized.parameters == pytest.approx(plain.parameters, rel=0.01)
    assert quantized.weight_bytes < 0.5 * plain.weight_bytes


def test_verification_of_quantized_experts_names_another_model(
    mixture: Callable[[str], Exported], tmp_path: Path
) -> None:
    made = mixture("mixtral")
    options = ExportOptions("m", trained=True, precision=parse_precision("int4"))
    export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)
    other = made.exits.copy()
    other.parts.layers[0].mlp.experts.down_proj.data[3] *= -4
    with pytest.raises(VerificationError, match=r"layers\.0\.mlp\.experts\.down_proj differs"):
        verify(tmp_path / "b", other, made.tokenizer, [PROMPT])


def test_an_engine_that_cannot_check_quantized_experts_is_refused_before_the_work(
    mixture: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mixture("mixtral")
    options = ExportOptions("m", trained=True, precision=parse_precision("int4"))
    monkeypatch.setattr("onnxruntime.__version__", "1.30.2")
    with pytest.raises(MissingDependencyError, match=r"1\.30\.2 is too old: bundles with quantized experts need 1\.31"):
        export_bundle(
            made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced, check=lambda _: pytest.fail("late")
        )

    def late(*_: object) -> None:
        pytest.fail("late")

    monkeypatch.setattr("balcony_export.export._quantize_caches", late)
    options = ExportOptions("m", trained=True, precision=parse_precision("int4,kv=8"))
    with pytest.raises(MissingDependencyError, match="quantized experts"):  # its keys and values cannot be measured
        export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)


def test_what_quantized_experts_cannot_be_is_refused(mixture: Callable[[str], Exported], tmp_path: Path) -> None:
    made = mixture("mixtral")
    options = ExportOptions("m", trained=True, precision=parse_precision("int8,level=1"))
    with pytest.raises(InputError, match="8-bit experts to int8 at every level: give level=4"):
        export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)
    assert _block_size(128, [64, 96]) == 32
    assert not (tmp_path / "b").exists()


def test_experts_that_cannot_be_rounded_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration runs every expert on all of its text."""
    monkeypatch.setattr("balcony_export.export.second_moments", lambda *_: pytest.fail("late"))
    exits = ExitModel(tiny_mixture("mixtral", intermediate_size=24))
    options = ExportOptions("m", trained=True, precision=parse_precision("int4"), calibration=[[1, 2, 3]])
    with pytest.raises(InputError, match=r"--precision int4.*multiples of 16, .* export with fp32"):
        export_bundle(exits, tiny_tokenizer(), tmp_path / "b", options)


def test_gptq_measures_each_expert_on_its_own_rows() -> None:
    exits = mixture_exits("mixtral")
    random = np.random.default_rng(5)
    rows = [random.integers(0, 320, 64).tolist() for _ in range(8)]
    moments = second_moments(exits, rows)
    name = "layers.2.mlp.experts"
    seen: dict[int, int] = {}

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        for expert in inputs[1].flatten().tolist():
            seen[expert] = seen.get(expert, 0) + 1

    handle = exits.parts.layers[2].mlp.experts.register_forward_pre_hook(count)
    with torch.no_grad():
        for row in rows:
            exits.run(torch.tensor([row]), ())
    handle.remove()
    for expert in range(8):
        assert (f"{name}.gate_up_proj.{expert}" in moments) == (seen[expert] >= EXPERT_ROWS)
    assert len({seen[expert] >= EXPERT_ROWS for expert in range(8)}) == 2, seen  # both sides of the rule occur
    expert = max(seen, key=lambda one: seen[one])
    assert moments[f"{name}.down_proj.{expert}"].shape == (32, 32)
    quantizer = Quantizer(parse_precision("int4"), moments)
    weight = exits.parts.layers[2].mlp.experts.down_proj.detach()
    blocks = quantizer.experts(f"{name}.down_proj", ir.tensor(weight.numpy()), 32).dequantized(32).reshape(8, 64, 32)
    nearest = Quantizer(parse_precision("int4")).experts("n", ir.tensor(weight.numpy()), 32)
    rounded = nearest.dequantized(32).reshape(8, 64, 32)

    def error(found: np.ndarray[Any, Any], which: int) -> float:
        far = torch.from_numpy(found[which]) - weight[which]
        return float(torch.einsum("nk,kl,nl->", far, moments[f"{name}.down_proj.{which}"], far))

    assert error(blocks, expert) < 0.9 * error(rounded, expert)
    unseen = min(seen, key=lambda one: seen[one])
    np.testing.assert_array_equal(blocks[unseen], rounded[unseen])


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize("name", ["qwen2-moe", "granite-moe-shared"])
@pytest.mark.parametrize("backend", ["packed", "device-fused", "device-plain"])
def test_any_schedule_of_exits_equals_a_pass_from_scratch(
    mixture: Callable[[str], Exported], name: str, backend: str, tmp_path: Path
) -> None:
    """Over packed weights, and over the graphs for TensorRT, which ONNX Runtime runs here."""
    path = Path(shutil.copytree(mixture(name).path, tmp_path / "bundle"))
    if backend == "device-fused":
        write_graphs(Bundle.open(path), "rtx-fp32", "rtx", Format("fp32", "fused", 256))
    elif backend == "device-plain":
        write_graphs(Bundle.open(path), "tensorrt-fp32-plain", "tensorrt", Format("fp32", "plain", 256))
    bundle = Bundle.open(path)
    with Engine.of(bundle.portable()) as reference, BACKENDS[backend](bundle) as engine:
        check_schedules(reference, engine, 5)


@pytest.mark.parametrize("name", ["qwen2-moe", "granite-moe", "lfm2-moe"])
def test_tensorrt_graphs_round_no_product_that_decides(
    mixture: Callable[[str], Exported], name: str, tmp_path: Path
) -> None:
    """Routers, with and without biases, and the gate of a shared expert."""
    path = Path(shutil.copytree(mixture(name).path, tmp_path / "bundle"))
    write_graphs(Bundle.open(path), "set", "rtx", Format("int8", "fused", 256))
    whole, rounded = (
        {one.name for one in onnx.load(path / place / "backbone.onnx").graph.initializer}
        for place in ("", "tensorrt/set")
    )
    deciding = {one for one in whole if one.endswith(("gate.weight", "router.weight"))}
    assert deciding and deciding <= rounded, "in their own precision"
    assert any(one.endswith("_proj.weight.int8") for one in rounded)


@pytest.mark.parametrize("precision", ["fp32", "int4,level=1"])
def test_batches_of_different_lengths(mixture: Callable[[str], Exported], precision: str, tmp_path: Path) -> None:
    """Several sequences in one pass give what each gives alone, whichever experts the others choose."""
    made = mixture("qwen3-moe")
    options = ExportOptions("b", trained=True, precision=parse_precision(precision))
    export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)
    random = np.random.default_rng(4)
    with Engine.open(tmp_path / "b") as engine:
        pool = new_pool(engine)
        members = []
        for count in (5, 17, 30, 8, 9):
            member = pool.take()
            assert member is not None
            member.advance(4, random.integers(0, 320, count))
            members.append(member)
        for exits in ((2, 3, 4, 4, 4), (4, 4, 4, 4, 4), (3, 2, 2, 2, 4)):
            moves = [
                PoolMove(member, exit_layer, int(random.integers(320)))
                for member, exit_layer in zip(members, exits, strict=True)
            ]
            check_step(engine, pool, moves)
        pool.close()


def test_a_dense_balcony_begins_as_the_most_used_experts() -> None:
    """With the routing fixed to its experts, a mixture and the dense MLP that comes from it compute the same."""
    model = tiny_mixture("qwen2-moe")
    (balcony,) = init_balconies(model, (2,), "dense").values()
    assert balcony.kind == "dense" and balcony.keeps_rows and not any(experts_in(balcony))
    dense = balcony.layer.mlp
    assert dense.gate_proj.weight.shape == (2 * 32 + 48, 64)  # two experts and the shared one
    block = model.model.layers[-1].mlp
    use = Use(block)
    use.rows += 4.0
    use.weights[3], use.weights[6] = 2.0, 1.0
    use.shared.append(0.25)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = dense_from(block, use, 2)(x)
        index = torch.tensor([[3, 6]] * 5)
        want = block.experts(x, index, torch.tensor([[0.5, 0.25]] * 5)) + 0.25 * block.shared_expert(x)
    use.close()
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_a_dense_balcony_needs_experts(make_tiny: Callable[..., Any]) -> None:
    for model in (make_tiny("llama"), tiny_mixture("qwen3-moe", mlp_only_layers=[3])):
        with pytest.raises(InputError, match="exit module 'dense': the layer that balconies copy is not a mixture"):
            init_balconies(model, (2,), "dense")


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen2-moe", "dense"), ("granite-moe-shared", "dense"), ("mixtral", "mlp")]
)
def test_exit_modules_of_mixtures_export_and_verify(name: str, kind: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_mixture(name), tiny_tokenizer()
    balconies = init_balconies(model, EXITS, kind)  # the exits of `mixture`, whose traced backbone is taken
    save_balconies(tmp_path / "balconies", balconies, fingerprint(model))
    exits = ExitModel(model, load_balconies(tmp_path / "balconies", model))
    assert {balcony.kind for balcony in exits.balconies.values()} == {kind}
    manifest = export_bundle(exits, tokenizer, tmp_path / "b", ExportOptions(name, trained=False))
    assert manifest.cached_exits == (EXITS if kind == "dense" else ())
    checks = verify(tmp_path / "b", exits, tokenizer, [PROMPT])
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("name", MIXTURES)
def test_a_balcony_at_some_positions_gives_what_it_gives_at_all(name: str) -> None:
    exits = mixture_exits(name)
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(3))
    where = torch.tensor([1, 4, 8, 12, 17])
    with torch.no_grad():
        states = exits.run(tokens, (2,))
        whole = exits.normed(2, states).flatten(0, 1)[where]
        some = exits.balconies[2].rows(states.at[2], where, **states.layer_arguments)
    assert torch.allclose(some, whole, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_exit_of_a_mixture_becomes_a_plain_model(name: str) -> None:
    exits = mixture_exits(name)
    ids = list(range(3, 40))
    for exit_layer in EXITS:  # in Qwen's mixtures the numbers of the dense layers change
        with torch.no_grad():
            got = submodel(exits, exit_layer)(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        want = reference_logits(exits, ids)[exit_layer]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_an_exit_before_the_first_mixture_becomes_a_plain_model() -> None:
    """The balcony is a mixture after two of three dense layers, so the smaller model has one dense layer less."""
    exits = mixture_exits("lfm2-moe", num_dense_layers=3)
    small = submodel(exits, 2)
    assert [any(experts_in(layer)) for layer in small.model.layers] == [False, False, True]
    ids = list(range(3, 40))
    with torch.no_grad():
        got = small(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    want = reference_logits(exits, ids)[2]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "kind"), [("granite-moe", "decoder"), ("qwen3-moe", "dense"), ("lfm2-moe", "decoder")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_balconies_of_mixtures_learn(name: str, kind: Any, precision: Any, tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).integers(1, 320, (8, 32)).astype(np.int32)
    rows = Rows(tokens, np.full(8, 32, np.int32))
    config = TrainConfig(
        exits=(1,),
        steps=60,
        seq_len=32,
        positions=0,
        rate=5e-3,
        warmup_steps=1,
        evaluate_every=60,
        module=kind,
        precision=precision,
    )
    trainer = Trainer(tiny_mixture(name), Corpus(rows, rows, {}, "digest"), config, tmp_path / "b", compiled=False)
    before, _ = trainer.evaluate()[1]
    trainer.run()
    after, _ = trainer.evaluate()[1]
    assert after < 0.8 * before


def test_half_precision_and_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    """Experts and routers of a bfloat16 checkpoint are converted while they are written; float16 graphs route in float32."""
    exits, tokenizer = (
        ExitModel(tiny_mixture("olmoe", hidden_size=128, num_experts=160, num_hidden_layers=2)),
        tiny_tokenizer(),
    )
    exits.cast(torch.bfloat16)
    export_bundle(exits, tokenizer, tmp_path / "wide", ExportOptions("w", trained=True))
    checks = verify(tmp_path / "wide", exits.copy(), tokenizer, [PROMPT])
    assert all(check.passed for check in checks), checks
    export_bundle(exits, tokenizer, tmp_path / "half", ExportOptions("h", trained=True, precision="float16"))
    checks = verify(tmp_path / "half", exits, tokenizer, [PROMPT])
    assert all(check.passed for check in checks), checks
    graph = ir.load(tmp_path / "half" / "stage_0.onnx").graph
    sources = [node.predecessors()[0] for node in graph if node.op_type == "Softmax"]
    assert len(sources) == 2 and all(node.attributes["to"].as_int() == ir.DataType.FLOAT for node in sources)


@pytest.mark.parametrize("architecture", ["mixtral", "granite-moe"])
def test_routers_and_experts_of_another_kind_are_refused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = tiny_mixture(architecture).model.layers[0]
    block = layer.mlp if architecture == "mixtral" else layer.block_sparse_moe
    name = "gate" if architecture == "mixtral" else "router"
    router, experts = getattr(block, name), block.experts
    forward = type(router).forward
    assert router_operator(router).normalizes
    for changed in (
        lambda self, x: (forward(self, x)[0], forward(self, x)[1] * 2.5, forward(self, x)[2]),  # DeepSeek scales
        lambda self, x: (forward(self, x)[0], forward(self, x)[1], 7 - forward(self, x)[2]),  # not the largest logits
    ):
        monkeypatch.setattr(type(router), "forward", changed)
        with pytest.raises(UnsupportedModelError, match="routes neither by the largest probabilities or their shares"):
            router_operator(router)
    monkeypatch.undo()
    for attribute, value in (("has_bias", True), ("is_transposed", True), ("has_gate", False)):
        before = getattr(experts, attribute)
        setattr(experts, attribute, value)
        with pytest.raises(UnsupportedModelError, match="another form than SwiGLU"), symbolic_experts([layer]):
            pytest.fail("it must be refused")
        setattr(experts, attribute, before)
    experts.act_fn = nn.GELU()
    with pytest.raises(UnsupportedModelError, match="its activation is not SwiGLU"), symbolic_experts([layer]):
        pytest.fail("it must be refused")


def test_biased_routers_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def router(**overrides: Any) -> Any:
        layer: Any = tiny_mixture("lfm2-moe", **overrides).model.layers[1]
        return layer.feed_forward.gate

    assert router_operator(router()).factor == 1.5
    for overrides in ({"norm_topk_prob": False}, {"use_expert_bias": False}):
        with pytest.raises(UnsupportedModelError, match="nor by the shares of the largest sigmoids plus biases"):
            router_operator(router(**overrides))
    gate = router()
    forward = type(gate).forward

    def groups(self: Any, x: torch.Tensor, expert_bias: torch.Tensor) -> Any:
        """DeepSeek chooses a group of experts first."""
        return forward(self, x, expert_bias + torch.tensor([0.0] * 4 + [-9.0] * 4))

    monkeypatch.setattr(type(gate), "forward", groups)
    with pytest.raises(UnsupportedModelError, match="nor by the shares of the largest sigmoids plus biases"):
        router_operator(gate)


def test_moments_have_the_names_of_the_weights_in_the_graphs(
    mixture: Callable[[str], Exported], tmp_path: Path
) -> None:
    """So a bundle that is rounded by GPTQ uses them: on its calibration text it is closer to the model."""
    made = mixture("qwen2-moe")
    exits = made.exits.copy()
    random = np.random.default_rng(8)
    rows = [random.integers(0, 320, 128).tolist() for _ in range(8)]
    moments = second_moments(exits, rows)
    names = {str(name) for graph in made.traced.lowered.values() for name in graph.graph.initializers}
    assert {name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name for name in moments} <= names
    assert {"layers.3.mlp.experts.gate_up_proj.1", "balcony_2.layer.mlp.experts.down_proj.1"} & set(moments)
    quality = []
    for calibration in ((), rows):
        options = ExportOptions("q", True, parse_precision("int4,level=1"), calibration)
        path = tmp_path / f"{len(calibration)}"
        export_bundle(exits, made.tokenizer, path, options, traced=made.traced)
        with Engine.open(path) as engine:
            got = [engine.new_sequence(max_length=128).advance(4, row, num_logits=128)[0] for row in rows]
        want = [reference_logits(exits, row)[4] for row in rows]
        quality.append(np.mean([np.square(one - other).mean() for one, other in zip(got, want, strict=True)]))
    assert quality[1] < 0.9 * quality[0]


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_packed_experts_are_shared_between_processes(
    mixture: Callable[[str], Exported], precision: str, tmp_path: Path
) -> None:
    """An engine over files of packed weights gives the bits of the one that packs for itself."""
    made = mixture("mixtral")
    options = ExportOptions("p", trained=True, precision=parse_precision(precision))
    export_bundle(made.exits, made.tokenizer, tmp_path / "b", options, traced=made.traced)
    ids = list(range(3, 23))
    logits = []
    for packed in (None, tmp_path / "packed", tmp_path / "packed"):
        with Engine.of(Bundle.open(tmp_path / "b"), packed=packed) as engine:
            sequence = engine.new_sequence(max_length=32)
            logits.append(
                [sequence.advance(4, ids), *(sequence.step(2, np.array([token])).copy() for token in ids[:4])]
            )
    for other in logits[1:]:
        for one, another in zip(logits[0], other, strict=True):
            np.testing.assert_array_equal(one, another)


def test_prices_at_load_separate_rows_and_experts(mixture: Callable[[str], Exported]) -> None:
    manifest = Bundle.open(mixture("qwen2-moe").path).manifest
    assert manifest.model.mixture is not None and manifest.model.mixture.share == 0.25
    with Engine.open(mixture("qwen2-moe").path) as engine:
        costs = measure_prices(engine)
    assert all(unit.experts is None or unit.experts.share == 0.25 for unit in costs.stages)
    assert all(unit.experts is None for unit in (*costs.balconies, costs.head))
    prices = [costs.stages[0].pass_ms(rows, 0) for rows in range(1, 20)]
    assert prices == sorted(prices)
