"""Damage of every kind, seeded: a bundle or a balcony file either works or is refused by one line; plus rough use.

The damage of bundles is in fuzz_bundle.py, which tries its cases in processes with bounded memory: a crash of the engine or
an allocation of gigabytes fails the test here and does not end it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from balcony_edge.bundle.bundle import Bundle, fingerprint
from balcony_edge.bundle.manifest import MANIFEST
from balcony_edge.errors import BalconyError, BundleError, CheckpointError, InputError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.balcony import init_balconies
from balcony_export.model.balcony_files import INDEX, load_balconies, save_balconies
from balcony_export.model.balcony_files import fingerprint as base_of
from balcony_export.model.exits import ExitModel
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from tests.support.command import unmeasured
from tests.support.properties import CHANCE, examples

FUZZ = Path(__file__).with_name("fuzz_bundle.py")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("bytes", 1100), ("manifest", 750), ("forged", 150)])
def test_damaged_bundles_work_or_are_refused(tiny: Any, tmp_path: Path, kind: str, count: int) -> None:
    """2,000 cases in all. What a forger made consistent may give other logits; nothing else may."""
    command = [sys.executable, "-W", "ignore", str(FUZZ), str(tiny.path), str(tmp_path), kind, "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=unmeasured(), timeout=600)
    cases = [line.partition("\t")[::2] for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{cases[-1:]}\n{done.stderr[-2000:]}"
    outcomes = Counter(outcome for _, outcome in cases)
    assert outcomes.total() == count
    assert outcomes["refused"] > count / 2 and outcomes["equal"] > 0
    if kind != "forged":
        assert not outcomes["differs"], [case for case, outcome in cases if outcome == "differs"]


@pytest.fixture(scope="module")
def forged(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle whose manifest is written anew by each example; its files are whole."""
    yield Path(shutil.copytree(tiny.path, tmp_path_factory.mktemp("forged") / "bundle"))


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
)


@examples(400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_the_manifest(tiny: Any, forged: Path, data: st.DataObject) -> None:
    """One value, anywhere in the manifest, becomes any JSON value."""
    document = json.loads((tiny.path / MANIFEST).read_text(encoding="utf-8"))
    node: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 4)) == 0:
            break
        node = node[key]
    node[key] = data.draw(_json)
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # where no forger can make one
        document["fingerprint"] = fingerprint(document)
    (forged / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    try:
        manifest = Bundle.open(forged, verify_hashes=False).manifest
    except BundleError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert manifest.exit_layers == (2, 3, 5)


@examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=_json)
def test_any_document_as_manifest(forged: Path, document: Any) -> None:
    (forged / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Bundle.open(forged)
    assert len(str(caught.value).splitlines()) == 1


def _changed(data: bytes, choose: random.Random) -> bytes:
    at, length = choose.randrange(len(data)), choose.choice((1, 2, 8, 100))
    how = choose.choice(("flip", "set", "drop", "insert", "cut"))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
    if how == "set":
        return data[:at] + choose.randbytes(length) + data[at + length :]
    if how == "drop":
        return data[:at] + data[at + length :]
    return data[:at] + (choose.randbytes(length) + data[at:] if how == "insert" else b"")


@pytest.mark.parametrize("forger", [False, True], ids=["bytes", "forged"])
def test_damaged_balconies_load_equal_or_are_refused(
    make_tiny: Callable[..., Any], tmp_path: Path, forger: bool
) -> None:
    """300 cases each; with ``forger`` the hash in the index is made to fit, so that the tensors' own checks are reached."""
    model = make_tiny("llama", num_hidden_layers=3)
    save_balconies(tmp_path, init_balconies(model, (1, 2)), base_of(model))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saved = {e: balcony.state_dict() for e, balcony in load_balconies(tmp_path, model).items()}
    outcomes: Counter[str] = Counter()
    for number in range(300):
        choose = random.Random(f"{forger} {number}")
        name = "balcony_1.safetensors" if forger else choose.choice(sorted(whole))
        # a header is a small part of a file of tensors: half of the cases go there
        head = 900 if name != INDEX and choose.random() < 0.5 else len(whole[name])
        data = _changed(whole[name][:head], choose) + whole[name][head:]
        (tmp_path / name).write_bytes(data)
        if forger:
            index = json.loads(whole[INDEX])
            index["exits"]["1"]["sha256"] = hashlib.sha256(data).hexdigest()
            (tmp_path / INDEX).write_text(json.dumps(index))
        try:
            loaded = load_balconies(tmp_path, model)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1, (number, name)
            outcomes["refused"] += 1
        else:
            equal = all(
                torch.equal(value, saved[e][key]) for e, b in loaded.items() for key, value in b.state_dict().items()
            )
            outcomes["equal" if equal else "differs"] += 1
            assert equal or forger, (number, name)
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content)
    assert outcomes["refused"] > 100


