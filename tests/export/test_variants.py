"""Exit modules, losses and extraction: each variant trains, exports, verifies, generates, and becomes a plain checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import CheckpointError, InputError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.balcony import KINDS, Balcony, init_balconies
from balcony_export.model.balcony_files import fingerprint, load_balconies, save_balconies
from balcony_export.model.checkpoint import load_model, load_tokenizer
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import Scheme
from balcony_export.tensorrt.graphs import Format
from balcony_export.train.config import TrainConfig
from balcony_export.train.loss import LOSS_WEIGHTS, Head, HeadLoss
from balcony_export.train.trainer import Trainer
from balcony_export.variants.extract import extract, layout_warning, submodel
from balcony_export.verify import reference_logits, verify
from balcony_runtime.engine import Engine
from tests.conftest import with_balconies
from tests.export.graph.experts import MIXTURES, tiny_mixture
from tests.export.train.distilling import random_corpus
from tests.support.engine_sets import write_graphs
from tests.support.hybrids import DENSE, EXPORTED

IDS = [(11 * i * i + 5 * i + 2) % 320 for i in range(30)]
PROMPTS = ("the quick brown fox jumps", "over the lazy dog and the balcony")


def trained(model: Any, output: Path, **options: Any) -> dict[int, Balcony]:
    """Balconies of a short run."""
    config = TrainConfig(
        exits=(2, 3),
        steps=6,
        seq_len=32,
        positions=0,
        rate=5e-3,
        vector_rate=5e-3,
        warmup_steps=1,
        evaluate_every=6,
        precision="fp32",
        **options,
    )
    trainer = Trainer(copy.deepcopy(model), random_corpus(), config, output, compiled=False)
    before = {name: value.clone() for name, value in trainer.balconies[2].state_dict().items()}
    trainer.run()
    after = trainer.balconies[2].state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items()), "nothing was trained"
    return load_balconies(output, model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])  # test_experts.py has that one
def test_every_exit_module_trains_exports_verifies_and_generates(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, kind: Any
) -> None:
    model, tokenizer = make_tiny("qwen3"), make_tokenizer()
    balconies = trained(model, tmp_path / "balconies", module=kind, optimizer="adamw")
    exits = ExitModel(model, balconies)
    assert {balcony.kind for balcony in balconies.values()} == {kind}
    assert json.loads((tmp_path / "balconies" / "balconies.json").read_text())["module"] == kind
    path = tmp_path / "bundle"
    manifest = export_bundle(exits, tokenizer, path, ExportOptions("tiny", trained=True))
    assert [exit_.module for exit_ in manifest.exits] == [kind, kind, "decoder"]
    checks = verify(path, exits, tokenizer, PROMPTS)
    assert len(checks) == 15 and all(check.passed and check.agreement == 1.0 for check in checks), checks
    cached = kind in ("decoder", "attention")
    assert manifest.cached_exits == ((2, 3) if cached else ())
    with Engine.open(path) as engine:
        sequence = engine.new_sequence(max_length=64)
        sequence.advance(5, IDS[:20])
        assert sequence.balcony_rows == ((20, 20, 0) if cached else (0, 0, 0))
        for exit_layer, token in zip((2, 3, 2, 5, 2), IDS[20:25], strict=True):
            got = sequence.step(exit_layer, np.array([token]))[0].copy()
            scratch = engine.new_sequence(max_length=64).advance(exit_layer, sequence.tokens)[0, 0]
            assert np.abs(got - scratch).max() <= 1e-4 * np.abs(scratch).max()
        assert sequence.catch_up() >= 0 and not any((*sequence.stage_rows, *sequence.balcony_rows))
    with balcony_edge.load(path, budget=Budget(tpot_ms=1000)) as llm:
        assert len(llm.generate("the fox", max_new_tokens=5, ignore_eos=True).tokens) == 5
        llm.budget = Budget(exit_layer=2)
        assert llm.generate("the fox", max_new_tokens=5, ignore_eos=True).tokens_per_exit == {2: 5}
    write_graphs(Bundle.open(path), "set", "rtx", Format("fp32", "fused", 64))
    with Engine.of(Bundle.open(path), device="cpu", engines="set") as engine:
        expected = reference_logits(exits, IDS)
        for exit_layer in engine.exit_layers:
            got = engine.new_sequence(max_length=64).advance(exit_layer, IDS, num_logits=len(IDS))[0]
            assert np.abs(got - expected[exit_layer]).max() <= 1e-4 * np.abs(expected[exit_layer]).max()


@pytest.mark.parametrize("kind", ["mlp", "none"])
def test_exit_modules_without_a_cache_are_quantized_too(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, kind: Any
) -> None:
    model, tokenizer = make_tiny("llama"), make_tokenizer()
    exits = ExitModel.open(model, (2, 3), kind=kind)
    rows = [[(7 * i + 13 * j) % 120 + 1 for i in range(48)] for j in range(40)]
    path, scheme = tmp_path / "bundle", Scheme(accuracy_level=1)
    export_bundle(exits, tokenizer, path, ExportOptions("q", True, scheme, rows))
    assert all(check.passed for check in verify(path, exits, tokenizer, PROMPTS))


def test_a_random_start_is_another_and_as_large_and_follows_from_seed_and_exit(make_tiny: Any) -> None:
    model = make_tiny("llama")

    def weight(exit_layer: int, seed: int | None, *others: int) -> torch.Tensor:
        return init_balconies(model, (exit_layer, *others), random=seed)[exit_layer].layer.mlp.up_proj.weight

    last, drawn = weight(2, None), weight(2, 0)
    assert torch.equal(last, model.model.layers[-1].mlp.up_proj.weight) and not torch.equal(last, drawn)
    torch.manual_seed(7)  # earlier random numbers and other exits make no difference
    assert torch.equal(drawn, weight(2, 0, 3))
    assert not torch.equal(drawn, weight(2, 1)) and not torch.equal(drawn, weight(3, 0))
    assert 0.5 < float(drawn.detach().std()) / model.config.initializer_range < 2


def test_a_random_start_says_nothing_about_gpus(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several, PyTorch warns in ten lines, in each process of a run, and takes the state of all of them."""
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert set(init_balconies(make_tiny("llama"), (2,), random=0)) == {2}


