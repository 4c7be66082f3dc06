"""Slots on disk and prefixes that are kept, over HTTP."""

from __future__ import annotations

import errno
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from balcony_edge.control.decision import Decision
from balcony_runtime.reply import Token, TokenStream
from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work.jobs import Job
from balcony_runtime.serve.work.service import Limits
from balcony_runtime.serve.work.slots import MOST_ENDED, Slots
from tests.serve.client import CHAT, HELLO, SLOW, until

PROMPT = {"prompt": list(range(10, 70)), "max_tokens": 4, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def saving(serve: Callable[..., Server], tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server with a directory for slots."""
    with httpx.Client(base_url=serve(prefix_directory=tmp_path).url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def refusing(serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server whose directory has only a file that is no session."""
    folder = tmp_path_factory.mktemp("junk")
    (folder / "bad.session").write_text("junk")
    with httpx.Client(base_url=serve(prefix_directory=folder).url, timeout=60) as client:
        yield client


def completed(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json=PROMPT | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert answer["timings"]["cache_n"] == number
    assert answer["timings"]["prompt_n"] == answer["usage"]["prompt_tokens"] - number
    return number


def test_a_slot_is_saved_erased_and_restored(saving: httpx.Client, tmp_path: Path) -> None:
    first = completed(saving)
    (slot,) = first["balcony"]["slots"]
    assert cached(first) == 0
    saved = saving.post(f"/slots/{slot}?action=save", json={"filename": "talk"}).json()
    path = tmp_path / "talk.session"
    assert saved["id_slot"] == slot and saved["filename"] == "talk.session"
    # the last token of a reply has no row
    assert saved["n_saved"] == 63 and saved["n_written"] == path.stat().st_size and saved["timings"]["save_ms"] > 0
    assert saving.post(f"/slots/{slot}?action=erase").json() == {"id_slot": slot, "n_erased": 63}
    path.rename(tmp_path / "talk.away")  # otherwise the file is found by itself
    again = completed(saving)
    assert cached(again) == 0
    saving.post(f"/slots/{again['balcony']['slots'][0]}?action=erase")
    (tmp_path / "talk.away").rename(path)
    restored = saving.post("/slots/0?action=restore", json={"filename": "talk.session"}).json()
    assert restored["n_restored"] == 63 and restored["n_read"] == path.stat().st_size
    last = completed(saving)
    assert cached(last) == 59, "all but the last token of the prompt"
    assert [one["choices"][0]["text"] for one in (again, last)] == [first["choices"][0]["text"]] * 2
    page = saving.get("/metrics").text
    for name, value in (("balcony_prefix_hits_total", 1), ("balcony_cached_prompt_tokens_total", 59)):
        assert f"\n{name} {value}.0\n" in page
    found = dict(re.findall(r'balcony_prefix_bytes{place="(\w+)"} (\S+)', page))
    assert float(found["memory"]) > 0 and float(found["disk"]) == 0, "nobody named a file"


def test_a_saved_prefix_is_found_by_the_next_server(serve: Callable[..., Server], tmp_path: Path) -> None:
    servers = [serve(prefix_directory=tmp_path) for _ in range(2)]
    with httpx.Client(base_url=servers[0].url, timeout=60) as http:
        (slot,) = completed(http)["balcony"]["slots"]
        assert http.post(f"/slots/{slot}?action=save", json={"filename": "system"}).status_code == 200
    with httpx.Client(base_url=serve(prefix_directory=tmp_path).url, timeout=60) as http:
        assert cached(completed(http, n=2)) == 59


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/slots/1?action=copy", {}, 400, "action = 'copy': must be one of save, restore, erase"),
        ("/slots/123?action=save", {"filename": "a"}, 404, "slot 123: has no reply that has ended lately"),
        ("/slots/1?action=restore", {"filename": "none"}, 404, "filename = 'none.session': there is no such file"),
        ("/slots/1?action=restore", {"filename": "../a"}, 400, "filename = '../a': must be a plain name"),
        ("/slots/1?action=restore", {"filename": "prefix-a"}, 400, "that does not begin with 'prefix-'"),
        ("/slots/1?action=restore", {"filename": 5}, 400, "must be a plain name"),
        ("/slots/1?action=restore", {}, 400, "must be a plain name"),
        ("/slots/1?action=restore", {"filename": "bad"}, 400, "bad.session: is not a session"),
        ("/slots/x?action=restore", {"filename": "bad"}, 404, "no such path"),
    ],
)
def test_what_cannot_be_done_is_said(
    refusing: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = refusing.post(path, json=body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and words in message and "/junk" not in message, answer.text


def test_a_server_without_a_directory_says_how_to_get_one(http: httpx.Client) -> None:
    answer = http.post("/slots/0?action=restore", json={"filename": "a"})
    assert answer.status_code == 400 and "--prefix-dir" in answer.json()["error"]["message"]


def test_saved_slots_are_bounded(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(prefix_directory=tmp_path, limits=Limits(saved_bytes=1000))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        (slot,) = completed(http)["balcony"]["slots"]
        answers = [http.post(f"/slots/{slot}?action=save", json={"filename": name}) for name in ("a", "b", "a")]
    assert [answer.status_code for answer in answers] == [200, 507, 200], "a file may be replaced"
    assert "b.session: 0.1 MB are saved by name, and 0.001 MB may be" in answers[1].json()["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.session"]


def test_a_reply_that_is_too_short_to_be_kept_is_named(saving: httpx.Client) -> None:
    """To save earlier, or to raise --prefix-mb, would not help."""
    (slot,) = completed(saving, prompt=[5, 6, 7])["balcony"]["slots"]
    answer = saving.post(f"/slots/{slot}?action=save", json={"filename": "a"})
    assert answer.status_code == 400 and "fewer than 32 rows are not kept" in answer.json()["error"]["message"]


def test_the_latest_replies_have_slots_and_earlier_ones_have_none() -> None:
    slots = Slots(Mock(), 0)
    for key in range(MOST_ENDED + 2):
        slots.ended(Job(key, 0, [key, 7], None))
    assert [slots._tokens(key) for key in (2, MOST_ENDED + 1)] == [[2, 7], [MOST_ENDED + 1, 7]]
    with pytest.raises(RefusedError, match="slot 1: has no reply that has ended lately"):
        slots._tokens(1)


def test_of_a_reply_that_a_client_left_only_the_numbers_are_kept() -> None:
    """Its step may still add one. Tokens with twenty log-probabilities take 3 kB each, and the last 64 replies have slots."""
    slots, job = Slots(Mock(), 0), Job(1, 0, [5], None)
    made = (Token(number, "a", 2, 1.0, None, None, 0, 0, Decision(2)) for number in (7, 8))
    job.stream = TokenStream(made, Mock())
    next(job.stream)
    slots.ended(job)
    next(job.stream)
    gone, job.stream = weakref.ref(job.stream), None
    assert slots._tokens(1) == [5, 7, 8] and gone() is None


def test_slots_leave_the_threads_to_prompts(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk hangs, as that of --prefix-dir may on a network drive, and clients save again and again."""
    server, gate, at_work = serve(), threading.Event(), list[str]()

    def hangs(slots: Slots, action: str, *_: Any) -> dict[str, Any]:
        at_work.append(action)
        assert action == "erase" or gate.wait(60)
        return {}

    monkeypatch.setattr(Slots, "act", hangs)
    # the loop has 32 threads at most
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(40) as savers:
        saves = [savers.submit(client.post, "/slots/1?action=save", json={"filename": "a"}) for _ in range(40)]
        try:
            until(lambda: at_work and len(server._uvicorn.server_state.tasks) == len(saves))
            assert client.post(CHAT, json=HELLO, timeout=30).status_code == 200
            assert len(at_work) == 1, "of two saves at once each would find the bound of --saved-mb not reached"
            erased = client.post("/slots/1?action=erase", timeout=30)
            assert erased.status_code == 200, "it frees memory, and needs no disk"
        finally:
            gate.set()
        assert {save.result().status_code for save in saves} == {200}


def test_a_reply_in_progress_is_not_saved(saving: httpx.Client) -> None:
    with saving.stream("POST", "/v1/chat/completions", json=SLOW) as reply:
        lines = reply.iter_lines()
        next(lines)
        (slot,) = saving.get("/slots").json()
        answer = saving.post(f"/slots/{slot['id']}?action=save", json={"filename": "a"})
        assert answer.status_code == 409 and "wait until it has ended" in answer.json()["error"]["message"]
        answer = saving.post(f"/slots/{slot['id']}?action=restore", json={"filename": "a"})
        assert answer.status_code == 404, "any number will do"
    until(lambda: not saving.get("/slots").json())


def test_a_full_disk_is_no_mistake_of_the_client(
    saving: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (slot,) = completed(saving)["balcony"]["slots"]
    with monkeypatch.context() as patch:
        patch.setattr("balcony_edge.files._flush", full)
        answer = saving.post(f"/slots/{slot}?action=save", json={"filename": "a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (507, "slots_full")
    assert error["message"].startswith("a.session: cannot be written (No space left on device)")
    assert f"{tmp_path / 'a.session'}: cannot be written" in caplog.text and not list(tmp_path.iterdir())
