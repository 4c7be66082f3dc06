"""Conversations and streams: reuse of shared rows, cancelling, async iteration, several threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.errors import InputError
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply, TokenStream
from balcony_runtime.telling import StopStrings
from balcony_runtime.token_sequence import TokenSequence


def finish(stream: Any) -> Reply:
    for _ in stream:
        pass
    return stream.reply


def test_turns_are_those_of_a_fresh_conversation(llm: LLM) -> None:
    chat = llm.chat(system="be brief")
    history: list[dict[str, str]] = [{"role": "system", "content": "be brief"}]
    for text in ("the fox", "and the dog?", "why"):
        history.append({"role": "user", "content": text})
        want = llm.generate(history, max_new_tokens=12, ignore_eos=True)
        reply = finish(chat.send(text, max_new_tokens=12, ignore_eos=True))
        assert [token.id for token in reply.tokens] == [token.id for token in want.tokens]
        history.append({"role": "assistant", "content": reply.text})
        assert chat.messages == history
    chat.reset()
    assert chat.messages == history[:1]


def test_rows_that_turns_share_are_not_run_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = llm.chat()
    finish(chat.send("the quick brown fox jumps over the lazy dog", max_new_tokens=4, ignore_eos=True))
    rows: list[int] = []
    run = type(chat.sequence.state).run_stage
    monkeypatch.setattr(
        type(chat.sequence.state), "run_stage", lambda s, i, a, b: (rows.append(b - a), run(s, i, a, b))[1]
    )
    before = chat.sequence.length
    second = "the quick brown fox jumps over the lazy dog"
    stream = chat.send("why", max_new_tokens=1, ignore_eos=True)
    reply = finish(stream)
    assert reply.prompt_tokens > len(llm.encode(second))
    assert rows and max(rows) <= reply.prompt_tokens - before + 8  # only the new message and the re-tokenized edge


def test_waiting_works_off_the_backlog(llm: LLM) -> None:
    chat = llm.chat()
    llm.budget = Budget(exit_layer=2)
    finish(chat.send("the fox", max_new_tokens=6, ignore_eos=True))
    assert chat.sequence.stage_rows[-1] > 0
    with chat.catching_up():
        deadline = threading.Event()
        for _ in range(500):
            if not any(chat.sequence.stage_rows) and not any(chat.sequence.balcony_rows):
                break
            deadline.wait(0.01)
    assert chat.sequence.stage_rows == (0, 0, 0) and chat.sequence.balcony_rows == (0, 0, 0)


def test_nothing_is_worked_off_where_nobody_watches_a_ceiling(llm: LLM) -> None:
    chat = llm.chat()
    llm.budget = Budget(exit_layer=2)
    finish(chat.send("the fox", max_new_tokens=6, ignore_eos=True))
    pending = chat.sequence.stage_rows
    llm.budget = Budget(memory_mb=1e6)
    with chat.catching_up():
        time.sleep(0.2)
    assert chat.sequence.stage_rows == pending and pending[-1] > 0


def test_the_ceilings_of_the_last_reply_hold_while_a_user_types(llm: LLM) -> None:
    chat = llm.chat()
    llm.budget = Budget()
    own = Budget(max_exit=2, memory_mb=1e6)
    finish(chat.send("the fox", max_new_tokens=6, ignore_eos=True, budget=own))
    pending = chat.sequence.stage_rows
    with chat.catching_up():
        time.sleep(0.2)
    assert chat.sequence.stage_rows == pending and pending[-1] > 0


def test_a_message_in_the_middle_of_catching_up_gets_the_same_reply(llm: LLM) -> None:
    """Eight users at once; each sends a message while a thread works off the backlog of the previous reply."""
    texts = ("the quick brown fox jumps over the lazy dog " * 3, "why", "and the lazy dog jumps over it")

    def converse(user: int, waits: bool) -> list[str]:
        chat = llm.chat()
        for text in texts:
            with chat.catching_up() if waits else nullcontext():
                finish(chat.send(f"{text} {user}", max_new_tokens=6, ignore_eos=True))
        return [message["content"] for message in chat.messages]

    llm.budget = Budget(exit_layer=2)
    want = [converse(user, False) for user in range(8)]
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(converse, range(8), [True] * 8)) == want


def test_a_message_ends_the_catching_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = llm.chat()
    llm.budget = Budget(exit_layer=2)
    finish(chat.send("the fox", max_new_tokens=100, ignore_eos=True))
    catch_up = chat.sequence.catch_up

    def slow(max_rows: int) -> int:
        time.sleep(0.02)
        return catch_up(max_rows)

    monkeypatch.setattr(chat.sequence, "catch_up", slow)
    with chat.catching_up():
        (worker,) = (thread for thread in threading.enumerate() if thread.name == "balcony-catch-up")
        chat.send("why", max_new_tokens=1, ignore_eos=True)
        worker.join(5)
        assert not worker.is_alive() and any(chat.sequence.stage_rows)
    with chat.catching_up():
        llm.close()  # while the thread runs; it ends without an error


def test_messages_that_cannot_be_leave_the_history(llm: LLM, bundle_copy: Any) -> None:
    chat = llm.chat()
    for text, options in (("  ", {}), ("hi", {"max_new_tokens": 0}), ("fox " * 400, {})):
        with pytest.raises(balcony_edge.BalconyError):
            chat.send(text, **options)
    assert chat.messages == []
    chat.send("never read")
    assert chat.messages == []


def test_token_ids_are_no_first_message(llm: LLM) -> None:
    """They are a prompt of `stream`. In the history no later turn could follow them, and nothing could save it."""
    chat = llm.chat()
    given: Any = llm.encode("the fox", chat=False)
    with pytest.raises(InputError, match=r"^message [0-9]+: must be a mapping with 'role' and 'content'"):
        finish(chat.send(given, max_new_tokens=2, ignore_eos=True))
    assert chat.messages == []


def test_a_message_that_its_sender_fills_again_stays_in_the_history(llm: LLM) -> None:
    chat, message = llm.chat(), {"role": "user", "content": ""}
    for given in (message, [message]):
        message["content"] = "the fox"
        finish(chat.send(given, max_new_tokens=2, ignore_eos=True))
        message["content"] = "why"
        assert chat.messages[-2] == {"role": "user", "content": "the fox"}
    chat, part = llm.chat(), {"type": "text", "text": "the fox"}
    finish(chat.send({"role": "user", "content": [part]}, max_new_tokens=2, ignore_eos=True))
    part["text"] = "why"
    assert chat.messages[-2]["content"] == [{"type": "text", "text": "the fox"}]


def test_cancelling_ends_before_the_next_token_and_keeps_what_was_said(llm: LLM) -> None:
    chat = llm.chat()
    stream = chat.send("the fox", max_new_tokens=100, ignore_eos=True)
    for count, _ in enumerate(stream, 1):
        if count == 3:
            threading.Thread(target=stream.cancel).start()
            stream.request.cancelled.wait(5)
    assert len(stream.reply.tokens) == 3 and stream.reply.finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": stream.reply.text}


def test_a_reply_that_is_left_joins_the_history_before_the_next_turn(llm: LLM) -> None:
    chat = llm.chat()
    left = chat.send("the fox", max_new_tokens=100, ignore_eos=True)
    said = [next(left).text for _ in range(3)]
    turn = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "".join(said)}]
    stream = chat.send("why", max_new_tokens=3, ignore_eos=True)
    assert chat.messages == turn and next(left, None) is None
    want = llm.generate([*turn, {"role": "user", "content": "why"}], max_new_tokens=3, ignore_eos=True)
    made = [next(stream) for _ in range(3)]  # the third is marked as the last, so no fourth is requested
    assert [token.id for token in made] == [token.id for token in want.tokens]
    assert made[-1].finish_reason == "length" and stream.reply.finish_reason == "length"
    assert chat.messages[2:] == [{"role": "user", "content": "why"}, {"role": "assistant", "content": want.text}]
    chat.send("and now", max_new_tokens=100, ignore_eos=True).__next__()
    chat.reset()
    assert chat.messages == []


def test_closing_a_stream_ends_it(llm: LLM) -> None:
    with llm.stream("the fox", max_new_tokens=100, ignore_eos=True) as stream:
        next(stream)
    assert stream.reply.finish_reason == "cancelled"
    with pytest.raises(StopIteration):
        next(stream)


def test_a_cancelled_task_gets_its_cancellation_and_the_stream_ends(llm: LLM) -> None:
    """The cancellation waits for the step that a thread is running, so the stream can be closed afterwards."""
    llm.budget = Budget(max_pace_tps=2)
    seen: list[int] = []

    async def main() -> None:
        with llm.stream("the fox", ignore_eos=True) as stream:
            async with asyncio.timeout(None) as limit:
                async for token in stream:
                    seen.append(token.id)
                    limit.reschedule(asyncio.get_running_loop().time() + 0.1)  # in the wait for the second token

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert len(seen) == 1


def test_a_task_that_is_cancelled_twice_ends_the_same(llm: LLM) -> None:
    llm.budget = Budget(max_pace_tps=2)
    seen: list[int] = []

    async def read(stream: Any) -> None:
        with stream:
            async for token in stream:
                seen.append(token.id)

    async def main() -> None:
        stream = llm.stream("the fox", ignore_eos=True)
        source, inside, go = stream._source, threading.Event(), threading.Event()

        def slow() -> Iterator[Any]:  # a step that a cancellation cannot end
            yield next(source)
            inside.set()
            assert go.wait(30)
            yield next(source)

        stream._source = slow()
        task = asyncio.create_task(read(stream))
        await asyncio.to_thread(inside.wait, 5)
        threading.Timer(0.3, go.set).start()  # the second cancellation waits for the step, and so does this loop
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.02)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.reply.finish_reason == "cancelled" and next(stream, None) is None

    asyncio.run(main())
    assert len(seen) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_reply_gives_its_place_back(llm: LLM, times: int) -> None:
    """Also where the stream is kept, and closed by nobody; and where anyio, as in Starlette, cancels at every wait."""

    async def main() -> None:
        stream = llm.stream([1, 2], max_new_tokens=100, ignore_eos=True, budget=Budget(max_pace_tps=50.0))

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        while not stream.reply.tokens:
            await asyncio.sleep(0.005)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):  # nobody waits for its step after a second cancellation
            while times > 1 and (stream.reply.finish_reason is None or llm._requests.scheduler._streams):
                await asyncio.sleep(0.005)
        assert stream.reply.finish_reason == "cancelled" and not llm._requests.scheduler._streams

    asyncio.run(main())


def test_stop_strings_end_the_reply_and_are_not_in_it(llm: LLM) -> None:
    whole = llm.generate("the fox", max_new_tokens=40, ignore_eos=True).text
    stop = whole[10:13]
    reply = llm.generate("the fox", max_new_tokens=40, ignore_eos=True, stop=[stop])
    assert reply.text == whole[: whole.find(stop)] and reply.finish_reason == "stop"
    same = llm.generate("the fox", max_new_tokens=40, ignore_eos=True, stop=["never in there 123"])
    assert same.text == whole and same.finish_reason == "length"


def test_log_probabilities_on_request(llm: LLM) -> None:
    reply = llm.generate("the fox", max_new_tokens=5, ignore_eos=True, logprobs=3)
    for token in reply.tokens:
        assert token.logprob == token.top_logprobs[0][1] <= 0  # greedy takes the likeliest
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0][0] == token.id
    assert llm.generate("the fox", max_new_tokens=1, ignore_eos=True).tokens[0].logprob is None
    with pytest.raises(InputError, match="logprobs = -1"):
        llm.stream("the fox", logprobs=-1)


def test_penalties_and_bias_reach_the_reply(llm: LLM) -> None:
    plain = llm.generate([5, 6], max_new_tokens=12, ignore_eos=True)
    banned = plain.tokens[0].id
    biased = llm.generate(
        [5, 6], max_new_tokens=12, ignore_eos=True, sampling=SamplingParams(logit_bias={banned: -100.0})
    )
    assert banned not in [token.id for token in biased.tokens]
    varied = llm.generate([5, 6], max_new_tokens=12, ignore_eos=True, sampling=SamplingParams(presence_penalty=1e6))
    assert len({token.id for token in varied.tokens}) == 12
    assert varied.ttft_ms is not None


def test_a_bundle_without_a_template_has_no_chat(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.codec, "_template", None)
    with pytest.raises(InputError, match="has no chat template"):
        llm.chat()


def test_an_interrupt_between_two_tokens_ends_the_reply(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook keeps the traceback, whose frames hold the stream: its memory and its share of the time would stay."""
    following = TokenStream.__next__

    def interrupted(self: TokenStream) -> Any:
        following(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(TokenStream, "__next__", interrupted)
        llm.generate([1, 2], max_new_tokens=9, ignore_eos=True)
    assert kept.tb is not None and not llm._requests.scheduler._streams


def test_a_stream_may_be_closed_in_the_middle_of_its_own_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal does that: Python runs it in the main thread, between two calls of the step."""
    stream = llm.stream([1, 2], max_new_tokens=100, ignore_eos=True)
    next(stream)
    step = TokenSequence.step

    def closing(self: TokenSequence, exit_layer: int, tokens: Any) -> Any:
        stream.close()
        return step(self, exit_layer, tokens)

    monkeypatch.setattr(TokenSequence, "step", closing)
    assert next(stream, None) is None
    assert stream.reply.finish_reason == "cancelled" and not llm._requests.scheduler._streams


def test_a_stream_may_be_closed_while_its_token_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal may come after the last look at whether the stream was cancelled."""
    stream = llm.stream([1, 2], max_new_tokens=100, ignore_eos=True)
    push = StopStrings.push

    def closing(self: StopStrings, text: str) -> Any:
        stream.close()
        return push(self, text)

    monkeypatch.setattr(StopStrings, "push", closing)
    next(stream)
    assert stream.reply.finish_reason == "cancelled" and not llm._requests.scheduler._streams
    assert len(stream.reply.tokens) == 1 and next(stream, None) is None
