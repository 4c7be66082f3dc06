"""Comparison of recipes for distillation on a small budget: same number of training tokens, same held-out rows.

    python benchmarks/paper/recipes.py --data DIR [--tokens 200000 | --minutes M] [--only NAME ...] [--work DIR]

The name of each trial says how it differs from the shipped recipe; ``paper`` is the paper's rate of 5e-4 and cosine
(section 4.1) on this budget, with AdamW: the paper names no optimizer. Rows, their order and the held-out rows are the same
for all trials with the same data, and they share the frozen backbone's states. A trial that was run before with the same
recipe, tokens and text is read from ``--work``. With ``--minutes`` trials are compared at equal time, compilation left out:
each makes its own passes through the backbone, and its rate follows the time.

The last line is JSON: ``tokens``, ``minutes``, ``rows_held_out``, ``trials`` (name → ``kl`` and ``agreement`` per exit,
``kl_sum``, ``tokens``, ``seconds``), ``against_paper`` (1 - shipped ``kl_sum`` / the paper's) and ``winner``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from balcony_edge.errors import InputError
from balcony_export.data.corpus import Corpus, Rows, build_corpus
from balcony_export.data.documents import read_records
from balcony_export.model.balcony import Balcony
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer
from balcony_export.train.config import TrainConfig
from balcony_export.train.loss import VocabularyPart, VocabularySample
from balcony_export.train.trainer import Trainer

EXITS = (14, 17, 20)
SEQ_LEN = 512
HELD_OUT_ROWS = 48


def _scale_norm(factor: float) -> Callable[[Trainer], None]:
    def start(trainer: Trainer) -> None:
        for balcony in trainer.balconies.values():
            for parameter in balcony.norm.parameters():
                parameter.data.mul_(factor)

    return start


def layer_of(balcony: Balcony) -> nn.Module:
    """Decoder layer of a balcony."""
    assert balcony.layer is not None
    return balcony.layer  # type: ignore[no-any-return]


def _silent_layer(trainer: Trainer) -> None:
    for balcony in trainer.balconies.values():
        for name, parameter in layer_of(balcony).named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.zero_()


def _next_layer(trainer: Trainer) -> None:
    for exit_layer, balcony in trainer.balconies.items():
        source: Any = trainer.exits.parts.layers[exit_layer]
        layer_of(balcony).load_state_dict({name: value.float() for name, value in source.state_dict().items()})


def _next_norm(trainer: Trainer) -> None:
    for exit_layer, balcony in trainer.balconies.items():
        layer: Any = trainer.exits.parts.layers[exit_layer]
        balcony.norm.load_state_dict(layer.input_layernorm.state_dict())


class _SeesSinks(Trainer):
    """A trainer whose loss includes the massive activations: the first position of each row is always sampled."""

    def positions_of(self, rows: Rows, states: torch.Tensor, seeds: list[list[int]]) -> torch.Tensor:
        where = super().positions_of(rows, torch.ones_like(states), seeds)
        first = torch.arange(len(rows.tokens), device=where.device) * self.config.seq_len
        return torch.cat([first, where]).sort().values


class _ExactAtTheEnd(Trainer):
    """A trainer that compares the whole vocabulary in the last fifth of its steps."""

    def _part(self, rows: npt.NDArray[np.int64]) -> VocabularyPart | None:
        return None if self.done >= 0.8 else super()._part(rows)


class _LikelyDraws(VocabularySample):
    """Draws the other half by the full model's mean probabilities to the power of one half, not evenly.

    Systematic sampling: token i is drawn with probability min(1, c·√p), and its logit gets the log of the inverse.
    """

    probabilities: torch.Tensor  # (V,), of the ranking's tokens by id

    def draw(self, whole: VocabularyPart, text: torch.Tensor, seed: Sequence[int]) -> VocabularyPart:
        chosen = self._chosen(text)
        share = self.probabilities.sqrt()
        share[chosen] = 0
        count, certain = self.size - len(chosen), torch.zeros_like(share, dtype=torch.bool)
        while True:  # those whose share is above 1 are drawn for certain, and the others share what is left
            scaled = share * (~certain) * ((count - certain.sum()) / (share * (~certain)).sum())
            if not (scaled > 1).any():
                break
            certain |= scaled > 1
        scaled[certain] = 1
        random = np.random.default_rng(seed)
        order = torch.from_numpy(random.permutation(len(scaled)))
        steps = (scaled[order].cumsum(0) + random.random()).floor()
        drawn = order[steps.diff(prepend=steps.new_zeros(1)) > 0]
        ids = torch.cat([chosen, drawn])
        offset = torch.cat([torch.zeros(len(chosen)), -scaled[drawn].log()])
        weight = whole.weight[ids]
        return VocabularyPart(weight, offset.float(), weight)


class _DrawsLikely(Trainer):
    """A trainer whose drawn tokens are the likely ones (:class:`_LikelyDraws`)."""

    def _vocabulary_sample(self) -> VocabularySample | None:
        likely = self.head.summed_probabilities(self._first_states()).double()
        sample = _LikelyDraws(self.config.vocabulary, likely.argsort(descending=True))
        sample.probabilities = likely / likely.sum()
        return sample


@dataclass(frozen=True)
class Trial:
    """Differences of a trial from the shipped recipe."""

    config: dict[str, Any] = field(default_factory=dict)
    start: Callable[[Trainer], None] = lambda trainer: None
    data: str = "given"  # or "sampled" (replies of the full model) or "mixed" (half of each)
    trainer: type[Trainer] = Trainer


TRIALS: dict[str, Trial] = {
    "shipped": Trial(),
    "shipped, seed 1": Trial({"seed": 1}),
    "paper: AdamW 5e-4, cosine, 4 rows": Trial(
        {
            "optimizer": "adamw",
            "rate": 5e-4,
            "vector_rate": 5e-4,
            "schedule": "cosine",
            "batch_rows": 4,
            "micro_rows": 4,
            "vocabulary": 0,
            "state_weight": 0.0,
        }
    ),
    "paper's schedule, 2 rows": Trial({"optimizer": "adamw", "rate": 5e-4, "vector_rate": 5e-4, "schedule": "cosine"}),
    "AdamW 5e-3": Trial({"optimizer": "adamw", "rate": 5e-3, "vector_rate": 5e-3}),
    "AdamW 2.5e-3": Trial({"optimizer": "adamw", "rate": 2.5e-3, "vector_rate": 2.5e-3}),
    "1 row a step": Trial({"batch_rows": 1, "micro_rows": 1}),
    "4 rows a step": Trial({"batch_rows": 4, "micro_rows": 4}),
    "Muon 1e-2": Trial({"rate": 1e-2}),
    "Muon 3e-3": Trial({"rate": 3e-3}),
    "cosine": Trial({"schedule": "cosine"}),
    "the whole vocabulary": Trial({"vocabulary": 0}),
    "4,096 of the vocabulary": Trial({"vocabulary": 4096}),
    "256 positions": Trial({"positions": 256}),
    "256 positions, the whole vocabulary": Trial({"positions": 256, "vocabulary": 0}),
    "256 positions, the whole vocabulary, the KL alone": Trial(
        {"positions": 256, "vocabulary": 0, "state_weight": 0.0}
    ),
    "without the states' distance": Trial({"state_weight": 0.0}),
    "half the weight of the states' distance": Trial({"state_weight": 0.25}),
    "128 positions": Trial({"positions": 128}),
    "64 positions": Trial({"positions": 64}),
    "8 rows of 128 a step": Trial({"seq_len": 128, "batch_rows": 8, "micro_rows": 8}),
    "4 rows of 256 a step": Trial({"seq_len": 256, "batch_rows": 4, "micro_rows": 4}),
    "1 row of 1,024 a step": Trial({"seq_len": 1024, "batch_rows": 1, "micro_rows": 1}),
    "random layer and norm": Trial({"start": "random"}),
    "silent layer (output projections zero)": Trial(start=_silent_layer),
    "next layer": Trial(start=_next_layer),
    "norm of the next layer": Trial(start=_next_norm),
    "norm × 0.3": Trial(start=_scale_norm(0.3)),
    "norms at 3e-2": Trial({"vector_rate": 3e-2}),
    "massive activations in the loss": Trial(trainer=_SeesSinks),
    "the whole vocabulary in the last fifth": Trial(trainer=_ExactAtTheEnd),
    "likely tokens drawn": Trial(trainer=_DrawsLikely),
    "sampled text": Trial(data="sampled"),
    "half sampled text": Trial(data="mixed"),
}


def sample_replies(model: Any, tokenizer: Any, data: Path, output: Path, tokens: int, batch: int = 48) -> None:
    """Write replies of the full model to the instructions in ``data`` as JSON Lines of messages."""
    records = [
        record
        for path in sorted(data.glob("*.jsonl"))
        for _, record in read_records(path, "JSON Lines")
        if isinstance(record, dict) and isinstance(record.get("instruction"), str)
    ]
    if not records:
        raise InputError(
            f'{data}: has no .jsonl file with "instruction": give a directory with one, or leave these trials out by --only'
        )
    order = np.random.default_rng(0).permutation(len(records))
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    written = 0
    with output.open("w", encoding="utf-8") as file:
        for start in range(0, len(order), batch):
            if written >= tokens:
                return
            questions = [records[index]["instruction"][:600] for index in order[start : start + batch]]
            prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
                for question in questions
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.no_grad():
                out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=256)
            replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for question, reply in zip(questions, replies, strict=True):
                if reply.strip():
                    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                    file.write(json.dumps({"messages": messages}) + "\n")
                    written += len(tokenizer(reply)["input_ids"])
            print(f"sampled {written:,} of {tokens:,} tokens", flush=True)


class Bench:
    """The model, the texts and the held-out rows, shared by all trials."""

    def __init__(self, data: Path, work: Path, tokens: int, minutes: float | None = None) -> None:
        self.data, self.work, self.tokens, self.minutes = data, work, tokens, minutes
        self.tokenizer = load_tokenizer(demo_model_path())
        self.model = load_model(demo_model_path(), attn_implementation="sdpa")
        self.corpora: dict[tuple[str, int], Corpus] = {}
        self.judge = self._trainer(Trial(), work / "judge")

    def corpus(self, kind: str, seq_len: int) -> Corpus:
        if (kind, seq_len) not in self.corpora:
            if kind == "given":
                files = [self.data]
            else:
                # Replies to another text, or of another number of tokens, are other ones.
                texts = [path.read_bytes() for path in sorted(self.data.glob("*.jsonl"))]
                asked = hashlib.sha256(b"".join(texts)).hexdigest()[:8]
                sampled = self.work / f"sampled-{self.tokens}-{asked}.jsonl"
                if not sampled.is_file():
                    part = sampled.with_suffix(".part")  # replies of an interrupted run are not taken for all
                    sample_replies(self.model, self.tokenizer, self.data, part, self.tokens)
                    part.rename(sampled)
                files = [sampled]
            if kind == "mixed":
                given, own = self.corpus("given", seq_len), self.corpus("sampled", seq_len)
                half = self.tokens // seq_len // 2
                pairs = [
                    np.concatenate([a[:half], b[:half]])
                    for a, b in ((given.train.tokens, own.train.tokens), (given.train.lengths, own.train.lengths))
                ]
                order = np.random.default_rng(0).permutation(len(pairs[0]))
                rows = Rows(pairs[0][order], pairs[1][order])
                digest = hashlib.sha256(rows.tokens.tobytes()).hexdigest()
                self.corpora[kind, seq_len] = Corpus(rows, given.held_out, given.sources | own.sources, digest)
            else:
                self.corpora[kind, seq_len] = build_corpus(
                    files, self.tokenizer, seq_len=seq_len, held_out_rows=HELD_OUT_ROWS * SEQ_LEN // seq_len
                )
        return self.corpora[kind, seq_len]

    def _trainer(self, trial: Trial, work: Path) -> Trainer:
        given: dict[str, Any] = {"exits": EXITS, "seq_len": SEQ_LEN, **trial.config}
        tokens_a_step = given["seq_len"] * given.get("batch_rows", TrainConfig(exits=EXITS, steps=1).batch_rows)
        steps = max(1, self.tokens // tokens_a_step)
        if self.minutes is None:
            given |= {"steps": steps, "warmup_steps": steps // 10, "cache_gb": 1.2}
        else:
            given |= {"minutes": self.minutes}
        config = TrainConfig(evaluate_every=10**9, checkpoint_minutes=10**9, **given)
        corpus = self.corpus(trial.data, config.seq_len)
        # Each trainer converts its own copy of the model, whose rotary tables are made in float32 before that.
        return trial.trainer(copy.deepcopy(self.model), corpus, config, work / "balconies", work=work)

    def run(self, name: str) -> dict[str, Any]:
        """Train and judge one trial; the better of the averaged and the last weights counts, as in a checkpoint."""
        trial = TRIALS[name]
        kept = self.work / "results.jsonl"
        seq_len = trial.config.get("seq_len", SEQ_LEN)
        work = self.work / f"{trial.data}-{seq_len}"  # trials with the same rows share their states here
        trainer = self._trainer(trial, work)
        key = json.dumps([name, self.tokens, asdict(trainer.config), trainer.corpus.digest])
        if kept.is_file():
            for line in kept.read_text(encoding="utf-8").splitlines():
                known: dict[str, Any] = json.loads(line)
                if known.pop("key") == key:
                    return known
        trial.start(trainer)
        for learner in trainer.learners.values():
            learner.average = {key: value.clone() for key, value in learner.balcony.state_dict().items()}
        trainer._begin()  # opens the cache of the backbone's states
        started = trainer.begun_s = time.monotonic()
        if self.minutes is not None:
            trainer.train_step()  # compiles
            started = trainer.begun_s = time.monotonic()
        while trainer.done < 1:
            trainer.train_step()
        seconds = time.monotonic() - started
        trainer.states.sync()  # for the next trials
        scores = [
            self._judged({e: b.state_dict() for e, b in trainer.balconies.items()}),
            self._judged({e: learner.average for e, learner in trainer.learners.items()}),
        ]
        best = {e: min((score[e] for score in scores), key=lambda pair: pair[0]) for e in EXITS}
        result = {
            "kl": {str(e): round(best[e][0], 4) for e in EXITS},
            "agreement": {str(e): round(best[e][1], 4) for e in EXITS},
            "kl_sum": round(sum(kl for kl, _ in best.values()), 4),
            "tokens": trainer.tokens,
            "seconds": round(seconds, 1),
        }
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")
        return result

    def _judged(self, weights: dict[int, dict[str, torch.Tensor]]) -> dict[int, tuple[float, float]]:
        for exit_layer, state in weights.items():
            self.judge.balconies[exit_layer].load_state_dict(state)
        return self.judge.evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory of text to distil on, with instructions for sampled replies"
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, help="training time of each trial, instead of --tokens")
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.data, options.work, options.tokens, options.minutes)
    results: dict[str, dict[str, Any]] = {}
    for name in options.only:
        results[name] = result = bench.run(name)
        kls, hits = ("/".join(f"{v:.2f}" for v in result[k].values()) for k in ("kl", "agreement"))
        print(f"{name:42} KL {kls}  sum {result['kl_sum']:.2f}  top-1 {hits}  {result['seconds']:.0f} s", flush=True)
    against = None
    paper = next((name for name in results if name.startswith("paper:")), None)
    if paper is not None and "shipped" in results:
        against = round(1 - results["shipped"]["kl_sum"] / results[paper]["kl_sum"], 4)
    winner = min(results, key=lambda name: results[name]["kl_sum"])
    print(
        json.dumps(
            {
                "benchmark": "recipes",
                "tokens": None if options.minutes else options.tokens,
                "minutes": options.minutes,
                "rows_held_out": HELD_OUT_ROWS,
                "trials": results,
                "against_paper": against,
                "winner": winner,
            }
        )
    )


if __name__ == "__main__":
    main()
