"""Several replies at once on a real bundle, and in simulation: ``python -m benchmarks.serving.streams BUNDLE [--only X,...]``.

    throughput   tokens a second of 1, 4 and 8 streams at the full depth, driven by one thread and by a thread each, compared
                 with one stream; rounds interleaved. One stream through the scheduler is compared with its decoder by itself
    mixed        streams at four exits in one round, compared with what their prices predict (rows and bytes)
    exact        KL of logits in company to passes from scratch, compared with that of one-row steps by a stream alone
    python       time outside the engine of a shared step by itself, and of a whole round (turns, decision, step, choice of the
                 tokens, text) of streams with targets that one thread drives, for 1, 4 and 8 streams
    targets      four streams with different targets, one with a deadline, and prompts of 500 tokens that arrive meanwhile: late
                 tokens of each class, compared with threads that know nothing of one another (each has its own controller)
    soak         streams that come, go, fail and are cancelled: memory of the process, and members of the pool in use at the end
    simulation   random arrivals of classes of budgets on a simulated device: mean depth compared with an oracle that pays
                 nothing for pending rows and knows the device, and with a bound for one that knows the future; late tokens and
                 missed deadlines; changes of exits; longest gaps of streams without a target; the time of a decision
                 (:mod:`benchmarks.serving.simulated`)
    mixes        10,000 random mixes of random budgets in simulation: exceptions, gaps that are no numbers, exits not allowed;
                 it takes about half an hour

The last line on stdout is one JSON object; tables go to stderr. Exit code 1 if a bar is missed. Stop everything else first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import numpy as np

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from balcony_edge.device.machine import cpu_name
from balcony_edge.errors import BalconyError
from balcony_runtime.backends.base import FloatArray
from balcony_runtime.decoding.loop import Decoder, Step
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.token_sequence import TokenSequence
from benchmarks.peer_workers.worker import log_softmax
from benchmarks.rounds import Neighbours, bar, interleave, print_bars, ratio
from benchmarks.serving.simulated import mixes, simulation

PROMPT_TOKENS, NEW_TOKENS = 32, 48
#: Shared steps or rounds that are timed one by one; the first four do not count.
STEPS = 24
COUNTS = (4, 8)
#: Share of tokens that the classes of ``targets`` want in time, and so the bar.
PROBABILITY = 0.95


def prompts(llm: LLM, count: int, seed: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random token ids, so that no prompt shares a prefix with another one."""
    random_ids = np.random.default_rng(seed).integers(3, llm.engine.manifest.model.vocab_size, (count, length))
    return [list(map(int, row)) for row in random_ids]


def rate(llm: LLM, count: int, how: str, seed: int) -> float:
    """Tokens a second of that many replies at the full depth, prompts left out."""
    asked = prompts(llm, count, seed)
    if how == "threads":
        with ThreadPoolExecutor(count) as threads:
            found = list(threads.map(partial(_arrivals_s, llm), asked))
        begin_s = max(times_s[0] for times_s in found)  # as below: from when every reply has a token
        made = sum(time_s > begin_s for times_s in found for time_s in times_s)
        return made / (max(times_s[-1] for times_s in found) - begin_s)
    with llm.together() as replies_at_once:
        streams = [replies_at_once.add(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True) for ids in asked]
        while any(not stream.reply.tokens for stream in streams):
            replies_at_once.step()
        made = sum(len(stream.reply.tokens) for stream in streams)
        begin = time.perf_counter()
        while replies_at_once.open:
            replies_at_once.step()
        return (count * NEW_TOKENS - made) / (time.perf_counter() - begin)


def _arrivals_s(llm: LLM, ids: list[int]) -> list[float]:
    return [time.perf_counter() for _ in llm.stream(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)]


def alone_rate(llm: LLM, seed: int) -> float:
    """The same of one stream whose decoder is stepped directly, without a scheduler."""
    with patch.object(llm._requests.scheduler, "steps", _without_company):
        return rate(llm, 1, "threads", seed)


def _without_company(decoder: Decoder, *_: object) -> Generator[Step]:
    return decoder.steps()


