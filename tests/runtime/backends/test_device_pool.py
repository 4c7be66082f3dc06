"""Sequences that share passes on an accelerator, over main memory and the stand-ins for CUDA, TensorRT and its provider."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import DeviceError, InputError
from balcony_runtime.backends.accelerator import pool as device_pool
from balcony_runtime.backends.accelerator.cuda import _Graph as cuda_graph
from balcony_runtime.backends.accelerator.pool import RUNS_BEFORE_CAPTURE
from balcony_runtime.backends.base import NotFiniteError
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import LEAST_SHARED, SequencePool
from balcony_runtime.scheduling.shared_step import PoolMove
from tests.runtime.backends.test_conformance import BACKENDS, NEEDS
from tests.support.engine_sets import memory_for
from tests.support.pools import MEMBERS, check_companies, check_step, new_pool
from tests.support.schedules import assert_equal, from_scratch

SHARED = ["device-fused", "stand-in-cuda", "stand-in-rtx", "cuda-fused", "tensorrt-rtx"]


@pytest.fixture(params=[pytest.param(name, marks=NEEDS.get(name, ())) for name in SHARED])
def engine(request: pytest.FixtureRequest, with_engine_sets: Callable[[str], Bundle]) -> Iterator[Engine]:
    with BACKENDS[request.param](with_engine_sets("llama")) as engine:
        yield engine
        gc.collect()


@pytest.fixture
def on_rtx(with_engine_sets: Callable[[str], Bundle]) -> Iterator[Engine]:
    """Engines on the stand-in for TensorRT-RTX; closing it checks that nothing is left and nothing was misused."""
    with BACKENDS["stand-in-rtx"](with_engine_sets("llama")) as engine:
        yield engine
        gc.collect()


def taken(pool: SequencePool, count: int) -> list[Any]:
    """Sequences of a pool that have rows at every exit, each of another length."""
    sequences = [pool.take() for _ in range(count)]
    for length, sequence in enumerate(sequences, 3):
        assert sequence is not None
        sequence.advance(5, list(range(length)))
        sequence.catch_up()
    return sequences


@pytest.mark.hypothesis  # its examples are drawn inside
@pytest.mark.parametrize(
    ("architecture", "backend"),
    [*[(a, "device-fused") for a in ("llama", "gemma3", "smollm3", "lfm2")], ("llama", "stand-in-rtx")],
)
def test_any_company_gives_each_sequence_its_own_logits(
    with_engine_sets: Callable[[str], Bundle], architecture: str, backend: str
) -> None:
    with BACKENDS[backend](with_engine_sets(architecture)) as engine:
        assert check_companies(engine, 8), "prompts began with rows of others"
        gc.collect()


def test_members_step_together_at_exits_of_their_own(engine: Engine, tiny_engine: Engine) -> None:
    pool = new_pool(engine)
    sequences = taken(pool, 5)
    alone = [tiny_engine.new_sequence() for _ in sequences]
    for one, sequence in zip(alone, sequences, strict=True):
        one.advance(5, sequence.tokens)
    for step, exits in enumerate([(5, 5, 3, 2, 2), (2, 5, 2, 3, 5), (3, 2, 3, 5, 5), (3, 3, 3, 3, 3)]):
        moves = [PoolMove(one, e, step + e) for one, e in zip(sequences, exits, strict=True)]
        for one, move, logits in zip(alone, moves, [row.copy() for row in pool.step(moves)], strict=True):
            assert_equal(logits, one.advance(move.exit_layer, [move.token])[:, -1])
    check_step(engine, pool, [PoolMove(sequences[4], 5, 3), PoolMove(sequences[1], 3, 3)])
    assert pool.busy_ns > 0
    for sequence in sequences:  # what shared steps have stored serves later stages and balconies
        got = sequence.advance(5, [9], num_logits=1)
        assert_equal(got, from_scratch(engine, 5, sequence.tokens, 1))


def test_a_shared_step_runs_captured_passes_and_copies_only_what_lies_askew(
    on_rtx: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for each graph; a row has 128 bytes here, so every second member's rows are copied to where 256 divides."""
    pool, device = new_pool(on_rtx), on_rtx.backend.device  # type: ignore[attr-defined]
    sequences, calls = taken(pool, 4), []
    for name in ("copy", "captured", "_one"):
        run = getattr(device, name)
        setattr(device, name, lambda *given, name=name, run=run: calls.append(name) or run(*given))
    launch = cuda_graph.__call__
    monkeypatch.setattr(cuda_graph, "__call__", lambda graph: calls.append("launch") or launch(graph))

    def step(*moves: PoolMove) -> list[str]:
        calls.clear()
        pool.step(moves)
        return calls

    def of(members: list[int], exit_layer: int) -> list[PoolMove]:
        for member in members:
            sequences[member].catch_up()
        return [PoolMove(sequences[member], exit_layer, 7) for member in members]

    graphs, found = 1 + 3 + 1 + 1, []
    for _ in range(RUNS_BEFORE_CAPTURE + 2):
        step(*of([0, 1, 2, 3], 5))
        found.append((calls.count("captured"), calls.count("launch")))
        # embedding → step; its row and those of three stages for each member; result → head
        assert calls.count("copy") == 1 + 4 + 1
    assert found == [*[(0, 0)] * (RUNS_BEFORE_CAPTURE - 1), (graphs, 0), (0, graphs), (0, graphs)]
    # From member 1 on: in and out for each stage and for the norm.
    assert step(*of([1, 2], 5)).count("copy") == 1 + 2 + 1 + 2 * 4
    assert step(*of([2, 3], 2)).count("copy") == 1 + 2 + 1


