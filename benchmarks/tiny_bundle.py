"""Writes TINY_BUNDLE, on which soak tests and the tests of the server spend little time in the engine.

    python -m benchmarks.tiny_bundle DIR

A Llama with random weights, six layers, exits 2, 3 and 5, and 1,024 rows: that of the tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from balcony_export.export import ExportOptions, export_bundle
from tests.conftest import tiny_model, tiny_tokenizer, with_balconies


def main() -> None:
    """Write the bundle."""
    parser = argparse.ArgumentParser(description="Write a tiny bundle of random weights.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    exits = with_balconies(tiny_model("llama", max_position_embeddings=1024))
    export_bundle(exits, tiny_tokenizer(), directory, ExportOptions("tiny-llama", trained=True))


if __name__ == "__main__":
    main()
