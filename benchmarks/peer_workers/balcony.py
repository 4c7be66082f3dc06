"""Our runtime as a worker: a variant is an exit layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from balcony_edge.bundle.bundle import Bundle
from balcony_runtime.engine import Engine
from balcony_runtime.token_sequence import TokenSequence
from benchmarks.peer_workers.worker import FloatArray, Stepper, serve


class BalconyEdge(Stepper):
    """One bundle; see :class:`balcony_runtime.token_sequence.TokenSequence`."""

    version = f"onnxruntime {ort.__version__}"

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        bundle = Bundle.open(model, verify_hashes=False)  # the peers do not read their files twice either
        self._engine = Engine.of(bundle, threads=threads, packed=options.get("packed"))
        self._max_length = min(options["max_length"], bundle.manifest.model.context_length)
        self._sequence: TokenSequence | None = None
        self._exit_layer = self._engine.exit_layers[-1]
        self._ids = np.zeros(1, np.int64)
        self.config = {"spinning": True, **options}
        self.generate([0], 0, None)

    def begin(self, variant: int | None) -> None:
        """See :class:`Stepper`."""
        self._exit_layer = self._engine.exit_layers[-1] if variant is None else variant
        self._sequence = self._engine.new_sequence(max_length=self._max_length)

    def prefill(self, tokens: list[int]) -> FloatArray:
        """See :class:`Stepper`."""
        assert self._sequence is not None
        logits: FloatArray = self._sequence.advance(self._exit_layer, tokens)[0, -1]
        return logits

    def step(self, token: int) -> FloatArray:
        """See :class:`Stepper`."""
        assert self._sequence is not None
        self._ids[0] = token
        logits: FloatArray = self._sequence.step(self._exit_layer, self._ids)[0]
        return logits


if __name__ == "__main__":
    serve(BalconyEdge)
