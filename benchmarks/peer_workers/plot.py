"""The picture of :mod:`benchmarks.peers`: tokens a second over the loss of quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.labels import name_points

#: KL below which the axis is linear, because float32 engines differ from one another by less.
LINEAR_KL = 1e-3


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw a document of :mod:`benchmarks.peers`: a line joins our exits, and each peer is a point."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    bundles = dict.fromkeys(case["bundle"] for case in document["cases"] if case["bundle"] is not None)
    colors = dict(zip(bundles, mpl.color_sequences["tab10"], strict=False))
    named: list[tuple[dict[str, Any], str, Any]] = []
    for bundle, color in colors.items():
        cases = sorted((c for c in document["cases"] if c["bundle"] == bundle), key=lambda case: -case["exit_layer"])
        axes.plot(
            [case["kl"] for case in cases],
            [case["decode_32_tps"] for case in cases],
            "o-",
            color=color,
            label=f"Balcony Edge {bundle}",
        )
        named += [(case, "full depth" if case is cases[0] else f"exit {case['exit_layer']}", color) for case in cases]
    for case in (case for case in document["cases"] if case["bundle"] is None):
        axes.plot(case["kl"], case["decode_32_tps"], "D", color="0.35")
        named.append((case, case["name"], "0.25"))
    axes.set_xscale("symlog", linthresh=LINEAR_KL)
    axes.set_xlim(-LINEAR_KL / 10, 10 * max(case["kl"] for case in document["cases"]))  # room for names on the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL to the float32 model, nats a token (left is better)")
    axes.set_ylabel("tokens a second after a prompt of 32 (up is better)")
    axes.set_title(f"SmolLM2-135M-Instruct, {document['threads']} threads, {document['cpu']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    points = [(case["kl"], case["decode_32_tps"]) for case, _, _ in named]
    name_points(axes, points, [name for _, name, _ in named], [color for _, _, color in named])
    figure.savefig(path, dpi=120)