def test_members_between_two_others_keep_what_they_have(engine: Engine) -> None:
    """Members far apart share one pass, if dead rows are cheap."""
    pool = new_pool(engine)
    pool._pool.most_dead = MEMBERS
    sequences = taken(pool, MEMBERS)
    between = sequences[2:-1:2]
    for sequence in sequences[1:-1:2]:
        pool.give_back(sequence)  # too short to keep: its place is free
    for sequence in between:
        sequence.rollback(sequence.length - 2)
    before = [(s.tokens.tolist(), s.stage_rows) for s in between]
    passes: list[tuple[int, int, int]] = []
    shared: Any = pool._pool
    run = shared.run_stage
    shared.run_stage = lambda *given: passes.append(given) or run(*given)
    check_step(engine, pool, [PoolMove(sequences[0], 3, 4), PoolMove(sequences[-1], 5, 4)])
    assert passes == [(0, 0, MEMBERS), (1, 0, MEMBERS), (2, MEMBERS - 1, 1)]
    assert [(s.tokens.tolist(), s.stage_rows) for s in between] == before
    for sequence in between:
        assert_equal(sequence.advance(5, [5]), from_scratch(engine, 5, sequence.tokens, 1))


def test_a_full_member_is_carried_along(engine: Engine) -> None:
    pool = new_pool(engine, 3)
    one, full, other = taken(pool, 3)
    full.advance(2, [1] * (full.max_length - full.length))
    check_step(engine, pool, [PoolMove(one, 5, 3), PoolMove(other, 5, 4)])
    full.rollback(full.max_length - 1)
    assert_equal(full.advance(5, [2]), from_scratch(engine, 5, full.tokens, 1))


def test_nan_of_a_member_does_not_reach_the_next_one(engine: Engine) -> None:
    pool = new_pool(engine)
    one, broken = taken(pool, 2)
    state: Any = broken.state
    for cache in state._workspace.graphs.caches:
        for region in cache.regions():
            state._device.upload(region, np.full(region.shape, np.nan))
    broken.rollback(0)
    pool.give_back(broken)
    fresh = pool.take()
    assert fresh is not None and fresh.state._workspace is state._workspace  # type: ignore[attr-defined]
    check_step(engine, pool, [PoolMove(fresh, 5, 3), PoolMove(one, 5, 4)])


