"""Cut models: what the cuts keep, that balconies and tuning learn from the uncut model, and the bundle at the end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli import app
from balcony_edge.errors import InputError, TrainingError
from balcony_export.data.corpus import Corpus, Rows
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.balcony_files import fingerprint, load_balconies
from balcony_export.model.checkpoint import load_model
from balcony_export.model.exits import ExitModel
from balcony_export.quantize.blocks import Scheme, parse_precision, quantize, stored_weights
from balcony_export.quantize.gptq import factors_of
from balcony_export.train.tune import closeness, tune
from balcony_export.variants.cut import BALCONIES, narrow, round_backbone, save_cut
from balcony_export.verify import reference_logits
from benchmarks.paper.compression import Method, Subject, factorize, make, mark_best, methods
from tests.export.graph.experts import mixture_exits
from tests.export.train.distilling import SEQ_LEN, trainer_of
from tests.support.command import invoke_here

ROWS = [[int(token) for token in np.random.default_rng(seed).integers(1, 320, 48)] for seed in range(12)]
IDS = ROWS[0][:24]


def logits_of(exits: ExitModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.from_numpy(reference_logits(exits, IDS)[exits.depth])


@pytest.mark.parametrize(
    ("architecture", "silenced"),
    [(name, "up_proj") for name in ("llama", "llama-mha", "gemma2", "gemma3", "qwen3")] + [("llama", "down_proj")],
)
def test_neurons_that_do_nothing_go_first(
    architecture: str, silenced: str, make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """Without them the model is the same, and its checkpoint is an ordinary one. What nothing reads does nothing."""
    model = make_tiny(architecture)
    exits = ExitModel.open(model, (2,))
    silent = np.random.default_rng(0).permutation(64)[:24]
    for mlp in (layer.mlp for layer in (*exits.parts.layers, exits.balconies[2].layer)):
        weight = getattr(mlp, silenced).weight.data
        (weight if silenced == "up_proj" else weight.T)[silent] = 0.0
    want = exits.copy()
    narrow(exits, 40, ROWS)
    assert exits.parts.layers[0].mlp.gate_proj.weight.shape == (40, 32)
    torch.testing.assert_close(logits_of(exits), logits_of(want), atol=2e-3, rtol=0)
    at, before = (reference_logits(one, IDS)[2] for one in (exits, want))
    np.testing.assert_allclose(at, before, atol=2e-3)
    save_cut(exits, make_tokenizer(), tmp_path / "cut")
    written = load_model(tmp_path / "cut")
    assert written.config.intermediate_size == 40
    assert torch.equal(logits_of(ExitModel(written)), logits_of(exits))
    assert list(load_balconies(tmp_path / "cut" / BALCONIES, written)) == [2]


def test_neurons_that_stay_make_up_for_the_others(make_tiny: Any) -> None:
    """If the neurons that go are fainter copies of those that stay, the MLP computes nearly the same as before."""
    exits = ExitModel(make_tiny("llama", num_hidden_layers=1))
    whole = exits.parts.layers[0].mlp
    whole.gate_proj.weight.data[32:] = whole.gate_proj.weight.data[:32]
    whole.up_proj.weight.data[32:] = 0.02 * whole.up_proj.weight.data[:32]
    fitted = exits.copy()
    narrow(fitted, 32, ROWS)
    small = fitted.parts.layers[0].mlp
    assert torch.equal(small.up_proj.weight, whole.up_proj.weight[:32])
    bare = copy.deepcopy(small)
    bare.down_proj.weight = nn.Parameter(whole.down_proj.weight.detach()[:, :32])
    with torch.no_grad():
        states = exits.parts.layers[0].post_attention_layernorm(exits.run(torch.tensor(ROWS), (0,)).at[0])
        with_fit, without = (float((one(states) - whole(states)).square().mean()) for one in (small, bare))
    assert with_fit < 0.05 * without


def test_what_cannot_be_narrowed(make_tiny: Any) -> None:
    with pytest.raises(InputError, match=r"--mlp 64: the model's MLPs have 64 neurons: give 1 to 63"):
        narrow(ExitModel(make_tiny("llama")), 64, ROWS)
    with pytest.raises(InputError, match=r"layers.0.mlp of this model type 'lfm2' does not consist of gate_proj"):
        narrow(ExitModel(make_tiny("lfm2")), 8, ROWS)


def test_what_cannot_be_rounded_is_refused_before_the_work(tmp_path: Path) -> None:
    """Also before the model is read, since its tuning may take hours."""
    arguments = (tmp_path, "--calibration", tmp_path / "t.txt", "--mlp", "8", "-o", tmp_path / "small")
    for precision in ("int8", "int4,asym", "int4,positive"):
        result = invoke_here("cut", *arguments, "--precision", precision)
        assert result.returncode == 1 and "only symmetric int4 is rounded before the training" in result.stderr
    with pytest.raises(
        InputError, match=r"--precision int4.*: experts are not rounded before the training: leave it out"
    ):
        round_backbone(mixture_exits("mixtral"), parse_precision("int4"), [])


@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_rounding_twice_is_rounding_once(moment: bool, again: bool) -> None:
    """A matrix that int4 blocks hold keeps its values, whatever moments are given later; another matrix does not."""
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(24, 96, generator=generator), torch.randn(300, 96, generator=generator)
    weight[3, :32] = 0.0
    factors = partial(factors_of, inputs.T @ inputs / 300)
    once = torch.from_numpy(
        quantize(weight, 4, 32, symmetric=True, factors=factors if moment else None).dequantized(96)
    )
    twice = quantize(once, 4, 32, symmetric=True, factors=factors if again else None).dequantized(96)
    np.testing.assert_allclose(twice, once.numpy(), rtol=1e-6)
    assert float((once - weight).abs().max()) > 0.05


def test_a_bundle_of_a_rounded_model_holds_its_weights(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Up to float32 rounding in the backbone and the head; balconies are rounded at the export."""
    scheme = parse_precision("int4,block=32,head=4,level=1")
    assert not isinstance(scheme, str)
    exits = ExitModel.open(make_tiny("llama", num_hidden_layers=2), (1,))
    before = exits.copy()
    round_backbone(exits, scheme, ROWS)
    assert torch.equal(exits.balconies[1].layer.mlp.up_proj.weight, before.balconies[1].layer.mlp.up_proj.weight)
    assert not torch.equal(exits.parts.layers[0].mlp.up_proj.weight, before.parts.layers[0].mlp.up_proj.weight)
    export_bundle(
        exits, make_tokenizer(), tmp_path / "bundle", ExportOptions("tiny", True, scheme, calibration=ROWS[:3])
    )
    stored = dict(stored_weights(Bundle.open(tmp_path / "bundle")))
    for name in ("layers.1.mlp.down_proj.weight", "layers.0.self_attn.o_proj.weight"):
        np.testing.assert_allclose(stored[name], exits.parts.decoder.get_parameter(name).detach(), rtol=1e-6)
    np.testing.assert_allclose(stored["lm_head.weight"], exits.parts.head.weight.detach(), rtol=1e-6)
    for text in ("int8", "int4,asym"):
        scheme = parse_precision(text)
        assert not isinstance(scheme, str)
        with pytest.raises(InputError, match="only symmetric int4 is rounded before the training"):
            round_backbone(exits, scheme, ())


