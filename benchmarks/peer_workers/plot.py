"""The picture of :mod:`benchmarks.peers`: tokens a second over the loss of quality, and over the context."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.labels import name_points

#: KL below which the axis is linear, because float32 engines differ from one another by less.
LINEAR_KL = 1e-3


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw a document of :mod:`benchmarks.peers`; the context gets a panel of its own if there are more than two."""
    contexts = sorted(int(key.split("_")[1]) for key in document["cases"][0] if re.fullmatch(r"decode_\d+_tps", key))
    long = len(contexts) > 2
    figure = Figure(figsize=(14 if long else 9, 5.5), layout="constrained")
    left, *right = figure.subplots(1, 2 if long else 1, squeeze=False)[0]
    _over_quality(left, document, contexts[0])
    if right:
        _over_context(right[0], document, contexts)
    figure.suptitle(f"SmolLM2-135M-Instruct, {document['threads']} threads, {document['cpu']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _over_quality(axes: Axes, document: dict[str, Any], context: int) -> None:
    """A line joins our exits, and each peer is a point; exits that were not measured after so many tokens are left out."""
    speed = f"decode_{context}_tps"
    measured = [case for case in document["cases"] if speed in case]
    bundles = dict.fromkeys(case["bundle"] for case in measured if case["bundle"] is not None)
    colors = dict(zip(bundles, mpl.color_sequences["tab10"], strict=False))
    named: list[tuple[dict[str, Any], str, Any]] = []
    for bundle, color in colors.items():
        cases = sorted((c for c in measured if c["bundle"] == bundle), key=lambda case: -case["exit_layer"])
        line = [case["kl"] for case in cases], [case[speed] for case in cases]
        axes.plot(*line, "o-", color=color, label=f"Balcony Edge {bundle}")
        named += [(case, "full depth" if case is cases[0] else f"exit {case['exit_layer']}", color) for case in cases]
    for case in (case for case in measured if case["bundle"] is None):
        axes.plot(case["kl"], case[speed], "D", color="0.35")
        named.append((case, case["name"], "0.25"))
    axes.set_xscale("symlog", linthresh=LINEAR_KL)
    least, most = (bound(case["kl"] for case in measured) for bound in (min, max))
    axes.set_xlim(-LINEAR_KL / 10 if least < 10 * LINEAR_KL else least / 3, 10 * most)  # room for names on the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL to the float32 model, nats a token (left is better)")
    axes.set_ylabel(f"tokens a second after a prompt of {context} (up is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    points = [(case["kl"], case[speed]) for case, _, _ in named]
    name_points(axes, points, [name for _, name, _ in named], [color for _, _, color in named])


def _over_context(axes: Axes, document: dict[str, Any], contexts: list[int]) -> None:
    """Milliseconds a token over the tokens before it, at full depth and of each peer."""
    for case in document["cases"]:
        speeds = [case.get(f"decode_{context}_tps") for context in contexts]
        if None not in speeds:
            times = [1e3 / speed for speed in speeds]
            axes.plot(contexts, times, "D--" if case["bundle"] is None else "o-", label=case["name"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("milliseconds a token (down is better)")
    axes.grid(alpha=0.3)
    axes.legend()
