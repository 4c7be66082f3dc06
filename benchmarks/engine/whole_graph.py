"""The whole depth as one graph with the same operators, for comparison with the chain of stages.

Owns how this graph is built and stepped. It joins the graphs of a full-depth token into a single graph: one session, no
stage boundary, and nothing that only exits need. The comparison is fair: it runs on the process's shared thread pool with
the session options of the runtime, and its weights lie in huge pages like the chain's. Its KV cache is bound in place with
the runtime's capacity, and its decode step is bound once.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import WEIGHTS
from balcony_runtime.backends.base import FloatArray
from balcony_runtime.backends.graph_files.packed import joined_step
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.onnxruntime.bindings import bound, bound_run
from balcony_runtime.backends.onnxruntime.host_memory import mapped, use_large_pages
from balcony_runtime.backends.onnxruntime.memory import bucketed, value_of
from balcony_runtime.backends.token_table import TokenTable


def write_whole_graph(bundle: Bundle, directory: Path) -> Path:
    """Write the graph into ``directory``, with a hard link to the bundle's weights (or a copy if that fails)."""
    manifest, path = bundle.manifest, directory / "whole.onnx"
    path.write_bytes(joined_step(manifest, manifest.model.num_layers, bundle.path, keep=("present_", "logits")))
    try:
        os.link(bundle.file(WEIGHTS), directory / WEIGHTS)
    except OSError:
        shutil.copyfile(bundle.file(WEIGHTS), directory / WEIGHTS)
    return path


class WholeGraph:
    """One sequence on the whole-depth graph. ``ort_ns`` counts the time inside ONNX Runtime, like ``State.busy_ns``."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, tokens: list[int]) -> None:
        """Prefill ``tokens`` and bind the decode step that follows, up to the next multiple of the runtime's bucket."""
        model = bundle.manifest.model
        self._table = TokenTable(bundle)
        self._session, dtype = session, self._table.dtype
        self.ort_ns = 0
        capacity = bucketed(len(tokens) + 1)
        pasts = [value for value in session.get_inputs() if value.name.startswith("past_")]
        by_head = len(pasts[0].shape) == 4
        shape = (model.num_kv_heads, capacity, model.head_dim) if by_head else (capacity, model.kv_width)
        self._cache = {value.name: value_of(np.zeros((1, *shape), dtype)) for value in pasts}
        self._start, self._last, self._total = np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros((), np.int32)
        where: dict[str, Any] = {"start": self._start, "last": self._last, "total": self._total}
        self._where = {name: value_of(array) for name, array in where.items()}
        self._row = np.zeros((1, 1, model.hidden_size), dtype)
        self._logits = np.zeros((1, 1, model.vocab_size), np.float32)
        rows, logits = self._table[np.array([tokens])], np.empty((1, len(tokens), model.vocab_size), np.float32)
        self._stand_at(0, len(tokens))
        self._session.run_with_iobinding(self._bind(rows, logits))
        self._stand_at(len(tokens), len(tokens) + 1)
        self._decode = bound_run(self._session, self._bind(self._row, self._logits))

    def step(self, token: int) -> FloatArray:
        """Logits (1, 1, V) after one more token, always at the same row; the next call overwrites them."""
        self._row[0, 0] = self._table.row(token)
        begin = time.perf_counter_ns()
        self._decode()
        self.ort_ns += time.perf_counter_ns() - begin
        return self._logits

    def _stand_at(self, start: int, stop: int) -> None:
        self._start.fill(start)
        self._last.fill(stop - 1)
        self._total.fill(stop)

    def _bind(self, rows: Any, logits: FloatArray) -> Any:
        inputs = {"hidden_0": value_of(rows), **self._where, **self._cache}
        outputs = {name.replace("past_", "present_", 1): value for name, value in self._cache.items()}
        outputs["logits"] = value_of(logits)
        return bound(self._session, self._session.get_inputs(), self._session.get_outputs(), inputs, outputs)


def open_whole_graph(bundle: Bundle, directory: Path) -> ort.InferenceSession:
    """Write the graph to ``directory`` and open it in a session like those of the runtime."""
    before = mapped()
    session = open_session(write_whole_graph(bundle, directory))
    use_large_pages(before)
    return session
