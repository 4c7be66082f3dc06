"""Policies compared on the same prompts: plain, fixed exits, a budget between two exits, and self-speculation.

    python benchmarks/control/policies.py BUNDLE --prompts TEXT.jsonl

Each policy makes greedy replies of ``TOKENS`` tokens to the first texts of a file, in interleaved rounds
(:mod:`benchmarks.rounds`). Reported are tokens a second (median over the rounds of all prompts), the ratio to plain within
a round, and the agreement: the share of tokens that the full depth would choose after the same prefix.

``speculative, auto`` is what a user gets: draft rounds only if the runtime expects them to pay. ``speculative, forced`` shows
the cost of rounds on this machine: its prices are replaced by ones under which rounds always pay. ``--calibrate TEXT`` learns
thresholds of confidence exits on a text and adds ``confident`` in the same two ways, forced once for each of ``PROMISES``.
The forced ones give a curve of agreement over speed, for comparison with the fixed exits. ``--plot FILE`` draws it.

The last line on stdout is one JSON object: ``policies`` (name → ``tokens_per_s``, ``of_plain``, ``agreement``,
``same_as_plain``: share of tokens that equal those of the plain reply, ``speculated``: share of tokens from rounds, ``kept``:
share of drafts kept, ``early``: share of tokens that exited early, ``joules_per_token``: of the board, else the CPU, else the
GPU; null if no sensor measures any), ``drafts`` and ``bars``. ``drafts`` has the number of drafts at each exit with which
rounds would be fastest by the prices: ``kept``, the share of these drafts that the plain replies would keep, and ``of_plain``.
The bars: policies on auto reach at least 0.97 of plain, and lossless replies equal the plain ones. If one is missed, the exit
code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, get_args

import numpy as np

from balcony_edge.budget import Budget, Rail
from balcony_edge.bundle.manifest import ConfidenceSpec, Manifest
from balcony_edge.device.costs import CostModel, UnitCost
from balcony_edge.device.machine import cpu_name
from balcony_edge.device.readings import adding_up
from balcony_edge.errors import InputError
from balcony_export.data.documents import read_documents, read_records
from balcony_runtime.backends.base import Array
from balcony_runtime.decoding.confident import Confident
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.speculate import MOST_DRAFTS, Speculator
from balcony_runtime.decoding.thresholds import compare_exits, learn
from balcony_runtime.llm import LLM
from benchmarks.rounds import Neighbours, interleave, ratio

TOKENS, PROMPTS, ROUNDS = 96, 6, 5
#: Shares of tokens that may exit early with another token than the full depth's.
PROMISES = (0.02, 0.05, 0.1, 0.2)
CALIBRATION_TOKENS = 6000
#: Lines of a file of prompts.
FORM = 'JSON Lines with "instruction" or "text"'


class Run(NamedTuple):
    """Result of one policy over all prompts, once."""

    seconds: float
    replies: list[list[int]]
    drafted: int
    made: int
    kept: int
    early: int
    joules: float | None


class Policy(NamedTuple):
    """A budget, the prices for its decisions, what it has learned of rounds, and the thresholds if it uses confidence exits.

    Without a speculator each run has a new one: it would learn the true prices, and forced rounds would not be forced any more.
    """

    budget: Budget
    costs: CostModel
    speculator: Speculator | None
    thresholds: ConfidenceSpec | None = None


def new_speculator(llm: LLM) -> Speculator:
    """One that has learned nothing."""
    return Speculator(llm.exit_layers, llm.engine.manifest.agreement)


def energy_j(llm: LLM) -> float | None:
    """Energy counter of the first rail that a sensor measures; None if none does. A battery's gauge lags by several runs."""
    readings = [one for one in llm.readings() if one.joules is not None and not one.source.startswith("battery:")]
    for rail in get_args(Rail):
        if own := [one for one in readings if one.scope == rail]:
            return sum(one.joules or 0.0 for one in adding_up(own, rail))
    return None


def _run(llm: LLM, policy: Policy, prompts: list[list[int]]) -> Run:
    llm.costs = policy.costs
    llm._settings.budgets = policy.budget, policy.budget
    llm._learned.speculator = policy.speculator or new_speculator(llm)
    llm._learned.confident = Confident(llm.exit_layers, policy.thresholds)
    replies, drafted, made, kept, early = [], 0, 0, 0, 0
    begin, begin_j = time.perf_counter(), energy_j(llm)
    for prompt in prompts:
        # a sequence of its own: rows of the last policy's reply to this prompt would spare this one the prompt
        sequence = llm.engine.new_sequence()
        tokens = list(llm.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True, sequence=sequence))
        replies.append([token.id for token in tokens])
        drafted += sum(token.decision.drafted > 0 for token in tokens)
        early += sum(token.exit_layer < llm.exit_layers[-1] for token in tokens)
        for token in tokens:
            if token.latency_ms and (found := re.search(r"drafted (\d+) at \d+, kept (\d+)", token.reason)):
                made, kept = made + int(found[1]), kept + int(found[2])
    seconds, end_j = time.perf_counter() - begin, energy_j(llm)
    joules = None if begin_j is None or end_j is None else end_j - begin_j
    return Run(seconds, replies, drafted, made, kept, early, joules)


