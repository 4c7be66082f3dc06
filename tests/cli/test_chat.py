"""The chat on a terminal: commands, several lines, and Ctrl-C that stops the reply and not the program."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import balcony_edge
from balcony_edge.cli.console import depth_styles
from balcony_edge.cli.device.chat import Conversation, parse_command
from balcony_edge.control.trace import read_trace, replay
from balcony_edge.errors import BudgetError
from balcony_runtime.decoding.confident import Telemetry
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.text.stream import TextStream
from tests.support.command import invoke_here

PROGRAM = "from balcony_edge.cli import main; main()"


def chat(bundle: Path, lines: str | bytes, *options: str) -> subprocess.CompletedProcess[str]:
    """A chat whose input is a terminal, where Ctrl-D ends it, and whose output is a pipe."""
    master, worker = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "run", str(bundle), "-n", "6", *options]
    try:
        os.write(master, (lines.encode() if isinstance(lines, str) else lines) + b"\x04")
        return subprocess.run(command, stdin=worker, capture_output=True, text=True, check=False, timeout=120)
    finally:
        os.close(worker)
        os.close(master)


def test_commands_and_replies(tiny: Any) -> None:
    done = chat(tiny.path, "/stats\nthe fox\n/stats\n/exit 3\nthe\\\nfox\n/stats\n/reset\n/help\n/nonsense\n/quit\n")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for expected in (
        "there is no reply yet",
        "│ 5 │",
        "│ 3 │",
        "Ctrl-C stops a reply",
        "Error: /nonsense: is not a command",
    ):
        assert expected in text, text
    assert text.startswith("Exits: 2, 3, 5. /help")  # by colour on a terminal only
    assert text.count("tokens after") == 2


ANSWERS = {
    "/budget tpot_ms=900": "From the next reply: tpot_ms = 900.0.",
    "/budget": "From the next reply: full depth, no target.",
    "/exit 3": "From the next reply: exit_layer = 3.",
    "/exit": "/exit: needs one of the exits 2, 3, 5: write e.g. /exit 2; /quit ends",
    "/reset": "The conversation is forgotten.",
    "/quit now": "/quit now: /quit takes no arguments",
    "/help me": "/help me: /help takes no arguments",
    "/save": "/save: needs the name of a file: write e.g. /save talk.session",
    "/save /": "/: is a directory: name a file in it",
    "/load /nowhere.session": "/nowhere.session: cannot be read (No such file or directory): give a file that was saved",
    "/load ~nobody.session": "~nobody.session: cannot be read (No such file or directory): give a file that was saved",
    "/etc/hosts": "/etc/hosts: is not a command: see /help; to send a message that begins with /, write //",
}


def test_every_command_is_answered(tiny: Any) -> None:
    done = chat(tiny.path, "\n".join(ANSWERS) + "\n")
    assert done.returncode == 0, done.stderr
    for answer in ANSWERS.values():
        assert answer in done.stdout, (answer, done.stdout)
    assert "Cut off" not in done.stdout  # none of them was taken for a message


def test_a_conversation_is_saved_and_goes_on(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk of today.session"
    done = chat(tiny.path, f"the fox\n/save {path}\n")
    assert done.returncode == 0 and f"Saved 2 messages in {path}" in " ".join(done.stdout.split()), done
    done = chat(tiny.path, f"/load {path}\nthe dog\n/save {path}\n")
    assert done.returncode == 0 and "2 messages; the last: " in done.stdout and "Saved 4 messages" in done.stdout, done


def test_a_conversation_that_ends_with_a_call_is_loaded(tiny: Any, tmp_path: Path) -> None:
    """Other programs save such messages: a call without the key of a content, or parts instead of a text."""
    path = str(tmp_path / "talk.session")
    call = {"id": "123456789", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    parts = [{"type": "text", "text": "the dog"}]
    with balcony_edge.load(tiny.path) as llm:
        for last in ({"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": parts}):
            saved = llm.chat()
            list(saved.send("the fox", max_new_tokens=2))
            saved.messages.append(last)
            saved.save(path)
            conversation = Conversation(llm, depth_styles(llm.exit_layers), None, {}, live=False)
            assert conversation.handle(f"/load {path}") and conversation.chat.messages[-1] == last


def test_two_slashes_begin_a_message(tiny: Any, tmp_path: Path) -> None:
    said: list[str] = []
    with balcony_edge.load(tiny.path) as llm:
        conversation = Conversation(llm, depth_styles(llm.exit_layers), None, {"max_new_tokens": 2}, live=False)
        assert conversation.handle("//etc/hosts is what?") and not conversation.handle("/quit")
        said += [message["content"] for message in conversation.chat.messages if message["role"] == "user"]
    assert said == ["/etc/hosts is what?"]


def test_stats_show_the_checks_of_confidence_exits(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with balcony_edge.load(tiny.path) as llm:
        llm._learned.confident.telemetry[2] = Telemetry(40, 3)
        conversation = Conversation(llm, depth_styles(llm.exit_layers), None, {"max_new_tokens": 2}, live=False)
        assert conversation.handle("the fox") and conversation.handle("/stats")
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit 2: the full depth disagreed with 3 of 40 checked tokens" in shown and "exit 3:" not in shown


def test_a_full_context_says_what_to_do(tiny: Any) -> None:
    lines = "the quick brown fox jumps over the lazy dog " * 5
    done = chat(tiny.path, f"{lines}\n{lines}\n{lines}\n{lines}\n/reset\nthe fox\n", "-n", "400")
    assert done.returncode == 0, done.stderr
    assert "The context is full: /reset starts a new conversation" in done.stdout
    text = " ".join(done.stdout.split())
    assert "context size (256 in this" in text and done.stdout.count("(Cut off after") == 0


def test_invalid_utf_8_is_one_line_and_the_chat_goes_on(tiny: Any) -> None:
    done = chat(tiny.path, b"the \xff fox\nthe fox\n/stats\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert "the prompt is not valid UTF-8 at character 5" in done.stdout and "6 tokens after" in done.stdout


def test_budgets_are_checked_and_the_chat_goes_on(tiny: Any) -> None:
    done = chat(
        tiny.path, "/budget tpot_ms=nan\n/budget tpot_ms\n/exit 4\n/budget tpot_ms=900 dwell_tokens=2\nthe fox\n"
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "tpot_ms = nan: must be a finite number above 0" in text and "tpot_ms: must be key=value" in text
    assert "exit_layer = 4, but this bundle has exits 2, 3, 5" in text


def test_a_chat_is_recorded_and_shown_live(tiny: Any, tmp_path: Path) -> None:
    trace = tmp_path / "chat.jsonl"
    done = chat(tiny.path, "the fox\nthe dog\n", "--record", str(trace), "--live", "--tpot-ms", "900")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("last decisions") >= 2, done.stderr
    recorded = read_trace(trace)
    assert [token.seen.made_tokens for token in recorded] == [*range(6), *range(6)]
    assert [decision.exit_layer for decision in replay(recorded)] == [5] * 12


def test_a_chat_takes_no_json(tiny: Any) -> None:
    done = chat(tiny.path, "", "--json")
    assert done.returncode == 1 and "give a prompt" in done.stderr


def test_parsing_of_budget_words() -> None:
    budget = parse_command("tpot_ms=12.5 min_exit=3 on_infeasible=error")
    assert (budget.tpot_ms, budget.min_exit, budget.on_infeasible) == (12.5, 3, "error")
    assert parse_command("").tpot_ms is None
    assert (
        parse_command("tpot_ms=9 pacing=false").pacing is False
        and parse_command("policy=lossless").policy == "lossless"
    )
    # As messages write them ("must be 'plain', 'speculative', ..."), and as budget files do.
    quoted = parse_command("policy='lossless' on_infeasible=\"error\"")
    assert (quoted.policy, quoted.on_infeasible) == ("lossless", "error")
    with pytest.raises(BudgetError, match="did you mean tpot_ms"):
        parse_command("tpot=3")


def test_ctrl_c_stops_the_reply_and_not_the_program(tiny: Any, interruptible: Any) -> None:
    """A real terminal: a reply is interrupted, the next message is answered, Ctrl-D ends."""
    program = (
        "import time; from balcony_runtime import token_sequence\n"
        "real = token_sequence.TokenSequence.step\n"
        "def slow(*a):\n    print('a step', flush=True); time.sleep(0.1); return real(*a)\n"
        "token_sequence.TokenSequence.step = slow\n" + PROGRAM
    )
    master, worker = pty.openpty()
    command = [sys.executable, "-c", program, "run", str(tiny.path), "-n", "60", "--temperature", "3", "--seed", "1"]
    process = interruptible(
        command,
        stdin=worker,
        stdout=worker,
        stderr=worker,
        env={**os.environ, "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(worker)
    output = b""

    def read_until(marker: bytes, seconds: float = 60.0) -> None:
        nonlocal output
        deadline = time.monotonic() + seconds
        while marker not in output:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([master], [], [], left)[0], output
            output += os.read(master, 4096)
        output = output.split(marker, 1)[1]

    read_until(b"> ")
    os.write(master, b"the fox\n")
    read_until(b"the fox\r\n")
    for _ in range(3):  # before the first one the signal would end no reply
        read_until(b"a step")
    process.send_signal(signal.SIGINT)
    read_until(b"(stopped)")
    read_until(b"> ")
    os.write(master, b"/stats\n")
    read_until(b"tokens after")
    read_until(b"> ")
    os.write(master, b"\x04")
    assert process.wait(30) == 0
    os.close(master)


def test_json_holds_log_probabilities(tiny: Any) -> None:
    done = invoke_here("run", tiny.path, "the fox", "-n", "3", "--json", "--logprobs", "2")
    assert all(len(token["top_logprobs"]) == 2 for token in json.loads(done.stdout)["tokens"])


def test_the_reply_in_a_chat_is_a_text_of_its_own(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers as in Llama 2 would otherwise begin it with a space."""
    before, stream = [], TextCodec.stream

    def seen(codec: TextCodec, ids: Sequence[int] = (), **options: Any) -> TextStream:
        before.append(len(ids))
        return stream(codec, ids, **options)

    monkeypatch.setattr(TextCodec, "stream", seen)
    for options in ((), ("--raw",)):
        assert invoke_here("run", tiny.path, "the fox", "-n", "2", "--json", *options).returncode == 0
    assert before[0] == 0 < before[-1]


def test_ctrl_d_ends_the_chat_where_it_is_a_character(tiny: Any) -> None:
    """As on Windows, whose own end of input is Ctrl-Z."""
    with balcony_edge.load(tiny.path) as llm:
        assert not Conversation(llm, depth_styles(llm.exit_layers), None, {}, live=False).handle("\x04")
