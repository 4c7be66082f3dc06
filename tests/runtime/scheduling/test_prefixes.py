"""Prefixes that are kept: who begins with whose rows, what goes first, and which files a later process uses."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BalconyError, BusyError, InputError
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling import sequences
from balcony_runtime.scheduling.admission import row_bytes
from balcony_runtime.scheduling.pool import LEAST_SHARED, SequencePool
from balcony_runtime.scheduling.shared_step import PoolMove
from balcony_runtime.sessions import file
from balcony_runtime.sessions.prefixes import PrefixFiles
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.token_sequence import TokenSequence
from tests.support.schedules import assert_equal, from_scratch


def test_prefixes_are_saved_and_loaded(llm: LLM, tiny: Any, tmp_path: Path) -> None:
    path, common = tmp_path / "system.session", list(range(10, 90))
    assert llm.save_prefix(common, path) == 80
    with balcony_edge.load(tiny.path) as other:
        want = other.generate([*common, 3, 4], max_new_tokens=6, ignore_eos=True)
        assert want.cached_tokens == 0
    with balcony_edge.load(tiny.path) as other:
        assert other.load_prefix(path) == 80 and other.pool is not None and other.pool.in_use == 0
        reply = other.generate([*common, 3, 4], max_new_tokens=6, ignore_eos=True)
        assert reply.cached_tokens == 80 and other.pool.reused.prompts == 1 and other.pool.reused.rows == 80
        assert [token.id for token in reply.tokens] == [token.id for token in want.tokens]
        with pytest.raises(InputError, match="cannot be read"):
            other.load_prefix(tmp_path / "none")
        assert other.pool.in_use == 0
    bundle = Bundle.open(tiny.path)
    with LLM(Engine.of(bundle.portable()), TextCodec(bundle), Budget()) as other:
        with pytest.raises(InputError, match="shares no rows"):
            other.load_prefix(path)
        assert other.save_prefix(common, tmp_path / "other.session") == 80


def test_the_time_to_the_first_token_has_that_of_reading_a_prefix(tiny: Any, tmp_path: Path) -> None:
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path, budget=Budget(ttft_ms=10_000)) as llm:
        recall = SequencePool.recall

        def slowly(*args: Any) -> Any:
            time.sleep(0.3)
            return recall(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SequencePool, "recall", slowly)
            alone = llm.generate([1, 2, 3], max_new_tokens=2)
            with llm.together() as replies:
                stream = replies.add([4, 5, 6], max_new_tokens=2)
                while replies.open:
                    replies.step()
    for reply in (alone, stream.reply):
        assert reply.tokens[0].latency_ms >= 300
        assert [verdict.reached >= 300 for verdict in reply.verdicts] == [True]


def test_names_of_control_tokens_in_a_saved_prefix_are_text(llm: LLM, tmp_path: Path) -> None:
    """As in the prompts that begin with it; otherwise they would never match."""
    messages = [{"role": "user", "content": "a<end>b" * 12}]
    saved = llm.save_prefix(messages, tmp_path / "user.session")
    assert saved == len(llm.encode(messages)) and 0 not in llm.encode(messages)
    assert llm.generate(messages, max_new_tokens=1).cached_tokens == saved - 1  # the last row gives the first logits


def test_a_member_is_given_away_only_if_little_is_lost(tiny_engine: Engine) -> None:
    pool = SequencePool.of(tiny_engine, 3)
    assert pool is not None
    common, rest = list(range(100, 100 + LEAST_SHARED)), list(range(200, 200 + LEAST_SHARED))
    first = pool.take()
    assert first is not None
    first.advance(5, [*common, *rest])
    pool.give_back(first)
    second = pool.take([*common, 1])
    assert second is not None and second is not first and second.tokens[0].tolist() == common
    third = pool.take([*common, *rest, 1])
    assert third is first, "the rows of the first are still there"
    assert third.length == 2 * LEAST_SHARED and pool.reused.prompts == 2
    assert_equal(second.advance(5, [1]), from_scratch(tiny_engine, 5, second.tokens, 1))
    # without another place, the donor gives its own
    pool.give_back(third)
    other = pool.take()
    last = pool.take([*common, 2])
    assert other is not None and last is first and last.length == LEAST_SHARED
    with pytest.raises(BusyError, match="all 3 places are in use"):
        pool.load(Path("any"))


def test_the_next_process_begins_with_what_was_kept(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    prompts = [list(range(start, start + 60)) for start in (10, 100, 200)]
    with balcony_edge.load(tiny.path, prefix_directory=folder) as llm:
        for prompt in prompts:
            llm.generate(prompt, max_new_tokens=4, ignore_eos=True)
        llm.save_prefix(list(range(270, 310)), folder / "named.session")
    assert len(list(folder.glob("prefix-*.session"))) == 3
    with balcony_edge.load(tiny.path, prefix_directory=folder) as llm:
        reply = llm.generate([*prompts[1], 5], max_new_tokens=4, ignore_eos=True)
        assert reply.cached_tokens == 60 and llm.pool is not None and llm.pool.reused.files == 1
        assert llm.generate([*prompts[1], 5], max_new_tokens=1).cached_tokens == 60 and llm.pool.reused.files == 1
        cold = llm.generate([*prompts[1][:20], *prompts[2]], max_new_tokens=1)
        assert cold.cached_tokens == 0, "too short a prefix is not read"
    # the bound holds for the files that nobody named; the one that was used longest ago goes first
    sizes = {path: path.stat().st_size for path in folder.glob("prefix-*.session")}
    engine = Engine.open(tiny.path)
    with engine:
        files = PrefixFiles(folder, engine, sum(sizes.values()))
        assert files.bytes == sum(sizes.values())
        for age, path in enumerate(sorted(sizes)):
            os.utime(path, (time.time() - 100 * (10 - age),) * 2)
        oldest = min(sizes)
        tokens = file.look(oldest, engine).tokens[0]
        files.load(oldest, again := engine.new_sequence())  # now it is the youngest
        sequence = engine.new_sequence()
        sequence.advance(5, np.arange(50))
        files.keep(sequence)
        left = set(folder.glob("*.session"))
        assert oldest in left and folder / "named.session" in left and files.longest(tokens, 1e9)[1] == len(tokens)
        assert len(left & sizes.keys()) < len(sizes) and files.bytes < sum(sizes.values())
        files.keep(sequence)
        assert set(folder.glob("*.session")) == left, "what is there is not written again"
        os.utime(oldest, (1e9, 1e9))
        files.keep(again)
        assert oldest.stat().st_mtime > 1.1e9, "its rows were used until now"


def taken(pool: SequencePool, tokens: list[int]) -> TokenSequence:
    """A sequence that has taken in the tokens."""
    sequence = pool.take(tokens)
    assert sequence is not None
    sequence.advance(5, tokens[sequence.length :])
    return sequence


def test_saves_are_right_while_others_take_the_places(tiny_engine: Engine, tmp_path: Path) -> None:
    """Three threads run prompts that begin alike in six places, while a fourth saves what has ended."""
    pool = SequencePool.of(tiny_engine, 6)
    assert pool is not None
    common, ended, over = list(range(100, 140)), deque[list[int]](maxlen=8), threading.Event()

    def others(seed: int) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            tokens = [*common[: draw.choice([20, 40])], *draw.choices(range(320), k=60)]
            if (sequence := pool.take(tokens)) is not None:
                sequence.advance(draw.choice([2, 5]), tokens[sequence.length :])
                pool.give_back(sequence)
                ended.append(tokens)

    threads = [threading.Thread(target=others, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    saved_files, path, until_s = 0, tmp_path / "talk.session", time.monotonic() + 300
    try:
        while saved_files < 25:
            assert time.monotonic() < until_s, saved_files
            tokens = list(ended[-1]) if ended else common
            try:
                rows, _ = pool.save(tokens, path)
            except InputError:
                continue  # another prompt has its place already
            saved_files += 1
            back = tiny_engine.new_sequence()
            file.load(path, back)
            assert back.tokens[0].tolist() == tokens[:rows]
            assert_equal(back.advance(5, [7]), from_scratch(tiny_engine, 5, back.tokens, 1))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert pool.in_use == 0


def test_a_save_holds_nobody_up(tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SequencePool.of(tiny_engine, 3)
    assert pool is not None
    tokens = list(range(100, 150))
    pool.give_back(taken(pool, tokens))
    other = taken(pool, list(range(200, 250)))
    writing, go_on = threading.Event(), threading.Event()
    hashed = file._hash

    def slow(array: Any) -> str:
        writing.set()
        assert go_on.wait(20)
        return hashed(array)

    monkeypatch.setattr(file, "_hash", slow)
    with ThreadPoolExecutor(1) as thread:
        save = thread.submit(pool.save, tokens, tmp_path / "slow.session")
        assert writing.wait(20)
        pool.step([PoolMove(other, 5, 1)])
        fresh = pool.take([*tokens, 1])
        assert fresh is not None and fresh.length == 0, "its rows are being written, so they are not copied"
        pool.give_back(fresh)
        go_on.set()
        assert save.result()[0] == 50
    pool.give_back(other)
    assert pool.in_use == 0


def test_a_turn_is_erased_and_its_conversation_is_not(tiny_engine: Engine) -> None:
    pool = SequencePool.of(tiny_engine, 3)
    assert pool is not None
    turn = list(range(100, 150))
    pool.give_back(taken(pool, [*turn, *range(200, 250)]))
    assert pool.forget([*turn, 9]) == 0
    pool.give_back(taken(pool, turn))
    assert pool.forget([*turn, 9]) == 50 and pool.forget([*turn, *range(200, 250), 1]) == 100
    assert pool.members == (None,) * 3


def test_an_interrupt_leaves_no_place_in_use(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(10, 70))
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        llm.generate(prompt, max_new_tokens=2, ignore_eos=True)
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        pool = llm.pool
        assert pool is not None

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(TokenSequence, "fill", interrupted)
            for _ in range(20):  # the pool has 16 places
                with pytest.raises(KeyboardInterrupt):
                    pool.take([*prompt, 1])
            with pytest.raises(KeyboardInterrupt):
                pool.load(next(tmp_path.iterdir()))
        pool.give_back(taken(pool, [*prompt, *prompt]))
        for method, asked in (("fill", prompt[:40]), ("rollback", prompt * 2)):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(TokenSequence, method, interrupted)
                pool.take([*asked, 1])
        assert pool.in_use == 0 and sum(member is not None for member in pool.members) == 1


def test_a_file_that_may_not_be_kept_is_not_read(tiny: Any, tmp_path: Path) -> None:
    prompt = list(range(10, 190))
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        assert llm.save_prefix(prompt, tmp_path / "large.session") == 180
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        llm.generate(list(range(200, 240)), max_new_tokens=1)
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path, prefix_mb=0.3) as llm:
        assert llm.generate([*range(200, 240), 5], max_new_tokens=1).cached_tokens == 40
        assert llm.generate([*prompt, 5], max_new_tokens=1).cached_tokens == 0
        assert llm.generate([*range(200, 240), 5], max_new_tokens=1).cached_tokens == 40
        assert llm.pool is not None and llm.pool.reused.files == 1
        with pytest.raises(InputError, match=r"180 tokens are not kept: prefix_mb = 0\.3 must have room"):
            llm.load_prefix(tmp_path / "large.session")
    with balcony_edge.load(tiny.path, prefix_mb=0, prefix_directory=tmp_path) as llm:
        assert llm.generate([*prompt, 5], max_new_tokens=1).cached_tokens == 0 and llm.pool is not None
        assert llm.pool.reused.files == 0


def test_bundles_share_a_directory(export_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    prompt = list(range(10, 70))
    for turn in range(2):
        for architecture in ("llama", "qwen3"):
            with balcony_edge.load(export_tiny(architecture).path, prefix_directory=tmp_path) as llm:
                assert llm.generate([*prompt, 1], max_new_tokens=1).cached_tokens == (60 if turn else 0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and len({name.split("-")[1] for name in names}) == 2


def test_what_a_killed_process_left_is_removed(tiny: Any, tmp_path: Path) -> None:
    for name in ("prefix-0123-4567.session", "talk.session", "instructions"):  # the others were saved by their names
        (left := tmp_path / f".{name}.partial-89ab").mkdir()
        (left / "part").write_bytes(b"x" * 1000)
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_wrote_anew_is_known_as_it_is(tiny: Any, tmp_path: Path) -> None:
    first, second = list(range(10, 70)), list(range(100, 160))
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        llm.save_prefix(first, tmp_path / "one.session")
    with (
        balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm,
        balcony_edge.load(tiny.path, prefix_directory=tmp_path / "other") as other,
    ):
        other.save_prefix(second, tmp_path / "one.session")
        assert llm.generate([*first, 1], max_new_tokens=1).cached_tokens == 0
        assert llm.generate([*second, 1], max_new_tokens=1).cached_tokens == 60
        assert llm.pool is not None and llm.pool.reused.files == 1
        llm.generate([*first, 2], max_new_tokens=1)
        assert llm.pool.reused.files == 1, "it is not read for the old tokens again"
        third = list(range(200, 260))
        llm.save_prefix(third, tmp_path / "now.session")
        assert llm.prefix_files is not None and llm.prefix_files.longest(np.array(third), 1e9)[1] == 60


def test_files_that_others_have_removed_are_forgotten(tiny: Any, tmp_path: Path) -> None:
    """Clients save slots under ever new names, and the server's owner removes them."""
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        for number in range(3):
            llm.save_prefix([number, *range(10, 70)], path := tmp_path / f"talk-{number}.session")
            path.unlink()
        llm.save_prefix(list(range(100, 160)), tmp_path / "last.session")
        assert llm.prefix_files is not None and list(llm.prefix_files._known) == [tmp_path / "last.session"]


