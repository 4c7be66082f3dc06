"""The service behind the routes: one loaded bundle, its names, and the replies in progress.

Owns the slots and the bound of the queue. Everything here runs in the event loop, except :meth:`Service.load`,
``_prepare`` and ``_compile``, which run in threads; ``slots``, ``waiting`` and what else the metrics ask for, which a
thread reads at any time; and :meth:`Service.close`, which runs after the loop has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from balcony_edge.budget import Budget, load_budget
from balcony_edge.device.machine import Machine, this_device
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Token
from balcony_runtime.requests import Request, refuse_longer
from balcony_runtime.serve.bodies.asked import Asked
from balcony_runtime.serve.bodies.named import Names
from balcony_runtime.serve.bodies.refusal import RefusedError, busy, draining, stopped, too_long
from balcony_runtime.serve.work.answers import Answer
from balcony_runtime.serve.work.energy import EnergyMeter
from balcony_runtime.serve.work.events import ResponseShapes
from balcony_runtime.serve.work.jobs import MOST_BUFFERED, Channel, Cost, Job
from balcony_runtime.serve.work.metrics import Metrics
from balcony_runtime.serve.work.shapes import Shapes, cached_tokens, prompt_tokens
from balcony_runtime.serve.work.slots import Slots
from balcony_runtime.serve.work.worker import Found, Worker
from balcony_runtime.tokens import refuse_foreign

_T = TypeVar("_T")
#: Bytes from which a body is large: its text takes seconds to tokenize, and some hundred bytes of memory a token meanwhile.
LARGE_BODY = 100_000
#: Longest time for which a refused client is asked to wait.
MOST_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the server.

    Attributes:
        parallel: most replies in progress.
        queue: most replies that wait for those to end.
        body_bytes: largest body of a request.
        request_s: longest time of a request.
        saved_bytes: bytes of slots that were saved by name, from which on no more are saved.
        head_s: longest time for sending the headers, and for the TLS handshake before them.
        body_s: longest time for sending the body.
        unread_s: longest time for which a client may read next to nothing of an answer that fills its buffers.
        connections: most connections, those without a request included.
        bodies_bytes: most bytes of bodies that come at once. One body may be larger, if it is alone; small ones always come in.
    """

    parallel: int = 16
    queue: int = 64
    body_bytes: int = 8_000_000
    request_s: float = 600.0
    saved_bytes: int = 1_000_000_000
    head_s: float = 10.0
    body_s: float = 30.0
    unread_s: float = 60.0
    connections: int = 1024
    bodies_bytes: int = 64_000_000


class _Parts(NamedTuple):
    """What there is once the bundle is loaded."""

    llm: LLM
    names: Names
    worker: Worker
    metrics: Metrics
    slots: Slots
    machine: Machine