def other(model: Any) -> Any:
    """A copy with another head, so that a target taken through the wrong one shows."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for parameter in changed.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return changed


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_balconies_learn_from_a_teacher(architecture: str, make_tiny: Any, corpus: Corpus, tmp_path: Path) -> None:
    """Held-out KL is KL(teacher ‖ exit) by the definition, and it falls; without a teacher it is another number."""
    model = make_tiny(architecture)
    teacher = other(model)
    trainer = trainer_of(
        copy.deepcopy(model), corpus, tmp_path / "a", teacher=copy.deepcopy(teacher), positions=0, steps=30
    )
    alone = trainer_of(copy.deepcopy(model), corpus, tmp_path / "b", positions=0)
    exits, sums, count = ExitModel.open(model, (2, 3)), dict.fromkeys((2, 3), 0.0), 0
    with torch.no_grad():
        for row, length in zip(corpus.held_out.tokens, corpus.held_out.lengths, strict=True):
            tokens = torch.from_numpy(row[None, :length]).long()
            want = ExitModel(teacher).logits(tokens)[exits.depth][0, 1:].log_softmax(-1)
            for exit_layer, logits in exits.logits(tokens).items():
                if exit_layer in sums:
                    log = logits[0, 1:].log_softmax(-1)
                    sums[exit_layer] += float((want.exp() * (want - log)).sum())
            count += int(length) - 1
    before = {exit_layer: kl for exit_layer, (kl, _) in trainer.evaluate().items()}
    assert before == pytest.approx({exit_layer: total / count for exit_layer, total in sums.items()}, rel=1e-3)
    assert abs(alone.evaluate()[2][0] / before[2] - 1) > 0.05
    trainer.run()
    assert all(trainer.best[exit_layer][0] < 0.95 * before[exit_layer] for exit_layer in (2, 3))
    assert json.loads((tmp_path / "a/balconies.json").read_text())["exits"]["2"]["training"]["teacher"][
        "weights_sha256"
    ]
    resumed = trainer_of(copy.deepcopy(model), corpus, tmp_path / "a", positions=0, steps=40)
    with pytest.raises(TrainingError, match="made with another teacher"):
        resumed.resume()


def test_teachers_of_another_size_are_refused(make_tiny: Any, corpus: Corpus, tmp_path: Path) -> None:
    for changes in ({"vocab_size": 256}, {"hidden_size": 64}):
        with pytest.raises(
            InputError, match=r"--teacher: its LM head has \d+ tokens and \d+ inputs, the model's has 320"
        ):
            trainer_of(make_tiny("llama"), corpus, tmp_path, teacher=make_tiny("llama", **changes))


def test_closeness_is_the_mean_over_tokens_of_the_divergence_from_the_teacher(make_tiny: Any, corpus: Corpus) -> None:
    """By the definition, KL(teacher ‖ model), without the first position of a row."""
    model = make_tiny("llama")
    exits, teacher, kl, hits, count = ExitModel(model), ExitModel(other(model)), 0.0, 0, 0
    with torch.no_grad():
        for row, length in zip(corpus.held_out.tokens, corpus.held_out.lengths, strict=True):
            tokens = torch.from_numpy(row[None, :length]).long()
            want, got = (one.logits(tokens)[5][0, 1:].log_softmax(-1) for one in (teacher, exits))
            kl += float((want.exp() * (want - got)).sum())
            hits += int((want.argmax(-1) == got.argmax(-1)).sum())
            count += int(length) - 1
    wanted = pytest.approx(kl / count, rel=1e-3), pytest.approx(hits / count)
    assert closeness(exits, teacher, corpus.held_out) == wanted


def test_a_cut_model_is_tuned(make_tiny: Any, corpus: Corpus) -> None:
    """It comes nearer to the uncut model, whose KL is zero, and its head stays."""
    uncut = ExitModel(make_tiny("llama"))
    exits = uncut.copy()
    narrow(exits, 16, ROWS)
    start = closeness(exits, uncut, corpus.held_out)
    assert closeness(uncut, uncut, corpus.held_out) == (pytest.approx(0, abs=1e-6), 1.0)
    losses = tune(exits, uncut, corpus, 40, rate=3e-3, vocabulary=200)
    end = closeness(exits, uncut, corpus.held_out)
    assert end.kl < 0.8 * start.kl and losses[-1] < losses[0]
    assert torch.equal(exits.parts.head.weight, uncut.parts.head.weight)


def test_the_rate_of_a_tuning_rises_and_then_falls(make_tiny: Any, corpus: Corpus) -> None:
    """Two of 40 steps are the warm-up; the line would be at zero one step after the last."""
    uncut, rates = ExitModel(make_tiny("llama", num_hidden_layers=1)), []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        tune(uncut.copy(), uncut, corpus, 40, rate=0.4)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.2, *(0.01 * left for left in range(39, 0, -1))])


def test_the_commands_make_a_bundle_of_a_cut_model(
    make_tiny: Callable[..., Any], make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    """cut, then train from the cut balconies with the uncut model as teacher, then export; and what they refuse."""
    uncut = make_tiny("llama", num_hidden_layers=3)
    uncut.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words, generator = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"], np.random.default_rng(3)
    text = tmp_path / "text.jsonl"
    lines = [" ".join(generator.choice(words, size=60)) for _ in range(120)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def run(*arguments: Any, fails: str | None = None) -> dict[str, Any]:
        if fails is not None:
            with pytest.raises(InputError, match=fails):
                CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
            return {}
        out = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
        found: dict[str, Any] = json.loads(out.stdout)
        return found

    model, small = tmp_path / "model", tmp_path / "small"
    recipe = (
        "--exits",
        "1,2",
        "--data",
        text,
        "--seq-len",
        SEQ_LEN,
        "--steps",
        3,
        "--precision",
        "fp32",
        "--no-compile",
    )
    run("train", model, *recipe, "-o", tmp_path / "first")
    cut = ("cut", model, "--calibration", text, "-o", small)
    run(*cut, fails="nothing to cut: give --mlp NEURONS")
    run(*cut, "--precision", "int4", "--tune-steps", 3, fails="--tune-steps 3 without --mlp")
    run(*cut, "--precision", "fp32", fails="--precision fp32: rounds nothing")
    width = ("--mlp", 32, "--tune-steps", 2, "--precision", "int4,head=4", "--balconies", tmp_path / "first")
    facts = run(*cut, *width, "--threads", 1)
    assert facts["parameters"] < sum(p.numel() for p in uncut.parameters()) and 0 < facts["kl"] < 10
    again = ("train", small, *recipe, "-o", tmp_path / "second", "--start", small / BALCONIES, "--teacher")
    run(*again, model, "--loss", "ce", fails="--teacher with --loss ce")
    uncut.save_pretrained(tmp_path / "foreign")
    foreign = make_tokenizer()
    foreign.add_tokens(["another"])
    foreign.save_pretrained(tmp_path / "foreign")
    run(*again, tmp_path / "foreign", fails="its tokens are not those of")
    assert set(run(*again, model)["exits"]) == {"1", "2"}
    bundle = ("export", small, "--exits", "1,2", "--balconies", tmp_path / "second", "--precision", "int4,head=4")
    assert run(*bundle, "-o", tmp_path / "bundle")["exits"] == [1, 2, 3]


def test_a_product_of_full_rank_is_the_matrix_itself(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """And one of a lower rank exports: its two matrices are two products in the graphs."""
    exits = ExitModel(make_tiny("llama", num_hidden_layers=2))
    want = logits_of(exits)
    whole, half = exits.copy(), exits.copy()
    factorize(whole, 32, ROWS)
    torch.testing.assert_close(logits_of(whole), want, atol=1e-4, rtol=0)
    factorize(half, 8, ROWS)
    assert float((logits_of(half) - want).abs().max()) > 1e-3
    export_bundle(half, make_tokenizer(), tmp_path / "bundle", ExportOptions("low rank", True))
    export_bundle(exits, make_tokenizer(), tmp_path / "whole", ExportOptions("whole", True))
    read, all_of_it = (Bundle.open(tmp_path / name).manifest.bytes_per_token(2) for name in ("bundle", "whole"))
    assert all_of_it - read == 2 * 3 * 4 * (32 * 64 - 8 * (32 + 64))


def test_methods_of_the_comparison_and_its_best_points() -> None:
    names = [str(method) for method in methods((256, 128), 64)]
    assert len(set(names)) == len(names) and {"depth", "depth, then int4", "width 256 + int4 + depth", "rank 64"} <= {
        *names
    }
    assert Method(depth=True).steps(200) == Method(int4=True, depth=True).steps(200) == (0, 200)
    assert Method(width=256).steps(201) == (201, 0) and Method(width=256, depth=True).steps(201) == (100, 101)
    points: dict[str, dict[str, dict[str, Any]]] = {
        "a": {"1": {"bytes": 10, "kl": 1.0}, "2": {"bytes": 20, "kl": 0.0}},
        "b": {"1": {"bytes": 10, "kl": 0.9}, "2": {"bytes": 25, "kl": 0.1}},
    }
    mark_best(points)
    assert [point["best"] for exits in points.values() for point in exits.values()] == [False, True, True, False]


def test_the_comparison_takes_no_points_of_another_model_text_or_length(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model, rows = make_tiny("llama"), Rows(np.array([[3, 4]], np.int32), np.array([2], np.int32))
    scheme, corpus = Scheme(), Corpus(rows, rows, {}, "one text")
    subject = Subject(model, make_tokenizer(), corpus, (2,), None, (32, 16), 8, scheme, 1e-3, {})
    of = {"model": fingerprint(model), "steps": 5, "data": "one text"}
    (tmp_path / "points.json").write_text(json.dumps({"of": of, "points": {"depth": {}}}))
    assert make(subject, tmp_path, 5, only=[]) == {"depth": {}}
    with pytest.raises(InputError, match=r"points\.json: is of another model, --steps or --data"):
        make(subject, tmp_path, 6, only=[])


def test_the_comparison_takes_no_balconies_of_another_length(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed before its first point leaves them without one."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = Rows(np.array([[3, 4]], np.int32), np.array([2], np.int32))
    corpus = Corpus(rows, rows, {}, "one text")
    subject = Subject(make_tiny("llama"), make_tokenizer(), corpus, (2,), None, (32, 16), 8, Scheme(), 1e-3, {})
    monkeypatch.setattr("benchmarks.paper.compression.learned", killed)
    with pytest.raises(KeyboardInterrupt):
        make(subject, tmp_path, 5, only=["depth"])
    with pytest.raises(InputError, match=r"points\.json: is of another model, --steps or --data"):
        make(subject, tmp_path, 6, only=["depth"])


def test_the_comparison_refuses_methods_that_it_does_not_have(
    make_tiny: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    rows = Rows(np.array([[3, 4]], np.int32), np.array([2], np.int32))
    corpus = Corpus(rows, rows, {}, "one text")
    subject = Subject(make_tiny("llama"), make_tokenizer(), corpus, (2,), None, (32, 16), 8, Scheme(), 1e-3, {})
    with pytest.raises(InputError, match=r"--only 'width 1,024': is not a method: give some of 'depth', "):
        make(subject, tmp_path, 5, only=["width 1,024"])
