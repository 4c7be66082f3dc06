"""Engines that are closed twice, or while another thread runs a pass, or that a fork of the process would use."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InfeasibleError, InputError
from balcony_runtime.backends.onnxruntime import state as onnxruntime_state
from balcony_runtime.decoding.prices import measure_prices
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from tests.runtime.backends.cuda_stand_in import onnxruntime, runtime
from tests.support.command import printed


def test_an_engine_on_a_device_may_be_closed_twice(with_engine_sets: Callable[[str], Bundle]) -> None:
    """The second time its stream is gone, and nothing may be asked of it."""
    with runtime.installed() as gpu, onnxruntime.installed(gpu):
        engine = Engine.of(with_engine_sets("llama"), device="cuda", engines="rtx-fp32")
        engine.close()
        engine.close()


def test_an_engine_on_a_device_may_be_closed_in_the_handler_of_a_signal(
    with_engine_sets: Callable[[str], Bundle],
) -> None:
    """Python runs it in the middle of a pass of its own thread, which still uses the memory, the stream and the engines."""
    with runtime.installed() as gpu, onnxruntime.installed(gpu):
        engine = Engine.of(with_engine_sets("llama"), device="cuda", engines="rtx-fp32")
        backend: Any = engine.backend
        with backend.alone():
            region = backend.allocate((4,), "float32")
            engine.close()
            backend.device.upload(region, np.ones(4, np.float32))
            assert backend.device.download(region).tolist() == [1.0] * 4
        assert gpu.left() == ""
        with pytest.raises(InputError, match="this bundle was closed: load it again"):
            engine.new_sequence()


def test_an_engine_that_is_closed_during_a_pass_is_one_line(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(tiny.path)
    sequence, bound_run, closes = engine.new_sequence(), onnxruntime_state.bound_run, threading.Event()

    def closing(session: Any, binding: Any) -> Any:
        if not closes.is_set():
            closes.set()
            threading.Thread(target=engine.close).start()  # it ends after the pass
            while engine.backend.sessions:
                time.sleep(0.001)
        return bound_run(session, binding)

    monkeypatch.setattr(onnxruntime_state, "bound_run", closing)
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        sequence.advance(5, [1, 2, 3])


def test_a_bundle_that_nobody_holds_is_freed_at_once(tiny: Any) -> None:
    """As by the second run of a notebook's cell. Python looks for cycles after many objects, and one may be a gigabyte."""
    llm = balcony_edge.load(tiny.path, budget=Budget(tpot_ms=1000.0))
    llm.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True)
    llm.generate_batch([[1, 2, 3], [4]], max_new_tokens=3)
    held = [weakref.ref(one) for one in (llm, llm.engine.backend, *llm.engine.backend.sessions.values())]
    gc.disable()
    try:
        del llm
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


def _batch(llm: LLM) -> None:
    llm.generate_batch([[1, 2, 3], [4]], max_new_tokens=3)


def _together(llm: LLM) -> None:
    with llm.together() as replies:
        replies.add([1, 2, 3], max_new_tokens=3)
        replies.step()


def _asynchronously(llm: LLM) -> None:
    async def read() -> None:
        with suppress(InfeasibleError):  # asyncio.run() would hold it
            async for _ in llm.stream([1, 2, 3], max_new_tokens=3):
                pass

    asyncio.run(read())


@pytest.mark.parametrize("reply", [_batch, _together, _asynchronously])
def test_a_bundle_whose_reply_has_failed_is_freed_at_once(tiny: Any, reply: Callable[[LLM], None]) -> None:
    """The traceback of an error has the frames of this package, which must not hold the error."""
    llm = balcony_edge.load(tiny.path, budget=Budget(tpot_ms=1e-4, on_infeasible="error"))
    gc.disable()
    try:
        with suppress(InfeasibleError):
            reply(llm)
        held = weakref.ref(llm.engine.backend)
        del llm
        end_s = time.monotonic() + 20
        while held() is not None and time.monotonic() < end_s:
            time.sleep(0.005)  # the thread of the steps may not yet have dropped its last one
        assert held() is None
    finally:
        gc.enable()


