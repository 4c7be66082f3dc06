"""Engines that are closed twice, or while another thread runs a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_runtime.backends.onnxruntime import state as onnxruntime_state
from balcony_runtime.engine import Engine
from tests.runtime.backends.cuda_stand_in import onnxruntime, runtime


def test_an_engine_on_a_device_may_be_closed_twice(with_engine_sets: Callable[[str], Bundle]) -> None:
    """The second time its stream is gone, and nothing may be asked of it."""
    with runtime.installed() as gpu, onnxruntime.installed(gpu):
        engine = Engine.of(with_engine_sets("llama"), device="cuda", engines="rtx-fp32")
        engine.close()
        engine.close()


def test_an_engine_that_is_closed_during_a_pass_is_one_line(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(tiny.path)
    sequence, bound_run, closes = engine.new_sequence(), onnxruntime_state.bound_run, threading.Event()

    def closing(session: Any, binding: Any) -> Any:
        if not closes.is_set():
            closes.set()
            thread = threading.Thread(target=engine.close)
            thread.start()
            thread.join(10)
        return bound_run(session, binding)

    monkeypatch.setattr(onnxruntime_state, "bound_run", closing)
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        sequence.advance(5, [1, 2, 3])
