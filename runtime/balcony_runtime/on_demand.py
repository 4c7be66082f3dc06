"""The device's sensors, which the first budget that needs them starts, and the ceilings that none of them measures.

Few budgets need sensors, so they are imported and started late. It does not know what they measure, nor the controller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from balcony_edge.budget import Budget, Rail
from balcony_edge.control.observed import unseen, watts
from balcony_edge.device.readings import Reading
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime.backends.base import closed

if TYPE_CHECKING:
    from balcony_runtime.sensors import Sensors

_log = logging.getLogger(__name__)
#: Longest wait for sensors that have just been started: energy counters and busy shares need two samples.
FIRST_READINGS_S = 1.0
#: Longest wait for a reading before a reply is refused: a source whose read failed (EIO) is asked again after two periods.
MISSED_S = 0.5


class SensorsOnDemand:
    """The sensors of one LLM.

    Args:
        latest: gives the latest reading of every sensor; None for the device's own sensors.
    """

    def __init__(self, latest: Callable[[], tuple[Reading, ...]] | None) -> None:
        self._latest = latest
        self._sensors: Sensors | None = None
        self._lock = threading.RLock()  # the handler of a signal may set a budget while its own thread starts sensors
        self._closed = False
        self._settled_s = 0.0
        self._told: set[tuple[str, str | None]] = set()  # keys, of power with its rail

    def latest(self) -> tuple[Reading, ...]:
        """Latest reading of every sensor; the first call starts the device's sensors.

        Raises:
            InputError: they would start after :meth:`close`, and nobody would stop them.
        """
        with self._lock:
            if self._latest is None:
                from balcony_runtime.sensors import Sensors, device_sources  # noqa: PLC0415 - few budgets need them

                # Known before they start, which waits for their first answers: another thread may close them meanwhile.
                sensors = self._sensors = Sensors(device_sources())
                if self._closed:
                    raise closed()
                # Before they start: a signal's handler in the middle of it finds these, and starts no others.
                self._latest, self._settled_s = sensors.latest, time.monotonic() + FIRST_READINGS_S
                try:
                    sensors.start()
                except BaseException as error:
                    self._latest = None
                    if isinstance(error, InputError):  # closed since the line above: it names another cure
                        raise closed() from error
                    raise
                self._settled_s = time.monotonic() + FIRST_READINGS_S
            latest = self._latest
        return latest()

    def check(self, budget: Budget) -> None:
        """Warn of ceilings that no sensor of this device measures, once of each.

        Raises:
            InfeasibleError: there are some, and the budget asks for an error in that case.
        """
        until_s = time.monotonic() + MISSED_S if budget.on_infeasible == "error" else 0.0
        while missing := unseen(budget, self.latest(), time.monotonic()):
            if time.monotonic() >= max(self._settled_s, until_s):
                break
            time.sleep(0.05)
        if not missing:
            return
        asked = ", ".join(f"{key} = {getattr(budget, key):g}" for key in missing)
        rails = self._rails(missing)
        text = f"{asked}: no sensor of this device measures it (`balcony-edge doctor` says what is missing{rails})"
        if budget.on_infeasible == "error":
            raise InfeasibleError(f"{text}: leave it out, or choose another on_infeasible")
        told = {(key, budget.power_rail if key in ("power_w", "energy_j_per_token") else None) for key in missing}
        if not self._told.issuperset(told):  # a server asks for each reply
            self._told.update(told)
            _log.warning("%s: it is not held", text)

    def _rails(self, missing: tuple[str, ...]) -> str:
        """The rails whose power is measured, if that of the budget's rail is not: doctor shows nothing missing then."""
        if not {"power_w", "energy_j_per_token"}.intersection(missing):
            return ""
        readings, now_s = self.latest(), time.monotonic()
        known = [rail for rail in get_args(Rail) if watts(readings, rail, now_s) is not None]
        return "".join(f'; power_rail = "{rail}" is measured' for rail in known)

    def close(self) -> None:
        """Stop the device's sensors, if they were started; later calls start none."""
        self._closed = True
        if self._sensors is not None:
            self._sensors.close()
