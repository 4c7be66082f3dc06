"""``balcony-edge simulate``: tries a budget against a device profile and a load, without the device."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from balcony_edge.budget import UNEVALUATED_PROFILE, Budget
from balcony_edge.cli.console import folded, stderr, stdout, warn
from balcony_edge.cli.options import finite
from balcony_edge.cli.show import say_doubts
from balcony_edge.errors import BudgetError, ContextLengthError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from balcony_edge.cli.budgets.arrivals import Company
    from balcony_edge.control.company.round_trace import RoundTraceWriter
    from balcony_edge.control.company.seen import Round
    from balcony_edge.device.profile import DeviceProfile
    from balcony_edge.simulation.loads import Load
    from balcony_edge.simulation.plant import Physics


#: Most requests of ``--arrivals``; so many take minutes.
MOST_REQUESTS = 100_000
#: Constants of ``--device`` that say how many watts it takes.
WATTS = {"idle_w", "busy_w"}
#: What helps a device whose battery is soon empty.
MORE_CHARGE = "give a larger --device battery_j=..., or a charge closer to 1"


def simulate(
    profile: Annotated[Path, typer.Option(help="Device profile that `balcony-edge profile` wrote.")],
    budget: Annotated[
        list[Path] | None,
        typer.Option(
            help="Budget file (profiles/*.toml); repeatable with --arrivals, where each is a class of requests."
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Target instead of a budget file: milliseconds between two tokens.")
    ] = None,
    slowdowns: Annotated[
        str,
        typer.Option(
            "--load",
            help="Slowdowns: a trace that `run --record` wrote, or one of idle, constant, step, ramp, square and bursts, "
            "with parameters as in square:high=1.7.",
        ),
    ] = "idle",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=2, help="Most tokens to make.")] = 256,
    seconds: Annotated[
        float, typer.Option(min=0.001, max=1e6, callback=finite, help="Most seconds to simulate.")
    ] = 600.0,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1, help="Length of the prompt.")] = 64,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Constant of the simulated device, repeatable: idle_w=2 (watts without a step), busy_w=6 (watts that a step "
            "adds), ambient_c=25, kelvin_per_watt=6, tau_s=40, throttle_c=95, battery_j=0, charge=1, others_utilization=0, "
            "... These are the defaults. A profile's own watts replace the first two, and then the device throttles only if "
            "throttle_c is given."
        ),
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="Simulate many streams at once: requests a second, as in rate=0.8, or rate=0.8,burst=3 for three at a time. "
            "Each gets one of the budgets, --prompt-tokens and --tokens; requests come for --seconds."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    record: Annotated[Path | None, typer.Option(help="Write the run as a trace.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show for each interval at the same exits why they were chosen.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Try a budget offline under a load: exits, late tokens, watts and degrees."""
    from contextlib import nullcontext

    from balcony_edge.cli.budgets.arrivals import explained, facts, parsed, show
    from balcony_edge.cli.budgets.budget import asked_budget, named_refusal
    from balcony_edge.control.company.round_trace import RoundTraceWriter
    from balcony_edge.control.trace import TraceWriter
    from balcony_edge.device.profile import DeviceProfile
    from balcony_edge.simulation import simulate as simulation
    from balcony_edge.simulation.plant import Plant

    files = budget or []
    if len(files) > 1 and arrivals is None:
        raise BudgetError(f"--budget {files[0]} --budget {files[1]}: one reply has one budget: also give --arrivals")
    asked, measured = asked_budget(files[0] if files else None, tpot_ms), DeviceProfile.load(profile)
    if prompt_tokens >= (longest := measured.bundle.context_length):
        raise ContextLengthError(
            f"--prompt-tokens {prompt_tokens}: the context holds {longest}, and a reply needs a token: give a shorter prompt"
        )
    if prompt_tokens + tokens > longest:
        stderr.print(f"--tokens {tokens}: a reply ends after {longest - prompt_tokens}, when the context is full")
        tokens = longest - prompt_tokens
    say_doubts(profile, measured)
    costs = measured.costs
    if arrivals is not None:
        sizes = (prompt_tokens, tokens, seconds)
        with RoundTraceWriter(record) if record is not None else nullcontext() as rounds:
            company = _company(
                files, asked, profile, measured, parsed(arrivals), sizes, load(slowdowns), seed, device, rounds, explain
            )
        _say_if_cut(company.classes.values(), tokens)
        if not company.streams:
            warn(f"no request comes in {seconds:g} s, and nothing is recorded: give more --seconds, or another rate")
        if unfinished := sum(not stream.done for _, stream in company.streams):
            warn(
                f"the battery is empty before {unfinished} of {len(company.streams)} requests are answered: {MORE_CHARGE}"
            )
        figures, rows = facts(company), explained(company) if explain else None
        if as_json:
            print(json.dumps(figures if rows is None else {**figures, "intervals": rows}))  # noqa: T201 - for programs
        else:
            show(figures, rows)
        return
    with named_refusal(files[0] if files else None):
        resolved = asked.for_bundle(measured.agreement(), unevaluated=UNEVALUATED_PROFILE)
    plant = Plant(
        costs, physics(device or [], measured, resolved), load(slowdowns), prompt_tokens=prompt_tokens, seed=seed
    )
    _say_if_unmeasured(profile, measured, asked, device)  # before: the device may be too hot at once
    with TraceWriter(record) if record is not None else nullcontext() as writer:
        run = simulation.simulate(costs, plant, resolved, tokens=tokens, seconds=seconds, trace=writer)
    _say_if_cut([resolved], tokens)
    if plant.empty:
        warn(f"the run ends after {run[-1].time_s:.1f} s, when the battery is empty: {MORE_CHARGE}")
    found = simulation.summary(run, resolved, empty=plant.empty)
    if _heat_sink_unknown(measured, asked, device):
        found["max_c"] = None
    intervals = [interval._asdict() for interval in simulation.explain(run)] if explain else None
    if as_json:
        print(json.dumps(found if intervals is None else {**found, "intervals": intervals}))  # noqa: T201 - for programs
        return
    _show(found, intervals)