@pytest.mark.parametrize("loss", ["ce", "kl+ce"])
def test_the_text_as_teacher(make_tiny: Any, tmp_path: Path, loss: Any) -> None:
    """Value and gradient of the loss against PyTorch's own, and a run that trains with it."""
    torch.manual_seed(1)
    full, student = torch.randn(2, 150, 16)
    weight, labels = torch.randn(40, 16), torch.randint(0, 40, (150,))
    head = HeadLoss(Head(weight), dtype=torch.float32, compiled=False, kind=loss)
    student.requires_grad_(True)
    (got,) = head.backward(full, [student], labels)
    again = student.detach().clone().requires_grad_(True)
    targets, logits = torch.log_softmax(full @ weight.T, -1), again @ weight.T
    kl = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), targets, reduction="sum", log_target=True)
    kl_weight, ce_weight = LOSS_WEIGHTS[loss]
    wanted = kl_weight * kl + ce_weight * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted.backward()
    assert got == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert student.grad is not None and again.grad is not None
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-4, atol=1e-4)
    trained(make_tiny("llama"), tmp_path, loss=loss, optimizer="adamw")


def test_kinds_do_not_mix_in_a_directory(make_tiny: Any, tmp_path: Path) -> None:
    model = make_tiny("llama")
    save_balconies(tmp_path, init_balconies(model, (2,), "mlp"), fingerprint(model))
    assert load_balconies(tmp_path, model)[2].kind == "mlp"
    with pytest.raises(CheckpointError, match="has balconies of kind 'mlp', not 'decoder'"):
        save_balconies(tmp_path, init_balconies(model, (3,)), fingerprint(model))


