"""Property tests: how many examples they run, and a source of chance that shrinks."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

#: A ``random.Random`` whose every draw is hypothesis' own, so that a failing example shrinks to a small one.
CHANCE = st.randoms(use_true_random=False)


def examples(count: int, **options: Any) -> settings:
    """Settings of a property: ``count`` examples in ``make test``, and more of them in the profile ``explore``."""
    return settings(max_examples=count * settings.default.max_examples // 100, **options)
