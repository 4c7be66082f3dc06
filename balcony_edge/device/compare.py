"""Comparison of two device profiles: of two devices, two bundles, or two versions of either.

Owns which entries are comparable, their ratios and whether a difference is more than chance. It reads no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from balcony_edge.device.profile import DeviceProfile, Entry
from balcony_edge.errors import ProfileError

#: Half a 95 % interval in standard deviations.
_HALF_WIDTH = 1.96


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity in both profiles.

    Attributes:
        entry: the quantity, with the first profile's figures.
        second_ms: median of the second profile.
        ratio: ``second_ms`` over the median of the first.
        ratio_uncertainty: half the width of the ratio's 95 % interval.
        p_value: probability of a difference as large by chance alone.
    """

    entry: Entry
    second_ms: float
    ratio: float
    ratio_uncertainty: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at the 5 % level."""
        return self.p_value < 0.05


def compare_profiles(first: DeviceProfile, second: DeviceProfile) -> tuple[Comparison, ...]:
    """Compare every quantity that both profiles measured, in the order of the first.

    Stages that end at the same exit but begin at others have different layers, and are not compared.

    Raises:
        ProfileError: the profiles have no quantity in common.
    """
    other = {(entry.key, _begin(second, entry)): entry for entry in second.entries}
    pairs = [(entry, other.get((entry.key, _begin(first, entry)))) for entry in first.entries]
    found = tuple(
        _compared(entry, same)
        for entry, same in pairs
        if same is not None and entry.timing.p50_ms > 0 and same.timing.p50_ms > 0
    )
    if not found:
        exits = [", ".join(map(str, profile.bundle.exit_layers)) for profile in (first, second)]
        raise ProfileError(
            f"the two device profiles have no quantity in common (exits {exits[0]} and {exits[1]}): "
            "measure both with the same -p, -n, -d and --pending"
        )
    return found


def _begin(profile: DeviceProfile, entry: Entry) -> int:
    """Layers before those of a stage's pass; 0 for all other quantities."""
    before = [layer for layer in profile.bundle.exit_layers if layer < entry.exit_layer]
    return max(before, default=0) if entry.kind == "catch_up" else 0


def _compared(first: Entry, second: Entry) -> Comparison:
    one, two = first.timing, second.timing
    ratio = two.p50_ms / one.p50_ms
    relative = math.hypot(one.uncertainty_ms / one.p50_ms, two.uncertainty_ms / two.p50_ms)
    # The distance is that of logarithms, so that the order of the two profiles does not change the answer.
    distance = abs(math.log(ratio)) * _HALF_WIDTH / relative if relative else math.inf
    p_value = 2 * (1 - NormalDist().cdf(distance)) if ratio != 1 else 1.0
    return Comparison(first, two.p50_ms, ratio, ratio * relative, p_value)
