"""The decode thread: one thread that owns all replies in progress and sends their tokens to the event loop.

Owns the order in which requests begin and the number that runs at once. A step's tokens go to the loop in one call. What other
threads want from it they put into its inbox.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any

import numpy as np

from balcony_edge.budget import Budget
from balcony_edge.control.company.waiting import in_order, overtakes
from balcony_edge.errors import BalconyError, DeviceError, is_out_of_memory
from balcony_runtime.decoding.sampling import log_probabilities
from balcony_runtime.llm import LLM
from balcony_runtime.reply import TokenStream
from balcony_runtime.requests import Request
from balcony_runtime.serve.bodies.refusal import refusal_of
from balcony_runtime.serve.work.jobs import Ended, Item, Job, Scores
from balcony_runtime.together import Together
from balcony_runtime.token_sequence import TokenSequence

#: Rows of a prompt that are scored at once: 64 rows of a vocabulary of 49,152 take 13 MB.
SCORED_ROWS = 64

_log = logging.getLogger(__name__)
Found = list[tuple[Job, Item]]


class Worker:
    """Runs jobs in a thread of its own.

    Args:
        llm: the loaded bundle; nothing else may decode with it.
        parallel: most replies in progress; others wait in the order of :func:`.waiting.in_order`. Paused ones do not count.
        most: most replies in progress, paused ones included.
        deliver: takes the items of a step; called in the decode thread.
    """

    def __init__(self, llm: LLM, parallel: int, most: int, deliver: Callable[[Found], None]) -> None:
        self._llm, self._parallel, self._most, self._deliver = llm, parallel, most, deliver
        self._inbox: SimpleQueue[tuple[Callable[[Job], None], Job] | None] = SimpleQueue()
        self._waiting: list[Job] = []
        self._running: dict[TokenStream, Job] = {}
        self._paused: set[Job] = set()
        self._scoring: dict[Job, Generator[None, None, Scores]] = {}
        self._found: Found = []
        self._together: Together = llm.together()
        self._thread = threading.Thread(target=self._run, name="balcony-decode", daemon=True)
        self._turned_s = time.monotonic()  # infinite while it waits for something to do
        self._failing_s = math.inf  # time since which the engine has only failed
        self._failed_s = 0.0  # seconds from then to its last failure

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End all replies and the thread."""
        for job in tuple(self._running.values()):
            self.cancel(job)
        self._inbox.put(None)
        self._thread.join()

    @property
    def stuck_s(self) -> float:
        """Seconds since its last turn, 0 while it waits for something to do; infinite if the thread has ended.

        If the engine only fails, the seconds for which it does: a GPU that is lost fails each reply at once, and only another
        process can use it again.
        """
        return max(time.monotonic() - self._turned_s, self._failed_s) if self._thread.is_alive() else math.inf

    def prepare(self, ids: Sequence[int], **options: Any) -> Request:
        """The reply to a prompt, for a job; see :meth:`.Together.prepare`. Any thread may call it."""
        return self._together.prepare(ids, **options)

    def submit(self, job: Job) -> None:
        """Queue a job; its items come through ``deliver``."""
        self._inbox.put((self._waiting.append, job))

    def cancel(self, job: Job) -> None:
        """End a job; no item follows the ones that are on the way."""
        if job.request is not None:
            job.request.cancelled.set()  # it may wait for its pace in the decode thread
        self._inbox.put((self._cancel, job))

    def pause(self, job: Job) -> None:
        """Make no more tokens of a job for the time being."""
        self._inbox.put((self._pause, job))

    def resume(self, job: Job) -> None:
        """Make tokens of a job again."""
        self._inbox.put((self._resume, job))

    def rebudget(self, job: Job, budget: Budget | None) -> None:
        """Give a job another budget, which must have been checked; None for the server's."""
        job.budget = budget
        self._inbox.put((functools.partial(_rebudget, budget=budget), job))

    def _run(self) -> None:
        with self._together:
            while self._read_inbox():
                self._turned_s = time.monotonic()
                self._admit()
                self._score()
                self._step()
                if self._found:
                    found, self._found = self._found, []
                    self._deliver(found)
            for pieces in self._scoring.values():
                pieces.close()

    def _read_inbox(self) -> bool:
        """Do what others ask for; sleeps if there is nothing else to do. False if the thread must end."""
        busy = self._found or self._scoring or (self._waiting and self._room) or len(self._running) > len(self._paused)
        while not self._inbox.empty() or not busy:
            if not busy:
                self._turned_s = math.inf
            message = self._inbox.get()
            self._turned_s = time.monotonic()
            if message is None:
                return False
            act, job = message
            try:
                act(job)
            except Exception as error:  # the job ends, and the others go on
                self._fail(job, error)
                self._cancel(job)
            busy = True
        return True

    @property
    def _room(self) -> bool:
        begun = len(self._running) + len(self._scoring)
        return begun - len(self._paused) < self._parallel and begun < self._most

    def _admit(self) -> None:
        while self._waiting and self._room:
            job = in_order(self._waiting, lambda one: (one.budget or self._llm.budget).weight)[0]
            self._waiting.remove(job)
            overtakes(job, self._waiting)
            if job.score is None:
                self._begin(job)
                continue
            try:
                resolved = self._llm.resolved(job.budget)
                exit_layer = resolved.allowed_exits(self._llm.exit_layers)[-1]
                borrowed = self._together.empty(len(job.ids))
            except Exception as error:  # the job ends, and the others go on
                self._fail(job, error)
                continue
            job.begin()
            self._scoring[job] = _scored(borrowed, job.ids, exit_layer, job.score)

    def _begin(self, job: Job) -> None:
        if job.request is None:
            job.begin()
            self._found.append((job, Ended()))
            return
        try:
            job.stream = self._together.begin(job.request, job.begin)
        except Exception as error:
            self._fail(job, error)
        else:
            self._running[job.stream] = job

    def _score(self) -> None:
        """Run one piece of the oldest prompt that is being scored."""
        for job, pieces in list(self._scoring.items())[:1]:
            try:
                next(pieces)
                self._failing_s, self._failed_s = math.inf, 0.0
            except StopIteration as done:
                del self._scoring[job]
                self._found.append((job, done.value))
                self._begin(job)
            except Exception as error:
                del self._scoring[job]
                self._fail(job, error)

    def _step(self) -> None:
        if not self._together.open:
            return
        try:
            for stream, item in self._together.step():  # also frees replies that were cancelled
                job = self._running[stream]
                if isinstance(item, Exception):
                    self._fail(job, item)
                else:
                    self._found.append((job, item))
                    self._failing_s, self._failed_s = math.inf, 0.0
                if isinstance(item, Exception) or item.finish_reason is not None:
                    self._forget(job)
        except Exception as error:  # a bug: the replies end, and the server goes on
            _log.error("the decode thread failed", exc_info=error)
            for job in list(self._running.values()):
                self._found.append((job, error))
                self._forget(job)
            try:
                self._together.close()
            except Exception as failed:  # what failed may fail again
                _log.error("the replies could not be ended", exc_info=failed)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error; the log gets a bug's traceback, and the line of an engine that failed."""
        if not (isinstance(error, BalconyError) or is_out_of_memory(error)):
            _log.error("the decode thread failed", exc_info=error)
        elif (refusal := refusal_of(error)).status >= 500:
            _log.error("a reply failed: %s", refusal.message)
        # Vulkan has other words for it, but the same cure.
        full = is_out_of_memory(error) or "free memory" in str(error)
        if isinstance(error, DeviceError) and not full:
            now_s = time.monotonic()
            self._failing_s = min(self._failing_s, now_s)
            self._failed_s = now_s - self._failing_s
        self._found.append((job, error))

    def _forget(self, job: Job) -> None:
        if job.stream is not None:
            self._running.pop(job.stream, None)
        self._paused.discard(job)

    def _cancel(self, job: Job) -> None:
        if (pieces := self._scoring.pop(job, None)) is not None:
            pieces.close()
        if job in self._waiting:
            self._waiting.remove(job)
        if job.stream is not None and job.stream in self._running:
            job.stream.cancel()
            self._forget(job)

    def _pause(self, job: Job) -> None:
        if job.stream is not None and job.stream in self._running:
            self._together.pause(job.stream)
            self._paused.add(job)

    def _resume(self, job: Job) -> None:
        if job.stream is not None and job in self._paused:
            self._paused.discard(job)
            self._together.resume(job.stream)


