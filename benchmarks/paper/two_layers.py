"""Is one trained layer after layer 14 worth as much as two after layer 13? Both read 15 of the demo model's 30 layers.

    python -m benchmarks.paper.two_layers --data TEXT [--minutes 10] [--rate 2e-3] [--first-share 0.25]

``one`` goes on training the shipped balcony of exit 14. ``two`` trains the backbone's layer 13 (a copy, at ``--first-share`` of
the rate) and that balcony after it: the same function at the start, with twice the weights to learn. Both see the same rows,
after those that the shipped balcony has seen, with the same recipe. They take turns, step by step, until each has had its
minutes of training, so that a restless machine is as fast for the one as for the other. The rate falls linearly.

The last line is JSON: ``minutes``, ``kl_before``, and for each arm ``steps``, ``tokens``, ``kl`` and ``agreement`` on held-out
rows (of the last or the averaged weights, whichever are better).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from balcony_export.data.corpus import Corpus, build_corpus
from balcony_export.model.balcony import Balcony
from balcony_export.model.balcony_files import load_balconies, rows_seen
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer
from balcony_export.train.config import TrainConfig
from balcony_export.train.schedule import make_optimizers
from balcony_export.train.trainer import Start, Trainer

EXIT = 14
SHIPPED = Path(__file__).parents[2] / "balconies" / "smollm2-135m-instruct"
HELD_OUT_ROWS = 38  # as in the runs of the shipped balconies, or rows would come again


class TwoLayers(Balcony):
    """A balcony of two decoder layers, of which all positions take the first."""

    def __init__(self, first: nn.Module, second: Balcony) -> None:
        super().__init__(second.exit_layer - 1, second.layer, second.norm)
        self.first = first

    def rows(self, hidden: torch.Tensor, where: torch.Tensor, **layer_arguments: Any) -> torch.Tensor:
        """See :meth:`Balcony.rows`."""
        return super().rows(self.first(hidden, **layer_arguments), where, **layer_arguments)


class Arm:
    """A trainer that counts its own time, and whose rate follows it."""

    def __init__(self, name: str, corpus: Corpus, options: argparse.Namespace, work: Path) -> None:
        model = load_model(demo_model_path(), attn_implementation="sdpa")
        balcony = load_balconies(SHIPPED, model, (EXIT,))[EXIT]
        if name == "two":
            layers: Any = model.model.layers
            balcony = TwoLayers(copy.deepcopy(layers[EXIT - 1]), balcony)
        config = TrainConfig(
            exits=(balcony.exit_layer,), minutes=options.minutes, rate=options.rate, vector_rate=options.rate / 2,
            decay_share=1.0, state_weight=0.0,
        )  # fmt: skip
        seen = rows_seen(SHIPPED, (EXIT,), corpus.digest) or 0
        print(f"{name}: begins after {seen:,} rows", flush=True)
        self.trainer = Trainer(model, corpus, config, work / name, start=Start({balcony.exit_layer: balcony}, seen))
        if isinstance(balcony, TwoLayers):
            layered: list[tuple[Any, float]] = [
                (balcony.first, options.first_share),
                (balcony.layer, 1.0),
                (balcony.norm, 1.0),
            ]
            self.trainer.learners[balcony.exit_layer].optimizers = [
                optimizer
                for module, share in layered
                for optimizer in make_optimizers(
                    module.parameters(),
                    "muon",
                    share * config.rate,
                    share * config.vector_rate,
                    0.0,
                    self.trainer.dtype,
                )
            ]
        self.trainer.clock = lambda: self.spent_s
        self.spent_s = 0.0
        ((self.before, _),) = self.trainer.evaluate().values()

    def step(self) -> None:
        """Train one step."""
        begun = time.monotonic()
        self.trainer.train_step()
        self.spent_s += time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of text to distil on")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each arm")
    parser.add_argument("--rate", type=float, default=2e-3, help="Muon's rate")
    parser.add_argument("--first-share", type=float, default=0.25, help="the first layer's share of the rate")
    options = parser.parse_args()
    corpus = build_corpus(
        [options.data], load_tokenizer(demo_model_path()), seq_len=512, seed=0, held_out_rows=HELD_OUT_ROWS
    )
    with tempfile.TemporaryDirectory() as work:
        arms = {name: Arm(name, corpus, options, Path(work)) for name in ("one", "two")}
        reported = 0.0
        while any(arm.trainer.done < 1 for arm in arms.values()):
            arm = min(arms.values(), key=lambda one: one.spent_s)
            arm.step()
            if arm.spent_s > reported + 60:
                reported = arm.spent_s
                steps = ", ".join(f"{name} {one.trainer.step}" for name, one in arms.items())
                print(f"{reported / 60:.0f} min each, steps: {steps}", flush=True)
        results: dict[str, Any] = {}
        for name, arm in arms.items():
            ((kl, agreement, _),) = arm.trainer.judged().values()
            results[name] = {
                "steps": arm.trainer.step,
                "tokens": arm.trainer.tokens,
                "kl": round(kl, 4),
                "agreement": round(agreement, 4),
            }
            print(f"{name}: {arm.trainer.step} steps, KL {arm.before:.4f} to {kl:.4f}, agreement {agreement:.4f}")
    before = {name: round(arm.before, 4) for name, arm in arms.items()}
    print(json.dumps({"benchmark": "two_layers", "minutes": options.minutes, "kl_before": before, "arms": results}))


if __name__ == "__main__":
    main()
