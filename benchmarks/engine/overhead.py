"""Python's share of a greedy decode step: everything except the calls into ONNX Runtime.

Owns item (e) of :mod:`benchmarks.engine.main_job`. Tokens are taken from ``LLM.stream`` as a user takes them, except that
the reply has a sequence of its own, outside the pool that replies share. The overhead
of a token is the wall time from its request to its arrival, minus the growth of ``State.busy_ns``, which counts from the
first ``run_with_iobinding`` call of a step to the end of its last. So it includes decision, embedding, row copies, bindings,
logits copy, argmax, detokenization and the generators.

Why it is more than a profiler shows: every pass streams its weights through the caches. So the interpreter's code and
objects come back from the last-level cache each time a call returns. With the engine stubbed out the same step takes
60 to 80 µs; with the real one it took 240 to 330 (2-core Xeon without other load). So the overhead depends on the amount of
memory that Python touches, and on the number of its turns between two calls.

The budgets: a fixed exit (no target); a target that holds an exit in place (the controller decides and stays); and a target
between two exits, where the controller also switches and works off a backlog. A sampled token, which costs a pass of NumPy over
the vocabulary, has a line of its own. The baseline is ``TokenSequence.step`` and the choice of the token in a loop: no
decision, no text, no reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from balcony_edge.budget import Budget
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from benchmarks.engine.decode import prompt
from benchmarks.rounds import interleave, p95

PROMPT_TOKENS, NEW_TOKENS = 32, 42
#: Tokens that are not counted: the first is the prefill, the second binds the decode step.
SKIPPED_TOKENS = 2
#: A target that is never missed: the controller runs and stays at the deepest exit allowed.
EASY_MS = 1000.0
#: The lines of the baseline.
BARE = "step alone"
#: The line of a sampled token, and the usual filters.
SAMPLED, SAMPLING = "sampled", SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=0)


def measure(llm: LLM, rounds: int) -> list[dict[str, Any]]:
    """Measure item ``overhead`` of the JSON line, with so many replies per budget."""
    shallow, full = llm.exit_layers[0], llm.exit_layers[-1]
    costs = measure_prices(llm.engine)
    deepest_ms, below_ms = (costs.steady_ms(exit_layer, PROMPT_TOKENS) for exit_layer in (full, llm.exit_layers[-2]))
    between_ms = round((deepest_ms + below_ms) / 2, 2)
    budgets = {
        f"exit {full}": Budget(exit_layer=full),
        f"exit {shallow}": Budget(exit_layer=shallow),
        f"exit {full}, target": Budget(tpot_ms=EASY_MS),
        f"exit {shallow}, target": Budget(tpot_ms=EASY_MS, max_exit=shallow),
        "mixed, target": Budget(tpot_ms=between_ms, probability=0.5, dwell_tokens=2),
    }
    cases: dict[str, Callable[[], list[float]]] = {
        name: partial(_reply, llm, budget, SamplingParams()) for name, budget in budgets.items()
    }
    cases |= {f"{BARE}, exit {layer}": partial(_steps, llm, layer) for layer in (full, shallow)}
    cases[SAMPLED] = partial(_reply, llm, budgets[f"exit {full}"], SAMPLING)
    rows = []
    for name, replies in interleave(cases, rounds).items():
        values = [value for reply in replies for value in reply]
        rows.append({"budget": name, "median_us": round(median(values), 1), "p95_us": round(p95(values), 1)})
    return rows


def _reply(llm: LLM, budget: Budget, sampling: SamplingParams) -> list[float]:
    """Overhead of each token of one reply, in µs."""
    llm.budget = budget
    ids, sequence = prompt(PROMPT_TOKENS), llm.engine.new_sequence(max_length=PROMPT_TOKENS + NEW_TOKENS)
    stream = llm.stream(ids, max_new_tokens=NEW_TOKENS, sampling=sampling, ignore_eos=True, sequence=sequence)
    next(stream)
    state = sequence.state
    overhead_us: list[float] = []
    while True:
        begin, busy_ns = time.perf_counter_ns(), state.busy_ns
        token = next(stream, None)
        wall_ns = time.perf_counter_ns() - begin
        if token is None:
            return overhead_us[SKIPPED_TOKENS - 1 :]
        overhead_us.append((wall_ns - (state.busy_ns - busy_ns)) / 1e3)


def _steps(llm: LLM, exit_layer: int) -> list[float]:
    """The same of bare steps."""
    sequence = llm.engine.new_sequence(max_length=PROMPT_TOKENS + NEW_TOKENS)
    ids = sequence.advance(exit_layer, prompt(PROMPT_TOKENS))[:, 0].argmax(-1)
    state = sequence.state
    overhead_us: list[float] = []
    for _ in range(NEW_TOKENS - 1):
        begin, busy_ns = time.perf_counter_ns(), state.busy_ns
        ids = sequence.step(exit_layer, ids).argmax(-1)
        overhead_us.append((time.perf_counter_ns() - begin - (state.busy_ns - busy_ns)) / 1e3)
    return overhead_us[SKIPPED_TOKENS - 1 :]