def _rebudget(job: Job, budget: Budget | None) -> None:
    if job.request is not None and not job.ended:
        job.request.limits.replace(budget)


def _scored(
    borrowed: AbstractContextManager[TokenSequence], ids: Sequence[int], exit_layer: int, top: int
) -> Generator[None, None, Scores]:
    """Log-probabilities of a prompt's tokens, by the engine's own logits at one exit, before any sampling parameter.

    Yields after every piece, so that replies in progress do not wait for a long prompt, and returns the scores.

    Args:
        borrowed: gives an empty sequence, which goes back at the end with the rows of the prompt: its reply begins with them.
        ids: tokens of the prompt.
        exit_layer: exit whose distribution is asked for.
        top: number of likeliest tokens to report at each place.

    Raises:
        ContextLengthError: the prompt does not fit the context.
        InputError: a token is outside the vocabulary.
    """
    logprobs: list[float | None] = [None]
    best: list[Sequence[tuple[int, float]]] = [()]
    with borrowed as sequence:
        for begin in range(0, len(ids) - 1, SCORED_ROWS):
            piece = list(ids[begin : min(begin + SCORED_ROWS, len(ids) - 1)])
            logits = sequence.advance(exit_layer, piece, len(piece))[0]
            found, likeliest = log_probabilities(logits, np.array(ids[begin + 1 : begin + 1 + len(piece)]), top)
            logprobs += found
            best += likeliest
            yield
    return Scores(logprobs, best)
