"""Batches in lockstep: replies to prompts of one length and one budget, whose steps are those of one batched sequence.

Owns which replies can run as one batch, and their loop. Engines on which replies share no passes need it; everywhere else
:mod:`.together` runs several replies, each at its own length and exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from balcony_edge.device.readings import Reading
from balcony_runtime.decoding.learned import Learned
from balcony_runtime.decoding.loop import Decoder, Environment
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.engine import Engine
from balcony_runtime.requests import Request, Requests
from balcony_runtime.scheduling.sequences import MEMBERS


class Lockstep:
    """Runs batches of replies over one engine.

    Args:
        engine: engine of the replies.
        requests: makes their sampler.
        learned: what replies learn about the device.
        readings: gives the latest reading of every sensor.
    """

    def __init__(
        self, engine: Engine, requests: Requests, learned: Learned, readings: Callable[[], tuple[Reading, ...]]
    ) -> None:
        self._engine, self._requests, self._learned, self._readings = engine, requests, learned, readings

    def takes(self, requests: Sequence[Request], sampling: SamplingParams | None) -> bool:
        """Whether replies with these sampling parameters can run as one batch."""
        alike = len({(len(request.ids), request.limits.budget) for request in requests}) == 1
        if not alike or len(requests) > (self._engine.backend.most_members or MEMBERS):
            return False
        # A batch draws from one generator, and a seed is each reply's own.
        return sampling is None or sampling.temperature == 0 or sampling.seed is None

    def texts(self, requests: Sequence[Request], sampling: SamplingParams | None) -> list[str]:
        """The texts of replies to prompts of one length and one budget."""
        batch, first = [request.ids for request in requests], requests[0]
        sequence = self._engine.new_sequence(batch_size=len(batch), max_length=len(batch[0]) + first.max_new_tokens)
        rows = np.array(batch, np.int64)
        sampler = self._requests.sampler(sampling, rows)
        environment = Environment(first.limits.now, self._readings, self._learned, first.max_new_tokens)
        decoder = Decoder(sequence, rows, sampler, environment)
        replies: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        slowdown = self._learned.state.slowdown
        try:
            for _, step in zip(range(first.max_new_tokens), decoder.steps(), strict=False):
                for member, token in enumerate(step.ids.tolist()):
                    ended[member] = ended[member] or token in first.ends
                    if not ended[member]:
                        replies[member].append(token)
                if all(ended):
                    break
        finally:  # how long steps of several rows take says nothing about those of one
            self._learned.state = self._learned.state._replace(slowdown=slowdown)
        texts = (request.text for request in requests)
        return ["".join(map(text.push, reply)) + text.flush() for text, reply in zip(texts, replies, strict=True)]
