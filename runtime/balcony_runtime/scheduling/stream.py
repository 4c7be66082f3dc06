"""A reply in progress, as the scheduler sees it.

Owns what passes between a stream's consumer and the thread that leads a round: the question, and the answer or the failure.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from balcony_edge.budget import Budget
from balcony_edge.control.company.seen import Chunk
from balcony_edge.control.governor import LEAST_PACE_TPS
from balcony_edge.errors import InputError
from balcony_runtime.backends.base import NotFiniteError
from balcony_runtime.decoding.loop import Decoder, Step, run_chunk

#: Pace in tokens a second below which a reply is slow.
SLOW_TPS = 2.0


class Cancellation(threading.Event):
    """The event that ends a reply.

    Args:
        wake: called when it is set; wakes threads that wait for the reply's turn.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        # The handler of a signal may cancel the reply whose own thread is about to wait here for its pace.
        self._cond = threading.Condition(threading.RLock())
        self._wake = wake

    def set(self) -> None:
        super().set()
        self._wake()


class Stream:
    """A reply in progress.

    Attributes:
        key: its number.
        decoder: its decoder.
        sequence: its sequence.
        rows: most rows that it will have.
        cancelled: event that ends it.
        asked_s: time of its last question.
        asks: whether it waits for its next token.
        admitted: whether it takes part in rounds.
        left: what the round that it left in the middle closes at its end.
        overtaken: number of later requests that began while it waited.
        on_admitted: called when it is admitted, while the scheduler is locked.
    """

    def __init__(self, key: int, decoder: Decoder, rows: int, cancelled: threading.Event) -> None:
        self.key, self.decoder, self.sequence = key, decoder, decoder.sequence
        self.rows, self.cancelled = rows, cancelled
        self.alone = frozenset((key,))  # the company of a stream that steps by itself
        self.asked_s = 0.0
        self.asks = self.admitted = False
        self.left: contextlib.ExitStack | None = None
        self.overtaken = 0
        self.on_admitted: Callable[[], None] | None = None
        self._found: list[Step] = []
        self._error: BaseException | None = None
        self._judged: tuple[Budget | None, bool] = None, False  # the last budget, and whether it makes a reply slow

    def admit(self) -> None:
        """Let it take part in rounds."""
        self.admitted = True
        if self.on_admitted is not None:
            self.on_admitted()

    @property
    def waits(self) -> bool:
        """Whether it waits to be admitted."""
        return self.asks and not self.admitted and not self.cancelled.is_set()

    @property
    def answered(self) -> bool:
        """Whether it has an answer, or a failure, that was not taken."""
        return bool(self._found) or self._error is not None

    def steps(self) -> list[Step]:
        """The answer, once: the next steps; none if the stream was cancelled.

        Raises:
            Exception: the stream cannot go on.
        """
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # its traceback has this frame: memory of a device would wait for the collector of cycles
        found, self._found = self._found, []
        return found

    def answer(self, steps: list[Step]) -> None:
        self._found, self.asks = steps, False
        self.decoder.untold = []

    def fail(self, error: BaseException) -> None:
        if isinstance(error, NotFiniteError):
            self.sequence.rollback(0)  # no prompt begins with its rows, and its place is cleared
        self._error, self.asks = error, False

    @property
    def is_slow(self) -> bool:
        """Whether it waits in rounds even if it is alone, so that who comes meanwhile does not wait for its long gap."""
        if (budget := self.decoder.budget) is not self._judged[0]:  # asked before each token, and seldom another one
            held_back = budget.needs_sensors and (budget.min_pace_tps or LEAST_PACE_TPS) < LEAST_PACE_TPS
            paced = budget.max_pace_tps is not None and budget.max_pace_tps < SLOW_TPS
            self._judged = budget, held_back or paced
        return self._judged[1]

    def work_off(self, chunk: Chunk) -> None:
        """Run pending rows, and wait for the device, so that their time is known."""
        with self.isolated():
            run_chunk(self.sequence, chunk)
            self.sequence.state.wait()

    def isolated(self) -> Stream:
        """End this stream, and no other one, if what is done for it in this context fails; its consumer gets the exception.

        The stream is the context itself, because a round enters two for each token.
        """
        return self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.fail(error)
        return isinstance(error, Exception)


def readers(streams: Iterable[Stream]) -> list[Stream]:
    """Streams with ``tpot_ms`` whose readers are at their tokens.

    Those are streams whose last token is less than two of their ``tpot_ms`` old: who reads for longer holds nobody up, also if
    there have been no tokens since, but portions of a prompt.
    """
    found, now_ns = [], time.perf_counter_ns()
    for one in streams:
        if one.asks or not one.decoder.made:  # first: as a rule all ask, and a budget takes calls
            continue
        tpot_ms = one.decoder.budget.tpot_ms
        if tpot_ms is not None and now_ns - one.decoder.emitted_ns < 2e6 * tpot_ms:
            found.append(one)
    return found


def absent_ms(streams: Iterable[Stream]) -> float:
    """Half the shortest ``tpot_ms`` of :func:`readers`: their own steps take the other half."""
    return min((one.decoder.budget.tpot_ms or math.inf for one in streams), default=math.inf) / 2


class Undoable:
    """A step of some streams: an error ends those that still ask, and an interrupt takes back what it has appended to them.

    After an interrupt they ask again. One between the choice of a token and the end of the step that chose it loses a row: some
    tens of microseconds, with a structure some milliseconds. A class, because a generator's context takes twice as many calls.
    """

    def __init__(self, asking: Sequence[Stream]) -> None:
        self._before = [(stream, stream.asked_s, stream.sequence.length) for stream in asking]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None:
            return False
        for stream, asked_s, length in self._before:
            asks = stream.asks and stream.asked_s == asked_s  # and has not been answered, and asked again, meanwhile
            if isinstance(error, Exception):
                if stream.asks:
                    stream.fail(error)
            elif asks and stream.decoder.made and not stream.decoder.untold:
                with contextlib.suppress(InputError):  # the engine was closed meanwhile
                    stream.sequence.rollback(min(length, stream.sequence.length))
        return isinstance(error, Exception)
