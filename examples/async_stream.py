"""Two replies at once in one event loop, and a deadline that cancels unfinished replies.

    python examples/async_stream.py BUNDLE [--tokens 40] [--seconds 10]

``async for`` runs each step in a worker thread, so the loop stays free. Both replies share the engine and the budget.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import balcony_edge
from balcony_edge import Reply, TokenStream

PROMPTS = ("Name three rivers.", "What is a balcony?")


async def read(stream: TokenStream, number: int) -> Reply:
    """Print the pieces of a reply as they arrive."""
    async for token in stream:
        if token.text:
            print(f"[{number}] {token.text!r} at exit {token.exit_layer}")
    return stream.reply


async def answer(bundle: Path, tokens: int, seconds: float) -> None:
    """Stream all prompts at once, and cancel the unfinished replies after ``seconds``."""
    with balcony_edge.load(bundle) as llm:
        streams = [llm.stream(prompt, max_new_tokens=tokens) for prompt in PROMPTS]
        loop = asyncio.get_running_loop()
        deadlines = [loop.call_later(seconds, stream.cancel) for stream in streams]
        replies = await asyncio.gather(*(read(stream, number) for number, stream in enumerate(streams, 1)))
        for deadline in deadlines:
            deadline.cancel()
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        print(f"{prompt} {reply.text!r} ({len(reply.tokens)} tokens, ended by {reply.finish_reason})")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Two replies at once, with a deadline.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    asyncio.run(answer(options.bundle, options.tokens, options.seconds))


if __name__ == "__main__":
    main()
