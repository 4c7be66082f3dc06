"""How the benchmarks start llama.cpp's server; the server itself runs only in them."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.peer_workers import server


def test_a_peer_without_a_prompt_cache_does_not_fill_one() -> None:
    """llama.cpp saves rows for later requests by default, also when no request may use them."""
    words = server.command(Path("m.gguf"), 8191, 2, 4)
    options = dict(itertools.pairwise(words))
    assert "--no-cache-prompt" in words and options["--cache-ram"] == "0"
    assert (options["--parallel"], options["--ctx-size"], options["--threads"]) == ("4", "4096", "2")
