"""The grid of a profile: prompts, depths and pending rows, from the user's options and within the bundle's context."""

from __future__ import annotations

import re
from dataclasses import dataclass

from balcony_edge.errors import ContextLengthError, InputError
from balcony_runtime.token_sequence import MAX_PASS_ROWS

#: Most values of an option; more are a typing mistake.
MAX_VALUES = 1000
_ITEM = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
#: Row counts of measured passes; in between, the price is linear. They double, because small passes read weights and large ones
#: multiply matrices.
PASS_ROWS = tuple(2**n for n in range(MAX_PASS_ROWS.bit_length()))
QUICK_PASS_ROWS = (1, 2, 8, 32, 128)
#: Length of the shortest sequence for passes, where attention costs almost nothing.
SHORT_END = 16
#: Most rows × keys of a measured pass, so that one pass of a small model takes seconds at most on a CPU.
MAX_SCORES = 2**20


@dataclass(frozen=True, slots=True)
class Grid:
    """The quantities to measure.

    Attributes:
        prompts: prompt lengths at which time to first token is measured.
        tokens: number of tokens of a decode block; the first two do not count.
        depths: numbers of tokens before a decode block.
        pending: numbers of pending rows at a switch of the exit.
        pass_rows: numbers of rows of single passes through each graph.
        rounds: most repetitions of everything.
        seconds: time limit; measuring stops after it, once everything was measured in two rounds.
        power_s: duration of decoding for the power of each exit, in seconds.
    """

    prompts: tuple[int, ...]
    tokens: int
    depths: tuple[int, ...]
    pending: tuple[int, ...]
    pass_rows: tuple[int, ...]
    rounds: int
    seconds: float
    power_s: float

    @classmethod
    def make(
        cls,
        context_length: int,
        *,
        quick: bool = False,
        prompts: tuple[int, ...] | None = None,
        tokens: int | None = None,
        depths: tuple[int, ...] | None = None,
        pending: tuple[int, ...] | None = None,
        rounds: int | None = None,
    ) -> Grid:
        """The default grid within a bundle's context, with the values that a user gave.

        Raises:
            ContextLengthError: a value does not fit the context.
            InputError: a value is out of range.
        """

        def default(*values: int) -> tuple[int, ...]:
            return tuple(sorted({min(value, context_length // 4) for value in values}))

        grid = cls(
            prompts=prompts or (default(128) if quick else default(32, 128, 512, 1024)),
            tokens=max(min(10 if quick else 18, context_length // 4), 3) if tokens is None else tokens,
            depths=depths or (default(128, 1024) if quick else default(0, 128, 512, 1024, 2048)),
            pending=pending or (default(16) if quick else default(1, 16, 128)),
            pass_rows=tuple(rows for rows in (QUICK_PASS_ROWS if quick else PASS_ROWS) if rows <= context_length),
            rounds=rounds or (9 if quick else 12),
            seconds=30.0 if quick else 600.0,
            power_s=1.5 if quick else 5.0,
        )
        grid._check(context_length)
        return grid

    def passes(self) -> tuple[tuple[int, int], ...]:
        """``(rows, end)`` of every single pass; ``end`` is the length of the sequence after it."""
        deepest = max(self.depths) + self.tokens
        ends = sorted({max(length, 1) for length in (SHORT_END, *self.depths, *self.prompts, deepest)})
        return tuple((rows, end) for end in ends for rows in self.pass_rows if rows <= end and rows * end <= MAX_SCORES)

    def _check(self, context_length: int) -> None:
        if self.tokens < 3:
            raise InputError(f"-n {self.tokens}: the first two tokens of a decode block only warm up: give 3 or more")
        for option, values, least in (("-p", self.prompts, 1), ("-d", self.depths, 0), ("--pending", self.pending, 1)):
            if min(values) < least:
                raise InputError(f"{option} {min(values)}: must be at least {least}: give a larger number")
        longest = {
            "-p": max(self.prompts) + 1,
            "-d and -n": max(self.depths) + self.tokens + 1,
            "--pending": min(self.depths) + max(self.pending) + 2,
        }
        for option, tokens in longest.items():
            if tokens > context_length:
                raise ContextLengthError(
                    f"{option}: {tokens} tokens are needed, but this bundle's context holds {context_length}: give less"
                )


def parse_values(option: str, text: str) -> tuple[int, ...]:
    """Read numbers as in llama-bench: ``32,512``, ``0-2048+512`` (step), ``1-64*2`` (factor), ``3-5``.

    Returns:
        The numbers in ascending order, without duplicates.

    Raises:
        InputError: the text has none of these forms.
    """
    values: set[int] = set()
    for item in text.split(","):
        found = _ITEM.fullmatch(item.strip())
        if found is None:
            raise InputError(
                f"{option} {text}: {item!r} is neither a number nor a range: write 32,512 or 0-2048+512 or 1-64*2"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        operator, step = found[3] or "+", int(found[4] or 1)
        if last < first or step < (2 if operator == "*" else 1) or (operator == "*" and first < 1):
            raise InputError(
                f"{option} {text}: {item!r} never ends: give an ascending range and a step above 0 (×: above 1)"
            )
        while first <= last:
            values.add(first)
            first = first + step if operator == "+" else first * step
            if len(values) > MAX_VALUES:
                raise InputError(f"{option} {text}: has more than {MAX_VALUES} values: give larger steps")
    return tuple(sorted(values))
