"""Several streams on a simulated device: arrivals, the joint controller in the loop, and what each stream got.

Owns the cursors of the simulated streams and the arrivals. The device is :class:`.plant.SimulatedDevice`, and the controller
is the real :class:`~balcony_edge.control.company.joint.JointController`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from balcony_edge.budget import Budget
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.prices import RoundEntry, RoundPrices
from balcony_edge.control.company.round_trace import RoundTraceWriter
from balcony_edge.control.company.seen import Chunk, CompanyState, Round, RoundSeen, StreamSeen
from balcony_edge.control.company.waiting import MOST_OVERTAKEN, in_order, overtakes
from balcony_edge.control.decision import Measurement
from balcony_edge.device.costs import CostModel
from balcony_edge.simulation.plant import Physics, SimulatedDevice
from balcony_edge.simulation.simulate import missed_deadline


class Arrival(NamedTuple):
    """A request: its time, the rows of its prompt, the tokens of its reply, and its budget."""

    time_s: float
    prompt_tokens: int
    new_tokens: int
    budget: Budget


@dataclass(slots=True)
class SimulatedStream:
    """A request and what became of it.

    Attributes:
        arrival: the request.
        exits: exit layer of each token.
        gaps_ms: gap before each token; the first is the time to first token.
        late_tokens: number of tokens after the first that missed ``tpot_ms``.
        refused_s: time at which it was refused; None if it was not.
        key: its number.
        overtaken: number of later requests that began while it waited.
    """

    arrival: Arrival
    stages: list[int]
    balconies: list[int]
    length: int
    exits: list[int] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    emitted_s: float = 0.0
    late_tokens: int = 0
    refused_s: float | None = None
    key: int = 0
    overtaken: int = 0

    @property
    def done(self) -> bool:
        return self.refused_s is not None or len(self.exits) == self.arrival.new_tokens

    @property
    def missed_deadline(self) -> bool | None:
        """As :func:`.simulate.missed_deadline`."""
        due_ms = self.gaps_ms[: self.arrival.budget.expected_tokens]
        ended_early = len(self.exits) < self.arrival.new_tokens
        return missed_deadline(self.arrival.budget, len(due_ms), sum(due_ms) / 1000, ended_early=ended_early)


def poisson(rate: float, seconds: float, classes: Sequence[Arrival], *, seed: int = 0, burst: int = 1) -> list[Arrival]:
    """Requests that arrive at random, ``burst`` at once, ``rate`` of them a second on average.

    Each takes prompt, reply and budget from one of the ``classes``, whose own times do not count.
    """
    chooser, now_s = random.Random(seed), 0.0
    found: list[Arrival] = []
    while True:
        now_s += chooser.expovariate(rate / burst)
        if now_s >= seconds:
            return found
        found += [chooser.choice(classes)._replace(time_s=now_s) for _ in range(burst)]


class CompanyPlant(SimulatedDevice):
    """Several sequences on a simulated device."""

    @cached_property
    def _prices(self) -> RoundPrices:
        return RoundPrices(self.costs)

    def stream(self, arrival: Arrival, key: int = 0) -> SimulatedStream:
        stages, balconies = [0] * len(self.costs.exits), [0] * (len(self.costs.exits) - 1)
        return SimulatedStream(arrival, stages, balconies, arrival.prompt_tokens, emitted_s=arrival.time_s, key=key)

    @staticmethod
    def rows_due(stream: SimulatedStream) -> tuple[list[int], list[int]]:
        """Rows that each stage and each balcony would run for the stream's next token."""
        total = stream.length + (1 if stream.exits else 0)
        return [total - cursor for cursor in stream.stages], [*(total - cursor for cursor in stream.balconies), 1]

    @staticmethod
    def context(stream: SimulatedStream) -> int:
        """Rows before the last one that the stream's next token runs; a prompt has its last row already."""
        return stream.length if stream.exits else stream.length - 1

    def run_chunk(self, stream: SimulatedStream, chunk: Chunk) -> None:
        """Run pending rows of a stream. Asking for rows that are not ready is a bug."""
        _, stage, rows, balcony = chunk
        cursors, units = (stream.balconies, self.costs.balconies) if balcony else (stream.stages, self.costs.stages)
        ready = stream.stages[stage] if balcony else stream.stages[stage - 1] if stage else stream.length
        if not 0 < rows <= ready - cursors[stage]:
            unit = f"{'balcony' if balcony else 'stage'} {stage}"
            raise AssertionError(f"{rows} rows of {unit} asked for, {ready - cursors[stage]} are ready")
        cursors[stage] += rows
        self.work(units[stage].pass_ms(rows, cursors[stage] - 1, 1 if balcony else None))

    def step(self, moves: Sequence[tuple[SimulatedStream, int]]) -> None:
        """Make a token of each of some streams at an exit index."""
        entries = (RoundEntry(index, *self.rows_due(stream), self.context(stream)) for stream, index in moves)
        self.work(self._prices.round_ms(entries))
        for stream, index in moves:
            stream.length += 1 if stream.exits else 0
            stream.stages[: index + 1] = [stream.length] * (index + 1)
            if index < len(stream.balconies):
                stream.balconies[index] = stream.length
            gap_ms = 1000 * (self.now_s - stream.emitted_s)
            stream.late_tokens += bool(stream.exits) and gap_ms > (stream.arrival.budget.tpot_ms or math.inf)
            stream.exits.append(self.costs.exits[index])
            stream.gaps_ms.append(gap_ms)
            stream.emitted_s = self.now_s


