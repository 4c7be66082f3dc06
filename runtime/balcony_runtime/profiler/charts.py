"""The charts of a profile's report, as Plotly figures.

Owns the choice of the numbers, not the look: the page sets colours of text and grid for light and dark. All points are those
of the profile, not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from balcony_edge.device.profile import DeviceProfile, Entry
from balcony_edge.errors import MissingDependencyError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: One colour per exit, shallow to deep; they differ in hue and lightness and are readable on white and on black.
COLOURS = ("#e4572e", "#e8a33d", "#4fa36f", "#3d8fd1", "#9a6fd0", "#c75d9b", "#7d8a99")
_GRID = "rgba(128,128,128,0.25)"


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its title and an explanation for readers."""

    name: str
    title: str
    text: str
    figure: Figure


def require_plotly() -> Any:
    """Import the plotting library.

    Raises:
        MissingDependencyError: the library, which is an extra, is not installed.
    """
    try:
        import plotly.graph_objects as go  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingDependencyError(
            "plotly is not installed, but a report needs it: pip install 'balcony-edge[report]', or leave --report out"
        ) from error
    return go


def charts(profile: DeviceProfile) -> tuple[Chart, ...]:
    """All charts for which the profile has numbers, in reading order."""
    found = [
        _quality(profile, "ms a token", _decode_ms(profile), "quality-latency"),
        _quality(profile, "joules a token", _joules(profile), "quality-energy"),
        _by_length(profile, "decode"),
        _by_length(profile, "prefill"),
        _parts(profile),
        _switches(profile),
        _sustained(profile),
    ]
    return tuple(chart for chart in found if chart is not None)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points ``(cost, quality)`` that no other point dominates: none has less cost and at least the same quality."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def _decode_ms(profile: DeviceProfile) -> dict[int, float]:
    """Exit → median time between tokens at the shortest measured context."""
    found: dict[int, float] = {}
    for entry in sorted(profile.select("decode"), key=lambda entry: entry.context):
        found.setdefault(entry.exit_layer, entry.timing.p50_ms)
    return found


def _joules(profile: DeviceProfile) -> dict[int, float]:
    exits = profile.bundle.exit_layers
    return {layer: joules for layer in exits if (joules := profile.joules_per_token(layer, profile.rail)) is not None}


def _quality(profile: DeviceProfile, unit: str, costs: dict[int, float], name: str) -> Chart | None:
    full = profile.bundle.exit_layers[-1]
    agreement = {layer: value for layer, value in profile.agreement().items() if value is not None} | {full: 1.0}
    layers = [layer for layer in profile.bundle.exit_layers if layer in costs and layer in agreement]
    if len(layers) < 2:
        return None
    points = [(costs[layer], agreement[layer]) for layer in layers]
    front = pareto_front(points)
    figure = _figure(unit, "same next token")
    figure.add_scatter(
        x=[cost for cost, _ in front],
        y=[quality for _, quality in front],
        mode="lines",
        line={"color": COLOURS[-1], "dash": "dot"},
        name="Pareto front",
    )
    for layer, (cost, quality) in zip(layers, points, strict=True):
        figure.add_scatter(x=[cost], y=[quality], mode="markers", marker=_marker(profile, layer), name=f"exit {layer}")
    text = (
        "Share of positions where an exit and the full model choose the same next token. Up and to the left is better; an exit "
        "below the dotted line is worse than another exit."
    )
    return Chart(name, f"Quality against {unit}", text, figure)


def _by_length(profile: DeviceProfile, kind: Any) -> Chart | None:
    entries, decode = profile.select(kind), kind == "decode"
    lengths = {entry.context if decode else entry.rows for entry in entries}
    if len(lengths) < 2:  # one point is not a curve, and the table shows it
        return None
    figure = _figure("tokens of context" if decode else "tokens of prompt", "ms")
    for layer in profile.bundle.exit_layers:
        own = sorted((e for e in entries if e.exit_layer == layer), key=lambda e: (e.context, e.rows))
        x = [entry.context if decode else entry.rows for entry in own]
        _add_medians(figure, x, own, _marker(profile, layer), f"exit {layer}")
        figure.add_scatter(
            x=x,
            y=[entry.predicted_ms for entry in own],
            mode="lines",
            line={"color": _marker(profile, layer)["color"], "dash": "dot"},
            name=f"exit {layer}, predicted",
            showlegend=False,
        )
    title = "Time between tokens by context" if decode else "Time to first token by prompt"
    return Chart(kind, title, "Medians with their 95 % intervals; dotted: what the fitted prices predict.", figure)


