"""What ``balcony-edge simulate --arrivals`` does: several streams at once on a simulated device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from balcony_edge.budget import Budget, load_budget
from balcony_edge.cli.console import folded, stdout
from balcony_edge.errors import InputError
from balcony_edge.simulation.loads import numbers

if TYPE_CHECKING:
    from balcony_edge.control.company.seen import Round
    from balcony_edge.simulation.company import SimulatedStream


class Company(NamedTuple):
    """A simulated company: its classes of budgets by name, its streams with the class of each, the number of its rounds, and
    these by time if they are to be explained."""

    classes: dict[str, Budget]
    streams: list[tuple[str, SimulatedStream]]
    round_count: int
    rounds: list[tuple[float, Round]]


def parsed(text: str) -> tuple[float, int]:
    """Arrivals a second and requests at once, of ``rate=0.8,burst=3``.

    Raises:
        InputError: a key is unknown, or a value is out of range.
    """
    ranges = {"rate": (1e-3, 1e3), "burst": (1, 100)}
    found = {"burst": 1.0} | numbers(f"--arrivals {text}", text.split(","), ranges, "rate=0.8,burst=3")
    if "rate" not in found or not found["burst"].is_integer():
        raise InputError(f"--arrivals {text}: must have a rate, and a burst is whole: give e.g. rate=0.8,burst=3")
    return found["rate"], int(found["burst"])


def classes(files: Sequence[Path], own: Budget) -> dict[str, Budget]:
    """Name of each budget file → its budget. ``own`` is that of the first file, which may be a pipe, or of none."""
    found: dict[str, Budget] = {}
    for file in files:
        if file.stem in found:
            raise InputError(f"--budget {file}: another class has the same name, {file.stem}: rename one of the files")
        found[file.stem] = load_budget(file) if found else own
    return found or {"budget": own}


def facts(company: Company) -> dict[str, Any]:
    """Figures of each class and of all streams, JSON-ready."""
    from balcony_edge.simulation.company import missed_share

    found: dict[str, Any] = {"streams": len(company.streams), "rounds": company.round_count, "classes": {}}
    for name in company.classes:
        streams = [stream for own, stream in company.streams if own == name]
        exits = [layer for stream in streams for layer in stream.exits]
        later = sum(max(len(stream.exits) - 1, 0) for stream in streams)
        firsts = [stream.gaps_ms[0] for stream in streams if stream.gaps_ms]
        budget = company.classes[name]
        begun = [stream for stream in streams if stream.exits or stream.refused_s is None]  # or waiting at the end
        found["classes"][name] = {
            "requests": len(streams),
            "refused": sum(stream.refused_s is not None for stream in streams),
            "tokens": len(exits),
            "late_share": sum(s.late_tokens for s in streams) / later if budget.tpot_ms is not None and later else None,
            "missed_share": missed_share(begun),
            "mean_exit": mean(exits) if exits else None,
            "tokens_per_exit": {str(layer): count for layer, count in sorted(Counter(exits).items())},
            "ttft_ms": mean(firsts) if firsts else None,
        }
    return found


def explained(company: Company) -> list[dict[str, Any]]:
    """Stretches of rounds with the same streams at the same exits, and the reason of the last one."""
    rows = []

    def exits(one: tuple[float, Round]) -> tuple[tuple[int, int], ...]:
        gone = {key for key, _ in one[1].refused}
        return tuple((move.key, move.decision.exit_layer) for move in one[1].moves if move.key not in gone)

    for members, group in groupby(company.rounds, exits):
        stretch = list(group)
        last = stretch[-1][1]
        reasons = list(dict.fromkeys(move.decision.reason for move in last.moves))
        idle = "waits for a pace" if last.chunk is None else "rows only"
        chunk = "" if last.chunk is None else f"; {last.chunk.rows} rows of stream {last.chunk.key} next to it"
        rows.append(
            {
                "begin_s": stretch[0][0],
                "rounds": len(stretch),
                "exits": {str(key): layer for key, layer in members},
                "round_ms": mean(found.predicted_ms for _, found in stretch),
                "reason": ("; ".join(reasons) or idle) + chunk,
            }
        )
    return rows


def show(found: dict[str, Any], rows: list[dict[str, Any]] | None) -> None:
    """Print what :func:`facts` and :func:`explained` found."""
    if rows is not None:
        table = Table("from, s", "rounds", "stream: exit", "ms a round", folded("reason"))
        for row in rows:
            members = " ".join(f"{key}:{layer}" for key, layer in row["exits"].items())
            table.add_row(f"{row['begin_s']:.2f}", str(row["rounds"]), members, f"{row['round_ms']:.1f}", row["reason"])
        stdout.print(table)
    table = Table("budget", "requests", "refused", "tokens", "late", "missed", "mean exit", "first token, ms")
    for name, one in found["classes"].items():
        late, missed = (("" if value is None else f"{value:.1%}") for value in (one["late_share"], one["missed_share"]))
        depth, first = (("" if value is None else f"{value:.1f}") for value in (one["mean_exit"], one["ttft_ms"]))
        counts = (str(one[key]) for key in ("requests", "refused", "tokens"))
        table.add_row(escape(name), *counts, late, missed, depth, first)
    stdout.print(table)