def test_files_that_cannot_be_used_are_left_alone(
    export_tiny: Callable[[str], Any], tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = list(range(10, 70))
    with balcony_edge.load(export_tiny("qwen3").path, prefix_directory=tmp_path) as llm:
        llm.generate(prompt, max_new_tokens=2, ignore_eos=True)
    (foreign,) = tmp_path.iterdir()
    (tmp_path / "prefix-x.session").write_bytes(b"junk")
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        llm.save_prefix(prompt, tmp_path / "own.session")
    with balcony_edge.load(tiny.path, prefix_directory=tmp_path) as llm:
        (tmp_path / "own.session").write_bytes(
            (tmp_path / "own.session").read_bytes()[:-4]
        )  # damaged after it was seen
        assert llm.generate([*prompt, 1], max_new_tokens=2).cached_tokens == 0
        assert "own.session: is damaged" in caplog.text and llm.pool is not None and llm.pool.reused.files == 0
        assert llm.generate([*prompt, 1], max_new_tokens=2).cached_tokens == 60
    assert foreign.exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"prefix_directory .*/file: cannot be written .* is not a directory"):
        balcony_edge.load(tiny.path, prefix_directory=tmp_path / "file")
    with pytest.raises(BalconyError, match="prefix_mb = -1"):
        balcony_edge.load(tiny.path, prefix_mb=-1)


