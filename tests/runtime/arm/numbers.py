"""Compare the logits of recorded bundles with those of the machine that exported them: one JSON line for each bundle.

    python -m tests.runtime.arm.numbers RECORDED PACKED

It runs on the other processor. Each bundle also runs over packed weights in the directory PACKED, which must give the
same bits. The exit code is 1 if a bound is exceeded. The bounds are those of `balcony-edge verify`, except for float16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from balcony_edge.bundle.bundle import Bundle
from tests.runtime.arm.reference import Logits, distance, logits_of

#: Largest difference where every product computes in float32: float32 bundles, and others at accuracy level 1.
EXACT = 1e-4
#: Largest difference in float16, above verify's 2e-2: Arm multiplies in half precision where x86 multiplies in float32.
HALF = 5e-2
#: Where activations are rounded to int8, the last bits of each kernel decide what is rounded up. So logits are compared as
#: distributions: mean KL from the form that rounds no activations, nats.
ROUNDED_KL = 0.5


def compared(path: Path, found: Logits) -> tuple[dict[str, dict[str, float]], bool]:
    """Distances from the other machine and from the exact logits, and whether they are within their bounds."""
    with np.load(path.parent / f"{path.name}.npz") as known:
        there = {name: known[name] for name in found}
        exact = {name: known[f"exact_{name}"] for name in found if f"exact_{name}" in known}
    manifest = Bundle.open(path).manifest
    facts = {"from_x86": distance(found, there)}
    if exact:
        facts |= {"from_exact": distance(found, exact), "x86_from_exact": distance(there, exact)}
    if manifest.quantization is not None and manifest.quantization.accuracy_level == 4:
        near = facts["from_exact"].kl <= ROUNDED_KL
    else:
        bound = HALF if manifest.precision == "float16" else EXACT
        near = all(apart.difference <= bound for apart in facts.values())
    return {name: asdict(apart) for name, apart in facts.items()}, near


def main() -> int:
    recorded, packed = map(Path, sys.argv[1:])
    failed = False
    for file in sorted(recorded.glob("*/*.npz")):
        path = file.with_suffix("")
        found, shared = logits_of(path), logits_of(path, packed)
        facts, near = compared(path, found)
        same = all(np.array_equal(found[name], shared[name]) for name in found)
        failed = failed or not near or not same
        words = {"precision": path.parent.name, "model": path.name, "passed": near and same, "packed_bits_equal": same}
        print(json.dumps({**words, **facts}), flush=True)  # noqa: T201 - the report reads it
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
