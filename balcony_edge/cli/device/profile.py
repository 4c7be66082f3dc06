"""``balcony-edge profile``: measures the cost of each exit on this device."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.cli.console import depth_styles, progress_bar, stderr, stdout, warn
from balcony_edge.cli.options import Engines, OnDevice, Packed, Threads, check_place, output_target, write_output
from balcony_edge.errors import InputError

if TYPE_CHECKING:
    from balcony_edge.device.profile import DeviceProfile


def profile(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="File; its suffix is the format (.json: the device profile; .jsonl, .csv, .md: its entries). "
            "Or json, jsonl, csv or md for stdout. Repeatable.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure a small grid, in less than a minute.")] = False,
    prompts: Annotated[
        str | None, typer.Option("--prompts", "-p", help="Prompt lengths: 32,512 or 512-2048+512 or 1-64*2.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", help="Tokens of a decode block.")] = None,
    depths: Annotated[
        str | None, typer.Option("--depths", "-d", help="Context lengths before a decode block, in tokens.")
    ] = None,
    pending: Annotated[str | None, typer.Option(help="Numbers of pending rows at a switch of the exit.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", "-r", min=1, help="Most repetitions.")] = None,
    sustain: Annotated[
        str | None, typer.Option(help="Also decode without a pause for this time, e.g. 300s or 5m: shows throttling.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report to this file.")] = None,
    packed: Packed = None,
    threads: Threads = None,
    device: OnDevice = "auto",
    engines: Engines = None,
) -> None:
    """Measure the cost of each exit on this device: time, memory, and energy if a sensor measures it."""
    import balcony_edge
    from balcony_edge.device.tables import render
    from balcony_runtime.profiler.grid import Grid, parse_values
    from balcony_runtime.profiler.run import measure_profile
    from balcony_runtime.sensors import Sensors, device_sources

    targets = [output_target(value) for value in output or []]
    places = [path for _, path in targets] + ([] if report is None else [report])
    if len(set(places)) < len(places):  # a place of None is stdout
        raise InputError("-o, --report: two of them go to one place, a file or stdout: give each a file of its own")
    if report is not None:
        check_place(report)
        from balcony_runtime.profiler.charts import require_plotly
        from balcony_runtime.profiler.report import write_report

        require_plotly()  # refuse a missing extra now, not after minutes of measuring
    seconds = _seconds(sustain) if sustain is not None else 0.0
    asked = {
        "prompts": None if prompts is None else parse_values("-p", prompts),
        "depths": None if depths is None else parse_values("-d", depths),
        "pending": None if pending is None else parse_values("--pending", pending),
    }
    with balcony_edge.load(bundle, threads=threads, packed=packed, device=device, engines=engines) as llm:
        grid = Grid.make(llm.engine.max_length, quick=quick, tokens=tokens, rounds=rounds, **asked)
        command = (
            shlex.join(["balcony-edge", *sys.argv[1:]]).encode("utf-8", "replace").decode()
        )  # a path may be no UTF-8
        with Sensors(device_sources()) as sensors, progress_bar() as progress:
            measured = measure_profile(llm, sensors, grid, progress, sustain_s=seconds, command=command)
    with ExitStack() as files:  # all are written, also after one that cannot be, or where nobody reads stdout any more
        if report is not None:
            files.callback(write_report, measured, report)
        for form, path in reversed(targets):
            files.callback(write_output, render(measured, form), path)
        if all(path is not None for _, path in targets):
            _show(measured)  # first: results are shown even if they cannot be kept
    for note in measured.conditions.notes:
        warn(note)  # may have what an engine said
    if measured.power_reason is not None:
        stderr.print(f"energy is not measured on this device: {measured.power_reason}", markup=False, soft_wrap=True)
    for words, status in (("interrupted", 130), ("stopped by an error", 1)):
        if any(note.startswith(words) for note in measured.conditions.notes):
            raise typer.Exit(status)


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86_400:
        raise InputError(f"--sustain {text}: must be 1 s to a day: write 300s or 5m")
    return value


def _show(measured: DeviceProfile) -> None:
    bundle = measured.bundle
    styles = depth_styles(bundle.exit_layers)
    stdout.print(f"[bold]{escape(bundle.model)}[/] ({escape(bundle.precision)}) on {escape(measured.device.title)}")
    energy = "J/token" if not measured.power else f"J/token ({measured.rail})"
    table = Table("exit", "after", "ms", "±", "p95", "p99", "tokens/s", "priced", energy, title="time between tokens")
    least = measured.least_context
    for entry in measured.select("decode"):
        timing, joules = entry.timing, measured.joules_per_token(entry.exit_layer, measured.rail)
        table.add_row(
            str(entry.exit_layer),
            str(entry.context),
            f"{timing.p50_ms:.2f}",
            f"{timing.uncertainty_ms:.2f}",
            f"{timing.p95_ms:.2f}",
            f"{timing.p99_ms:.2f}",
            f"{1000 / timing.p50_ms:.1f}" if timing.p50_ms else "",
            "" if entry.predicted_ms is None else f"{entry.predicted_ms:.2f}",
            "" if joules is None or entry.context > least else f"{joules:.3f}",
            style=styles[entry.exit_layer],
        )
    stdout.print(table)
    table = Table("prompt", *(f"exit {layer}, ms" for layer in bundle.exit_layers), title="time to first token")
    prefills = measured.select("prefill")
    for rows in dict.fromkeys(entry.rows for entry in prefills):
        times = {entry.exit_layer: entry.timing.p50_ms for entry in prefills if entry.rows == rows}
        table.add_row(str(rows), *(f"{times[layer]:.1f}" if layer in times else "" for layer in bundle.exit_layers))
    stdout.print(table)
    if (run := measured.sustained) is not None:
        stdout.print(
            f"sustained for {run.seconds:.0f} s: {run.sustained.p50_ms:.2f} ms a token at exit {run.exit_layer}, "
            f"{run.slowdown:.2f} times as long as in the first seconds ({run.burst.p50_ms:.2f} ms)"
        )
    memory = measured.memory
    peak = "" if memory.peak_bytes is None else f"{memory.peak_bytes / 1e6:.0f} MB at the peak, "
    stdout.print(f"memory: {peak}{memory.per_1k_tokens_bytes / 1e6:.1f} MB for 1,000 tokens")
    worst = max((r.p95 for r in measured.residuals if r.part.endswith("steps")), default=0.0)
    stdout.print(
        f"{len(measured.entries)} quantities in {measured.conditions.seconds:.0f} s; "
        f"predictions of whole steps are off by {worst:.1%} at most for 95 % of any kind"
    )