def test_the_memory_of_what_is_kept_is_bounded(tiny: Any) -> None:
    with balcony_edge.load(tiny.path, prefix_mb=0.4) as llm:
        for start in range(0, 200, 20):
            llm.generate(list(range(start, start + 60)), max_new_tokens=2, ignore_eos=True)
            assert llm.pool is not None and llm.pool.bytes <= 400_000
        assert llm.pool.bytes > 0
        assert llm.generate([*range(180, 240), 1], max_new_tokens=1).cached_tokens == 60
    with balcony_edge.load(tiny.path, prefix_mb=0) as llm:
        for _ in range(2):
            assert llm.generate(list(range(60)), max_new_tokens=1).cached_tokens == 0


def test_prompts_that_begin_alike_at_once_compute_their_beginning_once(llm: LLM, tiny: Any) -> None:
    """The first one runs, and the others take what it leaves; a prompt that nobody shares is not touched."""
    common, options = list(range(10, 90)), {"max_new_tokens": 4, "ignore_eos": True}
    prompts = [[*common, last, 5] for last in range(3)] + [[*common[::-1], 7]]
    with balcony_edge.load(tiny.path) as other:
        alone = [[token.id for token in other.generate(prompt, **options).tokens] for prompt in prompts]
    with llm.together() as replies:
        streams = [replies.add(prompt, **options) for prompt in prompts]
        assert llm.pool is not None and llm.pool.reused.rows == 0
        while replies.open:
            replies.step()
    assert [[token.id for token in one.reply.tokens] for one in streams] == alone
    assert [one.reply.cached_tokens for one in streams] == [0, 80, 80, 0]
    assert (llm.pool.reused.prompts, llm.pool.reused.rows, llm.pool.in_use) == (2, 160, 0)