def _hits(llm: LLM, exit_layer: int, prompts: list[list[int]], replies: list[list[int]]) -> list[Array]:
    """At which tokens of each reply an exit, given the reply so far, would have chosen the same; (len(reply),) each."""
    found = []
    for prompt, reply in zip(prompts, replies, strict=True):
        sequence = llm.engine.new_sequence(max_length=len(prompt) + len(reply))
        logits = sequence.advance(exit_layer, [*prompt, *reply[:-1]], num_logits=len(reply))[0]
        found.append(logits.argmax(-1) == np.array(reply))
    return found


def _agreement(llm: LLM, prompts: list[list[int]], replies: list[list[int]]) -> float:
    """Share of tokens that the full depth would have written after the same text."""
    return float(np.concatenate(_hits(llm, llm.exit_layers[-1], prompts, replies)).mean())


def best_drafts(llm: LLM, costs: CostModel, prompts: list[list[int]], replies: list[list[int]]) -> dict[str, Any]:
    """Number of drafts at each exit with which rounds would make replies of the full depth fastest; exit → figures."""
    found, plain_ms, speculator = {}, costs.steady_ms(llm.exit_layers[-1], 128), new_speculator(llm)
    for exit_layer in llm.exit_layers[:-1]:
        hits, draft_ms = _hits(llm, exit_layer, prompts, replies), costs.steady_ms(exit_layer, 128)
        rows = []
        for drafts in range(1, MOST_DRAFTS + 1):
            kept = mean(count for hit in hits for count in kept_in_rounds(hit.tolist(), drafts))
            took_ms = drafts * draft_ms + speculator._check_ms(costs, exit_layer, drafts, 128)
            of_plain = (1 + kept) * plain_ms / took_ms
            rows.append({"drafts": drafts, "kept": round(kept / drafts, 3), "of_plain": round(of_plain, 3)})
        found[str(exit_layer)] = max(rows, key=lambda row: row["of_plain"])
    return found


def kept_in_rounds(hits: list[bool], drafts: int) -> list[int]:
    """Drafts that each round of a reply keeps, if ``hits`` says at which of its tokens the exit would have chosen the same."""
    kept, at = [], 1  # the first token is the prompt's
    while at + drafts <= len(hits):
        kept.append(next((count for count in range(drafts) if not hits[at + count]), drafts))
        at += kept[-1] + 1
    return kept


def has_exact_products(manifest: Manifest) -> bool:
    """Whether one row and many rows are rounded alike, so that draft rounds must give the tokens of the full depth."""
    quantization = manifest.quantization
    return manifest.precision != "float16" and (quantization is None or quantization.accuracy_level == 1)


def always_paying(costs: CostModel) -> CostModel:
    """Prices under which shallow steps are almost free and deep ones are not, so that rounds and trials always pay."""
    return replace(costs, stages=(UnitCost(1e-3), *(UnitCost(1e3) for _ in costs.exits[1:])))


def read_prompts(llm: LLM, path: Path, count: int) -> list[list[int]]:
    """Tokens of the first texts of a file, each cut to 400 characters.

    Raises:
        InputError: the file cannot be read, or a line has no text.
    """
    found = []
    for where, record in islice(read_records(path, FORM), count):
        fields = record if isinstance(record, dict) else {}
        text = fields.get("instruction") or fields.get("text")
        if not isinstance(text, str):
            raise InputError(f'{where}: has neither an "instruction" nor a "text": give {FORM}')
        found.append(llm.encode(text[:400]))
    return found


def learned_thresholds(llm: LLM, path: Path) -> dict[float, ConfidenceSpec]:
    """Learn thresholds on the beginning of a text; returns promise → thresholds."""
    texts = [document.text for document in read_documents(path)]
    documents: list[list[int]] = []
    while texts and sum(map(len, documents)) < CALIBRATION_TOKENS:
        documents.append(llm.encode(texts.pop(0), chat=False)[:128])
    compared = compare_exits(llm.engine, documents)
    return {promise: learn(compared, path.name, promise, 0.95) for promise in PROMISES}


