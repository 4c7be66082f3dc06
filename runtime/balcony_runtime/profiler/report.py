"""A device profile as one HTML page: charts, tables, facts, and the profile itself. The page fetches nothing.

Owns the page. It follows the reader's light or dark scheme and fits a phone. Times, energies and
errors of prices are in table cells with their exact values as ``data-value``, and the whole profile is in a script
element, so that a program can check the page and read it back.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from balcony_edge.device.profile import DeviceProfile
from balcony_edge.errors import ProfileError
from balcony_edge.files import write_atomically
from balcony_runtime.profiler.charts import Chart, charts, require_plotly

#: Cells of a line of a table.
Line = Sequence[str | float | None]
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --paper: #fff; --card: #f6f8fa; --line: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22; --line: #3d444d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 0 0 .25rem }
p { margin: 0 0 .75rem; color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.facts th, .facts td { white-space: normal; text-align: left; vertical-align: top }
.facts td { overflow-wrap: anywhere }
.doubt { color: #bf4b00; font-weight: 600 }
code { overflow-wrap: anywhere }
"""
# Plotly draws text itself and does not know the page's colours.
_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function ink() {
  const style = getComputedStyle(document.documentElement);
  const colour = style.getPropertyValue('--ink'), card = style.getPropertyValue('--card');
  for (const chart of document.querySelectorAll('.js-plotly-plot'))
    Plotly.relayout(chart, {'font.color': colour, 'hoverlabel.bgcolor': card, 'hoverlabel.font.color': colour});
}
dark.addEventListener('change', ink);
ink();
"""


def write_report(profile: DeviceProfile, path: Path) -> None:
    """Write the page in one step.

    Raises:
        MissingDependencyError: the plotting library is not installed.
        ProfileError: the file cannot be written.
    """
    content = report(profile).encode()
    write_atomically(path, content, ProfileError, "free space, or name a place that is writable")


def report(profile: DeviceProfile) -> str:
    """The page as HTML."""
    require_plotly()
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra

    bundle = profile.bundle
    title = f"{bundle.model} on {profile.device.title}"
    figures = "".join(_figure(chart) for chart in charts(profile))
    quality = "" if profile.quality else "<section><h2>Quality</h2><p>This bundle was not evaluated.</p></section>"
    energy = "" if profile.power else _energy_reason(profile)
    doubts = "".join(f'<p class="doubt">{html.escape(doubt[0].upper() + doubt[1:])}</p>\n' for doubt in profile.doubts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(_summary(profile))}</p>
{doubts}{quality}{energy}{figures}{_tables(profile)}{_facts(profile)}
<script type="application/json" id="profile">{_embedded(json.dumps(profile.model_dump(mode="json")))}</script>
<script>{_SCRIPT}</script>
</body></html>
"""


def _figure(chart: Chart) -> str:
    from plotly.io import to_html  # noqa: PLC0415 - an extra

    drawing = to_html(
        chart.figure,
        full_html=False,
        include_plotlyjs=False,
        config={"responsive": True, "displayModeBar": False},
        div_id=f"chart-{chart.name}",
    )
    title, text = html.escape(chart.title), html.escape(chart.text)
    return f"<section><h2>{title}</h2><p>{text}</p>{drawing}</section>\n"


def _summary(profile: DeviceProfile) -> str:
    decode = sorted(profile.select("decode"), key=lambda entry: (entry.context, entry.exit_layer))
    if not decode:
        return "No decode step was measured."
    rates = {
        entry.exit_layer: 1000 / entry.timing.p50_ms
        for entry in decode
        if entry.context == decode[0].context and entry.timing.p50_ms
    }
    parts = [  # a slow device may reach only 0.4
        f"exit {layer}: {f'{rate:.0f}' if rate >= 10 else f'{rate:.2g}'} tokens a second"
        for layer, rate in rates.items()
    ]
    state = "" if profile.complete else " This profile is not complete."
    return f"After {decode[0].context} tokens: {', '.join(parts)}.{state}"