def throughput(llm: LLM, rounds: int) -> dict[str, Any]:
    """Item ``throughput``."""
    seeds = iter(range(10**6))
    cases: dict[str, Callable[[], float]] = {
        "alone": lambda: alone_rate(llm, next(seeds)),
        "1": lambda: rate(llm, 1, "threads", next(seeds)),
    }
    for count in COUNTS:
        for how in ("together", "threads"):
            cases[f"{count} {how}"] = lambda count=count, how=how: rate(llm, count, how, next(seeds))  # type: ignore[misc]
    found = interleave(cases, rounds)
    against = {name: round(ratio(found[name], found["1"]), 3) for name in cases if name not in {"alone", "1"}}
    return {
        "tokens_a_second": {name: round(median(rates), 1) for name, rates in found.items()},
        "of_one_stream": against,
        "scheduler_of_decoder": round(ratio(found["1"], found["alone"]), 3),
    }


def steps_ms(llm: LLM, exits: Sequence[int]) -> tuple[float, float]:
    """Median time of a shared step of streams at these exits, and of its part outside the engine, ms."""
    pool = SequencePool.of(llm.engine, len(exits))
    assert pool is not None, "this bundle's graphs share no passes"
    sequences = [pool.take() for _ in exits]
    members = [sequence for sequence in sequences if sequence is not None]
    for sequence, ids in zip(members, prompts(llm, len(exits), 5), strict=True):
        sequence.advance(llm.exit_layers[-1], ids)
        sequence.catch_up()
    times, outside = [], []
    for _ in range(STEPS):
        begin_ns, busy_ns = time.perf_counter_ns(), _busy_ns(pool, members)
        pool.step([PoolMove(sequence, layer, 100) for sequence, layer in zip(members, exits, strict=True)])
        took_ns = time.perf_counter_ns() - begin_ns
        times.append(took_ns / 1e6)
        outside.append((took_ns - (_busy_ns(pool, members) - busy_ns)) / 1e6)
    return median(times[4:]), median(outside[4:])


def _round_ms(llm: LLM, exits: Sequence[int]) -> float:
    return steps_ms(llm, exits)[0]


def _busy_ns(pool: SequencePool, members: Sequence[TokenSequence]) -> int:
    return pool.busy_ns + sum(sequence.state.busy_ns for sequence in members)


def mixed(llm: LLM, rounds: int) -> dict[str, Any]:
    """Item ``mixed``: predicted / measured; the full depth of four streams in the same round calibrates the prices."""
    prices, exits = RoundPrices(llm.costs), llm.exit_layers
    index = {layer: place for place, layer in enumerate(exits)}
    ones = (1,) * len(exits)

    def price(layers: Sequence[int]) -> float:
        return prices.round_ms([RoundEntry(index[layer], ones, ones, PROMPT_TOKENS) for layer in layers])

    groups = {
        "full depth": (exits[-1],) * 4,
        "each exit": exits,
        "two and two": (exits[0], exits[0], exits[-1], exits[-1]),
    }
    found = interleave({name: partial(_round_ms, llm, layers) for name, layers in groups.items()}, rounds)
    full_ms, full_price_ms = found.pop("full depth"), price(groups["full depth"])
    return {
        "measured_ms": {name: round(median(times), 2) for name, times in ({"full depth": full_ms} | found).items()},
        "predicted_of_measured": {
            name: round(price(groups[name]) / full_price_ms * ratio(full_ms, times), 3) for name, times in found.items()
        },
        "prices_of_measured_at_full_depth": round(full_price_ms / median(full_ms), 3),
    }


