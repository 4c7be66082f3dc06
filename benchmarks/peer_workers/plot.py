"""The picture of :mod:`benchmarks.peers`: tokens a second against what they lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

#: KL below which the axis is linear: float32 engines differ from one another by less.
LINEAR_KL = 1e-3


def plot(document: dict[str, Any], path: Path) -> None:
    """Write the picture of a document of :mod:`benchmarks.peers`: our exits joined by a line, each peer a point."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    bundles = dict.fromkeys(case["bundle"] for case in document["cases"] if case["bundle"] is not None)
    colors = dict(zip(bundles, mpl.color_sequences["tab10"], strict=False))
    for bundle, color in colors.items():
        cases = sorted((c for c in document["cases"] if c["bundle"] == bundle), key=lambda case: -case["exit_layer"])
        axes.plot(
            [case["kl"] for case in cases],
            [case["decode_32_tps"] for case in cases],
            "o-",
            color=color,
            label=f"Balcony Edge {bundle}",
        )
        for case in cases:
            text = f"exit {case['exit_layer']}" if case is not cases[0] else "full depth"
            _name(axes, case, text, color, to_the_left=True)
    peers = sorted((case for case in document["cases"] if case["bundle"] is None), key=lambda case: case["kl"])
    for number, case in enumerate(peers):
        axes.plot(case["kl"], case["decode_32_tps"], "D", color="0.35")
        _name(axes, case, case["name"], "0.25", up=6 if number % 2 else -6)  # neighbours' names do not meet
    axes.set_xscale("symlog", linthresh=LINEAR_KL)
    axes.set_xlim(-LINEAR_KL / 10, 10 * max(case["kl"] for case in document["cases"]))  # room for names on the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL to the float32 model, nats a token (left is better)")
    axes.set_ylabel("tokens a second after a prompt of 32 (up is better)")
    axes.set_title(f"SmolLM2-135M-Instruct, {document['threads']} threads, {document['cpu']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _name(axes: Any, case: dict[str, Any], text: str, color: Any, *, to_the_left: bool = False, up: int = 0) -> None:
    axes.annotate(
        text,
        (case["kl"], case["decode_32_tps"]),
        xytext=(-7 if to_the_left else 7, up),
        textcoords="offset points",
        horizontalalignment="right" if to_the_left else "left",
        verticalalignment="center",
        fontsize=8,
        color=color,
    )
