"""Whether self-speculation is lossless: greedy replies by draft rounds compared with those of the full depth.

    python -m benchmarks.control.lossless BUNDLE --prompts TEXT.jsonl [--count 100]

Each prompt gets ``TOKENS`` tokens at the full depth, and then a second reply on another sequence. That sequence first gets
some tokens from a shallow exit, which are rolled back, so that it has a backlog and stale rows. The reply follows by draft
rounds, with prices under which rounds always pay. The budget changes every ``STRETCH`` tokens: rounds, plain steps, rounds
under a latency target.

If products are exact (float32, int4 at accuracy level 1), both replies must have the same tokens. At level 4 one row and many
rows are rounded differently under any policy. The flip rate measures this: the share of the full depth's own tokens that a
single pass over the same text would not choose. The rate of divergences (the first token that differs in a reply) is compared
with the flip rate.

The last line is JSON: ``replies``, ``equal``, ``compared`` (tokens up to the first that differs), ``divergence_rate``,
``flip_rate`` and ``flip_se``, ``speculated`` (share of tokens from rounds), ``bars``. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.device.machine import cpu_name
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.llm import LLM
from benchmarks.control.policies import always_paying, has_exact_products, new_speculator, read_prompts

TOKENS, STRETCH, SHALLOW_TOKENS = 128, 16, 6
#: Budgets of the stretches of a reply; all of them give the full depth's tokens.
BUDGETS = (Budget(policy="lossless"), Budget(), Budget(policy="lossless", tpot_ms=1000.0))


def spoilt_and_speculated(llm: LLM, prompt: list[int], turn: int) -> tuple[list[int], int]:
    """Make a reply by rounds on a sequence with a backlog and rolled-back rows; also return the tokens from rounds."""
    sequence = llm.engine.new_sequence(max_length=len(prompt) + TOKENS)
    llm.budget = Budget(exit_layer=llm.exit_layers[turn % (len(llm.exit_layers) - 1)])
    for _ in llm.stream(prompt, max_new_tokens=SHALLOW_TOKENS, ignore_eos=True, sequence=sequence):
        pass
    # One that served earlier replies would have learned the true prices, under which rounds do not pay.
    llm._learned.speculator = new_speculator(llm)
    llm.budget = BUDGETS[0]
    reply, speculated = [], 0
    for token in llm.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True, sequence=sequence):
        reply.append(token.id)
        speculated += token.decision.drafted > 0
        llm.budget = BUDGETS[len(reply) // STRETCH % len(BUDGETS)]
    return reply, speculated


def measure(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Measure everything except the bars."""
    full = llm.exit_layers[-1]
    llm.costs = always_paying(measure_prices(llm.engine))
    equal = compared = flips = speculated = 0
    for turn, prompt in enumerate(prompts):
        llm.budget = Budget()
        plain = [token.id for token in llm.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True)]
        reply, rounds = spoilt_and_speculated(llm, prompt, turn)
        speculated += rounds
        equal += plain == reply
        compared += next((place for place, (a, b) in enumerate(zip(plain, reply, strict=True), 1) if a != b), TOKENS)
        sequence = llm.engine.new_sequence(max_length=len(prompt) + TOKENS)
        logits = sequence.advance(full, [*prompt, *plain[:-1]], num_logits=TOKENS)[0]
        flips += int((logits.argmax(-1) != np.array(plain)).sum())
        if (turn + 1) % 10 == 0:
            print(f"{turn + 1} prompts: {equal} equal, {flips} flips", file=sys.stderr)
    total = len(prompts) * TOKENS
    return {
        "replies": len(prompts),
        "equal": equal,
        "compared": compared,
        "divergence_rate": (len(prompts) - equal) / compared,
        "flip_rate": flips / total,
        "flip_se": (max(flips, 1) / total * (1 - flips / total) / total) ** 0.5,
        "speculated": round(speculated / total, 3),
    }


def is_noise(found: dict[str, Any]) -> bool:
    """Whether the divergence rate is within two standard errors of the difference of the two rates, if both are the same."""
    flip_rate, flip_se = found["flip_rate"], found["flip_se"]
    # Of as many tokens as were compared, the error of the same rate: its square is that of flip_se times the ratio of tokens.
    error = flip_se * (1 + found["replies"] * TOKENS / found["compared"]) ** 0.5
    return bool(found["divergence_rate"] <= flip_rate + 2 * error)


def main() -> int:
    """Parse the command line, run, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description="Self-speculation compared with the full depth; see the module's docstring."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help='JSON Lines with "instruction" or "text"')
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    with LLM.open(arguments.bundle) as llm:
        exact = has_exact_products(llm.engine.manifest)
        found = measure(llm, read_prompts(llm, arguments.prompts, arguments.count))
    if exact:
        bars = {"replies are the full depth's": found["equal"] == found["replies"]}
    else:
        bars = {"divergence rate <= flip rate + 2 s.e.": is_noise(found)}
    document = {"benchmark": "lossless", "bundle": str(arguments.bundle), "cpu": cpu_name(), "tokens": TOKENS, **found}
    print(json.dumps({**document, "bars": bars}))
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
