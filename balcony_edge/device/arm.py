"""Names of Arm cores. Their kernels print numbers in place of a model name: who made the core, and which one it is.

The numbers are those of the register MIDR_EL1, as the Linux kernel and util-linux list them. Old kernels, kernels for 32-bit
programs and qemu print a model name as well, but one that says little ("ARMv8 Processor rev 1").
"""

from __future__ import annotations

import re

#: Implementer → part → name.
_NAMES = {
    0x41: {  # Arm
        0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72",
        0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77",
        0xD0E: "Cortex-A76AE", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1",
        0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C",
        0xD4C: "Cortex-X1C", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520",
        0xD81: "Cortex-A720", 0xD82: "Cortex-X4", 0xD83: "Neoverse-V3AE", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925",
        0xD87: "Cortex-A725", 0xD8E: "Neoverse-N3",
    },
    0x46: {0x001: "A64FX"},  # Fujitsu
    0x4E: {0x003: "Denver 2", 0x004: "Carmel"},  # NVIDIA: Jetson TX2 and Xavier
    0x51: {  # Qualcomm
        0x001: "Oryon", 0x802: "Kryo 3xx Gold", 0x803: "Kryo 3xx Silver", 0x804: "Kryo 4xx Gold", 0x805: "Kryo 4xx Silver",
    },
    0x61: {0x022: "Icestorm (M1)", 0x023: "Firestorm (M1)", 0x032: "Blizzard (M2)", 0x033: "Avalanche (M2)"},  # Apple
    0xC0: {0xAC3: "Ampere-1", 0xAC4: "Ampere-1A"},
}  # fmt: skip
_CORE = re.compile(r"^CPU implementer\s*:\s*(0x[0-9a-f]+)$(?:\n.+)*?\nCPU part\s*:\s*(0x[0-9a-f]+)$", re.MULTILINE)


def core_names(cpuinfo: str) -> str | None:
    """Names of the kinds of cores in ``/proc/cpuinfo``, such as ``Cortex-A55 + Cortex-A76``; None if it lists no Arm cores."""
    found = dict.fromkeys((int(maker, 16), int(part, 16)) for maker, part in _CORE.findall(cpuinfo))
    names = (
        _NAMES.get(maker, {}).get(part) or f"Arm CPU part {part:#x} of implementer {maker:#x}" for maker, part in found
    )
    return " + ".join(names) or None
