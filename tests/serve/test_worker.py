"""The decode thread: what others ask of it is done between two rounds, whatever the rounds bring."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest

from balcony_edge.budget import Budget
from balcony_edge.errors import BudgetError, DeviceError
from balcony_runtime.backends.onnxruntime.bindings import run_step
from balcony_runtime.decoding.sampling import Sampler, SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.scheduling import stream
from balcony_runtime.scheduling.admission import row_bytes
from balcony_runtime.serve.bodies.refusal import refusal_of
from balcony_runtime.serve.work.jobs import Ended, Item, Job, Scores
from balcony_runtime.serve.work.worker import Found, Worker


def job(worker: Worker, key: int, tokens: int, **options: Any) -> Job:
    return Job(key, 0, [key], worker.prepare([key], max_new_tokens=tokens, ignore_eos=True, **options))


class Sent:
    """The items of a worker; ``slow`` jobs are paused at their second token, because their readers are slow."""

    def __init__(self, llm: LLM, slow: tuple[int, ...] = ()) -> None:
        self.items: dict[int, list[Item]] = {}
        self._slow, self._found = slow, queue.SimpleQueue[tuple[int, Item]]()
        self.worker = Worker(llm, 16, 64, self._deliver)

    def _deliver(self, found: Found) -> None:
        for one, item in found:
            items = self.items.setdefault(one.key, [])
            items.append(item)
            if one.key in self._slow and len(items) == 2:
                self.worker.pause(one)
            self._found.put((one.key, item))

    def until(self, key: int, count: int) -> None:
        """Wait until a job has that many items."""
        while len(self.items.get(key, ())) < count:
            self._found.get(timeout=30)


def test_slow_readers_hold_nobody_up_while_a_request_waits_for_them(llm: LLM) -> None:
    """There is memory for one reply; its reader is slow, and a second one waits. Both end once the reader has read."""
    llm.budget = Budget(kv_memory_mb=45 * row_bytes(llm.engine.manifest) / 1e6)
    sent, begun = Sent(llm, slow=(1,)), threading.Event()
    worker = sent.worker
    begin = worker._together.begin

    def begins(*asked: Any) -> Any:
        stream = begin(*asked)
        if len(worker._together.open) == 2:
            begun.set()
        return stream

    worker._together.begin = begins
    worker.start()
    slow, waits = job(worker, 1, 40), job(worker, 2, 40)
    worker.submit(slow)
    sent.until(1, 3)  # the token that was on the way when it was paused
    worker.submit(waits)
    assert begun.wait(30)
    worker.resume(slow)
    sent.until(1, 40)
    sent.until(2, 1)
    worker.cancel(waits)
    worker.submit(job(worker, 3, 3))
    sent.until(3, 3)
    worker.stop()


def test_a_bug_ends_one_reply_and_is_logged(llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pick = Sampler.pick
    monkeypatch.setattr(Sampler, "pick", lambda self, logits: pick(self, logits) if self.greedy else 1 / 0)
    sent = Sent(llm)
    sent.worker.start()
    sent.worker.submit(job(sent.worker, 1, 10))
    sent.worker.submit(job(sent.worker, 2, 10, sampling=SamplingParams(temperature=1.0)))
    sent.until(1, 10)
    sent.until(2, 1)
    sent.worker.stop()
    assert [type(item) for item in sent.items[2]] == [ZeroDivisionError]
    assert [type(item) for item in sent.items[1]] == [Token] * 10
    assert [record.message for record in caplog.records] == ["the decode thread failed"]


def test_a_bug_at_the_end_of_a_reply_ends_no_later_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(llm)
    sent.worker.start()
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "close", Mock(side_effect=RuntimeError("a bug")))
        sent.worker.submit(job(sent.worker, 1, 1))
        sent.until(1, 1)
    sent.worker.submit(job(sent.worker, 2, 3))
    sent.until(2, 1)
    sent.worker.stop()
    assert isinstance(sent.items[1][-1], Exception) and isinstance(sent.items[2][0], Token)


def test_a_reply_that_finds_no_memory_is_no_bug(llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The log has a line instead of a traceback, and the client is not asked to report it."""
    pick = Sampler.pick
    monkeypatch.setattr(Sampler, "pick", lambda self, logits: pick(self, logits) if self.greedy else bytearray(2**60))
    sent = Sent(llm)
    sent.worker.start()
    sent.worker.submit(job(sent.worker, 1, 10, sampling=SamplingParams(temperature=1.0)))
    sent.until(1, 1)
    sent.worker.stop()
    (error,) = sent.items[1]
    assert isinstance(error, MemoryError)
    refusal = refusal_of(error)
    assert (refusal.status, refusal.reason) == (500, "device") and "out of memory" in refusal.message
    assert [(one.message, one.exc_info) for one in caplog.records] == [(f"a reply failed: {refusal.message}", None)]


