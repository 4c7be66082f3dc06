"""The peer of the chain of stages: the whole depth as ONE graph, with the same operators and the same care.

Owns how it is built and stepped. ``backbone.onnx`` of the bundle with its exit outputs removed (the last hidden state and
the caches stay), followed by the nodes of ``norm.onnx`` and ``lm_head.onnx``: one session, no boundary, nothing that an
exit would need. It runs on the process's shared thread pool with the session options of the runtime, its KV cache is bound
in place with the runtime's bucketed capacity, and its decode step is bound once.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from balcony_edge.bundle import WEIGHTS, Bundle
from balcony_runtime.backends.base import FloatArray
from balcony_runtime.backends.onnxruntime import BUCKET, open_session


def write_whole_graph(bundle: Bundle, directory: Path) -> Path:
    """Write the graph into ``directory``, with the bundle's weights beside it as a hard link (a copy where that fails)."""
    depth = bundle.manifest.model.num_layers
    model, norm, head = (
        onnx.load(str(bundle.file(f"{name}.onnx")), load_external_data=False)
        for name in ("backbone", "norm", "lm_head")
    )
    graph = model.graph
    kept = [value for value in graph.output if value.name.startswith("present_")]
    for part, source in ((norm.graph, f"hidden_{depth}"), (head.graph, "normed")):
        names = {"hidden": source} | {value.name: value.name for value in part.output}

        def renamed(name: str, known: dict[str, str] = names, owner: str = part.name) -> str:
            return known.get(name, f"{owner}.{name}")  # the parts' inner names are not unique among them

        for node in part.node:
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
        for tensor in part.initializer:
            tensor.name = renamed(tensor.name)
        graph.node.extend(part.node)
        graph.initializer.extend(part.initializer)
    del graph.output[:]
    graph.output.extend([*head.graph.output, *kept])
    path = directory / "whole.onnx"
    onnx.save(model, str(path))
    try:
        os.link(bundle.file(WEIGHTS), directory / WEIGHTS)
    except OSError:
        shutil.copyfile(bundle.file(WEIGHTS), directory / WEIGHTS)
    return path


class WholeGraph:
    """One sequence over the whole-depth graph. ``ort_ns`` counts the time inside ONNX Runtime, as ``State.busy_ns`` does."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, tokens: list[int]) -> None:
        """Prefill ``tokens`` and bind the decode step that follows, up to the next multiple of the runtime's bucket."""
        manifest = bundle.manifest
        embedding, model = manifest.embedding, manifest.model
        dtype = np.dtype(embedding.dtype)
        self._table = np.asarray(
            np.memmap(bundle.file(embedding.file), dtype, mode="r", offset=embedding.offset, shape=embedding.shape)
        )
        self._scale = dtype.type(embedding.scale)
        self._session = session
        self.ort_ns = 0
        capacity = -(-(len(tokens) + 1) // BUCKET) * BUCKET
        names = [value.name for value in session.get_inputs() if value.name.startswith("past_")]
        self._cache = {name: _value(np.zeros((1, capacity, model.kv_width), dtype)) for name in names}
        self._start = np.zeros(1, np.int64)
        self._start_value = _value(self._start)
        self._row = np.zeros((1, 1, model.hidden_size), dtype)
        self._logits = np.zeros((1, 1, model.vocab_size), np.float32)
        rows, logits = self._embed(tokens), np.empty((1, len(tokens), model.vocab_size), np.float32)
        self._session.run_with_iobinding(self._bind(rows, logits))
        self._start[:] = len(tokens)
        self._decode = self._bind(self._row, self._logits)

    def step(self, token: int) -> FloatArray:
        """Logits (1, 1, V) after one more token, at the same row each time; the next call writes over them."""
        self._row[:] = self._embed([token])
        begin = time.perf_counter_ns()
        self._session.run_with_iobinding(self._decode)
        self.ort_ns += time.perf_counter_ns() - begin
        return self._logits

    def _embed(self, tokens: list[int]) -> Any:
        rows = self._table[np.array([tokens])]  # (1, n, D)
        return rows if self._scale == 1 else rows * self._scale

    def _bind(self, rows: Any, logits: FloatArray) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("hidden_0", _value(rows))
        binding.bind_ortvalue_input("start", self._start_value)
        binding.bind_ortvalue_output("logits", _value(logits))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)
        return binding


def open_whole_graph(bundle: Bundle, directory: Path) -> ort.InferenceSession:
    """A session as the runtime makes them, over the graph written to ``directory``."""
    return open_session(write_whole_graph(bundle, directory))


def _value(array: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)  # wraps the array on the CPU, no copy: it must outlive the binding