#: The last three are digits to ``str.isdigit``: in another script, a superscript, and more of them than ``int`` takes.
INDEX_VALUES = (
    None,
    True,
    [],
    {},
    0,
    -1,
    10**30,
    0.5,
    "x\ny",
    "../x",
    "balcony_2.safetensors",
    "",
    "٣",
    "²",
    "9" * 5000,
)


def test_any_value_in_the_index_of_balconies(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = make_tiny("llama", num_hidden_layers=3)
    save_balconies(tmp_path, init_balconies(model, (1, 2)), base_of(model))
    whole = (tmp_path / INDEX).read_text()
    places: list[tuple[str, ...]] = [(), ("base",), ("exits",), ("exits", "1")]
    for place in places:
        keys = list(_at(json.loads(whole), place))
        for key in keys:
            for value in INDEX_VALUES:
                for renames in (False, True):
                    document = json.loads(whole)
                    node = _at(document, place)
                    if renames:
                        node[str(value)] = node.pop(key)
                    else:
                        node[key] = value
                    (tmp_path / INDEX).write_text(json.dumps(document))
                    try:
                        load_balconies(tmp_path, model)
                    except CheckpointError as error:
                        assert len(str(error).splitlines()) == 1, (place, key, value)


def _at(document: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


Step = Callable[[TokenSequence], Any]


def _schedule(engine: Engine, choose: random.Random) -> list[Step]:
    """Twenty steps of one sequence: passes at any exit, portions of idle work, rollbacks."""
    prompt = [choose.randrange(320) for _ in range(choose.randint(1, 40))]
    first = choose.choice(engine.exit_layers)
    steps: list[Step] = [lambda sequence: sequence.advance(first, prompt)]
    for _ in range(19):
        exit_layer, rows = choose.choice(engine.exit_layers), choose.randint(1, 9)
        tokens = [choose.randrange(320) for _ in range(choose.choice((1, 1, 1, 5)))]
        share, kind = choose.random(), choose.randrange(6)
        if kind == 0:
            steps.append(lambda sequence, rows=rows: sequence.catch_up(rows))
        elif kind == 1:
            steps.append(lambda sequence, share=share: sequence.rollback(int(share * sequence.length)))
        else:
            steps.append(lambda sequence, e=exit_layer, new=tokens: sequence.advance(e, new))
    return steps


@examples(4, suppress_health_check=[HealthCheck.too_slow])
@given(CHANCE)
def test_interleaved_sequences_give_what_they_give_alone(tiny_engine: Engine, chance: random.Random) -> None:
    schedules = [_schedule(tiny_engine, chance) for _ in range(4)]
    alone = []
    for steps in schedules:
        sequence = tiny_engine.new_sequence(max_length=200)
        alone.append([step(sequence) for step in steps])
    order = [number for number, steps in enumerate(schedules) for _ in steps]
    chance.shuffle(order)
    sequences = [tiny_engine.new_sequence(max_length=200) for _ in schedules]
    together: list[list[Any]] = [[] for _ in schedules]
    for number in order:
        step = schedules[number][len(together[number])]
        together[number].append(step(sequences[number]))
    for number in range(len(schedules)):
        for one, other in zip(alone[number], together[number], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"sequence {number}")  # equal to the bit


def test_a_directory_that_cannot_be_written_is_one_line(make_tiny: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if os.geteuid() != 0:
        place.chmod(0o555)
    elif not _mount_read_only(place):
        pytest.skip("root writes everywhere, and here it may not mount a read-only directory either")
    try:
        model = make_tiny("llama")
        with pytest.raises(BalconyError, match=r"place/out: cannot be written \(.*place is read-only\)") as caught:
            export_bundle(ExitModel.open(model, (2,)), make_tokenizer(), place / "out", ExportOptions("x", False))
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(InputError, match=r"place: cannot be written \(.*place is read-only\)"):
            save_balconies(place, init_balconies(model, (2,)), base_of(model))
        assert list(place.iterdir()) == []
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)
        place.chmod(0o755)


def _mount_read_only(place: Path) -> bool:
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(place)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