@pytest.mark.parametrize("how", ["stream", "together"])
def test_a_prompt_that_begins_like_a_failed_reply_does_not_begin_with_its_rows(
    with_engine_sets: Callable[[str], Bundle], how: str
) -> None:
    """Rows of a reply that ended with NaN are not kept, and its place is clean: attention reads NaN after its rows, too."""
    prompt = np.random.default_rng(2).integers(0, 320, LEAST_SHARED + 9).tolist()
    with balcony_edge.load(with_engine_sets("llama").path, device="cpu", engines="rtx-fp32") as llm:
        want = llm.generate(prompt, max_new_tokens=5).text
        together = llm.together()
        begin = llm.stream if how == "stream" else together.add
        stream = begin([*prompt, 7, 9], max_new_tokens=9)

        def tokens() -> list[Any]:
            return [next(stream)] if how == "stream" else [found for _, found in together.step()]

        while not tokens():
            pass
        assert llm.pool is not None
        (sequence,) = [one for one in llm.pool.members if one is not None and one.length >= len(prompt)]
        state: Any = sequence.state
        for cache in state._workspace.graphs.caches:
            for region in cache.regions():
                rows = state._device.download(region)
                rows[:, :, len(prompt) - 1 :] = np.nan
                state._device.upload(region, rows)
        with pytest.raises(InputError, match="NaN or infinity"):
            for found in tokens():
                raise found
        assert llm.generate(prompt, max_new_tokens=5).text == want


def test_members_results_do_not_meet(engine: Engine) -> None:
    """Two threads may work on two members: what one has asked for is not replaced before it is read."""
    pool = new_pool(engine)
    states, want = [sequence.state for sequence in taken(pool, 2)], []
    for state in states:
        state.run_exit(0, 2, 3, 1)
        want.append(state.logits(1))
    for state in states:
        state.run_exit(0, 2, 3, 1)
    for state, logits in zip(states, want, strict=True):
        assert_equal(state.logits(1), logits)


def test_a_member_is_given_back_when_the_device_is_gone(engine: Engine) -> None:
    """The collector may do it at any time and in any thread, so it asks nothing of the device."""
    pool = new_pool(engine)
    (sequence,) = taken(pool, 1)
    backend: Any = engine.backend
    held, done, waited = threading.Event(), threading.Event(), list[bool]()

    def hold() -> None:
        with backend.lock:
            held.set()
            waited.append(done.wait(30))

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    pool.give_back(sequence)
    done.set()
    thread.join()
    assert pool.in_use == 0 and waited == [True], "it waited for the device"
    late = pool.take()
    engine.close()
    assert late is not None
    pool.give_back(late)
    assert pool.in_use == 0