def exact(llm: LLM, rounds: int) -> dict[str, Any]:
    """Item ``exact``: KL to passes from scratch, in company and of a stream by itself, whose steps take other numbers of rows.

    With int8 activations the number of rows in a pass changes the last bits, and rounding amplifies them.
    """
    random_numbers, exits, full = np.random.default_rng(3), llm.exit_layers, llm.exit_layers[-1]
    pool = SequencePool.of(llm.engine, 8)
    assert pool is not None, "this bundle's graphs share no passes"
    sequences = [one for one in (pool.take() for _ in range(8)) if one is not None]
    for sequence, ids in zip(sequences, prompts(llm, 8, 6), strict=True):
        sequence.advance(exits[0], ids)
    company, alone = [], []
    for _ in range(rounds):
        chosen = [sequence for sequence in sequences if random_numbers.random() < 0.8]
        tokens = random_numbers.integers(3, llm.engine.manifest.model.vocab_size, len(chosen)).tolist()
        layers = random_numbers.choice(exits, len(chosen)).tolist()
        moves = [PoolMove(*move) for move in zip(chosen, layers, tokens, strict=True)]
        for move, logits in zip(moves, pool.step(moves) if moves else (), strict=True):
            scratch = llm.engine.new_sequence().advance(move.exit_layer, move.sequence.tokens)[:, 0]
            company.append(_kl(scratch, logits))
    for sequence in sequences:
        tokens = sequence.tokens[0]
        one_row = llm.engine.new_sequence()
        one_row.advance(full, tokens[: len(tokens) - rounds])
        for place in range(len(tokens) - rounds, len(tokens)):
            layer = int(random_numbers.choice(exits))
            scratch = llm.engine.new_sequence().advance(layer, tokens[: place + 1])[:, 0]
            alone.append(_kl(scratch, one_row.step(layer, tokens[place : place + 1])))
    return {"kl_in_company": float(f"{mean(company):.3g}"), "kl_alone": float(f"{mean(alone):.3g}")}


def _kl(of: FloatArray, to: FloatArray) -> float:
    before, after = (log_softmax(logits) for logits in (of, to))
    return float((np.exp(before) * (before - after)).sum())


def python_share(llm: LLM) -> dict[str, Any]:
    """Item ``python``: microseconds of a shared step, and of a whole round, outside the engine."""
    full, counts = llm.exit_layers[-1], (1, *COUNTS)
    return {
        "step": {str(count): round(1000 * steps_ms(llm, (full,) * count)[1]) for count in counts},
        "round": {str(count): round(_round_us(llm, count)) for count in counts},
    }


def _round_us(llm: LLM, count: int) -> float:
    """Median time of a round outside the engine, from asking for tokens to having their text. No target takes depth."""
    llm.costs  # noqa: B018 - measured before anybody waits
    budget, outside = Budget(tpot_ms=1e4), []
    with llm.together() as replies:
        for ids in prompts(llm, count, 8):
            replies.add(ids, budget=budget, max_new_tokens=STEPS + 2 * count + 8, ignore_eos=True)
        while any(not stream.reply.tokens for stream in replies.open):
            replies.step()
        assert llm.pool is not None, "this bundle's graphs share no passes"
        members = [sequence for sequence in llm.pool.members if sequence is not None]
        for _ in range(STEPS):
            begin_ns, busy_ns = time.perf_counter_ns(), _busy_ns(llm.pool, members)
            replies.step()
            outside.append(time.perf_counter_ns() - begin_ns - (_busy_ns(llm.pool, members) - busy_ns))
    return median(outside[4:]) / 1000


def targets(llm: LLM, tokens: int) -> dict[str, Any]:
    """Item ``targets``: classes by the price of a full-depth step of one stream."""
    llm.costs  # noqa: B018 - measured before anybody waits
    full_ms = llm.costs.steady_ms(llm.exit_layers[-1], 64)
    classes = {
        f"{steps} steps": Budget(tpot_ms=round(steps * full_ms, 1), probability=PROBABILITY)
        for steps in (1.5, 2.7, 5.3)
    }
    classes["deadline"] = Budget(deadline_s=round(2.5 * tokens * full_ms / 1000, 2), expected_tokens=tokens)
    arrivals_s = (0.3, 1.3)

    def drawn(seed: int) -> tuple[dict[str, list[int]], list[list[int]]]:
        """Short and long prompts of one way; the other way has others, whose rows are not there yet."""
        return dict(zip(classes, prompts(llm, 4, 31 + seed), strict=True)), prompts(llm, 2, 77 + seed, 500)

    def in_company() -> dict[str, Reply]:
        four, long_prompts = drawn(0)
        with llm.together() as replies:
            options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}
            streams = {name: replies.add(ids, budget=classes[name], **options) for name, ids in four.items()}
            begin_s, waiting = time.perf_counter(), list(zip(arrivals_s, long_prompts, strict=True))
            while replies.open:
                while waiting and time.perf_counter() - begin_s >= waiting[0][0]:
                    replies.add(waiting.pop(0)[1], budget=Budget(), **options)
                replies.step()
            return {name: stream.reply for name, stream in streams.items()}

    def alone() -> dict[str, Reply]:
        four, long_prompts = drawn(1000)
        call = partial(llm.generate, max_new_tokens=tokens, ignore_eos=True)
        without_company = patch.object(llm._requests.scheduler, "steps", _without_company)
        with without_company, ThreadPoolExecutor(8) as threads:
            futures = {name: threads.submit(call, ids, budget=classes[name]) for name, ids in four.items()}
            late = [
                threads.submit(_later, after_s, partial(call, ids, budget=Budget()))
                for after_s, ids in zip(arrivals_s, long_prompts, strict=True)
            ]
            found = {name: future.result() for name, future in futures.items()}
            for one in late:
                one.result()
        return found

    found = {"in_company": in_company(), "threads_alone": alone()}
    judged = {
        how: {name: _judged(classes[name], reply) for name, reply in replies.items()} for how, replies in found.items()
    }
    return {"full_step_ms": round(full_ms, 2), **judged}


