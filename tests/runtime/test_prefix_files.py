"""Kept prefixes on disk: what a process writes when it ends, what the next one finds, and what goes first."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.sessions import file
from balcony_runtime.sessions.prefixes import PrefixFiles


def test_a_program_may_close_at_its_end(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of ``atexit`` run after Python has ended its pools of threads: all that is kept is written even so."""
    llm = balcony_edge.load(tiny.path, prefix_directory=tmp_path)
    for first in (10, 100):
        llm.generate(list(range(first, first + 60)), max_new_tokens=2, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.thread._shutdown", True)
        llm.close()
    assert len(list(tmp_path.glob("prefix-*.session"))) == 2


def test_a_program_may_change_its_directory_meanwhile(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `%cd` does in a notebook."""
    here, there, prompt = tmp_path / "here", tmp_path / "there", list(range(10, 70))
    for place in (here, there):
        place.mkdir()
    for cached in (0, 59):
        monkeypatch.chdir(here)
        with balcony_edge.load(tiny.path, prefix_directory="kept") as llm:
            monkeypatch.chdir(there)
            assert llm.generate(prompt, max_new_tokens=2, ignore_eos=True).cached_tokens == cached
    assert not list(there.iterdir())


def test_a_directory_that_may_not_be_entered_at_the_end_is_a_warning(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It became private, or its drive has gone, while rows of one of its files were in memory."""
    prompt, exists = list(range(10, 70)), Path.exists
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        llm.generate(prompt, max_new_tokens=2, ignore_eos=True)
    llm = balcony_edge.load(tiny.path, prefix_directory=tmp_path)
    assert llm.generate(prompt, max_new_tokens=2, ignore_eos=True).cached_tokens

    def private(path: Path, **options: Any) -> bool:
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", private)
        llm.close()
    assert "Permission denied" in caplog.text


def test_a_drive_that_has_gone_holds_no_bytes(
    tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scrape of a server's metrics asks for them, and would find nothing else either."""
    files = PrefixFiles(tmp_path, tiny_engine, 1 << 30)

    def gone(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", gone)
        assert files.bytes == 0 == files.named_bytes(tmp_path / "talk.session")


def test_graphs_of_one_bundle_share_a_directory(tiny: Any, tiny_engine: Engine, tmp_path: Path) -> None:
    """As those of a CPU and of a GPU's engine set do: the same prompt is kept for both."""
    prompt = np.arange(10, 60)
    with Engine.of(Bundle.open(tiny.path).portable()) as portable:
        for engine in (tiny_engine, portable):
            sequence = engine.new_sequence(max_length=64)
            sequence.advance(5, prompt)
            PrefixFiles(tmp_path, engine, 1 << 30).keep(sequence)
        for engine in (tiny_engine, portable):
            assert PrefixFiles(tmp_path, engine, 1 << 30).longest(prompt, 1e9)[1] == 50


def test_rows_of_deeper_stages_are_kept_when_they_have_run(tiny_engine: Engine, tmp_path: Path) -> None:
    """One process replied at a shallow exit, and the next one to the same prompt at the full depth."""
    prompt = np.arange(10, 60)
    sequence = tiny_engine.new_sequence(max_length=64)
    for exit_layer in (2, 5):
        sequence.advance(exit_layer, prompt[sequence.length :])
        PrefixFiles(tmp_path, tiny_engine, 1 << 30).keep(sequence)
    (path,) = tmp_path.iterdir()
    assert file.look(path, tiny_engine).notes.stage_rows == [50, 50, 50]


def test_all_that_one_process_used_is_newer_than_what_it_did_not(
    tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a device whose clock begins again at every start."""
    monkeypatch.setattr(time, "time", lambda: 60.0)
    files = PrefixFiles(tmp_path, tiny_engine, 1 << 30)
    for begin in (0, 150):
        pool = SequencePool.of(tiny_engine, 4, files)
        assert pool is not None
        for first in range(begin, begin + 150, 50):
            sequence = pool.take()
            assert sequence is not None
            sequence.advance(5, np.arange(first, first + 50))
            pool.give_back(sequence)
        pool.close()
        files = PrefixFiles(tmp_path, tiny_engine, 7 * files.bytes // 6)  # room for three
    assert [files.longest(np.arange(first, first + 50), 1e9)[1] for first in (150, 200, 250)] == [50] * 3


def test_a_lower_bound_holds_for_the_files_of_earlier_starts(tiny: Any, tmp_path: Path) -> None:
    """``prefix_mb=0`` keeps nothing: what was said before would lie there for ever, and is not read any more.

    Nor if the device loses its power, or nobody asks, before it is closed.
    """
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path) as llm:
        llm.generate(list(range(10, 70)), max_new_tokens=2, ignore_eos=True)
    assert len(list(tmp_path.glob("prefix-*.session"))) == 1
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path, prefix_mb=0):
        assert not list(tmp_path.glob("prefix-*.session"))


def test_a_device_without_a_clock_of_its_own_keeps_what_was_used_last(
    tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock begins again in 1970 at every start: files of earlier starts are then from the future."""

    def keep(files: PrefixFiles, first: int) -> None:
        sequence = tiny_engine.new_sequence(max_length=64)
        sequence.advance(5, np.arange(first, first + 50))
        files.keep(sequence)

    keep(PrefixFiles(tmp_path, tiny_engine, 1 << 30), 0)
    (earlier,) = tmp_path.iterdir()
    files = PrefixFiles(tmp_path, tiny_engine, 5 * earlier.stat().st_size // 2)  # room for two
    monkeypatch.setattr(time, "time", lambda: 60.0)
    for first in (60, 120):
        keep(files, first)
    assert not earlier.exists() and files.longest(np.arange(60, 110), 1e9)[1] == 50
