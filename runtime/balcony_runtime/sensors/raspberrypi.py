"""Raspberry Pi: power by the PMIC of the Pi 5, and whether the firmware holds the clocks down.

Both are answers of the firmware. User space asks it through ``/dev/vcio`` (group ``video``), as the program ``vcgencmd``
does (raspberrypi/utils, vcgencmd/vcgencmd.c); no daemon takes part. If that file may not be opened, the flags come from the
attribute ``get_throttled`` of Raspberry Pi's kernels, which the kernel refreshes every 2 s (raspberrypi-hwmon.c).

``pmic_read_adc`` gives volts and amperes of each rail that the PMIC feeds; other models measure no current. The sum of the
rails is less than the power of the supply: USB devices, a fan and the PMIC's own losses are not in it. VDD_CORE feeds CPU
and GPU together. Bits of ``get_throttled``: 0 low voltage, 1 ARM clock capped, 2 throttled, 3 soft temperature limit; from
16 on the same since boot (Raspberry Pi documentation, "vcgencmd"). ``gpus.py`` reads the GPU's load.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors.base import Absence, SourceSample
from balcony_runtime.sensors.sysfs import ATTRIBUTE_ERRORS, absence, read_text

#: ``IOCTL_MBOX_PROPERTY``: ``_IOWR(100, 0, char *)``.
_PROPERTY = 3 << 30 | struct.calcsize("P") << 16 | 100 << 8
_TEXT_COMMAND = 0x00030080
_TEXT_BYTES = 1024
_SUCCESS = 0x80000000
#: Size, code; tag, size of its buffer, length of the answer, error; the text of the command or answer; end tag.
_MESSAGE = struct.Struct(f"=6I{_TEXT_BYTES}sI")
_CHANNEL = re.compile(r"(\w+)_([AV]) \w+\(\d+\)=([0-9.]+)[AV]")
#: ARM clock capped, throttled, soft temperature limit. A low voltage alone leaves the clocks as they are.
_HELD_DOWN = 0b1110
_CURE = "let this user open /dev/vcio: sudo usermod -aG video $USER, then log in again"


class RaspberryPi:
    """``pmic:total`` and ``pmic:VDD_CORE`` of a Pi 5, ``raspberrypi:throttled`` of every model."""

    name = "raspberrypi"

    def __init__(self, sysfs: Path, mailbox: Path = Path("/dev/vcio")) -> None:
        """Prepare; nothing is opened.

        Args:
            sysfs: root of the sysfs tree.
            mailbox: character device of the firmware's mailbox.
        """
        self._platform = sysfs / "devices/platform"
        self._mailbox = mailbox
        self._flags: Path | None = None
        self._device: int | None = None
        self._problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(mailbox))

    def discover(self) -> None:
        self._flags = next(iter(sorted(self._platform.glob("soc*/soc*:firmware/get_throttled"))), None)
        if self._device is None:
            try:
                self._device = os.open(self._mailbox, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                self._problem = error

    def read(self, now_s: float) -> SourceSample:
        if self._device is None and self._flags is None and isinstance(self._problem, FileNotFoundError):
            return SourceSample(absences=(Absence(self.name, "no mailbox of its firmware: not a Raspberry Pi"),))
        readings: list[Reading] = []
        absences: list[Absence] = []
        try:
            watts = self._rail_watts()
        except ATTRIBUTE_ERRORS as error:
            absences.append(absence("pmic:total", error, _CURE if isinstance(error, PermissionError) else ""))
        else:
            readings.append(Reading("pmic:total", "board", now_s, watts=sum(watts.values())))
            if "VDD_CORE" in watts:
                readings.append(Reading("pmic:VDD_CORE", "other", now_s, watts=watts["VDD_CORE"]))
        try:
            held_down = bool(self._throttled() & _HELD_DOWN)
        except ATTRIBUTE_ERRORS as error:
            absences.append(absence("raspberrypi:throttled", error))
        else:
            readings.append(Reading("raspberrypi:throttled", "board", now_s, throttled=held_down))
        return SourceSample(tuple(readings), tuple(absences))

    def close(self) -> None:
        """Close the mailbox."""
        if self._device is not None:
            os.close(self._device)
        self._device = None

    def _rail_watts(self) -> dict[str, float]:
        """Rail → watts. Rails of which only volts are measured (the 5 V input, the clock's battery) are left out."""
        channels: dict[str, dict[str, float]] = {"A": {}, "V": {}}
        for name, unit, value in _CHANNEL.findall(self._answer("pmic_read_adc")):
            channels[unit][name] = float(value)
        watts = {
            name: amperes * channels["V"][name] for name, amperes in channels["A"].items() if name in channels["V"]
        }
        if not watts:
            raise OSError("this model measures no current: a Raspberry Pi 5 does")
        return watts

    def _throttled(self) -> int:
        if self._device is None and self._flags is not None:
            return int(read_text(self._flags), 16)
        return int(self._answer("get_throttled").removeprefix("throttled="), 16)

    def _answer(self, command: str) -> str:
        """Text of the firmware's answer.

        Raises:
            OSError: the mailbox cannot be opened, does not answer, or does not know the command.
        """
        if self._device is None:
            raise self._problem
        import fcntl  # noqa: PLC0415 - Windows has none

        message = bytearray(_MESSAGE.pack(_MESSAGE.size, 0, _TEXT_COMMAND, _TEXT_BYTES, 0, 0, command.encode(), 0))
        fcntl.ioctl(self._device, _PROPERTY, message)
        _, code, _, _, _, error, text, _ = _MESSAGE.unpack(message)
        if code != _SUCCESS or error:
            raise OSError(f"the firmware does not know {command}")
        answer: bytes = text
        return answer.partition(b"\0")[0].decode(errors="replace")
