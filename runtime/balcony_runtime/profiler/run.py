"""Makes a device profile of a loaded bundle: rounds over all cells until their intervals are tight, then power, then the fit.

Every round runs every cell once, every other round backwards, so that bursts of other load and a drifting clock affect all
exits alike. The first round is discarded. A cell whose interval is tight is not measured again; a round without open cells is
the last. Ctrl-C and the time limit keep the measurements so far.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

from balcony_edge.budget import Rail
from balcony_edge.device.machine import this_device
from balcony_edge.device.profile import DeviceProfile, EngineFacts, MemoryUse, Moment, Power, Sustained
from balcony_edge.errors import BalconyError
from balcony_runtime.backends.base import Backend
from balcony_runtime.llm import LLM
from balcony_runtime.profiler import results
from balcony_runtime.profiler.cells import Bench, Cell, Key
from balcony_runtime.profiler.conditions import (
    ConditionWatch,
    Meter,
    measured_rails,
    peak_bytes,
    private_bytes,
    why_no_power,
)
from balcony_runtime.profiler.grid import Grid
from balcony_runtime.profiler.timing import chance_ms, summarise
from balcony_runtime.sensors import Sensors
from balcony_runtime.token_sequence import rows_of_a_pass

#: A cell is finished once chance leaves its median uncertain by less than this share.
TIGHT = 0.01
#: Least rounds of every cell: despite the time limit, and before a cell may be finished. Without the second bound, cells would
#: stop at intervals that are tight by luck.
LEAST_ROUNDS, LEAST_TIGHT = 2, 5
#: Sustained run: seconds of the burst, which comes before everything else; last share of the run, which gives the sustained
#: speed; number of moments kept.
BURST_S, SUSTAINED_SHARE, MOMENTS = 5.0, 0.2, 100
#: Least seconds of an average of a battery's gauge, which shows a new value every 1 to 10 s.
BATTERY_S = 12.0

Progress = Callable[[str, float], None]


def measure_profile(
    llm: LLM, sensors: Sensors, grid: Grid, progress: Progress, *, sustain_s: float = 0.0, command: str = ""
) -> DeviceProfile:
    """Measure ``llm`` on this device.

    Args:
        llm: a loaded bundle; its budget is changed and restored.
        sensors: started sensors.
        grid: what is measured, and for how long.
        progress: function that gets the name of the current step and the finished share (0 to 1).
        sustain_s: seconds of a sustained run; 0 for none.
        command: the command line, for the record.

    Raises:
        KeyboardInterrupt: interrupted before everything was measured once; a later interrupt keeps the measurements.
    """
    budget, loaded_bytes = llm.budget, private_bytes()
    watch, bench = ConditionWatch(sensors), Bench(llm, grid)
    rails: dict[Rail, tuple[str, ...]] | None = None
    measured_once = False  # whether every cell has samples
    blocks: dict[Key, list[list[float]]] = defaultdict(list)
    power: tuple[Power, ...] = ()
    sustained: Sustained | None = None
    notes: list[str] = []
    try:
        burst = _burst(bench, watch) if sustain_s else []
        rounds = _rounds(bench.cells(), grid, blocks, watch, progress)
        try:
            measured_once = next(rounds)
            complete = next(rounds)
        finally:  # also of rounds that are interrupted; a sustained run may heat the device
            if watch.throttled:
                notes.append("clocks were held down, by heat or a limit of power: cool the device, and measure again")
        if not complete:
            notes.append(f"stopped after {grid.seconds:g} s: some intervals are wider than {TIGHT:.0%}")
        progress("power", 0.95)
        rails = measured_rails(sensors)  # now: a counter that stands still shows it at its second reading only
        if rails:
            power = _noted_power(bench, sensors, rails, watch, notes)
        if sustain_s:
            sustained, stopped = _sustain(bench, sustain_s, burst, watch, progress)
            if stopped is not None:
                raise stopped
    except KeyboardInterrupt:
        complete = False
        notes.append("interrupted: the profile has the measurements until then")
    except BalconyError as error:  # such as a GPU that is lost after minutes of load
        if not measured_once:
            raise
        complete = False
        notes.append(f"stopped by an error, with the measurements until then: {error}")
    finally:
        llm.budget = budget
    manifest = llm.engine.manifest
    if not measured_once:
        raise KeyboardInterrupt  # there is no profile to keep
    mixture = manifest.model.mixture
    costs, residuals = results.fit_costs(
        blocks,
        manifest.exit_layers,
        None if mixture is None else mixture.share,
        rows_of_a_pass(manifest, 1, llm.engine.max_length),
    )
    entries = results.entries(blocks, costs)
    tokens, state_bytes = bench.state_bytes()
    sequence_bytes = bench.recurrent_bytes()
    return DeviceProfile(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=version("balcony-edge"),
        command=command,
        complete=complete,
        device=this_device(),
        bundle=results.bundle_facts(manifest, llm.engine.max_length),
        engine=_engine_facts(llm.engine.backend),
        conditions=watch.report(tuple(notes)),
        entries=entries,
        costs=costs,
        residuals=(*residuals, *results.step_residuals(entries)),
        spread=results.spread(blocks),
        power=power,
        power_reason=None if power else _why_no_power(notes, rails, sensors),
        sustained=sustained,
        memory=MemoryUse(
            loaded_bytes=loaded_bytes,
            peak_bytes=peak_bytes(),
            sequence_bytes=sequence_bytes,
            per_1k_tokens_bytes=round((state_bytes - sequence_bytes) / tokens * 1000),
        ),
        quality=results.quality_figures(manifest),
    )


def _engine_facts(backend: Backend) -> EngineFacts:
    """The engine; the name of a TensorRT backend has its version already."""
    installed = ""
    if backend.name.startswith(("onnxruntime", "ONNX Runtime")):
        import onnxruntime  # noqa: PLC0415 - an engine is an extra, and comes in packages of several names

        installed = onnxruntime.__version__
    return EngineFacts(name=backend.name, graphs=backend.graphs, version=installed, threads=backend.threads)


def _why_no_power(notes: list[str], rails: dict[Rail, tuple[str, ...]] | None, sensors: Sensors) -> str:
    if rails is not None and not rails:
        return why_no_power(sensors)
    if rails is None or any(note.startswith(("interrupted", "stopped by")) for note in notes):
        return "the profile ended before it"
    return f"no reading of {', '.join(source for sources in rails.values() for source in sources)} came in time"


def _rounds(
    cells: tuple[Cell, ...], grid: Grid, blocks: dict[Key, list[list[float]]], watch: ConditionWatch, progress: Progress
) -> Iterator[bool]:
    """Run rounds and add their samples to ``blocks``.

    Gives True once everything was measured once, and at the end whether every interval is tight or every round was run.
    """
    begin_s, done, total = time.perf_counter(), 0, len(cells) * (grid.rounds + 1)
    keys: dict[str, list[Key]] = {}
    open_cells = list(cells)
    for number in range(grid.rounds + 1):
        for cell in open_cells[:: 1 if number % 2 else -1]:
            spent_s = time.perf_counter() - begin_s
            if number > LEAST_ROUNDS and spent_s > grid.seconds:
                yield False
                return
            share = max(done / total, min(spent_s / grid.seconds, 1.0) if number > LEAST_ROUNDS else 0.0)
            left_s = min(spent_s * (total / done - 1), max(grid.seconds - spent_s, 0.0)) if number else None
            left = "" if left_s is None else f", {left_s:.0f} s left"
            progress(f"round {number} of {grid.rounds}{left}", 0.95 * share)
            found = cell.run()
            done += 1
            if number:
                keys[cell.title] = list(found)
                for key, samples in found.items():
                    blocks[key].append(samples)
            watch.look()
        if number >= LEAST_TIGHT:
            open_cells = [cell for cell in open_cells if not all(_tight(blocks[key]) for key in keys[cell.title])]
            total = done + len(open_cells) * (grid.rounds - number)
            if not open_cells:
                break
        if number == 1:
            yield True
    yield True


def _tight(found: list[list[float]]) -> bool:
    """Whether the interval by chance is narrow: within 1 %, or within 0.01 ms, which never matters."""
    typical = median(sample for block in found for sample in block)
    return chance_ms(found) <= max(TIGHT * typical, 0.01)


def _noted_power(
    bench: Bench, sensors: Sensors, rails: dict[Rail, tuple[str, ...]], watch: ConditionWatch, notes: list[str]
) -> tuple[Power, ...]:
    """Measure power, and note what was lost and whether clocks were held down meanwhile."""
    meter = Meter(sensors, rails)
    power, lost = _power(bench, meter, rails, bench.grid.power_s)
    if meter.throttled and not watch.throttled:
        notes.append("clocks were held down while power was measured: cool the device, and measure again")
    watch.throttled |= meter.throttled
    notes += [f"power of the {rail} rail was lost while it was measured" for rail in lost]
    return power


def _power(
    bench: Bench, meter: Meter, rails: dict[Rail, tuple[str, ...]], seconds: float
) -> tuple[tuple[Power, ...], list[Rail]]:
    """Power of the rails that were measured at every exit, and the others."""
    if any(source.startswith("battery:") for sources in rails.values() for source in sources):
        seconds = max(seconds, BATTERY_S)
    meter.run(seconds)  # a gauge shows the load before for some seconds
    idle_w = meter.run(seconds)
    depth = min(bench.grid.depths)
    found: list[Power] = []
    for exit_layer in bench.exits:
        tokens = 0

        def work(layer: int = exit_layer) -> None:
            nonlocal tokens
            bench.decode(layer, depth)
            tokens += bench.grid.tokens

        meter.run(seconds, work)
        tokens, begin_s = 0, time.perf_counter()
        busy_w = meter.run(seconds, work)
        spent_s = time.perf_counter() - begin_s
        found += [
            Power(
                exit_layer=exit_layer,
                rail=rail,
                source=" + ".join(rails[rail]),
                busy_w=watts,
                idle_w=idle_w.get(rail),
                joules_per_token=watts * spent_s / max(tokens, 1),
                context=depth + bench.grid.tokens // 2,
            )
            for rail, watts in busy_w.items()
        ]
    lost = [rail for rail in rails if sum(entry.rail == rail for entry in found) < len(bench.exits)]
    return tuple(entry for entry in found if entry.rail not in lost), lost


def _burst(bench: Bench, watch: ConditionWatch) -> list[list[float]]:
    """Decode at full depth for some seconds, while the device is still cool."""
    begin_s = time.perf_counter()
    blocks: list[list[float]] = []
    while not blocks or time.perf_counter() - begin_s < BURST_S:
        blocks.append(_gaps(bench))
        watch.look()
    return blocks


def _sustain(
    bench: Bench, seconds: float, burst: list[list[float]], watch: ConditionWatch, progress: Progress
) -> tuple[Sustained | None, BaseException | None]:
    """Decode at full depth without a pause. Returns the result, and the interrupt or error that ended it early."""
    begin_s, moments = time.perf_counter(), []
    samples: list[tuple[float, list[float]]] = []
    due_s = 0.0
    stopped: BaseException | None = None
    try:
        while (now_s := time.perf_counter() - begin_s) < seconds:
            progress(f"sustained load, {seconds - now_s:.0f} s left", 0.95 + 0.05 * now_s / seconds)
            block = _gaps(bench)
            samples.append((now_s, block))
            watch.look()
            if now_s >= due_s:
                due_s += seconds / MOMENTS
                moments.append(
                    Moment(
                        at_s=now_s,
                        p50_ms=median(block),
                        celsius=watch.celsius(),
                        cpu_mhz=watch.cpu_mhz(),
                        watts=watch.watts(),
                    )
                )
    except (KeyboardInterrupt, BalconyError) as error:  # such as a GPU that is lost after minutes of load
        stopped = error
    if not samples:
        return None, stopped
    spent_s = time.perf_counter() - begin_s
    late = [block for at_s, block in samples if at_s >= spent_s * (1 - SUSTAINED_SHARE)] or [samples[-1][1]]
    found = Sustained(
        exit_layer=bench.exits[-1],
        seconds=spent_s,
        burst=summarise(burst),
        sustained=summarise(late),
        moments=tuple(moments),
    )
    return found, stopped


def _gaps(bench: Bench) -> list[float]:
    """Times between tokens of one block at full depth."""
    found = bench.decode(bench.exits[-1], min(bench.grid.depths))
    return next(block for key, block in found.items() if key.kind == "decode")
