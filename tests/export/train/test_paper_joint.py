"""The paper's baselines: each learns on a tiny model, and what it writes exports, verifies and generates like any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.errors import InputError, TrainingError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.balcony_files import load_balconies
from balcony_export.model.checkpoint import load_model
from balcony_export.model.exits import ExitModel
from balcony_export.verify import verify
from benchmarks.paper.joint import BASE, OBJECTIVES, JointConfig, JointTrainer, main
from tests.export.train.distilling import random_corpus

PROMPTS = ("the quick brown fox jumps", "over the lazy dog and the balcony")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_with_the_backbone(make_tiny: Any, make_tokenizer: Any, tmp_path: Path, objective: Any) -> None:
    """Each baseline learns, and its checkpoint exports, verifies and generates like any other."""
    model, tokenizer = make_tiny("llama", num_hidden_layers=4), make_tokenizer()
    before = copy.deepcopy(model.state_dict())
    module: Any = "none" if objective == "sorted" else "decoder"
    config = JointConfig((1, 2), objective, module, steps=12, batch_rows=4, rate=3e-3)
    trainer = JointTrainer(model, random_corpus(), config)
    start = trainer.evaluate()
    losses = trainer.run()
    assert len(losses) == 12 and losses[-1] < losses[0]
    after = trainer.evaluate()
    assert after.keys() == {1, 2, 4} and after[4].kl == 0 and after[4].agreement == 1.0
    if objective == "unfrozen":
        assert after[2].kl < start[2].kl
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "model.layers.0.mlp.up_proj.weight" in changed, "the backbone also learns"
    trainer.save(tmp_path / "run", tokenizer)
    loaded = load_model(str(tmp_path / "run" / BASE))
    balconies = load_balconies(tmp_path / "run", loaded)
    assert {balcony.kind for balcony in balconies.values()} == {module}
    exits, tokens = ExitModel(loaded, balconies), torch.arange(1, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(exits.logits(tokens)[4], trainer.exits.logits(tokens)[4], rtol=1e-4, atol=1e-4)
    if objective == "scratch":
        return  # its checkpoint has the form of that of "unfrozen"
    export_bundle(exits, tokenizer, tmp_path / "bundle", ExportOptions("tiny", trained=True))
    checks = verify(tmp_path / "bundle", exits, tokenizer, PROMPTS)
    assert all(check.passed for check in checks)
    with balcony_edge.load(tmp_path / "bundle", budget=Budget(exit_layer=2)) as llm:
        assert len(llm.generate("the fox", max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_a_model_from_scratch_has_no_weight_of_its_checkpoint(tiny_checkpoint: Path) -> None:
    model = load_model(str(tiny_checkpoint))
    before = copy.deepcopy(model.state_dict())
    JointTrainer(model, random_corpus(), JointConfig((2,), "scratch", seed=7))
    after = {name: value for name, value in model.state_dict().items() if "norm" not in name}  # norms begin as ones
    assert after and not [name for name, value in after.items() if torch.equal(value, before[name])]


@pytest.mark.parametrize(("schedule", "rates"), [("cosine", [1.0, 0.75, 0.25]), ("trapezoidal", [1.0, 1.0, 5 / 6])])
def test_the_rate_of_the_papers_pretraining(make_tiny: Any, schedule: Any, rates: list[float]) -> None:
    """Section 4.1: a cosine for fine-tuning, "a trapezoidal scheduler" from scratch."""
    config = JointConfig((2,), "scratch", steps=3, schedule=schedule)
    trainer = JointTrainer(make_tiny("llama"), random_corpus(), config)
    found = []
    for _ in rates:
        trainer.train_step()
        found.append(trainer._optimizer.param_groups[0]["lr"] / 1e-3)
    assert found == pytest.approx(rates)


def test_the_page_names_the_papers_baselines_that_are_not_here() -> None:
    """Those of its Table 1 and figure 4; only two of them were named."""
    page = (Path(__file__).parents[3] / "docs" / "variants.md").read_text(encoding="utf-8").split("\n## ", 1)[0]
    for name in ("LayerSkip", "Flextron", "SliceGPT", "Compresso", "NutePrune", "LLM-Pruner"):
        assert name in page


def test_joint_recipes_that_make_no_sense(make_tiny: Any) -> None:
    with pytest.raises(InputError, match="--objective sorted: its exits have no module"):
        JointConfig((2,), "sorted").check()
    with pytest.raises(InputError, match="must be positive numbers"):
        JointConfig((2,), "scratch", rate=0.0).check()
    with pytest.raises(TrainingError, match=r"the loss is nan: lower --rate"):
        model = make_tiny("llama")
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        JointTrainer(model, random_corpus(), JointConfig((2,), "unfrozen", steps=1)).run()
    spoilt = JointTrainer(make_tiny("llama"), random_corpus(), JointConfig((2,), "unfrozen", steps=1))
    spoilt.run()
    spoilt.balconies[2].norm.weight.data[0] = float("nan")  # as after a last step that was too large
    with pytest.raises(TrainingError, match=r"exit 2 is not finite any more: lower --rate"):
        spoilt.evaluate()


def test_the_command(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_checkpoint), "--exits", "2,3", "--data", str(text_file), "-o", str(tmp_path / "out")]
    command += ["--seq-len", "32", "--held-out-rows", "2", "--steps", "3"]
    main([*command, "--objective", "sorted"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["exits"]["5"]["kl"] == 0 and document["exits"]["2"]["cross_entropy"] > 0
    loaded = load_model(document["model"])
    assert list(load_balconies(Path(document["balconies"]), loaded)) == [2, 3]
    with pytest.raises(InputError, match="has balconies of another model"):
        main([*command, "--objective", "unfrozen"])
    with pytest.raises(InputError, match="--objective sorted: its exits have no module"):
        main([*command, "-o", str(tmp_path / "other"), "--objective", "sorted", "--exit-module", "mlp"])
    with pytest.raises(InputError, match=r"--seq-len 100000: this model's context holds \d+ tokens"):
        main([*command, "-o", str(tmp_path / "other"), "--objective", "scratch", "--seq-len", "100000"])
    assert not (tmp_path / "other").exists()
