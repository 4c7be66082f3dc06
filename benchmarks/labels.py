"""Names next to the points of a picture, placed so that they cover no other name or point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.transforms import Bbox

#: Possible places of a name, as distances from its point: near places first, the right side before the left.
_STEPS = (0, 9, -9, 20, -20, 32, -32, 46, -46)
_PLACES = [(side * 9, up) for up, side in product(_STEPS, (1, -1))]
#: Radius of a point in pixels.
_RADIUS = 6


def name_points(
    axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], colors: Sequence[Any] | None = None
) -> None:
    """Write the name of every point next to it; if there is no room, write it further away with a line to its point.

    Args:
        axes: axes that are otherwise complete, because scale, limits and legend decide which places are free.
        points: points in data coordinates.
        names: names of the points, one each.
        colors: colors of the names; dark grey by default.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    window = axes.get_window_extent()
    middles = axes.transData.transform(np.array(points, float))
    taken = [Bbox.from_extents(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in middles]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    for index, (point, name) in enumerate(zip(points, names, strict=True)):
        own = taken[index]
        best, best_box, least = _PLACES[0], own, float("inf")
        for place in _PLACES:
            label = _label(axes, point, name, place)
            box = label.get_window_extent()
            label.remove()
            covered = sum(_common(box, other) for other in taken if other is not own)
            covered += box.width * box.height - _common(box, window)
            if covered < least:
                best, best_box, least = place, box, covered
            if covered == 0:
                break
        color = "0.25" if colors is None else colors[index]
        line = {"arrowstyle": "-", "color": "0.7", "lw": 0.7} if abs(best[1]) > 10 else None
        _label(axes, point, name, best, color=color, arrowprops=line)
        taken.append(best_box)


def _label(axes: Any, point: tuple[float, float], name: str, place: tuple[float, float], **look: Any) -> Any:
    return axes.annotate(
        name,
        point,
        xytext=place,
        textcoords="offset points",
        ha="left" if place[0] > 0 else "right",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},  # covers lines under the name
        **look,
    )


def _common(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, square pixels."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)
