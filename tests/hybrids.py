"""Names of the tiny models with recurrent layers (tests/conftest.py has the models)."""

from __future__ import annotations

import pytest

#: Those with recurrent layers, and all for tests that export them: what is similar to others is tried in ``make test-deep``.
HYBRIDS = ("mamba2", "granite-hybrid", "falcon-h1", "qwen3.5")
_SIMILAR_HYBRIDS = ("mamba", "falcon-mamba", "bamba", "granite-hybrid-moe", "qwen3-next", "qwen3-next-moe")
SIMILAR = ("granite", "lfm2-moe", *_SIMILAR_HYBRIDS)
RECURRENT = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in _SIMILAR_HYBRIDS))
EXPORTED = (*HYBRIDS, *(pytest.param(name, marks=pytest.mark.deep) for name in SIMILAR))
