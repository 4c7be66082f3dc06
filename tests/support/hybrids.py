"""Names of the tiny models, for tests that take one of each (tests/conftest.py has the models)."""

from __future__ import annotations

from typing import Any

import pytest

#: Those that keep keys and values only, or rows of a convolution.
DENSE = (
    *("llama", "llama-mha", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2", "lfm2"),
    *("ministral", "phi3", "exaone4", "arcee", "hunyuan"),
)
#: Those with recurrent layers, and all for tests that export them: what is similar to others is tried in ``make test-deep``.
HYBRIDS = ("mamba2", "granite-hybrid", "falcon-h1", "qwen3.5")
_SIMILAR_HYBRIDS = ("mamba", "falcon-mamba", "bamba", "granite-hybrid-moe", "qwen3-next", "qwen3-next-moe")
SIMILAR = ("granite", "lfm2-moe", *_SIMILAR_HYBRIDS)
RECURRENT = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in _SIMILAR_HYBRIDS))
EXPORTED = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in SIMILAR))

_FIRST_ATTENDS_LAST = {"layer_types": ["linear_attention", "full_attention"]}
#: What differs where a hybrid has two layers instead of five, so that it can be exported in a few seconds.
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "falcon-mamba": {},
    "mamba2": {},
    "bamba": {"attn_layer_indices": [1]},
    "granite-hybrid": _FIRST_ATTENDS_LAST,
    "granite-hybrid-moe": _FIRST_ATTENDS_LAST,
    "falcon-h1": {},
    "qwen3-next": {**_FIRST_ATTENDS_LAST, "mlp_only_layers": [0, 1]},
    "qwen3-next-moe": _FIRST_ATTENDS_LAST,
    "qwen3.5": _FIRST_ATTENDS_LAST,
}