def test_without_memory_replies_run_by_themselves(
    with_engine_sets: Callable[[str], Bundle], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise DeviceError("out of memory: ask for less")

    with balcony_edge.load(with_engine_sets("llama").path, device="cpu", engines="rtx-fp32") as llm:
        monkeypatch.setattr(device_pool, "PoolMemory", none)
        assert llm.generate([1, 2, 3], max_new_tokens=3).tokens and llm.pool is None
    assert "no memory for replies that share passes (out of memory: ask for less): each runs by itself" in caplog.text


def test_a_capture_without_memory_is_done_without(on_rtx: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(on_rtx)
    sequences = taken(pool, 2)
    executor: Any = on_rtx.backend.executor  # type: ignore[attr-defined]
    make = executor._new_context

    def none(graph: str, profile: int, *, to_capture: bool = False) -> Any:
        if to_capture:
            raise DeviceError("out of memory")
        return make(graph, profile)

    monkeypatch.setattr(executor, "_new_context", none)
    for token in range(RUNS_BEFORE_CAPTURE + 2):
        pool.step([PoolMove(one, 5, token) for one in sequences])
    monkeypatch.undo()
    check_step(on_rtx, pool, [PoolMove(one, 5, 1) for one in sequences])


def test_memory_goes_back_with_the_last_user(with_engine_sets: Callable[[str], Bundle]) -> None:
    with BACKENDS["device-fused"](with_engine_sets("llama")) as engine:
        backend: Any = engine.backend
        device, alone = backend.device, engine.new_sequence()

        def held() -> int:
            return sum(array.nbytes for array in device._arrays.values())

        before = held()
        member = backend.new_pool(MEMBERS, 256).state(1)
        size = held() - before
        assert size > 4 * alone.state.memory_bytes, "the caches of eight"
        gc.collect()
        assert not backend.returned, "a member's state keeps the memory"
        del member
        gc.collect()
        assert len(backend.returned) == 1
        pair = backend.new_state(2, 64)  # no sequence can take a pool's memory: it is freed
        assert not backend.returned and held() < before + size
        del pair
        gc.collect()
        assert len(backend.returned) == 1
        again = backend.new_pool(MEMBERS, 256)
        assert not backend.returned, "memory that no member takes makes room"
        assert again.state(0).memory_bytes == 0
        again.state(0).embed(np.arange(9)[None], 8)
        again.state(0).embed(np.arange(7)[None], 3)
        assert again.state(0).memory_bytes == again._memory.workspace(0).memory_bytes * 10 // 256
        # Where the memory does not suffice, what was taken is given back.
        after = held()
        with memory_for(device, 12), pytest.raises(DeviceError, match="out of memory"):
            backend.new_pool(MEMBERS, 256)
        assert held() == after


def test_a_pool_has_as_many_members_as_the_engines(with_engine_sets: Callable[[str], Bundle]) -> None:
    bundle = with_engine_sets("llama")
    with BACKENDS["device-fused"](bundle) as engine:
        assert engine.backend.new_pool(16, 256).members == 8  # type: ignore[union-attr]
        assert engine.backend.new_pool(3, 256).members == 3  # type: ignore[union-attr]
    with BACKENDS["stand-in-plain"](bundle) as engine:  # its passes write caches to other memory
        assert engine.backend.new_pool(2, 256) is None
    with BACKENDS["device-plain"](bundle) as engine:  # ONNX Runtime writes them in place
        assert engine.backend.new_pool(2, 256) is not None


def test_replies_share_passes_and_beginnings(with_engine_sets: Callable[[str], Bundle], tiny_llm: LLM) -> None:
    bundle = with_engine_sets("llama")
    random = np.random.default_rng(4)
    common = random.integers(0, 320, LEAST_SHARED + 5).tolist()
    prompts = [[*common, *random.integers(0, 320, 3 + n).tolist()] for n in range(5)]
    asked: dict[str, Any] = {"max_new_tokens": 9, "budget": [Budget(exit_layer=e) for e in (5, 2, 3, 5, 2)]}
    with balcony_edge.load(bundle.path, device="cpu", engines="rtx-fp32") as llm:
        shared, pool = llm.generate_batch(prompts, **asked), llm.pool
        assert pool is not None and pool.busy_ns > 0 and pool.in_use == 0
        assert pool.reused.rows >= 4 * len(common), "a common beginning is computed once"
        assert llm.generate_batch(prompts, **asked) == shared
    assert shared == tiny_llm.generate_batch(prompts, **asked)


def test_a_conversation_begins_anew_after_nan(with_engine_sets: Callable[[str], Bundle]) -> None:
    """These graphs read rows after the end under a mask, so the sequence needs clean memory."""
    prompt = list(range(20, 60))
    with balcony_edge.load(with_engine_sets("llama").path, device="cpu", engines="rtx-fp32") as llm:
        clean = [token.id for token in llm.stream(prompt, max_new_tokens=3, ignore_eos=True)]
        sequence: Any = llm.engine.new_sequence()
        for cache in sequence.state._workspace.graphs.caches:
            for region in cache.regions():
                sequence.state._device.upload(region, np.full(region.shape, np.nan))
        with pytest.raises(NotFiniteError):
            llm.generate(prompt, max_new_tokens=3, ignore_eos=True, sequence=sequence)
        again = llm.stream(prompt, max_new_tokens=3, ignore_eos=True, sequence=sequence)
        assert [token.id for token in again] == clean
