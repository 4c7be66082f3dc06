"""Stream a reply under a target and see which exit each token took.

python examples/stream.py BUNDLE [--prompt TEXT] [--tpot-ms 25] [--tokens 60]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import balcony_edge


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Stream a reply under a target.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--tpot-ms", type=float, default=25.0, help="milliseconds between two tokens")
    parser.add_argument("--tokens", type=int, default=60)
    options = parser.parse_args()
    try:
        with balcony_edge.load(options.bundle, budget=balcony_edge.Budget(tpot_ms=options.tpot_ms)) as llm:
            stream = llm.stream(options.prompt, max_new_tokens=options.tokens)
            for token in stream:
                print(token.text, end="", flush=True)
    except balcony_edge.BalconyError as error:  # one line that says what to do
        raise SystemExit(f"stream.py: {error}") from None
    reply = stream.reply
    print(f"\n\nended by {reply.finish_reason}; tokens per exit: {reply.tokens_per_exit}")
    if reply.mean_tpot_ms is not None:
        late = f"{reply.late_tokens} of {len(reply.tokens) - 1} late"
        print(f"first token after {reply.ttft_ms:.0f} ms, then {reply.mean_tpot_ms:.1f} ms a token, {late}")


if __name__ == "__main__":
    main()
