"""Many tokens in one process: resident memory must stay flat over budgets, cancels, rollbacks, turns and batches.

    python -m benchmarks.engine.soak BUNDLE [--tokens 200000] [--seed 0] [--allowed-growth 0.02]

Each round draws a budget (none, a fixed exit, a target that changes in the middle of a reply), a prompt and a way to use the
engine: a reply read to its end, one cancelled or closed half-way, a batch, a conversation with idle catch-up, or a bare
sequence that is advanced and rolled back. Resident memory (VmRSS) is read after 10,000 tokens (after a tenth of the tokens
if that is less) and at the end, each time after a garbage collection. The output ends with one JSON line; exit code 1 if
memory grew by more than allowed.

Resident memory includes memory that the allocator keeps for later. If it stays flat, nothing leaks.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import balcony_edge
from balcony_edge.budget import Budget
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.reply import TokenStream
from benchmarks.peer_workers.worker import memory_mb

#: Tokens after which arenas, caches and code paths have reached their final size.
SETTLED_TOKENS = 10_000
#: Longest prompt and reply of a round, in tokens; shorter if the context is short.
LONGEST = 96


class Soak:
    """Rounds of mixed use on one loaded bundle. Every kind of round makes some tokens and returns their number."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.random = llm, random.Random(seed)
        self.longest = min(LONGEST, llm.engine.manifest.model.context_length // 2)
        self.vocabulary = llm.engine.manifest.model.vocab_size
        self.rounds: Counter[str] = Counter()
        kinds: list[Callable[[], int]] = [
            self.reply,
            self.reply,
            self.cancelled,
            self.closed,
            self.rollbacks,
            self.batch,
        ]
        if "chat_template.jinja" in llm.engine.manifest.files:
            kinds.append(self.conversation)
        self.kinds = kinds

    def round(self) -> int:
        """Run one round of a random kind; returns the number of tokens that it made."""
        kind = self.random.choice(self.kinds)
        self.rounds[kind.__name__] += 1
        self.llm.budget = self.budget()
        return kind()

    def budget(self) -> Budget:
        """No target, a fixed exit, bounds, or a target between the prices of the shallowest and the deepest exit."""
        exits, costs = self.llm.exit_layers, self.llm.costs
        low, high = costs.steady_ms(exits[0], self.longest), costs.steady_ms(exits[-1], self.longest)
        choices = (
            Budget(),
            Budget(exit_layer=self.random.choice(exits)),
            Budget(max_exit=self.random.choice(exits)),
            Budget(tpot_ms=self.random.uniform(0.8 * low, 1.5 * high), dwell_tokens=self.random.choice((0, 8))),
        )
        return self.random.choice(choices)

    def prompt(self) -> list[int]:
        """Random tokens."""
        return [self.random.randrange(self.vocabulary) for _ in range(self.random.randint(1, self.longest))]

    def sampling(self) -> SamplingParams:
        """Greedy, or sampled with penalties."""
        if self.random.random() < 0.5:
            return SamplingParams()
        seed = self.random.randrange(2**31)
        return SamplingParams(temperature=1.0, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=seed)

    def reply(self) -> int:
        """Read a reply to its end; the budget changes in the middle."""
        change = self.random.randint(1, self.longest)
        made = 0
        for made, _ in enumerate(self._stream(), 1):
            if made == change:
                self.llm.budget = self.budget()
        return made

    def cancelled(self) -> int:
        """Cancel a reply half-way."""
        stream = self._stream()
        made, last = 0, self.random.randint(1, self.longest)
        for made, _ in enumerate(stream, 1):
            if made == last:
                stream.cancel()
        return made

    def closed(self) -> int:
        """Close a reply half-way."""
        last = self.random.randint(1, self.longest)
        with self._stream() as stream:
            for made, _ in enumerate(stream, 1):
                if made == last:
                    return made
        return len(stream.reply.tokens)

    def rollbacks(self) -> int:
        """Run a bare sequence with a random schedule of exits, chunks and rollbacks."""
        sequence = self.llm.engine.new_sequence(max_length=2 * self.longest)
        made = 0
        for _ in range(self.random.randint(1, 24)):
            room = sequence.max_length - sequence.length
            if room < 8 or (sequence.length and self.random.random() < 0.3):
                sequence.rollback(self.random.randint(0, sequence.length))
                continue
            tokens = self.prompt()[: self.random.randint(1, 8)]
            sequence.advance(self.random.choice(self.llm.exit_layers), tokens)
            sequence.catch_up(self.random.randint(0, 16))
            made += len(tokens)
        return made

    def batch(self) -> int:
        """Generate several replies together."""
        length, count, new = self.random.randint(1, 16), self.random.randint(2, 4), self.random.randint(1, 24)
        prompts = [[self.random.randrange(self.vocabulary) for _ in range(length)] for _ in range(count)]
        self.llm.generate_batch(prompts, max_new_tokens=new, sampling=self.sampling())
        return count * new

    def conversation(self) -> int:
        """Run turns of a conversation that reuse one another's rows, with idle catch-up between them."""
        chat = self.llm.chat(system="Be brief.")
        made = 0
        for turn in range(self.random.randint(1, 3)):
            if chat.sequence.length + 2 * self.longest > chat.sequence.max_length:
                break
            with chat.catching_up():
                pass
            made += sum(1 for _ in chat.send(f"turn {turn}", max_new_tokens=16, sampling=self.sampling()))
        return made

    def _stream(self) -> TokenStream:
        count = self.random.randint(1, self.longest)
        return self.llm.stream(
            self.prompt(), max_new_tokens=count, sampling=self.sampling(), ignore_eos=True, logprobs=2
        )


def resident_mb() -> float:
    """Resident memory of this process in megabytes, after a garbage collection."""
    gc.collect()
    return memory_mb()["rss"]


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description="Resident memory over many tokens of mixed use.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allowed-growth", type=float, default=0.02)
    options = parser.parse_args()
    settled = min(SETTLED_TOKENS, options.tokens // 10)
    with balcony_edge.load(options.bundle) as llm:
        soak = Soak(llm, options.seed)
        begin, made = time.monotonic(), 0
        settled_mb: float | None = None
        shown = 0
        while made < options.tokens:
            made += soak.round()
            if settled_mb is None and made >= settled:
                settled_mb = resident_mb()
                print(f"{made} tokens: {settled_mb:.1f} MB resident", file=sys.stderr)
            if made - shown >= options.tokens / 20:
                shown = made
                print(f"{made} tokens: {resident_mb():.1f} MB, {time.monotonic() - begin:.0f} s", file=sys.stderr)
        end_mb = resident_mb()
    assert settled_mb is not None
    growth = end_mb / settled_mb - 1
    print(f"resident {settled_mb:.1f} MB after {settled} tokens, {end_mb:.1f} MB after {made}: {growth:+.2%}")
    document = {
        "benchmark": "soak",
        "bundle": llm.engine.manifest.model.name,
        "tokens": made,
        "seconds": round(time.monotonic() - begin, 1),
        "settled_tokens": settled,
        "settled_mb": round(settled_mb, 2),
        "end_mb": round(end_mb, 2),
        "growth": round(growth, 5),
        "allowed_growth": options.allowed_growth,
        "rounds": dict(sorted(soak.rounds.items())),
        "passed": growth <= options.allowed_growth,
    }
    print(json.dumps(document))
    sys.exit(0 if document["passed"] else 1)


if __name__ == "__main__":
    main()