class Service:
    """One loaded bundle that answers requests.

    Args:
        name: name of the model; None for the bundle's.
        budget: file of the server's own budget; None for the one that the bundle was loaded with.
        budgets: directory of budget files, or None.
        limits: bounds.
    """

    def __init__(self, name: str | None, budget: Path | None, budgets: Path | None, limits: Limits) -> None:
        self._name, self._budget, self.folder, self.limits = name, budget, budgets, limits
        self.started_s = int(time.time())
        self.draining = self._stopped = False
        self._loaded: _Parts | None = None
        self._jobs: dict[int, Job] = {}
        self._preparing = 0  # replies to requests whose prompts are being read
        self._answers: set[Answer] = set()
        self._keys = itertools.count()
        self._mean_s, self._slowdown = 1.0, 1.0
        # One at a time: the threads that read prompts are for everybody, and the decode thread must not wait for a compiler.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="balcony-compile")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="balcony-large")
        # The disk of slots may hang; and of several saves at once each would find room for its file.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="balcony-slots")

    def load(self, open_llm: Callable[[], LLM], loop: asyncio.AbstractEventLoop) -> None:
        """Load the bundle and measure its prices, so that no budget of a request has to. Takes seconds; for a thread."""
        llm = open_llm()
        if self.draining:  # a signal came meanwhile
            llm.close()
            return
        try:
            llm.costs  # noqa: B018 - measured now, not while others decode
            llm.readings()  # starts the sensors
            manifest = llm.engine.manifest
            names = Names(self._name or manifest.model.name, llm.budget, manifest, self.folder)
            machine = this_device()  # here, because a GPU's driver may take seconds to answer
        except BaseException:
            llm.close()
            raise

        limits = self.limits

        def hand_over(found: Found) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and no one waits for these
                loop.call_soon_threadsafe(self._deliver, found)

        worker = Worker(llm, limits.parallel, limits.parallel + limits.queue, hand_over)
        metrics = Metrics(
            llm.exit_layers,
            running=lambda: sum(job.begun_s is not None for job in self.slots),
            waiting=lambda: self.waiting,
            pending=lambda: sum(0 if job.cost.last is None else job.cost.last.pending_rows for job in self.slots),
            slowdown=lambda: self._slowdown,
            kept={
                "memory": lambda: 0 if llm.pool is None else llm.pool.bytes,
                "disk": lambda: 0 if llm.prefix_files is None else llm.prefix_files.bytes,
            },
            readings=llm.readings,
        )
        worker.start()
        self._loaded = _Parts(llm, names, worker, metrics, Slots(llm, limits.saved_bytes), machine)

    def close(self) -> None:
        """End all replies and free the engine."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        for pool in (self._large, self._disk):
            pool.shutdown(cancel_futures=True)  # the text that one reads may still look for rows
        if self._loaded is not None:
            self._loaded.worker.stop()
            self._loaded.llm.close()

    @property
    def ready(self) -> bool:
        """Whether the bundle is loaded."""
        return self._loaded is not None

    def refuse_unready(self) -> None:
        """Refuse a request for a reply while the model is loading or the server stops.

        Raises:
            RefusedError: it is.
        """
        if self.draining:
            raise draining()
        self._parts  # noqa: B018 - refuses while the model is loading

    @property
    def llm(self) -> LLM:
        """The bundle; the server answers no request that needs it before it is loaded."""
        return self._parts.llm

    @property
    def names(self) -> Names:
        """Names and their budgets."""
        return self._parts.names

    @property
    def machine(self) -> Machine:
        """The device that the bundle runs on."""
        return self._parts.machine

    @property
    def metrics(self) -> Metrics:
        """Counters."""
        return self._parts.metrics

    @property
    def _parts(self) -> _Parts:
        if self._loaded is None:
            raise RefusedError(503, "the model is loading: try again soon", "loading", headers={"retry-after": "1"})
        return self._loaded

    def reload(self) -> None:
        """Read the budget files again.

        Raises:
            BalconyError: a file is refused; all budgets are as before.
        """
        own = self.llm.budget if self._budget is None else load_budget(self._budget)
        self.llm.resolved(own)
        self.names.read(own)
        self.llm.budget = own

    @property
    def stuck_s(self) -> float:
        """Seconds for which the decode thread has made nothing although it should; infinite if it has ended."""
        return 0.0 if self._loaded is None else self._parts.worker.stuck_s

    @property
    def busy(self) -> bool:
        """Whether an answer is in progress."""
        return bool(self._answers) or self._preparing > 0

    @property
    def slots(self) -> Sequence[Job]:
        """Replies that have not ended."""
        return tuple(job for job in tuple(self._jobs.values()) if not job.ended)  # a thread asks, too: metrics

    @property
    def waiting(self) -> int:
        """Number of replies that have not begun."""
        return sum(job.begun_s is None for job in self.slots)

    @property
    def retry_s(self) -> int:
        """Seconds after which a place is likely to be free."""
        rounds = (self.waiting + 1) / self.limits.parallel
        return min(max(math.ceil(self._mean_s * rounds), 1), MOST_RETRY_S)

    def _deliver(self, found: Found) -> None:
        """Hand the items of a step to their answers, and pause replies whose readers are slow. Runs in the event loop."""
        count = self.metrics.token
        for job, item in found:
            if isinstance(item, Token):
                count(item, first=job.cost.tokens == 0)
                job.cost.count(item)
                decision = item.decision
                if decision.price_ms > 0 and decision.predicted_ms > 0:
                    self._slowdown = decision.predicted_ms / decision.price_ms
            job.buffered += 1
            job.channel.put(job, item)
            if job.buffered >= MOST_BUFFERED and not job.paused:
                job.paused = True
                self._parts.worker.pause(job)

    async def in_thread(self, call: Callable[[], _T], size: int) -> _T:
        """Run what takes time for a body of so many bytes. Large ones run one at a time, so that small ones need not wait.

        Raises:
            RefusedError: it took longer than a request may; if it had not begun, it never does.
        """
        executor = self._large if size > LARGE_BODY else None
        try:
            async with asyncio.timeout(self.limits.request_s):
                return await asyncio.get_running_loop().run_in_executor(executor, call)
        except TimeoutError:
            raise too_long(self.limits.request_s) from None

    async def answer(self, asked: Asked, headers: Mapping[str, str], client: str, size: int, asked_s: float) -> Answer:
        """The answer to a request, not begun; its body has ``size`` bytes and came at ``asked_s`` (``time.monotonic``).

        Raises:
            RefusedError: the server is stopping, the queue is full, or the model is unknown.
            BalconyError: a prompt, a budget or a parameter is refused.
        """
        self.refuse_unready()  # the route looked before the body came
        meter = EnergyMeter(self.llm.readings)
        most_tokens = None if asked.max_tokens is None else min(max(asked.max_tokens, 1), self.llm.engine.max_length)
        budget = self.names.budget(asked.model, headers, asked.budget, most_tokens)
        model, count = self.names.listed(asked.model), len(asked.prompts) * asked.n
        others, most = len(self.slots) + self._preparing, self.limits.parallel + self.limits.queue
        if others and others + count > most:  # a request that is larger than the queue has it to itself
            raise busy(f"{others} replies run or wait, and {most} may: try again later", "queue_full", self.retry_s)
        self._preparing += count
        reading: asyncio.Future[Any] | None = None
        left = threading.Event()
        try:
            if asked.structured and not await asyncio.to_thread(self._compile, asked, only_look=True):
                await asyncio.get_running_loop().run_in_executor(self._compiler, self._compile, asked)
            prepare = partial(self._prepare, asked, budget, asked_s)
            reading = asyncio.ensure_future(self.in_thread(lambda: [] if left.is_set() else prepare(), size))
            prepared = await asyncio.shield(reading)
        finally:
            if reading is None or reading.done():
                self._preparing -= count
            else:  # nobody waits for it any more, but its thread goes on, unless it has not begun
                left.set()
                reading.add_done_callback(partial(self._abandoned, count))
        if self._stopped:
            raise stopped()
        channel = Channel()
        jobs = [
            Job(
                next(self._keys),
                index,
                ids,
                request,
                budget=budget,
                score=asked.logprobs if asked.echo else None,
                model=model,
                most_tokens=most_tokens,
                channel=channel,
                cost=Cost(asked_s),
                shown=Cost(asked_s),
            )
            for index, (ids, _, request) in enumerate(prepared)
        ]
        self._jobs |= {job.key: job for job in jobs}
        # What only the preparation needs may be large, and would stay until the answer ends.
        asked = replace(asked, prompts=(), tooling={}, template={}, budget=None)
        make = Shapes if asked.response is None else ResponseShapes
        shapes = make(asked, model, self.llm.codec, [text for _, text, _ in prepared], meter)
        on_close = partial(self._closed, model=model, client=client)
        found = Answer(asked, shapes, jobs, self._parts.worker, self.limits.request_s, lambda: self.retry_s, on_close)
        self._answers.add(found)
        return found

    def _abandoned(self, count: int, reading: asyncio.Future[Any]) -> None:
        self._preparing -= count
        if not reading.cancelled():
            reading.exception()  # asyncio would log one that nobody has seen

    def _compile(self, asked: Asked, *, only_look: bool = False) -> bool:
        return self.llm.compile_grammar(asked.params(0), **asked.tooling, only_look=only_look)

    def _prepare(
        self, asked: Asked, budget: Budget | None, asked_s: float
    ) -> list[tuple[list[int], str, Request | None]]:
        """Each reply: its prompt's tokens, the text that it echoes, and the reply itself, unless it makes no tokens.

        Runs in a thread. A compiled structure may have been forgotten meanwhile; it is then compiled here.
        """
        llm = self.llm
        if budget is not None:
            llm.resolved(budget)
        options = {
            "budget": budget,
            "max_new_tokens": asked.max_tokens,
            "stop": asked.stop,
            "logprobs": asked.logprobs,
            "ignore_eos": asked.ignore_eos,
            "chat": asked.chat,
            "asked_s": asked_s,
            **asked.tooling,
        }
        found: list[tuple[list[int], str, Request | None]] = []
        samplings = [asked.params(choice) for choice in range(asked.n)]
        for prompt in asked.prompts:
            special, ids = asked.parse_special, prompt
            if asked.chat:
                shown = {name: value for name, value in asked.tooling.items() if name != "parallel_tool_calls"}
                ids = llm.encode(prompt, control_tokens=special, **shown, **asked.template)
            elif isinstance(prompt, str):
                ids = llm.encode(
                    prompt, chat=False, control_tokens=special, add_special_tokens=asked.add_special_tokens
                )
            refuse_foreign(np.array(ids), llm.engine.manifest.model.vocab_size)
            if llm.pool is not None:  # read a file here, not in the thread that decodes
                llm.pool.recall(np.array(ids))
            text = ""
            if asked.echo:
                refuse_longer(llm.engine, "the prompt", len(ids))
                text = prompt if isinstance(prompt, str) else llm.decode(prompt)
            for sampling in samplings:
                request = None
                if asked.max_tokens != 0:
                    request = self._parts.worker.prepare(ids, sampling=sampling, **options)
                found.append((ids, text, request))
        return found

    def abort(self) -> None:
        """End all answers with an error, those to requests that are being read included."""
        self._stopped = True
        for answer in tuple(self._answers):
            answer.stop()

    def _closed(self, answer: Answer, model: str, client: str) -> None:
        self._answers.discard(answer)
        for job in answer.jobs:
            self._jobs.pop(job.key, None)
            self._parts.slots.ended(job)
        seconds = time.monotonic() - answer.asked_s
        self._mean_s += 0.2 * (seconds - self._mean_s)
        cost = Cost.of([job.cost for job in answer.jobs])
        operation = "chat" if answer.asked.chat else "text_completion"
        ran = [job for job in answer.jobs if job.cost.tokens or job in answer.scores]
        self.metrics.prompts(prompt_tokens(ran), cached_tokens(ran))
        self.metrics.reply(operation, model, cost, seconds, answer.reason)
        if answer.streaming and answer.reason and answer.status != 499:  # the client has seen status 200
            self.metrics.rejected(answer.reason)
        answer.log(client, model)

    async def rebudget(self, key: int, body: Any) -> Job:
        """Give a reply in progress another budget, from the next token on.

        Args:
            key: number of its slot.
            body: keys of a budget file; None for the server's own budget.

        Raises:
            RefusedError: there is no such reply.
            BalconyError: the budget is refused.
        """
        job, budget = self._jobs.get(key), None
        if body is not None:
            most_tokens = None if job is None else job.most_tokens
            if isinstance(body, dict) and body.get("deadline_s") is not None and most_tokens is not None:
                body = {"expected_tokens": most_tokens, **body}
            budget = Budget.model_validate(body)
            await asyncio.to_thread(self.llm.resolved, budget)
            job = self._jobs.get(key)
        if job is None or job.ended:
            raise RefusedError(
                404, f"slot {key}: has no reply in progress; /slots lists those that have", "no_such_slot"
            )
        self._parts.worker.rebudget(job, budget)
        return job

    async def act_on_slot(self, action: str, key: int, name: object) -> dict[str, Any]:
        """Save, restore or erase the rows of a slot; see :meth:`.slots.Slots.act`."""
        if key in self._jobs and action != "restore":
            raise RefusedError(409, f"slot {key}: its reply is in progress: wait until it has ended", "slot_busy")
        slots, threads = self._parts.slots, None if action == "erase" else self._disk  # which frees memory only
        return await asyncio.get_running_loop().run_in_executor(threads, slots.act, action, key, name)
