"""Damages a bundle in seeded ways and tries each; run by test_fuzz.py in a process of its own with bounded memory.

    python tests/fuzz_bundle.py BUNDLE SCRATCH KIND FIRST COUNT

Every case is made from its kind and number alone, so a failure repeats. Kinds:

    bytes      bytes of any file are changed, nothing else
    forged     bytes of a file are changed, and hashes and fingerprint are made to fit
    manifest   values of the manifest are changed, keys dropped or added, and the fingerprint is made to fit

Prints one line per case: a JSON object that tells what was done, a tab, and the outcome. Outcomes: ``refused`` (a
BalconyError of one line), ``equal`` (loads, and every exit's logits are those of the whole bundle), ``differs`` (loads and
runs, with other logits: only a forger's consistent bundle can do that). Anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from balcony_edge.bundle.bundle import fingerprint, sha256_file
from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.cli.device.inspect import inspect
from balcony_edge.errors import BalconyError
from balcony_runtime.llm import LLM

PROMPT = [5, 6, 7, 8, 9]
#: Address space on top of what the process has once everything is loaded: a tiny bundle needs a small part of it.
ROOM_BYTES = 600 * 2**20
#: What a forger may put in the place of a value.
VALUES: list[Any] = [
    *(None, True, False, [], {}, "", [[]], {"": 0}, 0, 1, -1, 2, 3, 5, 7, 17, 2**22, 2**31, 2**63, 10**30, 10**400),
    *(0.5, 1e300, float("nan"), float("inf"), "float16", "int64", "rows", "[/x]", "[red]", "a\nb", "\x1b[2J"),
    *("weights.bin", "stage_0.onnx", "../weights.bin", "/dev/zero", "/proc/self/environ", "x" * 5000, "\ud800"),
]


def main() -> None:
    """Try ``COUNT`` cases from ``FIRST`` on."""
    bundle, scratch, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    copy = Path(shutil.copytree(bundle, scratch / "bundle"))
    expected = attempt(copy, {}, hashes=True)
    assert isinstance(expected, dict)
    limit_memory()
    for number in range(int(sys.argv[4]), int(sys.argv[4]) + int(sys.argv[5])):
        choose = random.Random(f"{kind} {number}")
        with damaged(copy, kind, choose) as what:
            tell(json.dumps({"case": f"{kind} {number}", **what}))  # first, so that what kills the process is known
            outcome = attempt(copy, expected, hashes=kind == "bytes" or choose.random() < 0.5)
        tell(f"\t{outcome}\n")


def tell(text: str) -> None:
    """Write at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def attempt(bundle: Path, expected: dict[int, Any], *, hashes: bool) -> str | dict[int, Any]:
    """Load, show, and run every exit; the logits when none were expected."""
    try:
        with LLM.open(bundle, threads=1, verify_hashes=hashes) as llm:
            logits = {}
            sequence = llm.engine.new_sequence(max_length=min(16, llm.engine.manifest.model.context_length))
            for exit_layer in llm.exit_layers:
                logits[exit_layer] = sequence.advance(exit_layer, [] if sequence.length else PROMPT)
            llm.engine.new_sequence()  # of the whole context
            for message in ("the fox", [{"role": "user", "content": "the fox"}]):
                llm.encode(message)
            llm.generate("the fox", max_new_tokens=2)
            long = [9] * min(300, llm.engine.manifest.model.context_length - 2)
            llm.generate(long, max_new_tokens=1)
        with contextlib.redirect_stdout(io.StringIO()):
            inspect(bundle, tables=True)
    except BalconyError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, f"not one short line: {error!r}"
        return "refused"
    if not expected:
        return logits
    same = all(np.allclose(logits[e], expected[e], rtol=0, atol=1e-5) for e in logits if e in expected)
    return "equal" if same and logits.keys() <= expected.keys() else "differs"