def simulate_company(
    costs: CostModel,
    arrivals: Sequence[Arrival],
    *,
    quality: Sequence[float],
    physics: Physics | None = None,
    load: Callable[[float], float] | None = None,
    most_streams: int = 16,
    admission: bool = False,
    seed: int = 0,
    decide: Callable[[CompanyState, RoundSeen], tuple[CompanyState, Round]] | None = None,
    plant_class: type[CompanyPlant] = CompanyPlant,
    log: Callable[[float, Round], object] | None = None,
    trace: RoundTraceWriter | None = None,
) -> list[SimulatedStream]:
    """Run requests on a simulated device until all have ended, or its battery is empty.

    Args:
        costs: prices that the controller knows.
        arrivals: the requests, by time.
        quality: agreement of each exit with the full depth.
        physics, load: as for :class:`.plant.SimulatedDevice`.
        most_streams: largest number of streams at once; later requests wait.
        admission: whether a request waits until there is time for it, or is refused if its budget asks for that.
        seed: seed of the noise.
        decide: another controller to compare with.
        plant_class: another device to compare with.
        log: called with the time and each round.
        trace: record of the rounds.

    Returns:
        One stream for every request, in their order.
    """
    plant = plant_class(costs, physics or Physics(), load or (lambda _: 1.0), seed)
    controller = JointController(costs, quality)
    decide = decide or controller.decide
    state = CompanyState()
    last: Measurement | None = None
    streams = [plant.stream(arrival, key) for key, arrival in enumerate(arrivals)]
    coming, waiting = deque(streams), list[SimulatedStream]()
    active: list[int] = []

    def refused(one: SimulatedStream) -> bool:
        if not (admission and active):
            return False
        now = RoundSeen(tuple(_seen(plant, streams[key]) for key in active), None, plant.now_s)
        return controller.refusal(state, now, _seen(plant, one)) is not None

    while (coming or waiting or active) and not plant.empty:
        while coming and coming[0].arrival.time_s <= plant.now_s:
            waiting.append(coming.popleft())
        if waiting and len(active) < most_streams:
            _admit(waiting, active, most_streams, refused, plant.now_s)
            waiting = [one for one in waiting if one.key not in active and one.refused_s is None]
        if not active:
            if coming:
                plant.wait(coming[0].arrival.time_s - plant.now_s)
                last = None
            continue
        known = tuple(_seen(plant, streams[key]) for key in active)
        seen = RoundSeen(known, last, plant.now_s, plant.busy_s, plant.readings)
        ended = [key for key in state.streams if key not in active]
        before = state.without(ended)
        state, found = decide(before, seen)
        if trace is not None:
            trace.write(costs, quality, before, seen, found, ended)
        for key, _ in found.refused:
            streams[key].refused_s = plant.now_s
        if log is not None:
            log(plant.now_s, found)
        begin_s = plant.now_s
        gone = {key for key, _ in found.refused}
        if found.chunk is not None and found.chunk.key not in gone:
            plant.run_chunk(streams[found.chunk.key], found.chunk)
        index = {layer: place for place, layer in enumerate(costs.exits)}
        moves = [(streams[move.key], index[move.decision.exit_layer]) for move in found.moves if move.key not in gone]
        if moves:
            plant.step(moves)
        measured_ms = 1000 * (plant.now_s - begin_s)
        last = None
        if measured_ms > 0 and not gone and all(len(stream.exits) > 1 for stream, _ in moves):
            last = Measurement(costs.exits[found.deepest], found.price_ms, measured_ms)
        active = [key for key in active if not streams[key].done]
        # A newcomer ends a wait until somebody is due, and not the pace of a ceiling. Who waits to begin ends neither.
        comes = len(active) < most_streams and not (found.moves or found.chunk)
        times_s = (one.arrival.time_s for one in coming if one.arrival.time_s > plant.now_s)
        next_s = next(times_s, math.inf) if comes else math.inf
        plant.wait(min(found.wait_ms / 1000, next_s - plant.now_s))
    return streams