def _company(
    files: list[Path],
    own: Budget,
    path: Path,
    profile: DeviceProfile,
    arriving: tuple[float, int],
    sizes: tuple[int, int, float],
    slowdowns: Load,
    seed: int,
    device: list[str] | None,
    trace: RoundTraceWriter | None,
    explain: bool,
) -> Company:
    """Run the requests of ``--arrivals`` on the profile's device."""
    from balcony_edge.cli.budgets.arrivals import Company, classes
    from balcony_edge.cli.budgets.budget import named_refusal
    from balcony_edge.control.company.assignment import qualities
    from balcony_edge.control.company.ceilings import merged_ceilings
    from balcony_edge.simulation.company import Arrival, poisson, simulate_company

    agreement, (prompt_tokens, tokens, seconds) = profile.agreement(), sizes
    if (expected := arriving[0] * seconds) > MOST_REQUESTS:
        raise InputError(
            f"--arrivals with --seconds {seconds:g}: {expected:.0f} requests would come, and at most {MOST_REQUESTS} may: give "
            "fewer seconds"
        )
    named = {}
    for name, budget in classes(files, own).items():
        with named_refusal(name):
            named[name] = budget.for_bundle(agreement, unevaluated=UNEVALUATED_PROFILE)
    asked = [Arrival(0.0, prompt_tokens, tokens, budget) for budget in named.values()]
    arrivals = poisson(arriving[0], seconds, asked, seed=seed, burst=arriving[1])
    ceilings = merged_ceilings(list(named.values()))  # the rail whose power is held
    constants = physics(device or [], profile, ceilings)
    _say_if_unmeasured(path, profile, ceilings, device)
    rounds: list[tuple[float, Round]] = []
    count = 0

    def log(now_s: float, found: Round) -> None:
        nonlocal count
        count += 1
        if explain:  # 2 kB each
            rounds.append((now_s, found))

    streams = simulate_company(
        profile.costs,
        arrivals,
        quality=qualities(agreement),
        physics=constants,
        load=slowdowns,
        seed=seed,
        admission=True,
        log=log,
        trace=trace,
    )
    names = {id(budget): name for name, budget in named.items()}
    return Company(named, [(names[id(stream.arrival.budget)], stream) for stream in streams], count, rounds)