ARCHITECTURES = (*DENSE, *EXPORTED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_extracted_exit_is_a_plain_model_with_equal_logits(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, architecture: str
) -> None:
    model, tokenizer = make_tiny(architecture), make_tokenizer()
    exits = with_balconies(model)
    extract(exits, tokenizer, 3, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(loaded) is type(model) and loaded.config.num_hidden_layers == 4
    written, rope = (
        json.loads((tmp_path / "out/config.json").read_text()),
        getattr(loaded.config, "rope_parameters", None),
    )
    if architecture == "gemma3":  # what transformers 4 reads, for each kind of attention
        local, rope = rope["sliding_attention"], rope["full_attention"]
        assert written["rope_local_base_freq"] == local["rope_theta"]
    if rope:
        assert written["rope_theta"] == rope["rope_theta"] and "rope_scaling" not in written
    with torch.no_grad():
        got = loaded(torch.tensor([IDS])).logits[0].numpy()
    want = reference_logits(exits, IDS)[3]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids
        == tokenizer("the fox").input_ids
    )


def test_an_extracted_exit_keeps_its_rope_scaling_under_both_names(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    model = make_tiny("llama", rope_parameters={"rope_theta": 5e5, **scaling})
    exits = ExitModel.open(model, (2,))
    extract(exits, make_tokenizer(), 2, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, scaling)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert loaded.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        got = loaded(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(got - reference_logits(exits, IDS)[2]).max() <= 1e-5 * np.abs(got).max()


def test_an_extracted_phi3_has_the_rope_that_transformers_4_takes(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """Its class there refuses a `rope_scaling` of other than these three keys."""
    factors = {"short_factor": [1.5, 2.0], "long_factor": [4.0, 4.0]}
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "partial_rotary_factor": 0.5, **factors}
    model = make_tiny("phi3", head_dim=8, original_max_position_embeddings=64, rope_parameters=rope)
    exits = ExitModel.open(model, (2,))
    extract(exits, make_tokenizer(), 2, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_scaling"] == {"type": "longrope", **factors}
    assert (written["original_max_position_embeddings"], written["partial_rotary_factor"]) == (64, 0.5)
    loaded = load_model(tmp_path / "out")
    with torch.no_grad():
        got = loaded(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(got - reference_logits(exits, IDS)[2]).max() <= 1e-5 * np.abs(got).max()


@pytest.mark.parametrize(
    ("name", "key", "wanted"),
    [("granite-hybrid", "layer_types", ["mamba", "attention", "attention"]), ("lfm2", "block_ff_dim", 48)],
)
def test_an_extracted_exit_has_the_names_that_other_engines_read(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, name: str, key: str, wanted: Any
) -> None:
    """transformers 5 renames Granite 4's layers and drops LFM2's width; transformers 4 and llama.cpp read the old names."""
    model = make_tiny(name, intermediate_size=48)
    extract(ExitModel.open(model, (2,)), make_tokenizer(), 2, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == wanted
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "key", "wanted"), [("qwen3-moe", "num_experts", 8), ("phi3", "partial_rotary_factor", 0.5)]
)
def test_an_extracted_exit_has_the_names_that_transformers_4_reads(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, name: str, key: str, wanted: float
) -> None:
    """It assumes 128 experts and heads that are rotated whole; MLX does not load a Qwen3-MoE without the first."""
    model = (tiny_mixture if name in MIXTURES else make_tiny)(name)
    extract(ExitModel.open(model, (2,)), make_tokenizer(), 2, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == wanted
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["mamba2", "granite-hybrid"])
def test_an_extracted_exit_has_no_infinite_number(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, name: str
) -> None:
    """transformers 5 writes `{"__float__": "Infinity"}`, which transformers 4 takes for the limit of time steps."""
    extract(ExitModel.open(make_tiny(name), (2,)), make_tokenizer(), 2, tmp_path / "out")
    assert "Infinity" not in (tmp_path / "out/config.json").read_text()
    assert tuple(load_model(tmp_path / "out").config.time_step_limit) == (0.0, float("inf"))


def test_an_extracted_tokenizer_has_a_class_that_transformers_4_knows(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """llama.cpp's converter and engines built on it refuse `TokenizersBackend`, the name in transformers 5."""
    extract(ExitModel.open(make_tiny("llama"), (2,)), make_tokenizer(), 2, tmp_path / "out")
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "out")("the fox").input_ids == make_tokenizer()("the fox").input_ids


def test_an_extracted_tokenizer_names_further_control_tokens_as_transformers_4_does(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """It refuses the list of transformers 5, `extra_special_tokens`, with an AttributeError (SmolLM2, Qwen)."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    extract(ExitModel.open(make_tiny("llama"), (2,)), tokenizer, 2, tmp_path / "out")
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert named["additional_special_tokens"] == ["<end>"] and "extra_special_tokens" not in named
    loaded: Any = load_tokenizer(tmp_path / "out")
    assert loaded.extra_special_tokens == ["<end>"]


@pytest.mark.parametrize("name", ["falcon-h1", "llama", "granite"])
def test_an_exit_of_a_bfloat16_checkpoint_is_extracted(
    name: str, make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    odd: dict[str, Any] = {}
    if name == "falcon-h1":  # numbers that bfloat16 rounds
        odd = {"ssm_multipliers": [0.3536, 0.25, 0.3536, 0.5, 0.3536], "lm_head_multiplier": 0.3}
    make_tiny(name, **odd).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", keep_dtype=True)
    extract(ExitModel.open(loaded, (2,)), make_tokenizer(), 2, tmp_path / "out")
    assert load_model(tmp_path / "out", keep_dtype=True).dtype == torch.bfloat16


def test_float32_vectors_of_a_bfloat16_checkpoint_are_not_rounded(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """Qwen3.5-0.8B to 27B have these two of each recurrent layer in float32 among bfloat16."""
    model = make_tiny("qwen3.5").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight")):
            parameter.data = torch.linspace(0.3, 2.7, parameter.numel())
    model.save_pretrained(tmp_path / "m")
    wanted = {name: value for name, value in load_file(tmp_path / "m/model.safetensors").items() if "layers.0." in name}
    loaded = load_model(tmp_path / "m", keep_dtype=True)
    extract(ExitModel.open(loaded, (2,)), make_tokenizer(), 2, tmp_path / "out")
    for got in (loaded.state_dict(), load_file(tmp_path / "out/model.safetensors")):
        assert all(got[name].dtype == value.dtype and torch.equal(got[name], value) for name, value in wanted.items())
    assert sum(value.dtype == torch.float32 for value in wanted.values()) == 2 and loaded.dtype == torch.bfloat16


def test_a_head_that_its_configuration_calls_tied_is_extracted(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    extract(ExitModel.open(model, (2,)), make_tokenizer(), 2, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_extraction_writes_what_the_bundles_exit_writes(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    tiny = export_tiny("llama")
    extract(tiny.exits, tiny.tokenizer, 2, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with balcony_edge.load(tiny.path, budget=Budget(exit_layer=2)) as llm:
        for start in range(20):
            prompt = [(start * 7 + 3 * i) % 319 + 1 for i in range(5 + start)]
            with torch.no_grad():
                out = loaded.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            reply = llm.generate(prompt, max_new_tokens=12, ignore_eos=True)
            assert [token.id for token in reply.tokens] == out[0, len(prompt) :].tolist(), start


def test_a_full_disk_leaves_no_half_checkpoint(make_tiny: Any, make_tokenizer: Any, small_disk: Path) -> None:
    model = make_tiny("llama")
    with pytest.raises(InputError, match=r"out: cannot be written .*No space left on device"):
        extract(ExitModel.open(model, (2,)), make_tokenizer(), 2, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_what_cannot_be_extracted(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    model, tokenizer = make_tiny("llama"), make_tokenizer()
    with pytest.raises(InputError, match="--exit 4: there are balconies at 2, 3"):
        extract(ExitModel.open(model, (2, 3)), tokenizer, 4, tmp_path / "out")
    with pytest.raises(InputError, match="its module is 'mlp': only 'decoder' and 'none'"):
        extract(ExitModel.open(model, (2,), kind="mlp"), tokenizer, 2, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        extract(ExitModel.open(model, (2,)), tokenizer, 2, tmp_path)
    assert submodel(ExitModel.open(model, (2,), kind="none"), 2).config.num_hidden_layers == 2


def test_extraction_warns_of_layers_that_do_not_follow_their_number(make_tiny: Callable[..., Any]) -> None:
    """Every fourth layer of SmolLM3 is without rope, every sixth of Gemma 3 sees all rows; balconies copy the eighth."""
    by_rule: dict[str, Any] = {"num_hidden_layers": 8, "layer_types": None, "no_rope_layers": None}

    def warning(name: str, exit_layer: int, **sizes: Any) -> str | None:
        model = make_tiny(name, **sizes)
        exits = ExitModel(model, init_balconies(model, (exit_layer,)))
        return layout_warning(model.config, submodel(exits, exit_layer).config)

    assert str(warning("smollm3", 4, **by_rule)).startswith(
        "no_rope_layers: the last layer is not what its number says"
    )
    assert str(warning("gemma3", 5, **by_rule)).startswith("layer_types: the last layer is not what its number says")
    assert warning("smollm3", 3, **by_rule) is warning("gemma3", 3, **by_rule) is None
    assert str(warning("qwen3.5", 4, **by_rule)).startswith("layer_types: the last layer is not what its number says")
    assert warning("qwen3.5", 3, **by_rule) is None
    letters: dict[str, Any] = {"num_hidden_layers": 8, "sliding_window_pattern": "LLLG"}  # as in EXAONE 4.0 32B
    letters["layer_types"] = [*["sliding_attention"] * 3, "full_attention"] * 2
    assert str(warning("exaone4", 4, **letters)).startswith("layer_types: the last layer is not what its number says")
    assert warning("exaone4", 3, **letters) is None
    assert warning("exaone4", 3, sliding_window=None, layer_types=["full_attention"] * 5) is None  # as in that of 1.2B
    assert [warning(name, 3) for name in ("llama", "gemma3", "smollm3", "lfm2", "qwen3")] == [None] * 5


def test_an_extracted_lfm2_lists_the_layers_of_its_own_that_attend(make_tiny: Callable[..., Any]) -> None:
    """The files of LFM2-350M, 700M and 1.2B have this list and no layer_types; some engines go by the list."""
    model = make_tiny("lfm2", layer_types=None, full_attn_idxs=[1, 3])
    small = submodel(ExitModel(model, init_balconies(model, (2,))), 2).config
    assert (small.full_attn_idxs, small.layer_types) == ([1, 2], ["conv", "full_attention", "full_attention"])
    assert layout_warning(model.config, small) is None
