"""The scheduler: steps all streams of one engine, whichever thread asks for the next token.

Owns the turns. Every consumer asks for its own next token; one of the waiting threads leads and runs a round for all that ask
(:mod:`balcony_edge.control.company.joint` decides it), the others wait for what it brings them. So there is no thread between a
stream and its consumer: one that is alone is stepped by its own decoder, but in a round if its step would be long (a long
prompt, a slow pace). A stream whose consumer does not ask is not stepped and holds nobody up.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from balcony_edge.control.company.assignment import qualities
from balcony_edge.control.company.ceilings import longest_pause_s
from balcony_edge.control.company.joint import JointController
from balcony_edge.control.company.seen import CompanyState, RoundSeen, StreamSeen
from balcony_edge.control.company.waiting import MOST_OVERTAKEN, in_order, overtakes
from balcony_edge.control.decision import Decision, Measurement
from balcony_edge.device.costs import CostModel
from balcony_edge.device.readings import Reading
from balcony_edge.errors import BusyError, InfeasibleError, InputError
from balcony_runtime.backends.base import FloatArray
from balcony_runtime.decoding.learned import Learned
from balcony_runtime.decoding.loop import Decoder, Step, unmeasured
from balcony_runtime.engine import Engine
from balcony_runtime.scheduling.admission import Looks
from balcony_runtime.scheduling.sequences import Sequences
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.scheduling.stream import Stream, Undoable, absent_ms, readers

if TYPE_CHECKING:
    from balcony_edge.control.company.round_trace import RoundTraceWriter

_log = logging.getLogger(__name__)
#: Longest time that a round waits for the streams of the round before it, whose consumers are at their tokens.
GATHER_S = 0.001
#: Rows from which a prompt that has no target for its first token makes way for others, even if it is alone at first.
LONG_PROMPT = 128
#: Most streams that wait for others to end; one more is refused.
MOST_WAITING = 64
#: Longest sleep before the scheduler looks again at which streams have ended, ask or are due.
NAP_S = 0.02


class Scheduler:
    """Runs the streams of one engine in rounds.

    Args:
        engine: engine of all sequences.
        sequences: the sequences of all replies.
        learned: what replies learn about the device, shared with the decoders.
        costs: gives the prices, or None while no budget needs them.
        readings: gives the latest reading of every sensor.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        learned: Learned,
        costs: Callable[[], CostModel | None],
        readings: Callable[[], tuple[Reading, ...]],
    ) -> None:
        #: The sequences of all replies.
        self.sequences = sequences
        self._engine, self._learned, self._costs, self._readings = engine, learned, costs, readings
        self._quality = tuple(qualities(engine.manifest.agreement))
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._streams: dict[int, Stream] = {}
        self._keys = itertools.count()
        self._leader: int | None = None  # the thread that leads a round
        self._running: Sequence[Stream] = ()
        self._company: frozenset[int] = frozenset()  # streams of the last round that brought tokens
        self._looks = Looks()
        self._controller: JointController | None = None
        self._priced: CostModel | None = None
        self._state = CompanyState()
        self._last: Measurement | None = None
        # End of the last round, the pause after it, and the time until somebody is due if nobody was in it.
        self._done_s = self._wait_s = self._idle_s = 0.0
        self._trace: RoundTraceWriter | None = None
        self._recorded: RoundTraceWriter | None = None  # the trace from the next round on

    @property
    def _all(self) -> tuple[Stream, ...]:
        """All streams; the collector may end one in any thread, also while this one looks at them."""
        return tuple(list(self._streams.values()))  # noqa: C414 - tuple() alone may begin a collection in the middle

    def close(self) -> None:
        """Write what ended sequences have to the files."""
        self.sequences.close()

    def record(self, trace: RoundTraceWriter | None) -> None:
        """Record all rounds from the next one on, or stop recording; a signal's handler does not wait for its own step."""
        with self._turn:
            self._recorded, running = trace, self._running  # it may still write to the trace before
            while running and self._running is running and self._leader != threading.get_ident():
                self._turn.wait(NAP_S)

    def steps(self, decoder: Decoder, rows: int, cancelled: threading.Event) -> Generator[Step]:
        """The steps of one stream, until it is cancelled; it belongs to the company until the end of the iterator.

        Raises:
            InfeasibleError: nothing meets the targets, and the budget asks for an error in that case.
            ContextLengthError: the sequence is full.
        """
        stream = self.join(decoder, rows, cancelled)
        try:
            while True:
                self._engine.refuse_closed()  # after a fork no thread ends a round that another thread led
                if (found := self._by_itself(stream)) is None:
                    self.ask([stream], time.monotonic() if decoder.made else decoder.started_s)
                    while stream.asks:
                        self.wait([stream])
                    if not (found := stream.steps()):
                        return
                decoder.untold = []
                yield from found
        finally:
            self.leave(stream)

    def _by_itself(self, stream: Stream, asked: bool = False) -> list[Step] | None:
        """Step the only stream, which goes on, with fewer calls than a round; None if one is due, or if it is answered."""
        me = threading.get_ident()
        try:
            with self._lock:
                others = len(self._streams) > 1 or not self._company <= stream.alone
                if self._leader or others or stream.asks != asked or not stream.decoder.made or stream.is_slow:
                    return None
                self._leader, self._running = me, (stream,)
                self._company = stream.alone  # who comes gathers with it
            if not asked:
                return stream.decoder.step()
            with Undoable((stream,)):  # while nobody else can lead a round that finds it asking
                stream.answer(stream.decoder.step(1000 * (time.monotonic() - stream.asked_s)))
            return None
        finally:
            if self._leader == me:  # no call comes before the lead is given back: an interrupt may come at each call
                self._running, self._leader = (), None
                with self._lock:
                    if len(self._streams) > 1 or stream.left is not None:  # others have come meanwhile
                        self._turn.notify_all()
                    if stream.left is not None:
                        stream.left.close()

    def join(self, decoder: Decoder, rows: int, cancelled: threading.Event) -> Stream:
        """Add a stream. It waits until there is memory for its rows, and the shallowest exits would hold everybody's targets.

        Args:
            decoder: its decoder.
            rows: most rows that it will have.
            cancelled: event that ends it, also while it waits.

        Raises:
            InputError: the rows would never fit into the memory that the budget leaves.
            BusyError: too many streams wait already.
        """
        stream = Stream(next(self._keys), decoder, rows, cancelled)
        try:
            with self._turn:
                if (waiting := sum(not one.admitted for one in self._all)) >= MOST_WAITING:
                    raise BusyError(f"{waiting} replies wait for others to end: try again later")
                self.sequences.most_rows(rows)
                self._streams[stream.key] = stream
            return stream
        except BaseException:  # an interrupt may come as the lock is given back: nobody would take the stream out
            self._streams.pop(stream.key, None)
            raise

    def ask(self, streams: Sequence[Stream], asked_s: float) -> None:
        """Ask for the next token of each of some streams, since some time; :meth:`wait` brings it."""
        with self._lock:  # which is the condition's own, without its calls
            for stream in streams:
                stream.asked_s, stream.asks = asked_s, True
            self._turn.notify_all()

    def wait(self, streams: Sequence[Stream]) -> list[Stream]:
        """Wait for an answer to one of the streams, for one round at most, and return the streams that have one.

        Leads the round if no other thread does. A round brings no answer if it runs a part of a prompt only, or if all who ask
        wait for streams that do not ask. The caller can then serve the readers of those, and call again.
        """
        self._engine.refuse_closed()  # after a fork the lock may stay held, and the leader is a thread of the other process
        if len(streams) == len(self._streams) == 1:
            self._by_itself(streams[0], asked=True)  # as a rule it goes on by itself
        with self._lock:  # which is the condition's own, without its calls
            while not (answered := self._answered(streams)) and self._leader:
                self._turn.wait()
            if not answered:
                self._leader = threading.get_ident()
                try:
                    self._lead()
                finally:  # also of a round whose end was interrupted: who leaves waits for those that are running
                    self._running, self._leader = (), None
                    self._turn.notify_all()
            return answered or self._answered(streams)

    def _answered(self, streams: Sequence[Stream]) -> list[Stream]:
        for stream in streams:
            if stream.asks and stream.cancelled.is_set() and stream not in self._running:
                stream.answer([])
        return [stream for stream in streams if not stream.asks]

    def wake(self) -> None:
        """Let waiting threads look whether their streams were cancelled."""
        if not self._engine.is_forked:  # another thread of the other process may have held the lock
            self.ask((), 0.0)

    def leave(self, stream: Stream, held: ExitStack | None = None, *, waits: bool = True) -> None:
        """Remove a stream; waits for another thread's round with it. A round that still has it closes ``held`` at its end."""
        if self._engine.is_forked:  # as for wake()
            return
        with self._turn:
            stream.asks = False
            try:
                while waits and stream in self._running and self._leader != threading.get_ident():
                    self._turn.wait(NAP_S)
                if held is not None and stream in self._running:
                    stream.left = held.pop_all()
            finally:
                self._streams.pop(stream.key, None)
                if not self._streams:
                    self._state = self._state.without(self._state.streams.keys())
                self._turn.notify_all()

    def _lead(self) -> None:
        """Run one round for all streams that ask. Holds the lock at both ends, and not while the round runs."""
        begin_ns = time.perf_counter_ns()  # what a stream waits for the others is part of its gap
        known: Sequence[Stream] = self._all
        asking, begins, others = known, list[Stream](), len(known) > 1
        if not all(one.asks and one.admitted and one.decoder.made for one in known):  # as a rule they all go on
            self._gather()
            while self._looks.due(self._all) and self._admit_next():
                pass
            known = [one for one in self._all if one.asks]
            if not (asking := [one for one in known if one.admitted]):
                if known:
                    self._turn.wait(NAP_S)  # for those that hold the place or the time, and do not ask at the moment
                return
            admitted = [one for one in self._all if one.admitted]
            begins, others = [one for one in admitted if not one.decoder.made], len(admitted) > 1
        self._running = asking
        try:
            self._turn.release()  # an interrupt may come as it returns
            if begins:
                self.sequences.look_again(begins)
                begin_ns = time.perf_counter_ns()  # copies, and places made ready, are no part of the measurement
            for stream in [one for one in asking if one.asks and one.decoder.untold]:  # after an interrupted step
                stream.answer(stream.decoder.step())
            if not (asking := [one for one in asking if one.asks]):
                return
            with Undoable(asking):  # what fails in the decision ends all of them
                if len(asking) > 1 or self._makes_way(asking[0], others):
                    self._round(asking, begin_ns)
                else:
                    self._step_alone(asking[0])
        finally:
            self._turn.acquire()
            ran, self._running = self._running, ()
            for left in [one.left for one in ran if one.left is not None]:
                left.close()
            self.sequences.have_run(begins)
            idle_s, self._idle_s = self._idle_s, 0.0
            if idle_s and all(one in known for one in self._all if one.asks):
                self._turn.wait(min(idle_s, NAP_S))  # who asks meanwhile ends it

    def _admit_next(self) -> bool:
        """Admit the first stream in order that there is memory and time for; whether there was one.

        Nobody begins before one that was overtaken too often. A stream whose budget asks for that is refused and does not wait.
        """
        waits, held = (one for one in self._all if one.waits), False
        waiting = in_order(waits, lambda one: one.decoder.budget.weight)
        for stream in waiting:
            with stream.isolated():
                reason = "a reply that has waited for longer is next: wait" if held else self._refusal(stream)
                if reason is None:
                    stream.admit()
                    overtakes(stream, (other for other in waiting if other.waits))
                    return True
                if stream.decoder.budget.on_infeasible == "error":
                    raise BusyError(reason)
            held = held or (stream.waits and stream.overtaken >= MOST_OVERTAKEN)
        return False

    def _refusal(self, stream: Stream) -> str | None:
        """Why a stream cannot begin now; None if it can.

        Raises:
            InputError: its rows would never fit into the memory that the budget leaves.
        """
        others = [one for one in self._all if one.admitted]
        most = self.sequences.most_rows(stream.rows)
        if most is not None and (left := most - sum(one.rows for one in others)) < stream.rows:
            return f"kv_memory_mb: the replies in progress leave room for {left} tokens, not for {stream.rows}: wait"
        if not others:
            return None
        now = RoundSeen(tuple(map(self._seen_of, others)), None, time.monotonic(), learned=self._learned.alone())
        return self._joint().refusal(self._state, now, self._seen_of(stream))

    def _seen_of(self, stream: Stream) -> StreamSeen:
        shares = self.sequences.shares(stream) or self.sequences.will_share(stream, self._all)
        return stream.decoder.seen(stream.key, stream.asked_s, shares)

    def _gather(self) -> None:
        """Wait a moment for the streams of the last round, so that they stay together."""
        self._turn.wait_for(lambda: all(one.asks for one in self._all if one.key in self._company), GATHER_S)

    def _makes_way(self, stream: Stream, others: bool) -> bool:
        """Whether the only stream that asks takes a round, so that one that asks meanwhile need not wait for all of its step.

        Its prompt or pending rows then run in portions, it waits for its pace, or a plain step takes the place of its policy's.
        ``others``: whether others are in progress.
        """
        decoder = stream.decoder
        if decoder.made:
            budget = decoder.budget
            waits = budget.max_pace_tps is not None or budget.needs_sensors or budget.policy != "plain"
            waits = waits or (decoder.rows_due > 1 and bool(readers(self._all)))
            return stream.is_slow or (others and waits)
        long = others or (decoder.rows_due > LONG_PROMPT and decoder.budget.ttft_ms is None)
        return long and self._costs() is not None

    def _step_alone(self, stream: Stream) -> None:
        self._company = stream.alone
        stream.answer(stream.decoder.step(1000 * (time.monotonic() - stream.asked_s)))

    def _round(self, asking: Sequence[Stream], begin_ns: int) -> None:
        both = ([one.decoder.budget for one in those] for those in (self._all, asking))
        longest_s = longest_pause_s(*both) if self._wait_s else 0.0
        if (pause_s := self._done_s + min(self._wait_s, longest_s) - time.monotonic()) > 0:
            time.sleep(min(pause_s, NAP_S))
            return
        controller = self._joint()
        if self._trace is not self._recorded:
            self._trace, self._state = self._recorded, self._state._replace(assigned_for=())
            if self._trace is not None:
                self._trace.begin()
        streams, seen = self._seen(asking)
        if not streams:
            return
        before = self._state.without(ended := [key for key in self._state.streams if key not in self._streams])
        state, found = controller.decide(before, seen)
        if found.wait_ms and not (found.moves or found.refused or found.chunk):
            self._idle_s = found.wait_ms / 1000  # nobody is due, and nothing has changed
            return
        for key, why in found.refused:
            streams.pop(key).fail(InfeasibleError(why))
        work_ns, prepared = time.perf_counter_ns(), self.sequences.prepared
        if found.chunk is not None and found.chunk.key in streams:
            streams[found.chunk.key].work_off(found.chunk)
        moves = {move.key: move.decision for move in found.moves if move.key in streams and streams[move.key].asks}
        logits = self._step({streams[key]: decision for key, decision in moves.items()})
        unusual = any(not stream.decoder.made for stream in logits) or prepared != self.sequences.prepared
        self._company, self._state, self._last = frozenset(moves) or self._company, state, None
        self._learned.follow(state.slowdown, state.governor)
        if self._trace is not None and self._priced is not None:
            try:  # not before the step: an interrupted round is decided again
                self._trace.write(self._priced, self._quality, before, seen, found, ended)
            except (InputError, TypeError, ValueError) as error:  # a full disk or an odd reading ends no reply
                _log.warning("no rounds are recorded any more: %s", error)
                self._recorded = None if self._recorded is self._trace else self._recorded
                self._trace = None
        for stream, row in logits.items():
            with stream.isolated():
                stream.decoder.take(row, moves[stream.key], stream.asked_s, (seen.readings, seen.now_s), state)
        done_ns, now_s = time.perf_counter_ns(), time.monotonic()  # everybody waits until all tokens are picked
        self._learned.busy_ns += done_ns - work_ns
        if found.price_ms and not (unusual or found.refused) and all(stream.asks for stream in streams.values()):
            took_ms = (done_ns - begin_ns) / 1e6
            self._last = Measurement(self._engine.exit_layers[found.deepest], found.price_ms, took_ms)
        for stream in [one for one in logits if one.asks]:  # the others have failed
            stream.answer(stream.decoder.taken(1000 * (now_s - stream.asked_s)))
        self._done_s, self._wait_s = now_s, found.wait_ms / 1000

    def _joint(self) -> JointController:
        if (costs := self._costs()) is not self._priced or self._controller is None:
            self._priced = costs
            self._controller = JointController(costs or unmeasured(self._engine.exit_layers), self._quality)
            self._state, self._last = CompanyState(self._learned.state.slowdown, self._learned.state.governor), None
        return self._controller

    def _seen(self, asking: Sequence[Stream]) -> tuple[dict[int, Stream], RoundSeen]:
        """What the controller must know; a stream that cannot go on fails alone."""
        streams, found = {}, []
        for stream in asking:
            try:  # the calls of a context cost more than the rest
                found.append(self._seen_of(stream))
                streams[stream.key] = stream
            except Exception as error:
                stream.fail(error)
        senses = [key for key, stream in streams.items() if stream.decoder.senses]
        now_s, busy_s = time.monotonic(), self._learned.busy_ns / 1e9
        try:
            readings = self._readings() if senses else ()
        except Exception as error:  # a function of the user's: those who need it end
            for key in senses:
                streams[key].fail(error)
            return self._seen([one for one in asking if one.asks])
        late_ms = absent_ms(readers(self._all))
        return streams, RoundSeen(tuple(found), self._last, now_s, busy_s, readings, self._learned.alone(), late_ms)

    def _step(self, moves: Mapping[Stream, Decision]) -> dict[Stream, FloatArray]:
        """Run the round's tokens: those of the pool together, prompts and others one by one. Gives logits (1, V)."""
        together, logits = list[Stream](), {}
        for stream, decision in moves.items():
            sequence = stream.sequence
            if stream.decoder.made and self.sequences.shares(stream):
                if sequence.length < sequence.max_length:
                    together.append(stream)
                else:
                    stream.fail(sequence.too_long_error())
                continue
            with stream.isolated():
                if stream.decoder.made:
                    logits[stream] = sequence.step(decision.exit_layer, np.array([stream.decoder.last_token])).copy()
                else:
                    logits[stream] = sequence.advance(decision.exit_layer, ())[:, -1]
        if together:
            tokens = [PoolMove(one.sequence, moves[one].exit_layer, one.decoder.last_token) for one in together]
            with Undoable(together):  # what fails in a shared pass ends those that share it
                logits |= dict(zip(together, self.sequences.step(tokens), strict=True))
        return logits
