"""transformers on PyTorch as a worker; its float32 model is the reference for the KL of all engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peer_workers.worker import FloatArray, Stepper, serve


class TransformersTorch(Stepper):
    """A Hugging Face directory in eager mode, with a dynamic cache and logits of the last row only, as in ``generate``."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, options["precision"]), attn_implementation="sdpa"
        ).eval()
        self._cache = transformers.DynamicCache()
        self.config = {"attention": "sdpa", **options}
        self.generate([0], 0, None)

    def begin(self, variant: int | None) -> None:
        """See :class:`Stepper`."""
        self._cache = transformers.DynamicCache(config=self._model.config)

    def prefill(self, tokens: list[int]) -> FloatArray:
        """See :class:`Stepper`."""
        return self._forward(tokens)

    def step(self, token: int) -> FloatArray:
        """See :class:`Stepper`."""
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> FloatArray:
        output = self._model(torch.tensor([tokens]), cache=self._cache, use_cache=True, logits_to_keep=1)
        logits: FloatArray = output.logits[0, -1].float().numpy().astype(np.float32, copy=False)
        return logits


if __name__ == "__main__":
    serve(TransformersTorch)