def measure(
    llm: LLM, prompts: list[list[int]], rounds: int, thresholds: dict[float, ConfidenceSpec]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure everything except the bars: policies, and what drafts are worth at each exit."""
    costs = measure_prices(llm.engine)
    exits, full = llm.exit_layers, llm.exit_layers[-1]
    deep_ms, below_ms = (costs.steady_ms(exit_layer, 128) for exit_layer in (full, exits[-2]))
    free = always_paying(costs)

    def policy(budget: Budget, prices: CostModel = costs, spec: ConfidenceSpec | None = None) -> Policy:
        speculator = None if prices is free else new_speculator(llm)
        return Policy(budget, prices, speculator, spec)

    policies = {
        "plain": policy(Budget()),
        **{f"exit {exit_layer}": policy(Budget(exit_layer=exit_layer)) for exit_layer in exits[:-1]},
        "budgeted": policy(Budget(tpot_ms=(deep_ms + below_ms) / 2, probability=0.5)),
        "speculative, auto": policy(Budget(policy="lossless")),
        "speculative, forced": policy(Budget(policy="lossless"), free),
    }
    for promise, spec in thresholds.items():
        policies[f"confident {promise:.0%}, forced"] = policy(Budget(policy="confident"), free, spec)
    if thresholds:
        policies["confident, auto"] = policy(Budget(policy="confident"), spec=next(iter(thresholds.values())))
    samples = interleave({name: partial(_run, llm, policy, prompts) for name, policy in policies.items()}, rounds)
    plain = samples["plain"]
    found = {}
    for name, runs in samples.items():
        last, joules = runs[-1], [run.joules for run in runs if run.joules is not None]
        found[name] = {
            "tokens_per_s": round(len(prompts) * TOKENS / median(run.seconds for run in runs), 1),
            "of_plain": round(ratio([run.seconds for run in plain], [run.seconds for run in runs]), 3),
            "agreement": round(_agreement(llm, prompts, last.replies), 4),
            "same_as_plain": round(
                float(np.mean([a == b for x, y in zip(last.replies, plain[-1].replies, strict=True)
                               for a, b in zip(x, y, strict=True)])), 4,
            ),
            "speculated": round(last.drafted / (len(prompts) * TOKENS), 3),
            "early": round(last.early / (len(prompts) * TOKENS), 3),
            "kept": round(last.kept / last.made, 3) if last.made else None,
            "joules_per_token": round(median(joules) / (len(prompts) * TOKENS), 4) if joules else None,
        }  # fmt: skip
    return found, best_drafts(llm, costs, prompts, plain[-1].replies)


def plot(policies: dict[str, Any], output: Path) -> None:
    """Draw the agreement of each policy with the full depth over its tokens a second."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only the plot needs it

    from benchmarks.labels import name_points  # noqa: PLC0415 - likewise

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for names in (
        ["plain", *reversed([n for n in policies if n.startswith("exit")])],
        [n for n in policies if "%" in n],
    ):
        rows = [policies[name] for name in names]
        axes.plot([row["tokens_per_s"] for row in rows], [row["agreement"] for row in rows], ":", color="0.6", zorder=0)
    for name, row in policies.items():
        kind = name.split()[0].rstrip(",")
        marker = {"plain": "*", "exit": "o", "budgeted": "s", "speculative": "^", "confident": "D"}[kind]
        axes.plot(row["tokens_per_s"], row["agreement"], marker, markersize=9)
    axes.set_xlabel("tokens a second")
    axes.set_ylabel("share of tokens that are the full depth's")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2, y=0.1)
    name_points(axes, [(row["tokens_per_s"], row["agreement"]) for row in policies.values()], list(policies))
    figure.savefig(output, dpi=110)


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description="Comparison of policies; see the module's docstring.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help=FORM)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calibrate", type=Path, help='JSON Lines with "text", for confidence exits')
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    neighbours = Neighbours()
    with LLM.open(arguments.bundle) as llm:
        prompts = read_prompts(llm, arguments.prompts, PROMPTS)
        thresholds = learned_thresholds(llm, arguments.calibrate) if arguments.calibrate else {}
        policies, drafts = measure(llm, prompts, arguments.rounds, thresholds)
        exact = has_exact_products(llm.engine.manifest)
    bars = {
        f"{name} >= 0.97 of plain": row["of_plain"] >= 0.97
        for name, row in policies.items()
        if name in ("speculative, auto", "confident, auto")
    }
    if exact:
        lossless = [policies[f"speculative, {kind}"]["same_as_plain"] for kind in ("auto", "forced")]
        bars["lossless replies are the plain ones"] = min(lossless) == 1.0
    document = {
        "benchmark": "policies",
        "bundle": str(arguments.bundle),
        "cpu": cpu_name(),
        "tokens": TOKENS,
        "prompts": len(prompts),
        "rounds": arguments.rounds,
        **neighbours.report(),
        "policies": policies,
        "drafts": drafts,
        "bars": bars,
    }
    for name, row in policies.items():
        print(f"{name:22} {row}", file=sys.stderr)
    print(json.dumps(document))
    if arguments.plot is not None:  # last: a picture that cannot be written costs no figures
        plot(policies, arguments.plot)
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
