"""OpenVINO GenAI as a worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai

from benchmarks.peer_workers.worker import FloatArray, Peer, Timing, serve, timing


class _Clock(openvino_genai.StreamerBase):  # type: ignore[misc]  # the package has no types
    """Records the time at which each token arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.instants_ns: list[int] = []
        self.tokens: list[int] = []

    def write(self, token: Any) -> Any:
        self.instants_ns.append(time.perf_counter_ns())
        self.tokens += token if isinstance(token, list) else [token]
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVINOGenAI(Peer):
    """One directory of optimum-intel.

    Speed is measured on the pipeline; rows come from the same graph with the same properties.
    """

    version = f"openvino-genai {openvino_genai.__version__}"

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        self._path = model
        self._properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": options["hint"]}
        self._pipeline = openvino_genai.LLMPipeline(
            model, "CPU", ATTENTION_BACKEND=options["attention"], **self._properties
        )
        self.config = options
        self.generate([0], 0, None)

    def generate(self, prompt: list[int], steps: int, variant: int | None) -> Timing:
        """See :class:`Peer`; uses the engine's own greedy loop, timed by the arrival of its tokens."""
        ids = np.array([prompt], np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        settings = openvino_genai.GenerationConfig(max_new_tokens=steps + 1, ignore_eos=True, do_sample=False)
        clock = _Clock()
        begin = time.perf_counter_ns()
        self._pipeline.generate(inputs, settings, clock)
        return timing([begin, *clock.instants_ns], clock.tokens)

    def rows(self, tokens: list[int], first: int, variant: int | None) -> Iterator[FloatArray]:
        """See :class:`Peer`."""
        request = (
            ov.Core().compile_model(self._path / "openvino_model.xml", "CPU", self._properties).create_infer_request()
        )
        length = 0
        for new in (tokens[:first], *([token] for token in tokens[first:])):
            begin, length = length, length + len(new)
            request.infer(
                {
                    "input_ids": np.array([new], np.int64),
                    "attention_mask": np.ones((1, length), np.int64),
                    "position_ids": np.arange(begin, length, dtype=np.int64)[None],
                    "beam_idx": np.zeros(1, np.int32),
                }
            )
            yield np.asarray(request.get_tensor("logits").data[0, -1], np.float32)


if __name__ == "__main__":
    serve(OpenVINOGenAI)
