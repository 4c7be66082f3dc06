"""``balcony-edge compare``: two device profiles as a table of ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from balcony_edge.cli.console import stdout
from balcony_edge.cli.options import output_target, write_output
from balcony_edge.cli.show import say_doubts
from balcony_edge.errors import InputError

if TYPE_CHECKING:
    from balcony_edge.device.compare import Comparison
    from balcony_edge.device.profile import DeviceProfile


def compare(
    first: Annotated[Path, typer.Argument(help="Device profile that counts as 1.")],
    second: Annotated[Path, typer.Argument(help="Device profile whose ratios are shown.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Also show single passes and the time spent in Python.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Write all quantities to a file, whose suffix is the format (.json, .jsonl, .csv, .md), or print them: json, "
            "jsonl, csv or md.",
        ),
    ] = None,
) -> None:
    """Compare two devices, bundles or versions: show ratios and whether they are significant."""
    from balcony_edge.device.compare import compare_profiles
    from balcony_edge.device.profile import DeviceProfile
    from balcony_edge.device.tables import entry_line, render_lines

    if output is not None and everything:
        raise InputError("--all with -o: a file has all quantities anyway: leave --all out")
    target = None if output is None else output_target(output)
    one, two = DeviceProfile.load(first), DeviceProfile.load(second)
    for path, profile in ((first, one), (second, two)):
        say_doubts(path, profile)
    found = compare_profiles(one, two)
    if target is not None:
        lines = [
            {
                **{key: entry_line(item.entry)[key] for key in ("kind", "exit_layer", "from_exit", "rows", "context")},
                "first_ms": item.entry.timing.p50_ms,
                "second_ms": item.second_ms,
                "ratio": item.ratio,
                "ratio_uncertainty": item.ratio_uncertainty,
                "p_value": item.p_value,
                "significant": item.significant,
            }
            for item in found
        ]
        document = {"differences": differences(one, two), "entries": lines}
        form, file = target
        write_output(json.dumps(document) + "\n" if form == "json" else render_lines(lines, form), file)
        return
    _show(one, two, found, everything)


def differences(one: DeviceProfile, two: DeviceProfile) -> list[str]:
    """Differences of devices, bundles and engines, one phrase each."""
    found = list(one.device.differences(two.device, ("first", "second")))
    if one.bundle.fingerprint != two.bundle.fingerprint:
        found.append(
            f"bundles: {one.bundle.model} ({one.bundle.precision}), {two.bundle.model} ({two.bundle.precision})"
        )
    engines = [f"{e.name} {e.version}, {e.threads} threads" for e in (one.engine, two.engine)]
    if engines[0] != engines[1]:
        found.append(f"engines: {engines[0]} first, {engines[1]} second")
    graphs = one.engine.graphs, two.engine.graphs
    if graphs[0] != graphs[1] and None not in graphs:
        found.append(f"graphs: {graphs[0]} first, {graphs[1]} second")
    return found


def _show(one: DeviceProfile, two: DeviceProfile, found: tuple[Comparison, ...], everything: bool) -> None:
    for name, profile in (("first", one), ("second", two)):
        bundle = profile.bundle
        stdout.print(
            f"{name}: {escape(bundle.model)} ({escape(bundle.precision)}) on {escape(profile.device.title)}, "
            f"{escape(profile.created)}"
        )
    for line in differences(one, two):
        stdout.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    table = Table("ms", "first", "second", "ratio", "±", "significant")
    shown = [
        item for item in found if everything or item.entry.kind in ("prefill", "decode", "switch_up", "switch_down")
    ]
    shown = shown or list(found)  # two profiles of other -p and -d have only single passes in common
    for item in shown:
        style = ("red" if item.ratio > 1 else "green") if item.significant else None
        table.add_row(
            item.entry.title,
            _ms(item.entry.timing.p50_ms),
            _ms(item.second_ms),
            f"{item.ratio:.3f}",
            f"{item.ratio_uncertainty:.3f}",
            "yes" if item.significant else "no",
            style=style,
        )
    stdout.print(table)
    changed = sum(item.significant for item in shown)
    stdout.print(f"{changed} of {len(shown)} quantities differ significantly (5 % would by chance alone)")


def _ms(value: float) -> str:
    """Two decimals, or three digits below a millisecond: a norm takes 0.0116 ms."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
