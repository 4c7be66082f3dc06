"""Spellings of earlier versions: keys of a budget and options of the command line that have another name now.

They are refused, and the refusal names the new spelling. Only this table knows them.
"""

from __future__ import annotations

from collections.abc import Sequence

from balcony_edge.errors import InputError

#: A key of a budget, or a verb and its option → what says the same now.
RENAMED = {
    "speculate": 'policy = "speculative"',
    "confident": 'policy = "confident"',
    "lossless": 'policy = "lossless"',
    "train --unfreeze": "`python -m benchmarks.paper.joint --objective unfrozen`",
    "train --objective": "`python -m benchmarks.paper.joint --objective sorted`",
    "train --from-scratch": "`python -m benchmarks.paper.joint --objective scratch`",
}


def refuse_former_options(words: Sequence[str]) -> None:
    """Refuse a command line, without the program's name, that has an option of an earlier version.

    Raises:
        InputError: it has one.
    """
    for word in words[1:]:
        given = f"{words[0]} {word.partition('=')[0]}"
        if given in RENAMED:
            raise InputError(f"{given}: this option is now {RENAMED[given]}: write that instead")
