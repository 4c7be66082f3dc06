"""A device profile's entries as tables for other programs: CSV, JSON Lines, Markdown.

Owns the columns and their order. Times are milliseconds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Literal, get_args

from balcony_edge.device.profile import DeviceProfile, Entry

Format = Literal["json", "jsonl", "csv", "md"]
FORMATS: tuple[Format, ...] = get_args(Format)
Line = dict[str, str | int | float | None]


def entry_line(entry: Entry) -> Line:
    """One entry as a line of a table: column → value."""
    return {
        "kind": entry.kind,
        "exit_layer": entry.exit_layer,
        "from_exit": entry.from_exit,
        "rows": entry.rows,
        "context": entry.context,
        "p50_ms": entry.timing.p50_ms,
        "uncertainty_ms": entry.timing.uncertainty_ms,
        "p95_ms": entry.timing.p95_ms,
        "p99_ms": entry.timing.p99_ms,
        "mean_ms": entry.timing.mean_ms,
        "samples": entry.timing.samples,
        "predicted_ms": entry.predicted_ms,
        "tokens_per_s": _tokens_per_s(entry),
    }


def render(profile: DeviceProfile, form: Format) -> str:
    """The whole profile (``json``) or its entries (``jsonl``, ``csv``, ``md``), ending in a line break.

    JSON is ASCII, because stdout may have another encoding than the UTF-8 in which files are read.
    """
    if form == "json":
        return json.dumps(profile.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    return render_lines([entry_line(entry) for entry in profile.entries], form)


def render_lines(lines: Sequence[Line], form: Literal["jsonl", "csv", "md"]) -> str:
    """Lines with the same columns as text that ends in a line break."""
    if form == "jsonl":
        return "".join(json.dumps(line) + "\n" for line in lines)
    columns = list(lines[0]) if lines else []
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return buffer.getvalue()
    cells = [columns, ["---"] * len(columns), *([_cell(line[column]) for column in columns] for line in lines)]
    return "".join(f"| {' | '.join(parts)} |\n" for parts in cells)


def _tokens_per_s(entry: Entry) -> float | None:
    if entry.kind in ("decode", "prefill") and entry.timing.p50_ms:  # a decode step has one row
        return 1000 * entry.rows / entry.timing.p50_ms
    return None


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
