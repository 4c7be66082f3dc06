"""Packed weights: made once, whole, and by one writer at a time."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.errors import BundleError, InputError
from balcony_runtime.engine import Engine


def test_packed_weights_give_the_same_bits_and_are_made_once(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    path, packed = export_tiny("qwen3").path, tmp_path / "packed"
    with Engine.open(path) as plain, Engine.open(path, packed=packed) as first:
        (home,) = packed.iterdir()
        made = {file.name: file.stat().st_mtime_ns for file in home.iterdir()}
        assert {"cpu_stage_0.onnx", "cpu_lm_head.onnx"} <= made.keys() and any(n.endswith(".weights") for n in made)
        size = sum(file.stat().st_size for file in home.glob("path_*"))
        assert size < 0.5 * sum(
            file.stat().st_size for file in home.iterdir()
        )  # joined graphs have no weights of their own
        with Engine.open(path, packed=packed) as second:
            for exit_layer in plain.exit_layers:
                logits = [
                    engine.new_sequence(max_length=8).advance(exit_layer, [3, 1, 4, 1, 5])
                    for engine in (plain, first, second)
                ]
                assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])
        # Decode steps through the joined graphs, with changing exits.
        apart, joined = plain.new_sequence(batch_size=2), first.new_sequence(batch_size=2)
        assert np.array_equal(apart.advance(5, [[1, 2, 3]] * 2), joined.advance(5, [[1, 2, 3]] * 2))
        for index in range(40):
            exit_layer, ids = plain.exit_layers[index // 3 % 3], np.array([index, 300 - index])
            assert np.array_equal(apart.step(exit_layer, ids), joined.step(exit_layer, ids))
        assert {file.name: file.stat().st_mtime_ns for file in home.iterdir()} == made
    shutil.rmtree(home)
    for leftover in (os.getpid(), "0a1b2c3d"):  # leftovers of killed writers
        (packed / f".{home.name}.partial-{leftover}").mkdir()
    (packed / ".0123456789abcdef.partial-0a1b2c3d").mkdir()  # of a bundle that is gone
    with Engine.open(path, packed=packed):
        assert {file.name for file in home.iterdir()} == made.keys() and list(packed.iterdir()) == [home]
    weights = next(home.glob("*.weights"))
    whole = weights.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for content in (flipped, whole[:-1], None):  # damage that ONNX Runtime would map and use
        weights.unlink() if content is None else weights.write_bytes(content)
        with pytest.raises(BundleError, match=f"{home.name}: the packed weights are damaged: remove it"):
            Engine.open(path, packed=packed)
    weights.write_bytes(flipped)
    Engine.open(path, packed=packed, verify_hashes=False).close()
    (home / "files.json").write_text("{}")
    with pytest.raises(BundleError, match=f"{home.name}: the packed weights are damaged: remove it"):
        Engine.open(path, packed=packed)
    with Engine.open(export_tiny("llama").path, packed=packed):
        assert len(list(packed.iterdir())) == 2  # another bundle has another directory
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="packed weights cannot be written"):
        Engine.open(path, packed=blocked / "packed")


def test_packed_weights_of_another_user_are_not_called_damaged(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are whole, and who removes them would only have to make them again."""
    Engine.open(tiny.path, packed=tmp_path).close()

    def private(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("balcony_runtime.backends.graph_files.packed.sha256_file", private)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\): make them readable"):
        Engine.open(tiny.path, packed=tmp_path)


def test_packed_weights_in_a_private_directory_are_one_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python up to 3.13 lets `is_dir` fail there."""
    is_dir = Path.is_dir

    def private(path: Path) -> bool:
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", private)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\): make them readable"):
        Engine.open(tiny.path, packed=tmp_path)


def test_damaged_weights_are_not_packed(bundle_copy: Path, tmp_path: Path) -> None:
    """What they give would pass every later check: it is compared with hashes of its own only."""
    weights, packed = bundle_copy / "weights.bin", tmp_path / "packed"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for verify_hashes in (True, False):
        with pytest.raises(BundleError, match=r"weights\.bin: SHA-256"):
            balcony_edge.load(bundle_copy, packed=packed, verify_hashes=verify_hashes).close()
        assert not list(packed.iterdir())
    weights.write_bytes(whole)
    balcony_edge.load(bundle_copy, packed=packed).close()
    assert len(list(packed.iterdir())) == 1


def test_threads_and_processes_that_pack_at_once_all_get_the_weights(tiny: Any, tmp_path: Path) -> None:
    with Engine.open(tiny.path) as engine:
        want = engine.new_sequence(max_length=8).advance(5, [3, 1, 4])
    program = (
        "import sys; from balcony_runtime.engine import Engine\n"
        "with Engine.open(sys.argv[1], packed=sys.argv[2]) as engine:\n"
        "    engine.new_sequence(max_length=8).advance(5, [3, 1, 4])\n"
    )
    for run in range(5):
        packed = tmp_path / str(run)
        others = range(2 * (run == 0))
        processes = [subprocess.Popen([sys.executable, "-c", program, str(tiny.path), str(packed)]) for _ in others]
        together = threading.Barrier(8)

        def load(_: int, packed: Path = packed, together: threading.Barrier = together) -> bool:
            together.wait()
            with Engine.open(tiny.path, packed=packed, verify_hashes=False) as engine:
                return np.array_equal(engine.new_sequence(max_length=8).advance(5, [3, 1, 4]), want)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(load, range(8))) == [True] * 8
        assert [process.wait(120) for process in processes] == [0 for _ in others]
        assert len(list(packed.iterdir())) == 1


def test_a_disk_that_is_full_of_packed_weights_is_one_line_and_left_empty(tiny: Any, small_disk: Path) -> None:
    with pytest.raises(InputError, match=r"packed weights cannot be written .*: free space or name another place"):
        Engine.open(tiny.path, packed=small_disk / "packed")
    assert list((small_disk / "packed").iterdir()) == []