@pytest.mark.parametrize("scores", [False, True])
def test_an_engine_that_fails_every_reply_is_stuck(llm: LLM, monkeypatch: pytest.MonkeyPatch, scores: bool) -> None:
    """A lost GPU fails each reply at once, so the thread turns. A prompt that finds no memory says nothing about others."""
    sent = Sent(llm)
    worker = sent.worker
    worker.start()
    full = "stage_0: WebGPU failed (VK_ERROR_OUT_OF_DEVICE_MEMORY): ask for a shorter context, free memory of the GPU"
    begins = "stage_0: TensorRT could not start it (Error Code 1: Cuda Runtime (out of memory)): look at `nvidia-smi`"
    with pytest.raises(DeviceError) as graph:  # of a CPU, as when the bundle's files were overwritten
        run_step([Mock(side_effect=RuntimeError("Gather: indices element out of data bounds"))], "stage_0.onnx")
    lost = "CUDA: unspecified launch failure"
    messages = (1, full, False), (6, begins, False), (8, str(graph.value), True), (3, lost, True)
    for first, message, stuck in messages:
        with monkeypatch.context() as patch:
            patch.setattr(worker._together, "begin", Mock(side_effect=DeviceError(message)))
            for key in (first, first + 1):
                worker.submit(job(worker, key, 3))
                sent.until(key, 1)
        assert isinstance(sent.items[first][0], DeviceError)
        assert (worker._failed_s > 0) == stuck and worker.stuck_s >= worker._failed_s
    worker.submit(Job(5, 0, [5, 6], None, score=0) if scores else job(worker, 5, 3))
    sent.until(5, 2)
    assert worker._failed_s == 0
    worker.stop()


def test_a_change_that_fails_ends_the_reply_that_it_was_for(llm: LLM) -> None:
    """A budget that was allowed when it was checked, and is not any more: the thread goes on."""
    sent = Sent(llm)
    sent.worker.start()
    first = job(sent.worker, 1, 4000, budget=Budget(max_pace_tps=100))
    sent.worker.submit(first)
    sent.until(1, 2)
    sent.worker.rebudget(first, Budget(exit_layer=4))
    while not isinstance(sent.items[1][-1], BudgetError):
        sent.until(1, len(sent.items[1]) + 1)
    sent.worker.submit(job(sent.worker, 2, 3))
    sent.until(2, 3)
    sent.worker.stop()
    assert "this bundle has exits 2, 3, 5" in str(sent.items[1][-1])


def test_the_heaviest_request_begins_first_and_nobody_is_overtaken_without_end(llm: LLM) -> None:
    """One reply at once. The light request asked first; four heavy ones begin before it, and the fifth after it."""
    begun: list[int] = []
    worker = Worker(llm, 1, 64, lambda found: begun.extend(one.key for one, _ in found if one.key not in begun))
    jobs = [job(worker, key, 2) for key in range(1, 8)]
    for one in jobs[1:6]:
        one.budget = Budget(weight=2)
    for one in jobs:
        worker.submit(one)
    worker.start()
    worker.submit(last := job(worker, 9, 2))
    while len(begun) < 8:
        threading.Event().wait(0.01)
    worker.stop()
    assert begun == [2, 3, 4, 5, 1, 6, 7, last.key]


def test_times_of_a_reply_count_from_its_request(llm: LLM) -> None:
    """Also those of its budget: it waits for another one, which takes more time than it may have."""
    items: list[tuple[int, Item]] = []
    ended = threading.Event()

    def deliver(found: Found) -> None:
        items.extend((one.key, item) for one, item in found)
        if any(one.key == 2 and isinstance(item, Token) and item.finish_reason for one, item in found):
            ended.set()

    worker = Worker(llm, 1, 64, deliver)
    worker.submit(job(worker, 1, 8, budget=Budget(max_pace_tps=20)))
    budget = Budget(ttft_ms=200, deadline_s=0.3, expected_tokens=2)
    asked_s = time.monotonic()
    worker.submit(waits := job(worker, 2, 2, budget=budget, asked_s=asked_s))
    worker.start()
    assert ended.wait(30)
    begun_ms = 1000 * (time.monotonic() - asked_s)
    worker.stop()
    first = next(item for key, item in items if key == 2)
    assert isinstance(first, Token) and 350 <= first.latency_ms <= begun_ms
    assert waits.stream is not None
    held = {verdict.key: verdict.held for verdict in waits.stream.reply.verdicts}
    assert held == {"ttft_ms": False, "deadline_s": False}


def test_a_prompt_that_is_only_scored_keeps_to_the_memory_of_the_budget(llm: LLM) -> None:
    """As a reply that makes tokens; the next one has room."""
    llm.budget = Budget(kv_memory_mb=45.5 * row_bytes(llm.engine.manifest) / 1e6)
    sent = Sent(llm)
    sent.worker.start()
    for key, rows in ((1, 60), (2, 45)):
        sent.worker.submit(Job(key, 0, list(range(rows)), None, score=0))
        sent.until(key, key)
    sent.worker.stop()
    (refused,) = sent.items[1]
    assert "kv_memory_mb: 60 tokens do not fit, which has room for 45" in str(refused)
    assert isinstance(sent.items[2][0], Scores) and isinstance(sent.items[2][1], Ended)


def test_a_budget_that_changes_while_its_reply_waits(llm: LLM) -> None:
    worker = Worker(llm, 1, 64, lambda found: None)
    worker.rebudget(waits := job(worker, 1, 2), Budget(exit_layer=2))
    worker.submit(waits)
    worker.start()
    while waits.stream is None or waits.stream.reply.finish_reason is None:
        time.sleep(0.01)
    worker.stop()
    assert waits.stream.reply.tokens_per_exit == {2: 2}


def test_a_job_that_waits_for_its_pace_ends_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gap is a minute, and it is alone in the decode thread, which sleeps through it."""
    monkeypatch.setattr(stream, "SLOW_TPS", 0.0)
    sent = Sent(llm)
    sent.worker.start()
    for key in (1, 2):
        begin_s, paced = time.monotonic(), job(sent.worker, key, 30, budget=Budget(max_pace_tps=1 / 60))
        sent.worker.submit(paced)
        sent.until(key, 1)
        if key == 1:
            sent.worker.cancel(paced)
            sent.worker.submit(job(sent.worker, 3, 2))
            sent.until(3, 2)
    sent.worker.stop()
    assert time.monotonic() - begin_s < 20 and len(sent.items[1]) == len(sent.items[2]) == 1
