"""Traces for tests: without coverage's tracer, and of equal models only once.

Tracing a tiny model takes half a minute on a slow machine, which is nearly all of its export. It runs torch's Python, which is
not what coverage measures.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from balcony_edge.bundle.manifest import ModelSpec
from balcony_export.graph import trace, widen
from balcony_export.model.exits import ExitModel

#: Keys of a configuration that say where a model comes from.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without coverage's tracer and the garbage collector, which double the time of a trace."""

    def call(*arguments: Any, **options: Any) -> Any:
        tracer, collecting = sys.gettrace(), gc.isenabled()
        sys.settrace(None)
        gc.disable()
        try:
            return function(*arguments, **options)
        finally:
            if collecting:
                gc.enable()
            sys.settrace(tracer)

    return call


class SharedTraces:
    """Traces of this test run by all that goes into them: weights, buffers, rope tables, configuration and exits."""

    def __init__(self) -> None:
        self._made: dict[bytes, ir.Model] = {}
        self._trace_backbone, self._trace_balcony = trace.trace_backbone, trace.trace_balcony

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let exports take a graph from here if an equal model was traced before."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "trace_backbone", self._backbone)
            patch.setattr(trace, "trace_balcony", self._balcony)
            yield

    def _backbone(self, exits: ExitModel, spec: ModelSpec) -> ir.Model:
        key = _key(exits, exits.parts.layers, spec.context_length, exits.exit_layers)
        return self._once(key, lambda: self._trace_backbone(exits, spec))

    def _balcony(self, exits: ExitModel, exit_layer: int, spec: ModelSpec) -> ir.Model:
        balcony = exits.balconies[exit_layer]
        key = _key(exits, balcony, spec.context_length, balcony.kind, balcony.copies)
        return self._once(key, lambda: self._trace_balcony(exits, exit_layer, spec))

    def _once(self, key: bytes, make: Callable[[], ir.Model]) -> ir.Model:
        if key not in self._made:
            made = make()
            for value in made.graph.initializers.values():  # the model's own tensors, which its test may change later
                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
            self._made[key] = made
        return self._made[key].clone()


def _key(exits: ExitModel, module: nn.Module, *facts: Any) -> bytes:
    config = {name: value for name, value in exits.model.config.to_dict().items() if name not in _ORIGIN}
    ropes = (table for pair in exits.rotary_tables(facts[0]).values() for table in pair)
    tensors = [*module.named_parameters(), *module.named_buffers(), *(("rope", table) for table in ropes)]
    # larger ones of a narrow type are reserved memory during a trace
    assert all(tensor.numel() <= widen.SMALL for _, tensor in tensors), "only traces of tiny models are shared"
    digest = hashlib.sha256(repr((type(exits.model), sorted(config.items()), module, facts)).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