def _energy_reason(profile: DeviceProfile) -> str:
    reason = html.escape(profile.power_reason or "it was not asked for")
    return f"<section><h2>Energy</h2><p>Not measured on this device: {reason}.</p></section>\n"


def _tables(profile: DeviceProfile) -> str:
    timings: list[Line] = [
        [
            entry.title,
            entry.timing.p50_ms,
            entry.timing.uncertainty_ms,
            entry.timing.p95_ms,
            entry.timing.p99_ms,
            entry.predicted_ms,
        ]
        for entry in profile.entries
        if entry.kind in ("decode", "prefill", "switch_up", "switch_down")
    ]
    columns = ["quantity", "p50, ms", "±", "p95", "p99", "predicted"]
    found = _table("Times", "entries", columns, timings)
    if profile.power:
        lines: list[Line] = [
            [f"exit {p.exit_layer}, {p.rail}", p.joules_per_token, p.busy_w, p.idle_w] for p in profile.power
        ]
        found += _table("Energy", "power", ["exit and rail", "joules a token", "busy, W", "idle, W"], lines)
    fits: list[Line] = [[r.part, str(r.points), r.median, r.p95] for r in profile.residuals]
    return found + _table(
        "Relative errors of the prices", "residuals", ["part", "points", "median", "95 % below"], fits
    )


def _facts(profile: DeviceProfile) -> str:
    bundle, engine, conditions, memory = profile.bundle, profile.engine, profile.conditions, profile.memory
    shown: dict[str, object] = {
        "device": profile.device.title,
        "system": profile.device.system,
        "power mode": profile.device.power_mode,
        "GPU driver": ", ".join(gpu.driver for gpu in profile.device.gpus) or None,
        "bundle": f"{bundle.model}, {bundle.precision}, exits {', '.join(map(str, bundle.exit_layers))}",
        "fingerprint": bundle.fingerprint[:16],
        "engine": f"{engine.name} {engine.version}, {engine.threads} threads",
        "memory": None if memory.peak_bytes is None else f"{memory.peak_bytes / 1e6:.0f} MB at the peak",
        "recurrent states of a reply": f"{memory.sequence_bytes / 1e6:.1f} MB" if memory.sequence_bytes else None,
        "memory per 1,000 tokens": f"{memory.per_1k_tokens_bytes / 1e6:.1f} MB",
        "CPU clock": None
        if conditions.cpu_mhz is None
        else " to ".join(f"{mhz:.0f} MHz" for mhz in conditions.cpu_mhz),
        "governor": conditions.governor,
        "hottest sensor": None
        if conditions.celsius is None
        else " to ".join(f"{c:.0f} °C" for c in conditions.celsius),
        "throttled": {True: "yes", False: "no", None: None}[conditions.throttled],
        "CPU time of other processes": None
        if conditions.others_cpu_share is None
        else f"{conditions.others_cpu_share:.1%}",
        "measured": f"{profile.created}, {conditions.seconds:.0f} s, balcony-edge {profile.tool}",
        "notes": "; ".join(conditions.notes) or None,
    }
    lines = "".join(
        f"<tr><th>{name}</th><td>{html.escape('not known' if value is None else str(value))}</td></tr>"
        for name, value in shown.items()
    )
    command = f"<tr><th>command</th><td><code>{html.escape(profile.command)}</code></td></tr>"
    return f'<section class="facts"><h2>Device and bundle</h2><table>{lines}{command}</table></section>\n'


def _table(title: str, name: str, columns: Sequence[str], lines: Sequence[Line]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    table = f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<section><h2>{html.escape(title)}</h2><div class="scroll">{table}</div></section>\n'


def _cell(value: str | float | None) -> str:
    """A cell: a text, or a number with at least four digits for readers and the exact value for programs."""
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    if value is None:
        return "<td></td>"
    shown = f"{value:.4g}" if value < 1000 else f"{value:.0f}"  # from 10,000 on, the first form is 1.235e+04
    return f'<td data-value="{value!r}">{shown}</td>'


def _embedded(text: str) -> str:
    """JSON that cannot end its script element."""
    return text.replace("<", "\\u003c")
