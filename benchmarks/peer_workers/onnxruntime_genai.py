"""ONNX Runtime GenAI as a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.peer_workers.worker import FloatArray, Peer, Timing, serve, timing


class OnnxRuntimeGenAI(Peer):
    """One directory of the model builder; past and present share the KV cache, as by default."""

    version = f"onnxruntime-genai {og.__version__}"

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        self._max_length: int = options["max_length"]
        config = og.Config(str(model))
        sessions = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self._model = og.Model(config)
        self.config = {"spinning": True, **options}
        self.generate([0], 0, None)

    def generate(self, prompt: list[int], steps: int, variant: int | None) -> Timing:
        """See :class:`Peer`; uses the engine's own greedy loop."""
        generator = self._new(min_length=len(prompt) + steps + 1)  # so that an end token does not end the reply
        clock, tokens = [time.perf_counter_ns()], []
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(steps + 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            clock.append(time.perf_counter_ns())
        return timing(clock, tokens)

    def rows(self, tokens: list[int], first: int, variant: int | None) -> Iterator[FloatArray]:
        """See :class:`Peer`."""
        generator = self._new()
        for new in (tokens[:first], *([token] for token in tokens[first:])):
            generator.append_tokens(np.array([new], np.int32))
            yield np.asarray(generator.get_logits(), np.float32).reshape(-1)

    def _new(self, **search: Any) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=self._max_length, **search)
        return og.Generator(self._model, params)


if __name__ == "__main__":
    serve(OnnxRuntimeGenAI)