def _admit(
    waiting: Sequence[SimulatedStream],
    active: list[int],
    places: int,
    refused: Callable[[SimulatedStream], bool],
    now_s: float,
) -> None:
    """Let those begin that there is a place and time for, as the scheduler does."""
    while len(active) < places:
        come = [one for one in waiting if not one.done and one.key not in active]
        held = False  # by one that was overtaken too often
        for one in in_order(come, lambda one: one.arrival.budget.weight):
            if not held and not refused(one):
                active.append(one.key)
                overtakes(one, (other for other in come if other is not one))
                break
            if one.arrival.budget.on_infeasible == "error":
                one.refused_s = now_s
            else:
                held = held or one.overtaken >= MOST_OVERTAKEN
        else:
            return


def _seen(plant: CompanyPlant, stream: SimulatedStream) -> StreamSeen:
    stages, balconies = plant.rows_due(stream)
    arrival = stream.arrival
    return StreamSeen(
        stream.key,
        arrival.budget,
        plant.context(stream),
        stages,
        balconies,
        len(stream.exits),
        arrival.time_s,
        stream.emitted_s,
        late=stream.late_tokens,
    )


def missed_share(streams: Iterable[SimulatedStream]) -> float | None:
    """Share of missed deadlines among those of which it is known; None if there are none."""
    known = [stream.missed_deadline for stream in streams if stream.arrival.budget.deadline_s is not None]
    due = [missed for missed in known if missed is not None]
    return fmean(due) if due else None


def summary(streams: Sequence[SimulatedStream], costs: CostModel) -> Mapping[str, float]:
    """Figures of a run: share of late tokens, mean depth, and those below.

    ``deadlines_missed`` is a share of the streams of which it is known; their tokens are not among the late ones.
    ``switches`` is the number of changes of the exit in 100 tokens, ``longest_gap_ms`` that of streams that ask for nothing,
    which give way to all others.
    """
    exits = [layer for stream in streams for layer in stream.exits]
    later = sum(max(len(stream.exits) - 1, 0) for stream in streams if stream.arrival.budget.tpot_ms is not None)
    switches = sum(one != other for stream in streams for one, other in pairwise(stream.exits))
    lax = [stream for stream in streams if stream.arrival.budget == Budget()]
    return {
        "late_share": sum(stream.late_tokens for stream in streams) / max(later, 1),
        "deadlines_missed": missed_share(streams) or 0.0,
        "mean_depth": sum(exits) / max(len(exits), 1) / costs.exits[-1],
        "switches": 100 * switches / max(len(exits), 1),
        "longest_gap_ms": max((gap for stream in lax for gap in stream.gaps_ms[1:]), default=0.0),
    }
