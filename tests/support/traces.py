"""Traces for tests: without coverage's tracer, and of equal models only once, in this run and in later ones.

Tracing a tiny model takes half a minute on a slow machine, which is nearly all of its export. It runs torch's Python, which is
not what coverage measures. ``.cache/traces`` keeps what was traced by the present code with the present libraries.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from balcony_edge.bundle.manifest import ModelSpec
from balcony_edge.errors import InputError
from balcony_edge.files import atomic_file
from balcony_export import export
from balcony_export.graph import trace, widen
from balcony_export.model.exits import ExitModel

#: Keys of a configuration that say where a model comes from.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
#: What a trace depends on besides the model: this project's code, and the libraries.
_SOURCES = (
    "export/balcony_export/graph",
    "export/balcony_export/model",
    "balcony_edge/bundle",
    "tests/support/traces.py",
)
_LIBRARIES = ("torch", "transformers", "onnx-ir", "onnxscript")
#: Most values of a module whose trace is kept: 16 MB in float32, more than any tiny model has.
_MOST_VALUES = 1 << 22


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
    """Traces by all that goes into them: weights, buffers, rope tables, configuration and exits."""

    def __init__(self) -> None:
        self._made: dict[str, ir.Model] = {}
        self._kept = _directory()
        self._reserved: Mapping[int, torch.Tensor] = {}
        self._trace_backbone, self._trace_balcony = trace.trace_backbone, trace.trace_balcony

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let exports take a graph from here if an equal model was traced before."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "trace_backbone", self._backbone)
            patch.setattr(trace, "trace_balcony", self._balcony)
            patch.setattr(export, "stand_ins", self._stand_ins)
            yield

    @contextmanager
    def _stand_ins(self, roots: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Mapping[int, torch.Tensor]]:
        with widen.stand_ins(roots, dtype) as self._reserved:
            yield self._reserved

    def _backbone(self, exits: ExitModel, spec: ModelSpec) -> ir.Model:
        key = self._key(exits, exits.parts.layers, spec.context_length, exits.exit_layers)
        return self._once(key, lambda: self._trace_backbone(exits, spec))

    def _balcony(self, exits: ExitModel, exit_layer: int, spec: ModelSpec, traced: Mapping[int, ir.Model]) -> ir.Model:
        balcony = exits.balconies[exit_layer]
        key = self._key(exits, balcony, spec.context_length, balcony.kind, balcony.copies)
        return self._once(key, lambda: self._trace_balcony(exits, exit_layer, spec, traced))

    def _once(self, key: str | None, make: Callable[[], ir.Model]) -> ir.Model:
        """The trace by its key. A kept one was read from its file, and so does not hold the model's own tensors."""
        if key is None:
            return make()
        path = self._kept / f"{key}.onnx"
        if key not in self._made:
            if not path.exists():
                made = make()
                with atomic_file(path, InputError, "free space") as file:
                    file.write(ir.serde.serialize_model(made).SerializeToString())
                return made
            self._made[key] = ir.load(path)
        return self._made[key].clone()

    def _key(self, exits: ExitModel, module: nn.Module, *facts: Any) -> str | None:
        """The key of a trace; None for one of a large model, or of one whose matrices are reserved memory meanwhile."""
        config = {name: value for name, value in exits.model.config.to_dict().items() if name not in _ORIGIN}
        ropes = (table for pair in exits.rotary_tables(facts[0]).values() for table in pair)
        tensors = [*module.named_parameters(), *module.named_buffers(), *(("rope", table) for table in ropes)]
        if sum(tensor.numel() for _, tensor in tensors) > _MOST_VALUES:
            return None
        if any(tensor.data_ptr() in self._reserved for _, tensor in tensors):
            return None
        digest = hashlib.sha256(repr((type(exits.model), sorted(config.items()), module, facts)).encode())
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _directory() -> Path:
    """The directory of traces by the present code; those by other code are removed."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for source in _SOURCES:
        for path in sorted([root / source] if source.endswith(".py") else (root / source).rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update(repr([importlib.metadata.version(library) for library in _LIBRARIES]).encode())
    found = root / ".cache" / "traces" / digest.hexdigest()[:16]
    for other in found.parent.glob("*"):
        if other != found:
            shutil.rmtree(other, ignore_errors=True)
    found.mkdir(parents=True, exist_ok=True)
    return found
