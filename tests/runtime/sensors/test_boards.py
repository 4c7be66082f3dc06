"""Raspberry Pi with a stand-in for its firmware, and Apple's system management controller."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from balcony_edge.device.readings import Reading
from balcony_runtime.sensors import Absence, SourceSample
from balcony_runtime.sensors.apple import AppleSmc
from balcony_runtime.sensors.raspberrypi import RaspberryPi

Tree = Callable[[str], Path]
#: Some rails as a Pi 5 prints them. EXT5V and BATT have no amperes.
RAILS = """ 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.05000000A
  VDD_CORE_A current(7)=6.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.85000000V
     EXT5V_V volt(24)=5.09066000V
      BATT_V volt(25)=0.00000000V
"""
UNKNOWN = 'error=1 error_msg="Command not registered"'


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Command → answer of the mailbox ``tmp_path / "vcio"``, with the messages of raspberrypi/utils, vcgencmd.c."""
    answers = {"pmic_read_adc": RAILS, "get_throttled": "throttled=0x50000"}
    (tmp_path / "vcio").touch()

    def answer(_device: int, request: int, message: bytearray) -> int:
        assert request == {8: 0xC0086400, 4: 0xC0046400}[struct.calcsize("P")]  # _IOWR(100, 0, char *)
        size, code, tag, room, length, error = struct.unpack_from("=6I", message)
        assert (size, code, tag, room, length, error) == (len(message), 0, 0x00030080, 1024, 0, 0)
        assert len(message) == 1052 and message[-4:] == bytes(4)
        command = message[24:-4].partition(b"\0")[0].decode()
        struct.pack_into("=I", message, 4, 0x80000000)
        message[24:-4] = answers[command].encode().ljust(1024, b"\0")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", answer)
    return answers


def look(source: RaspberryPi | AppleSmc) -> SourceSample:
    source.discover()
    try:
        return source.read(1.0)
    finally:
        source.close()


def test_a_pi_5_measures_its_rails(firmware: dict[str, str], tmp_path: Path) -> None:
    assert look(RaspberryPi(tmp_path, tmp_path / "vcio")) == SourceSample((
        Reading("pmic:total", "board", 1.0, watts=pytest.approx(0.37 + 0.165 + 5.1)),
        Reading("pmic:VDD_CORE", "other", 1.0, watts=pytest.approx(5.1)),
        Reading("raspberrypi:throttled", "board", 1.0, throttled=False),  # throttled since boot, but not now
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "throttled"),
    [
        ("0x0", False),
        ("0x1", False),
        ("0x2", True),
        ("0x4", True),
        ("0x8", True),
        ("0xe0000", False),
        ("0x50005", True),
    ],
)
def test_flags_of_now_count(flags: str, throttled: bool, firmware: dict[str, str], tmp_path: Path) -> None:
    firmware["get_throttled"] = f"throttled={flags}"
    assert look(RaspberryPi(tmp_path, tmp_path / "vcio")).readings[-1].throttled is throttled


def test_a_pi_4_measures_no_current(firmware: dict[str, str], tmp_path: Path) -> None:
    firmware["pmic_read_adc"] = UNKNOWN
    sample = look(RaspberryPi(tmp_path, tmp_path / "vcio"))
    assert [reading.source for reading in sample.readings] == ["raspberrypi:throttled"]
    assert sample.absences == (Absence("pmic:total", "this model measures no current: a Raspberry Pi 5 does"),)


def test_nonsense_and_a_firmware_that_refuses(
    firmware: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware |= {"pmic_read_adc": " VDD_CORE_A current(7)=1.2.3A\n VDD_CORE_V volt(15)=1V\n", "get_throttled": UNKNOWN}
    sample = look(RaspberryPi(tmp_path, tmp_path / "vcio"))
    assert sample.readings == () and [absence.part for absence in sample.absences] == [
        "pmic:total", "raspberrypi:throttled"
    ]  # fmt: skip

    def busy(*_: object) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(fcntl, "ioctl", busy)
    sample = look(RaspberryPi(tmp_path, tmp_path / "vcio"))
    assert {absence.reason for absence in sample.absences} == {"Device or resource busy"}
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)  # the message comes back as it was sent
    sample = look(RaspberryPi(tmp_path, tmp_path / "vcio"))
    assert sample.absences[0].reason == "the firmware does not know pmic_read_adc"


def test_without_the_mailbox_flags_come_from_the_kernel(sysfs_tree: Tree, tmp_path: Path) -> None:
    root = sysfs_tree("raspberrypi5")
    sample = look(RaspberryPi(root, tmp_path / "nowhere"))
    assert sample.readings == (Reading("raspberrypi:throttled", "board", 1.0, throttled=False),)
    (root / "devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled").write_text("50006\n")
    assert look(RaspberryPi(root, tmp_path / "nowhere")).readings[0].throttled is True


def test_a_mailbox_that_may_not_be_opened_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    power, flags = look(RaspberryPi(tmp_path, tmp_path / "vcio")).absences
    assert power.part == "pmic:total" and power.reason.startswith("permission denied (")
    assert power.cure == "let this user open /dev/vcio: sudo usermod -aG video $USER, then log in again"
    assert flags.part == "raspberrypi:throttled"


def test_another_device_is_not_a_raspberry_pi(sysfs_tree: Tree, tmp_path: Path) -> None:
    sample = look(RaspberryPi(sysfs_tree("laptop"), tmp_path / "nowhere"))
    assert sample == SourceSample(absences=(Absence("raspberrypi", "no mailbox of its firmware: not a Raspberry Pi"),))


def test_a_mac_measures_its_whole_power(sysfs_tree: Tree) -> None:
    root = sysfs_tree("macbook")
    assert look(AppleSmc(root)).readings == (Reading("macsmc:system", "board", 1.0, watts=9.75),)
    (root / "class/hwmon/hwmon1/power2_input").write_text("")
    ((part, reason),) = [(absence.part, absence.reason) for absence in look(AppleSmc(root)).absences]
    assert part == "macsmc:system" and "does not contain a number" in reason
    assert [absence.part for absence in look(AppleSmc(sysfs_tree("laptop"))).absences] == ["macsmc"]