def test_closing_waits_for_a_pass_of_another_thread(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon thread of a server that came back from ONNX Runtime later, as Python ends, would abort the process."""
    engine, inside, go = Engine.open(tiny.path), threading.Event(), threading.Event()
    sequence, run_step = engine.new_sequence(), onnxruntime_state.run_step

    def slow(*arguments: Any) -> int:
        inside.set()
        assert go.wait(20)
        return run_step(*arguments)

    monkeypatch.setattr(onnxruntime_state, "run_step", slow)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(sequence.advance, 5, [1, 2, 3])
        assert inside.wait(20)
        closing = threads.submit(engine.close)
        ended = wait([closing], 0.5).done
        go.set()
        closing.result(20)
        with pytest.raises(InputError, match="this bundle was closed: load it again"):
            running.result(20)
    assert not ended


def test_closing_waits_for_all_passes_that_do_not_end_only_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared pass has the locks of up to 16 sequences: half a minute for each would be eight minutes."""
    monkeypatch.setattr("balcony_runtime.engine.LONGEST_PASS_S", 0.5)
    engine, inside, go = Engine.open(tiny.path), threading.Event(), threading.Event()
    sequences = [engine.new_sequence(max_length=8) for _ in range(4)]

    def hang() -> None:
        with ExitStack() as held:
            for sequence in sequences:
                held.enter_context(sequence.lock)
            inside.set()
            assert go.wait(20)

    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(hang)
        assert inside.wait(20)
        begin_s = time.monotonic()
        engine.close()
        took_s = time.monotonic() - begin_s
        go.set()
        hanging.result(20)
    assert 0.5 <= took_s < 1.0


def test_an_engine_that_is_closed_while_its_prices_are_measured_is_one_line(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a program ends during the first reply that has a target."""
    engine = Engine.open(tiny.path, device="cpu")
    monkeypatch.setattr(onnxruntime_state.OnnxRuntimeState, "embed", lambda *_: engine.close())
    with pytest.raises(InputError, match="this bundle was closed: load it again"):
        measure_prices(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_an_engine_in_a_forked_process_is_one_line(tiny: Any) -> None:
    """The threads of ONNX Runtime, grammars and sensors stay in the other process: a structured reply would hang."""
    program = f"""
import os, balcony_edge
with balcony_edge.load({str(tiny.path)!r}) as llm:
    before = llm.generate([1, 2, 3], max_new_tokens=2)
    child = os.fork()
    if not child:
        try:
            llm.generate([1, 2, 3], max_new_tokens=2)
        except balcony_edge.InputError as error:
            print(error, flush=True)
        llm.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert llm.generate([1, 2, 3], max_new_tokens=2).text == before.text
"""
    command = [sys.executable, "-W", "ignore", "-c", program]  # later Pythons warn of a fork with threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (
        done.stdout
        == "this bundle was loaded before this process was forked: load bundles after a fork only, or spawn\n"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_other_threads_stream_does_not_hang(tiny: Any) -> None:
    """Those threads hold locks of the pool and the scheduler, and lead rounds; in the new process they never end."""
    program = f"""
import os, signal, threading, balcony_edge
held, forked = threading.Event(), threading.Event()
def hold(lock):
    with lock:
        held.set()
        forked.wait()
with balcony_edge.load({str(tiny.path)!r}) as llm:
    begun, fresh = (llm.stream([1, 2, 3], max_new_tokens=4, ignore_eos=True) for _ in range(2))
    next(begun)
    replies = llm.together()
    replies.add([1, 2, 3], max_new_tokens=4)
    llm._requests.scheduler._leader = -1  # another thread
    other = threading.Thread(target=hold, args=[llm._requests.scheduler._lock])
    other.start()
    held.wait()
    with llm.pool._lock:
        child = os.fork()
        if not child:
            signal.alarm(20)
            for act in (begun.__next__, fresh.__next__, replies.step, lambda: replies.add([1, 2, 3])):
                try:
                    act()
                except balcony_edge.InputError as error:
                    print(error, flush=True)
            for one in (begun, fresh, replies, llm):
                one.close()
            os._exit(0)
    forked.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0, "it waits for threads that it does not have"
    llm._requests.scheduler._leader = None
    replies.close()
    assert len([*begun, *fresh]) == 3 + 4
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("this bundle was loaded before this process was forked") == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_bundle_that_is_loaded_in_a_fork_has_the_one_thread_that_is_there(tiny: Any) -> None:
    """ONNX Runtime's pool belongs to the process that made it, and cannot be made again."""
    program = f"""
import os, balcony_edge
balcony_edge.load({str(tiny.path)!r}, threads=2, device="cpu").close()
child = os.fork()
if not child:
    with balcony_edge.load({str(tiny.path)!r}, threads=2, device="cpu") as llm:
        print(llm.engine.backend.threads, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"
    assert "runs on one thread instead of 2: the process from which this one was forked had loaded" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("closed", [False, True])
def test_a_forked_process_ends_though_it_has_inherited_threads_that_sleep(tiny: Any, closed: bool) -> None:
    """Each session waits for its threads as it is freed, and they are in the other process."""
    program = f"""
import os, sys, balcony_edge
llm = balcony_edge.load({str(tiny.path)!r}, threads=2, spin=False, device="cpu")
if {closed}:
    llm.close()
child = os.fork()
if child:
    sys.exit(os.waitpid(child, 0)[1])
llm.close()
del llm
with balcony_edge.load({str(tiny.path)!r}, threads=2, spin=False, device="cpu") as llm:
    print(llm.engine.backend.threads, len(llm.generate([1, 2], max_new_tokens=2, ignore_eos=True).tokens))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("2 2\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    """A bundle that it loads would wait for ever for a mask from the threads of the other process."""
    program = """
import os, time
from balcony_runtime.structure.grammar import _helpers
assert _helpers().submit(int).result(10) == 0
time.sleep(0.5)  # until the thread is idle
child = os.fork()
if not child:
    os._exit(_helpers().submit(int, "7").result(10))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=True)


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 3), reason="Python 3.12.3 mends it (python/cpython#113964)")
def test_threads_of_the_application_go_on_after_the_main_one(tiny: Any, tmp_path: Path) -> None:
    """Python waits for them, but its pools of threads begin nothing any more: for graphs, for masks, for a file's hashes."""
    program = """
import sys, threading, balcony_edge

def work(bundle, prefixes):
    threading.main_thread().join()
    sampling = balcony_edge.SamplingParams(regex="[ab]{3}")
    for _ in range(2):
        with balcony_edge.load(bundle, prefix_directory=prefixes) as llm:
            reply = llm.generate(list(range(10, 70)), sampling=sampling, max_new_tokens=3)
    print(reply.cached_tokens)

threading.Thread(target=work, args=sys.argv[1:]).start()
"""
    assert printed(program, tiny.path, tmp_path) == "59\n"


@pytest.mark.parametrize("ends", ["interrupt", "fail"])
def test_a_load_that_ends_early_opens_no_other_graphs(ends: str) -> None:
    """Ctrl-C, or a graph that is damaged or has no room: a large bundle takes a minute, and Python would wait for the rest."""
    program = """
import signal, sys, threading, time
from balcony_runtime.backends.base import at_once

begun = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell has none

def fail():
    raise ValueError

def interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

def opened(number):
    begun.append(number)
    time.sleep(0.05)
    if number == 3:
        globals()[sys.argv[1]]()

try:
    at_once(opened, range(40), 2)
except (KeyboardInterrupt, ValueError):
    print(len(begun) < 40, threading.active_count())
"""
    assert printed(program, ends) == "True 1\n"