def test_who_joins_a_full_pool_gets_a_place_when_it_begins(
    llm: LLM, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows that others have left there; a conversation keeps the memory that it has."""
    monkeypatch.setattr(sequences, "MEMBERS", 2)
    prompt, options = list(range(10, 90)), {"max_new_tokens": 3, "ignore_eos": True}
    conversation = llm.engine.new_sequence()
    # Room for the rows of the first two replies, or for one of the two that wait.
    llm.budget = Budget(kv_memory_mb=90 * row_bytes(llm.engine.manifest) / 1e6)
    with llm.together() as replies:
        for one in range(2):
            replies.add([one, 2, 3], **options)
        late = [replies.add([*prompt, one], **options) for one in range(2)]
        turns, pool = llm._requests.scheduler, llm.pool
        own = [stream.sequence for stream in turns._streams.values()][2:]
        assert pool is not None and not any(map(pool.holds, own))
        with ThreadPoolExecutor(1) as threads:
            talking = threads.submit(lambda: list(llm.stream([*prompt, 0], sequence=conversation, **options)))
            while len(turns._streams) < 5:
                time.sleep(0.001)
            while replies.open:
                replies.step()
                if late[1] in replies.open and len(late[1].reply.tokens):
                    assert pool.holds(own[1])
            talk = [token.id for token in talking.result(30)]
    assert [one.reply.cached_tokens for one in late] == [0, 80] and pool.in_use == 0
    assert not pool.holds(conversation) and [token.id for token in late[0].reply.tokens] == talk
    with balcony_edge.load(tiny.path) as other:
        want = other.generate([*prompt, 1], **options)
    assert [token.id for token in late[1].reply.tokens] == [token.id for token in want.tokens]


def test_rows_that_never_ran_are_nobodys_prefix(tiny_engine: Engine) -> None:
    """A prompt that was given up before its turn has tokens and no rows: the rows of another one count."""
    pool, prompt = SequencePool.of(tiny_engine, 4), list(range(10, 90))
    assert pool is not None
    waiting = pool.take(prompt)
    ran = pool.take(prompt)
    assert waiting is not None and ran is not None
    waiting.append(prompt)
    ran.advance(5, prompt)
    late = pool.take(prompt)
    assert late is not None and late.stage_cursor == [79, 79, 79] and late.length == 79
    pool.give_back(waiting)
    assert not pool.holds(waiting), "it has nothing that is worth a place"
    assert pool.look_again(late, ()) == 0, "nobody has more"
    assert (pool.reused.prompts, pool.reused.rows) == (1, 79)


def test_tokens_that_never_ran_are_no_rows_of_a_file(tiny_engine: Engine, tmp_path: Path) -> None:
    """A prompt whose client left after 40 of its 80 rows; the file of another one with all of them is found later."""
    files, prompt = PrefixFiles(tmp_path, tiny_engine, 1e9), np.arange(10, 90)
    for rows in (40, 80):
        sequence = tiny_engine.new_sequence()
        sequence.advance(5, prompt[:rows])
        sequence.append(prompt[rows:])
        files.keep(sequence)
    for known in (files, PrefixFiles(tmp_path, tiny_engine, 1e9)):
        path, saved = known.longest(prompt, 1e9)
        assert saved == 80
    loaded = tiny_engine.new_sequence()
    assert path is not None
    files.load(path, loaded)
    assert loaded.stage_cursor[0] == 80


def test_a_place_got_late_serves_longer_replies_later(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reply waits for the only place; the third continues it and is longer than the second could have been."""
    monkeypatch.setattr(sequences, "MEMBERS", 1)
    prompt, options = list(range(10, 90)), {"max_new_tokens": 3, "ignore_eos": True}
    llm.budget = Budget(kv_memory_mb=85 * row_bytes(llm.engine.manifest) / 1e6)
    with llm.together() as replies:
        replies.add([1, 2, 3], **options)
        late = replies.add(prompt, **options)
        while replies.open:
            replies.step()
    llm.budget = Budget()
    written = [*prompt, *(token.id for token in late.reply.tokens)]
    reply = llm.generate(written, max_new_tokens=40, ignore_eos=True)
    assert reply.cached_tokens == 82 and len(reply.tokens) == 40


def test_the_only_place_changes_hands_with_its_rows(tiny_engine: Engine) -> None:
    """A sequence without a place gets that of the reply whose rows it shares, if no other place is free."""
    pool, prompt = SequencePool.of(tiny_engine, 1), list(range(10, 90))
    assert pool is not None
    ended = pool.take(prompt)
    assert ended is not None and pool.take(prompt) is None
    ended.advance(5, [*prompt, 1, 2])
    waits = tiny_engine.new_sequence()
    waits.append([*prompt, 7])
    assert pool.look_again(waits, ()) == 80, "its rows are copied"
    assert not pool.holds(waits) and waits.stage_cursor == [80, 80, 80]
    again = tiny_engine.new_sequence()
    again.append([*prompt, 7])
    pool.give_back(ended)
    assert pool.look_again(again, ()) == 80 and pool.holds(again) and not pool.holds(ended)
    assert pool.look_again(waits, ()) == 0 and waits.stage_cursor == [80, 80, 80]
    want = from_scratch(tiny_engine, 5, np.array([[*prompt, 7]]), 1)
    for one in (waits, again):
        assert_equal(one.advance(5, ()), want)
    pool.give_back(again)
    assert pool.look_again(waits, ()) == 0 and pool.holds(waits) and waits.stage_cursor == [81, 81, 81]
    assert_equal(waits.advance(5, ()), want)


def test_rows_of_a_reply_that_runs_at_the_moment_are_found_before_the_prompt_runs(llm: LLM) -> None:
    """Its sequence is locked during its steps: another thread would rarely find it idle at its first look."""
    prompt = list(range(100, 160))
    first = llm.stream([*prompt, 1], max_new_tokens=60, ignore_eos=True)
    next(first)
    assert llm.pool is not None
    (donor,) = (one for one in llm.pool._places if one.length > 60)
    with first, llm.together() as replies:
        with ThreadPoolExecutor(1) as threads, donor.lock:  # the lock is its thread's own
            second = threads.submit(replies.add, [*prompt, 2], max_new_tokens=2).result(60)
        while replies.open:
            replies.step()
    assert second.reply.cached_tokens == 60
