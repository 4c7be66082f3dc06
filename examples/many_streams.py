"""Several replies at once, each with its own budget: ``python examples/many_streams.py BUNDLE``.

A voice answer must not stutter, a summary must be done in time, and the third may take what is left.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import balcony_edge
from balcony_edge import Budget, Reply

REQUESTS = {
    "What is the capital of France?": Budget(tpot_ms=40, ttft_ms=800),
    "Explain in a few sentences why the sky is blue.": Budget(deadline_s=8, expected_tokens=60),
    "Write a short story about a lighthouse.": Budget(),
}


def main() -> None:
    """Ask all questions at the same time and say what each reply got."""
    if len(sys.argv) != 2:
        raise SystemExit("many_streams.py: give the directory of a bundle")
    words: dict[bool | None, str] = {True: "held", False: "missed", None: "not measured"}
    with balcony_edge.load(sys.argv[1]) as llm, ThreadPoolExecutor(len(REQUESTS)) as threads:

        def answer(request: tuple[str, Budget]) -> Reply:
            question, budget = request
            return llm.generate(question, budget=budget, max_new_tokens=60)

        for (question, _), reply in zip(REQUESTS.items(), threads.map(answer, REQUESTS.items()), strict=True):
            verdicts = ", ".join(f"{one.key} {words[one.held]}" for one in reply.verdicts)
            print(
                f"{question}\n  {reply.text.strip()}\n  tokens by exit: {reply.tokens_per_exit}; {verdicts or 'no target'}"
            )


if __name__ == "__main__":
    main()
