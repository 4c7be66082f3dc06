"""A conversation that reuses its turns and catches up while it waits for the user.

    python examples/chat.py BUNDLE [--exit EXIT_LAYER] [--tokens 60]

Replies come from a shallow exit. While the user thinks, a thread processes the pending rows of the deeper stages, so that
the full depth costs nothing extra later. The program reads messages from standard input until it ends. After an empty
line the full depth answers the next message.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import balcony_edge


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="A conversation with idle catch-up.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--exit", type=int, dest="exit_layer", help="exit of the replies [default: the shallowest]")
    parser.add_argument("--tokens", type=int, default=60)
    options = parser.parse_args()
    with balcony_edge.load(options.bundle) as llm:
        shallow = balcony_edge.Budget(exit_layer=options.exit_layer or llm.exit_layers[0])
        chat = llm.chat(system="You answer in one sentence.")
        llm.budget = shallow
        while True:
            waiting = sum(chat.sequence.stage_rows)
            with chat.catching_up():  # while the user thinks
                line = sys.stdin.readline()
            caught_up = waiting - sum(chat.sequence.stage_rows)
            if not line:
                return
            if not line.strip():
                llm.budget = balcony_edge.Budget()
                print("(the next reply comes from the full depth)")
                continue
            stream = chat.send(line.strip(), max_new_tokens=options.tokens)
            for token in stream:
                print(token.text, end="", flush=True)
            exits = ", ".join(f"exit {e} ×{n}" for e, n in stream.reply.tokens_per_exit.items())
            print(f"\n({exits}; {caught_up} rows caught up while waiting; history: {len(chat.messages)} messages)")
            llm.budget = shallow


if __name__ == "__main__":
    main()