def _later(seconds: float, call: Callable[[], Reply]) -> Reply:
    time.sleep(seconds)
    return call()


def _judged(budget: Budget, reply: Reply) -> dict[str, Any]:
    depth = mean(token.exit_layer for token in reply.tokens)
    found: dict[str, Any] = {"mean_exit": round(depth, 1), "ttft_ms": round(reply.ttft_ms or 0.0)}
    later = reply.tokens[1:]
    found["infeasible"] = round(mean(token.decision.infeasible for token in later), 4)
    if budget.tpot_ms is not None:
        promised = [token for token in later if not token.decision.infeasible]
        late = sum(token.late for token in promised) / max(len(promised), 1)
        found |= {"target_ms": budget.tpot_ms, "late_in_all": round(mean(token.late for token in later), 4)}
        found["late"] = round(late, 4)
    else:
        took_s = sum(token.latency_ms for token in reply.tokens) / 1000
        found |= {
            "deadline_s": budget.deadline_s,
            "took_s": round(took_s, 2),
            # Not promised if most decisions called it infeasible.
            "late": float(took_s > (budget.deadline_s or 0) and found["infeasible"] < 0.5),
        }
    return found


def soak(llm: LLM, tokens: int) -> dict[str, Any]:
    """Item ``soak``: threads with replies of all kinds until that many tokens have been made."""
    made, lock, sizes = [0], threading.Lock(), []  # type: list[int], threading.Lock, list[float]
    llm.costs  # noqa: B018 - prices are needed by the budgets below

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while made[0] < tokens:
            budget = chance.choice(
                [
                    Budget(exit_layer=llm.exit_layers[0]),
                    Budget(tpot_ms=50.0),
                    Budget(tpot_ms=1e-3, on_infeasible="error"),
                    None,
                ]
            )
            length, ends = chance.randint(1, 40), chance.randint(1, 40)
            ids = [chance.randrange(3, 300) for _ in range(length)]
            stream = llm.stream(ids, budget=budget, max_new_tokens=chance.randint(1, 60), ignore_eos=True)
            count = 0
            try:
                for _ in stream:
                    count += 1
                    if count == ends:
                        stream.cancel() if chance.random() < 0.5 else stream.close()
            except BalconyError:
                pass
            with lock:
                made[0] += count
                sizes.append(_private_mb())

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    pool = llm._requests.scheduler.sequences._pool
    used = 0 if pool is None else pool.in_use
    early, late = median(sizes[len(sizes) // 4 : len(sizes) // 2]), median(sizes[-len(sizes) // 4 :])
    return {
        "tokens": made[0],
        "streams": len(sizes),
        "memory_mb": [round(early, 1), round(late, 1)],
        "members_in_use": used,
    }


def _private_mb() -> float:
    fields = Path(f"/proc/{os.getpid()}/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def bars(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that were fixed before."""
    held: dict[str, Any] = {}
    if (measured := found.get("throughput")) is not None:
        for count, least in zip(COUNTS, (2.2, 3.0), strict=True):
            best = max(measured["of_one_stream"][f"{count} {how}"] for how in ("together", "threads"))
            held[f"{count} streams / one"] = bar(best, least, at_least=True)
        held["one through the scheduler"] = bar(measured["scheduler_of_decoder"], 0.98, at_least=True)
    if (measured := found.get("mixed")) is not None:
        held["mixed exits, predicted / measured"] = bar(
            min(measured["predicted_of_measured"].values()), 0.9, at_least=True
        )
    if (measured := found.get("exact")) is not None:
        held["KL in company / alone"] = bar(round(measured["kl_in_company"] / max(measured["kl_alone"], 1e-9), 6), 2.0)
    if (measured := found.get("python")) is not None:
        for what, figures in measured.items():
            for count, microseconds in figures.items():
                held[f"µs of a {what} outside the engine, {count} streams"] = bar(microseconds, 150 + 40 * int(count))
    if (measured := found.get("targets")) is not None:
        held["late in company where it was promised, worst class"] = bar(
            max(one["late"] for one in measured["in_company"].values()), round(1 - PROBABILITY, 4)
        )
    if (measured := found.get("soak")) is not None:
        held["members in use at the end"] = bar(measured["members_in_use"], 0)
        held["memory, late / early"] = bar(round(measured["memory_mb"][1] / measured["memory_mb"][0], 6), 1.02)
    if (measured := found.get("simulation")) is not None:
        depth = round(mean(row["depth_of_oracle"] for row in measured["rows"]), 6)
        held["simulated depth / oracle"] = bar(depth, 0.93, at_least=True)
        more = max(row["late"] - row["oracle_late"] for row in measured["rows"])
        held["simulated late share above the oracle's"] = bar(round(more, 4), 0.05)
        more = max(row["deadlines_missed"] - row["oracle_deadlines_missed"] for row in measured["rows"])
        held["simulated share of missed deadlines above the oracle's"] = bar(round(more, 4), 0.05)
        most = max(row["switches_per_100_tokens"] for row in measured["rows"])
        held["simulated changes of the exit in 100 tokens (oscillation)"] = bar(most, 2.0)
        most = max(row["longest_gap_ms"] for row in measured["rows"])
        held["simulated longest gap of streams without a target (starvation), ms"] = bar(most, 300.0)
        held["decision for 8 streams, µs"] = bar(measured["decision_us"].get(8, math.inf), 150)
    if (measured := found.get("mixes")) is not None:
        held["mixes with a stream that is wrong"] = bar(len(measured["wrong"]), 0)
    return held


def main() -> int:
    """Parse the command line, run, print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Several replies at once.")
    parser.add_argument("bundle", type=Path, nargs="?", help="bundle; without one only the simulations run")
    parser.add_argument("--quick", action="store_true", help="few repetitions: checks only that it runs")
    parser.add_argument(
        "--only", default="throughput,mixed,exact,python,targets,soak,simulation,mixes", help="items to run"
    )
    arguments = parser.parse_args()
    only, quick = set(arguments.only.split(",")), arguments.quick
    if unknown := only - set(parser.get_default("only").split(",")):
        parser.error(f"--only {', '.join(sorted(unknown))}: must be of {parser.get_default('only')}")
    if arguments.bundle is None and not only & {"simulation", "mixes"}:
        parser.error(f"--only {arguments.only}: needs a bundle: name one")
    neighbours = Neighbours()
    found: dict[str, Any] = {"benchmark": "streams", "quick": quick, "cpu": cpu_name()}
    if arguments.bundle is not None:
        with balcony_edge.load(arguments.bundle) as llm:
            found["bundle"] = f"{llm.engine.manifest.model.name}, {llm.engine.manifest.precision}"
            items: dict[str, Callable[[], Any]] = {
                "throughput": lambda: throughput(llm, 2 if quick else 7),
                "mixed": lambda: mixed(llm, 1 if quick else 5),
                "exact": lambda: exact(llm, 4 if quick else 24),
                "python": lambda: python_share(llm),
                "targets": lambda: targets(llm, 40 if quick else 300),
                "soak": lambda: soak(llm, 500 if quick else 100_000),
            }
            for name, measure in items.items():
                if name in only:
                    found[name] = measure()
                    print(name, json.dumps(found[name]), file=sys.stderr)
    if "simulation" in only:
        found["simulation"] = simulation(1 if quick else 5)
        for row in found["simulation"]["rows"]:
            print(json.dumps(row), file=sys.stderr)
    if "mixes" in only:
        found["mixes"] = mixes(20 if quick else 10_000)
    found |= {**neighbours.report(), "bars": bars(found)}
    missed = print_bars(found["bars"])
    print(json.dumps(found, ensure_ascii=False))
    return missed


if __name__ == "__main__":
    sys.exit(main())
