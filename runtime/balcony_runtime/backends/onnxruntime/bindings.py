"""Bindings of ONNX Runtime's graphs, and the calls that run them.

Every pass leaves the caches cold for Python, so what can be made before is made before: a call here is one function with its
arguments. Which arrays are bound is decided in :mod:`.state` and :mod:`.pool`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import onnxruntime as ort

from balcony_edge.errors import DeviceError, is_out_of_memory
from balcony_runtime.backends.installed import first_line

#: Options of the runs of a decode step: made once, and without the final wait for devices. This saves 35 µs a step
#: (docs/LOG.md, "A run's options, made once").
RUN_OPTIONS = ort.RunOptions()
RUN_OPTIONS.add_run_config_entry("disable_synchronize_execution_providers", "1")


def run_step(runs: Iterable[Callable[[], object]], what: str = "a decode step") -> int:
    """Make the calls of a decode step, or one call; returns the nanoseconds from the first one to the end of the last.

    Raises:
        DeviceError: a call failed.
    """
    begin = time.perf_counter_ns()
    try:
        for run in runs:
            run()
    except RuntimeError as error:
        # The tables fit, so the cause is inside a graph, or memory ran out.
        cure = "free memory" if is_out_of_memory(error) else "export again"
        raise DeviceError(f"{what}: ONNX Runtime failed while running it ({first_line(error)}): {cure}") from error
    return time.perf_counter_ns() - begin


def bound_run(session: ort.InferenceSession, binding: Any) -> Callable[[], object]:
    """A call that runs ONNX Runtime's inner session object, or the public call if a version keeps that object elsewhere.

    The public ``InferenceSession.run_with_iobinding`` is a Python wrapper that handles WebGPU's graphs: it takes 16
    to 70 µs of a decode step (docs/LOG.md, "ONNX Runtime's Python wrapper looks for WebGPU's graphs at every run").
    """
    run = getattr(getattr(session, "_sess", None), "run_with_iobinding", None)
    inner = getattr(binding, "_iobinding", None)
    if run is None or inner is None:
        return partial(session.run_with_iobinding, binding, RUN_OPTIONS)
    return partial(run, inner, RUN_OPTIONS)


def bound(
    session: ort.InferenceSession,
    asked: Iterable[Any],
    given: Iterable[Any],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
) -> Any:
    """A binding of those inputs (``asked``) and outputs (``given``) of a graph for which there are values."""
    binding = session.io_binding()
    bind_ports(binding, asked, given, inputs, outputs)
    return binding


def bind_ports(
    binding: Any, asked: Iterable[Any], given: Iterable[Any], inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
    """Bind those ports of a graph for which there are values; the others stay as they are."""
    for port in asked:
        if port.name in inputs:
            binding.bind_ortvalue_input(port.name, inputs[port.name])
    for port in given:
        if port.name in outputs:
            binding.bind_ortvalue_output(port.name, outputs[port.name])