def _parts(profile: DeviceProfile) -> Chart:
    """Prices of one token at every exit, split into parts."""
    costs, exits, context = profile.costs, profile.bundle.exit_layers, profile.least_context
    figure = _figure("ms a token", "exit")
    names = [f"exit {layer}" for layer in exits]
    parts: list[tuple[str, list[float]]] = []
    first = 0
    for index, layer in enumerate(exits):
        own = costs.stages[index].pass_ms(1, context)
        layers = f"layer {layer}" if layer == first + 1 else f"layers {first + 1} to {layer}"
        parts.append((layers, [own if i >= index else 0.0 for i in range(len(exits))]))
        first = layer
    parts.append(("balcony or norm", [unit.pass_ms(1, context, query_rows=1) for unit in costs.balconies]))
    parts.append(("LM head", [costs.head.pass_ms(1, context)] * len(exits)))
    parts.append(("Python", [costs.overhead_ms] * len(exits)))
    for index, (name, values) in enumerate(parts):
        figure.add_bar(y=names, x=values, orientation="h", name=name, marker={"color": COLOURS[index % len(COLOURS)]})
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    return Chart("parts", "Parts of a token's time", f"Fitted prices of one step after {context} tokens.", figure)


def _switches(profile: DeviceProfile) -> Chart | None:
    entries = (*profile.select("switch_up"), *profile.select("switch_down"))
    if len({entry.rows for entry in entries}) < 2:
        return None
    figure = _figure("pending rows", "ms of the step that switches")
    for index, way in enumerate(dict.fromkeys((entry.from_exit, entry.exit_layer) for entry in entries)):
        own = sorted((e for e in entries if (e.from_exit, e.exit_layer) == way), key=lambda e: e.rows)
        marker = {"color": COLOURS[index % len(COLOURS)], "size": 9}
        _add_medians(figure, [entry.rows - 1 for entry in own], own, marker, f"{way[0]} → {way[1]}")
    text = "Up: the deeper stages take in the pending rows in one pass. Down: the balcony takes them in, keys and values only."
    return Chart("switches", "Cost of a switch", text, figure)


def _sustained(profile: DeviceProfile) -> Chart | None:
    run = profile.sustained
    if run is None:
        return None
    figure = _figure("seconds under load", "ms a token")
    figure.add_scatter(
        x=[moment.at_s for moment in run.moments],
        y=[moment.p50_ms for moment in run.moments],
        mode="lines",
        line={"color": COLOURS[0]},
        name=f"exit {run.exit_layer}",
    )
    figure.add_scatter(
        x=[0.0, run.seconds],
        y=[run.burst.p50_ms] * 2,
        mode="lines",
        line={"color": COLOURS[-1], "dash": "dot"},
        name="burst",
    )
    if any(moment.celsius is not None for moment in run.moments):
        figure.add_scatter(
            x=[moment.at_s for moment in run.moments],
            y=[moment.celsius for moment in run.moments],
            mode="lines",
            line={"color": COLOURS[3]},
            name="°C",
            yaxis="y2",
        )
        right = {"overlaying": "y", "side": "right", "title": "°C", "showgrid": False, "automargin": True}
        figure.update_layout(yaxis2=right)
    text = f"At the end, a token takes {run.slowdown:.2f} times as long as in the first seconds."
    return Chart("sustained", "Sustained load compared with a burst", text, figure)


def _add_medians(figure: Any, x: list[int], own: list[Entry], marker: dict[str, Any], name: str) -> None:
    """Add a line of medians with their 95 % intervals."""
    figure.add_scatter(
        x=x,
        y=[entry.timing.p50_ms for entry in own],
        error_y={"type": "data", "array": [entry.timing.uncertainty_ms for entry in own]},
        mode="lines+markers",
        marker=marker,
        name=name,
    )


def _marker(profile: DeviceProfile, layer: int) -> dict[str, Any]:
    return {"color": COLOURS[profile.bundle.exit_layers.index(layer) % len(COLOURS)], "size": 9}


def _figure(x: str, y: str) -> Any:
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "automargin": True}
    return require_plotly().Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "height": 400,
            "legend": {"orientation": "h", "y": -0.35, "traceorder": "normal"},
            "xaxis": {**axis, "title": x},
            "yaxis": {**axis, "title": y},
            "font": {"family": "system-ui, sans-serif", "size": 13},
        }
    )