@contextlib.contextmanager
def damaged(bundle: Path, kind: str, choose: random.Random) -> Iterator[dict[str, Any]]:
    """The bundle with one case's damage; whole again afterwards."""
    manifest = (bundle / MANIFEST).read_bytes()
    path = bundle / MANIFEST
    try:
        if kind == "manifest":
            document = json.loads(manifest)
            changes = [change_value(document, choose) for _ in range(choose.choice((1, 1, 1, 2, 3)))]
            write_forged(bundle, document)
            yield {"file": MANIFEST, "what": changes}
            return
        names = sorted(file.name for file in bundle.iterdir() if kind == "bytes" or file.name != MANIFEST)
        if kind == "forged":  # of two sets of graphs the runtime opens one: a forged one of the other changes nothing
            unread = {spec["file"] for spec in json.loads(manifest)["graphs"].values()}
            names = [name for name in names if name not in unread]
        path = bundle / choose.choice(names)
        whole = path.read_bytes()
        try:
            data, what = change_bytes(whole, choose)
            path.write_bytes(data)
            if kind == "forged":
                document = json.loads(manifest)
                document["files"][path.name] = {"bytes": len(data), "sha256": sha256_file(path)}
                write_forged(bundle, document)
            yield {"file": path.name, "what": what}
        finally:
            path.write_bytes(whole)
    finally:
        (bundle / MANIFEST).write_bytes(manifest)


def change_bytes(data: bytes, choose: random.Random) -> tuple[bytes, str]:
    """``data`` with one to three changes, and what they were."""
    changed, words = bytearray(data), []
    for _ in range(choose.choice((1, 1, 2, 3))):
        at = choose.randrange(len(changed)) if changed else 0
        length = choose.choice((1, 2, 4, 16, 200))
        how = choose.choice(("flip", "set", "digit", "drop", "insert", "zero", "repeat", "cut"))
        words.append(f"{how} {length} at {at}")
        if how == "flip" and changed:
            changed[at] ^= 1 << choose.randrange(8)
        elif how == "set":
            changed[at : at + length] = choose.randbytes(min(length, len(changed) - at))
        elif how == "digit":
            digits = [i for i in range(len(changed)) if 48 <= changed[i] < 58]
            if digits:
                changed[choose.choice(digits)] = choose.randrange(48, 58)
        elif how == "drop":
            del changed[at : at + length]
        elif how == "insert":
            changed[at:at] = choose.randbytes(length)
        elif how == "zero":
            changed[at : at + length] = bytes(min(length, len(changed) - at))
        elif how == "repeat":
            changed[at:at] = changed[at : at + length]
        else:
            del changed[at:]
    return bytes(changed), ", ".join(words)


def change_value(document: dict[str, Any], choose: random.Random) -> str:
    """Change, drop, add or swap one value somewhere in ``document``; tells what."""
    places = list(walk(document, ()))
    # tables of tensors are most of a manifest: a third of the changes goes elsewhere
    outside = [place for place in places if place[0][0] != "graphs"]
    keys, parent, key = choose.choice(outside if choose.random() < 0.6 else places)
    how = choose.choice(("replace", "replace", "near", "drop", "add", "swap"))
    if how == "drop":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[str(choose.choice(VALUES))] = choose.choice(VALUES)
    elif how == "swap":
        _, other, other_key = choose.choice(places)
        parent[key], other[other_key] = json.loads(json.dumps([other[other_key], parent[key]]))
    elif how == "near" and isinstance(parent[key], int) and not isinstance(parent[key], bool):
        parent[key] = choose.choice((parent[key] + 1, parent[key] - 1, parent[key] * 2, parent[key] // 2, -parent[key]))
    else:
        how, parent[key] = "replace", choose.choice(VALUES)
    shown = repr(parent.get(key) if isinstance(parent, dict) else parent[key : key + 1])
    return f"{how} {'.'.join(map(str, keys))}: {shown[:60]}"


def walk(node: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Every ``(keys on the way, container, key)`` below ``node``."""
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        yield (*keys, key), node, key
        if isinstance(value, dict | list):
            yield from walk(value, (*keys, key))


def write_forged(bundle: Path, document: dict[str, Any]) -> None:
    """Write the manifest with a fingerprint that fits, where one can be made."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        document["fingerprint"] = fingerprint(document)
    (bundle / MANIFEST).write_text(json.dumps(document), encoding="utf-8")


def limit_memory() -> None:
    """Refuse allocations far beyond what a tiny bundle needs."""
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # 10**400 is written, not refused, by the forger
    main()
