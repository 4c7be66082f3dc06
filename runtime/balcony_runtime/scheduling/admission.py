"""Admission: the memory that sequences may take, and how often those that wait are looked at.

Whether there is time for one more stream, and who begins first, is decided in :mod:`balcony_edge.control.company`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import InputError, shown
from balcony_edge.files import require_path

if TYPE_CHECKING:
    from balcony_runtime.scheduling.stream import Stream

_log = logging.getLogger(__name__)
#: Time after which those that wait are looked at again if nobody has come or gone.
LOOK_S = 0.1
#: Time after which a warning says that those that wait do so for streams whose tokens nobody asks for.
LEFT_S = 5.0
#: Most megabytes that may be asked for: far beyond every memory, and a number of bytes that a float still holds.
MOST_MB = 1e12


def row_bytes(manifest: Manifest) -> int:
    """Bytes of one row of a sequence: what all stages and balconies keep of it, and the row at every boundary."""
    model, floats = manifest.model, np.dtype(manifest.float_dtype).itemsize
    kept = {
        "key": np.dtype(manifest.kv_dtype).itemsize,
        "value": np.dtype(manifest.kv_dtype).itemsize,
        "inputs": floats,
    }
    layers = [*range(model.num_layers), *map(manifest.balcony_layer, manifest.cached_exits)]
    parts = [(part, layer) for layer in layers for part in model.memory(layer).parts if part in kept]
    boundaries = (1 + len(manifest.exits)) * model.hidden_size * floats
    return boundaries + sum(model.sizes(part, layer)[0] * kept[part] for part, layer in parts)


class Looks:
    """When those that wait are looked at: if somebody has come or gone, or after a while. A look is a joint decision each."""

    def __init__(self) -> None:
        self._waits: dict[int, bool] = {}  # stream → whether it waited at the last look
        self._looked_s = 0.0
        self._left_s = 0.0  # since when nobody asks but those that wait; infinite once that was told

    def due(self, streams: Sequence[Stream]) -> bool:
        """Whether to look now."""
        waits, now_s = {one.key: one.waits for one in streams}, time.monotonic()
        self._tell_of_left(streams, waits, now_s)
        if not any(waits.values()) or (waits == self._waits and now_s - self._looked_s < LOOK_S):
            return False
        self._waits, self._looked_s = waits, now_s
        return True

    def _tell_of_left(self, streams: Sequence[Stream], waits: Mapping[int, bool], now_s: float) -> None:
        """Warn if those that wait do so for streams whose tokens nobody has asked for in a while."""
        goes_on = any(self._waits.get(key) for key, one in waits.items() if one)  # as at the last look
        if not goes_on or any(one.asks and one.admitted for one in streams):
            self._left_s = now_s
        elif now_s - self._left_s >= LEFT_S:
            self._left_s, left = math.inf, sum(one.admitted for one in streams)
            _log.warning(
                "a reply waits for others: for %g s nobody has asked for a token of the %d in progress: "
                "read those streams on, or close them",
                LEFT_S,
                left,
            )


class Bounds(NamedTuple):
    """What sequences may take.

    Attributes:
        kv_bytes: gives the bound of all streams' memory, or None without one.
        kept_bytes: most bytes of ended sequences, whose rows new prompts can begin with; the same again on disk.
        directory: place of the files of ended sequences; None keeps them in memory only.
    """

    kv_bytes: Callable[[], float | None]
    kept_bytes: int
    directory: Path | None

    def most_rows(self, rows: int, row_bytes: int) -> int | None:
        """Rows of ``row_bytes`` that all sequences together may have; None without a bound.

        Raises:
            InputError: one sequence's own ``rows`` are more.
        """
        if (bound := self.kv_bytes()) is None:
            return None
        if rows > (most := int(min(bound, sys.maxsize)) // row_bytes):
            raise InputError(
                f"kv_memory_mb: {rows} tokens do not fit, which has room for {most}: ask for fewer tokens or raise it"
            )
        return most

    @classmethod
    def of(
        cls, kv_bytes: Callable[[], float | None], prefix_mb: float, prefix_directory: str | os.PathLike[str] | None
    ) -> Self:
        """The bounds that a user asks for.

        Raises:
            InputError: ``prefix_mb`` is negative, too large or not a number; or the directory is no path.
        """
        if isinstance(prefix_mb, bool) or not isinstance(prefix_mb, Real) or not 0 <= prefix_mb <= MOST_MB:
            raise InputError(
                f"prefix_mb = {shown(prefix_mb)}: must be a number from 0 to {MOST_MB:g}: give megabytes, or 0 to keep nothing"
            )
        if prefix_directory is not None:
            require_path(prefix_directory, "prefix_directory", InputError, "give the path of a directory")
        return cls(kv_bytes, int(1e6 * prefix_mb), None if prefix_directory is None else Path(prefix_directory))
