"""Writes TINY_BUNDLE, on which soak tests and the tests of the server spend little time in the engine.

    python -m benchmarks.tiny_bundle DIR

A Llama with random weights, five layers, exits 2, 3 and 5, and 1,024 rows: that of the tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.conftest import exported, tiny_model, with_balconies


def main() -> None:
    """Write the bundle."""
    parser = argparse.ArgumentParser(description="Write a tiny bundle of random weights.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    exported(with_balconies(tiny_model("llama", max_position_embeddings=1024)), "tiny-llama", directory)


if __name__ == "__main__":
    main()