def _say_if_unmeasured(path: Path, profile: DeviceProfile, budget: Budget, device: list[str] | None) -> None:
    """Print on stderr that watts and degrees are no measurement, if the profile has none and none were given."""
    line = None
    if profile.powered(profile.rail_of(budget)) is None and not _given(device) & WATTS:
        line = "has no power measurement: watts and degrees are those of a small board; give --device idle_w=... and busy_w=..."
    elif {budget.temperature_c, budget.critical_temperature_c} != {None} and "kelvin_per_watt" not in _given(device):
        line = "its heat sink is unknown: degrees are those of a small board; give --device kelvin_per_watt=..."
    if line is not None:
        warn(f"{path}: {line}")


def _say_if_cut(budgets: Iterable[Budget], tokens: int) -> None:
    """Print on stderr that fewer tokens are simulated than a deadline is for."""
    for budget in budgets:
        if tokens < (expected := budget.expected_tokens or 0):
            warn(f"--tokens {tokens}: deadline_s is for {expected} tokens; whether they are in time may stay unknown")


def _heat_sink_unknown(profile: DeviceProfile, budget: Budget, device: list[str] | None) -> bool:
    """Whether the watts are those of a real device, and nobody said how warm they make it."""
    real = profile.powered(profile.rail_of(budget)) is not None or bool(_given(device) & WATTS)
    return real and "kelvin_per_watt" not in _given(device)


def _given(device: list[str] | None) -> set[str]:
    """Names of the constants that ``--device`` gives."""
    return {word.partition("=")[0] for word in device or ()}


def load(text: str) -> Load:
    """A generated load by name, or the slowdowns of a recorded reply.

    Raises:
        InputError: the text is neither, or the reply has no slowdowns.
    """
    from balcony_edge.control.trace import read_trace
    from balcony_edge.simulation.loads import PARAMETERS, parse_load, recorded

    if text.partition(":")[0] in PARAMETERS or not os.path.isfile(text):  # noqa: PTH113 - a load may be longer than a file name
        return parse_load(text)
    tokens = read_trace(text)
    times_s, slowdowns = [], []
    for before, token in pairwise(tokens):
        last = token.seen.last
        if last is not None and last.predicted_ms > 0 and last.measured_ms > 0:
            times_s.append(before.seen.now_s - tokens[0].seen.now_s)  # start of the measured step
            slowdowns.append(last.measured_ms / last.predicted_ms)
    if not times_s:
        raise InputError(f"--load {text}: has no predicted times: record a run whose budget has a target")
    return recorded(times_s, slowdowns)


def physics(words: list[str], profile: DeviceProfile, budget: Budget) -> Physics:
    """Constants of the simulated device: the profile's noise, memory and watts of the budget's rail, and those given.

    With watts of a real device it does not throttle unless ``throttle_c`` is given: its heat sink is unknown, so the defaults
    would make it throttle or not by chance.

    Raises:
        InputError: a key is unknown, or a value is not a number in its range.
    """
    from balcony_edge.simulation.loads import numbers
    from balcony_edge.simulation.plant import RANGES, Physics

    rail = profile.rail_of(budget)
    values: dict[str, Any] = {"rail": rail, "noise": min(profile.spread, RANGES["noise"][1])}
    values |= profile.memory.simulated(len(profile.costs.exits))
    measured = profile.powered(rail)
    if measured is not None:
        idle_w, busy_w = measured
        values |= {"idle_w": idle_w, "busy_w": busy_w, "throttle_c": math.inf}
    given = _given(words)
    if given & WATTS and "kelvin_per_watt" not in given:
        values["throttle_c"] = math.inf
    defaults = asdict(Physics())
    for word in words:
        found = numbers(f"--device {word}", [word], RANGES, "busy_w=8")
        values |= {key: type(defaults[key])(value) for key, value in found.items()}
    return Physics(**values)


def _show(facts: dict[str, Any], intervals: list[dict[str, Any]] | None) -> None:
    if intervals is not None:
        table = Table("from, s", "to, s", "exit", "tokens", "ms a token", "slowdown", folded("reason"))
        for interval in intervals:
            table.add_row(
                f"{interval['begin_s']:.2f}",
                f"{interval['end_s']:.2f}",
                str(interval["exit_layer"]),
                str(interval["tokens"]),
                f"{interval['mean_ms']:.1f}",
                f"{interval['slowdown']:.2f}",
                interval["reason"],
            )
        stdout.print(table)
    for key, value in facts.items():
        shown = value if not isinstance(value, float) else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
        stdout.print(f"{key}: {shown}", markup=False)
