"""The server for clients of other kinds: addresses without /v1, TLS, pages elsewhere, and models that think."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.serve.http import server as server_module
from balcony_runtime.serve.http.server import Server, Settings
from balcony_runtime.serve.work.service import Limits
from tests.serve.client import CHAT, HELLO, until
from tests.serve.conftest import with_template
from tests.support.command import COMMAND, printed

PAGE = "app://obsidian.md"
#: Opens a thought in the prompt, as Qwen3.5's template does, unless it is switched off.
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think></think>{% endif %}"
)


def test_addresses_without_v1(server: Server, http: httpx.Client) -> None:
    """As llama.cpp's server has them."""
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.chat.completions.create(**{"model": "tiny", **HELLO}).choices[0].message.content
    assert http.get("/v1/health").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def shared(serve: Callable[..., Server]) -> Iterator[httpx.Client]:
    """A client of a server with a key that pages of one other origin may use."""
    started = serve(name="tiny", api_key="secret", origins=(PAGE, "http://localhost:3000", "file://"))
    with httpx.Client(base_url=started.url, timeout=20) as client:
        yield client


def test_props_have_what_was_measured_of_an_exit(serve: Callable[..., Server], tiny: Any, tmp_path: Path) -> None:
    bundle = with_template(tiny.path, tmp_path, THINKS)
    text: dict[str, Any] = {"documents": 1, "tokens": 9, "window": 4}
    text |= {"perplexity": {"value": 9.5}, "kl": {"value": 0.25, "stderr": 0.5}, "agreement": {"value": 0.75}}
    quality = {"reference": "full depth", "text": {"a.txt": text}}
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["exits"][0]["quality"] = quality
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    first, *_, last = httpx.get(serve(path=bundle).url + "/props").json()["exits"]
    assert (first["agreement"], first["quality"], last["quality"]) == (0.75, quality, None)


def test_a_page_elsewhere_that_is_allowed(shared: httpx.Client) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    asks["access-control-request-private-network"] = "true"
    before = shared.options(CHAT, headers={"origin": PAGE, **asks})  # no key: browsers send none before they may
    assert before.headers["access-control-allow-private-network"] == "true"
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in before.headers["access-control-allow-headers"]
    assert shared.options(CHAT, headers={"origin": "https://evil.example", **asks}).status_code == 400
    key = {"authorization": "Bearer secret"}
    allowed = (PAGE, 200), ("http://localhost:3000", 200), ("file://", 200)
    for origin, status in (*allowed, ("https://evil.example", 403)):
        found = shared.post(CHAT, json=HELLO, headers={"origin": origin, **key})
        assert found.status_code == status
        assert found.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    refused = shared.post(CHAT, json=HELLO, headers={"origin": PAGE})  # an error can be read by the page, too
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
    assert "x-balcony-reason" in refused.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", [
    "localhost:3000", "http://localhost:3000/", "http://", "a b", "", "https://*.example.com", "http://LocalHost:3000",
    "http://localhost:80", "https://localhost:443", "http://a?b",
])  # fmt: skip
def test_an_origin_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(
        InputError, match=r"--allow-origin .*: is not an origin as browsers send it: give scheme and host"
    ):
        Server(lambda: pytest.fail("it must not load"), Settings(port=0, origins=(origin,)))


def test_a_name_with_several_addresses_is_listened_on_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),  # of no interface
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    server = Server(lambda: pytest.fail("it must not load"), Settings(port=0, host="localhost"))
    first, *others = server._sockets
    try:
        assert server.url == f"http://127.0.0.1:{first.getsockname()[1]}"
        for other in others:
            assert other.getsockname()[:2] == ("::1", first.getsockname()[1])
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:  # a system without IPv6, or where it is switched off
            assert not others
        else:
            assert len(others) == 1
    finally:
        for one in server._sockets:
            one.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both[2:])
    with pytest.raises(InputError, match=r"edge:0: cannot be listened on .*give another --host"):
        Server(lambda: pytest.fail("it must not load"), Settings(port=0, host="edge"))


def test_a_name_that_is_none() -> None:
    with pytest.raises(InputError, match=r"--host a\.\.b: is not an address of this machine"):
        Server(lambda: pytest.fail("it must not load"), Settings(port=0, host="a..b"))


def test_budget_files_are_read_before_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "chat.toml").write_text("tpot = 12\n", encoding="utf-8")
    refusals = {tmp_path / "none": "none: is not a directory", tmp_path: r"chat\.toml: tpot = 12: no such key"}
    for folder, why in refusals.items():
        with pytest.raises(BalconyError, match=why):
            Server(lambda: pytest.fail("it must not load"), Settings(port=0, budgets=folder))


def test_any_page_without_a_key_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for origins, key, told in ((("*",), None, 1), (("null",), None, 2), (("*",), "secret", 2), ((PAGE,), None, 2)):
        server = Server(lambda: pytest.fail("it must not load"), Settings(port=0, origins=origins, api_key=key))
        server._sockets[0].close()
        assert caplog.text.count("any page that is open in a browser here may use this server") == told


@pytest.fixture(scope="module")
def thinker(
    serve: Callable[..., Server], tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a server whose model begins with a thought."""
    started = serve(path=with_template(tiny.path, tmp_path_factory.mktemp("thinks"), THINKS), name="tiny")
    with httpx.Client(base_url=started.url, timeout=60) as client:
        yield client


def test_thoughts_are_no_content(thinker: httpx.Client) -> None:
    asked = HELLO | {"temperature": 0, "max_tokens": 8, "ignore_eos": True}

    def message(**extra: Any) -> dict[str, Any]:
        found: dict[str, Any] = thinker.post(CHAT, json=asked | extra).json()["choices"][0]["message"]
        return found

    thought = message()
    assert thought["content"] == "" and thought["reasoning_content"]  # the tiny model never closes it
    plain = message(chat_template_kwargs={"enable_thinking": False})
    assert plain["content"] and "reasoning_content" not in plain
    assert message(reasoning_effort="none") == plain != message(reasoning_effort="low") == thought
    assert message(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}) == plain
    document = message(guided_regex="[a-f]{3}", ignore_eos=False)  # it has no thought
    assert len(document["content"]) == 3 and "reasoning_content" not in document


def test_thoughts_in_pieces(thinker: httpx.Client) -> None:
    asked: dict[str, Any] = {"messages": HELLO["messages"], "temperature": 0, "max_tokens": 8}
    whole = thinker.post(CHAT, json=asked | {"ignore_eos": True}).json()["choices"][0]["message"]
    with openai.OpenAI(base_url=f"{thinker.base_url}/v1", api_key="none") as client:
        pieces = client.chat.completions.create(model="tiny", **asked, stream=True, extra_body={"ignore_eos": True})
        deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == whole["reasoning_content"]
    assert "".join(delta.content or "" for delta in deltas) == ""


def test_a_budget_file_that_changes_while_the_model_loads(tiny: Any, tmp_path: Path) -> None:
    """The load has read it, and the SIGHUP of that time is not lost."""
    own = tmp_path / "own.toml"
    own.write_text("exit_layer = 3\n", encoding="utf-8")

    def open_llm() -> balcony_edge.LLM:
        llm = balcony_edge.load(tiny.path, budget=own)
        own.write_text("exit_layer = 2\n", encoding="utf-8")
        server.reload()
        return llm

    server = Server(open_llm, Settings(port=0, budget=own))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.ready and server.service.llm.budget == Budget(exit_layer=2))
    finally:
        server.stop()
        thread.join(60)


def test_servers_that_start_at_once_do_not_share_a_port() -> None:
    """Linux lets both bind it while neither listens, and the second would fail after it has loaded the bundle."""
    first = Server(lambda: pytest.fail("it must not load"), Settings(port=0))
    with (
        first._sockets[0] as taken,
        pytest.raises(InputError, match=r"cannot be listened on \(Address already in use\)"),
    ):
        Server(lambda: pytest.fail("it must not load"), Settings(port=taken.getsockname()[1]))


def test_the_watchdog_hears_of_a_decode_thread_that_goes_on_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times in each period, here of two seconds, unless a turn has taken more than half of it."""
    turns, told, slept = [0.0, 0.9, 1.1, math.inf, 0.2], list[str](), list[float]()

    class Stuck:
        @property
        def stuck_s(self) -> float:
            return turns.pop(0)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            raise EOFError

    server = Server(lambda: pytest.fail("it must not load"), Settings(port=0))
    server._sockets[0].close()
    monkeypatch.setattr(server, "service", Stuck())
    monkeypatch.setattr(server_module, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(server_module, "_notify", told.append)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    with pytest.raises(EOFError):
        asyncio.run(server._tell_watchdog())
    assert (told, slept) == (["WATCHDOG=1"] * 3, [0.5] * 5)


def test_a_container_that_is_stopped_before_its_port_is_open_ends() -> None:
    """Linux ignores a signal that process 1 has no handler for: it would serve until it is killed."""
    printed(
        "import os, signal, sys; os.getpid = lambda: 1; from balcony_runtime.serve.http import server\n"
        "server.Server = lambda *_: signal.raise_signal(signal.SIGTERM)\n"
        "from balcony_edge.cli import main; sys.argv = ['balcony-edge', 'serve', 'bundle']; main()"
    )


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_record_but_neither_replies_nor_the_server(tiny: Any) -> None:
    """It ends as it should, and says in its log what is missing."""
    command = [*COMMAND, "serve", str(tiny.path), "--port", "0", "--record", "/dev/full"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = next(line for line in iter(process.stderr.readline, "") if "ready after" in line)
            url = json.loads(ready)["message"].rpartition(" ")[2]
            both = {"prompt": [[5, 6], [7, 8]], "max_tokens": 4, "ignore_eos": True, "budget": {"tpot_ms": 500}}
            assert len(httpx.post(f"{url}/v1/completions", json=both, timeout=60).json()["choices"]) == 2
            process.terminate()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    said = [json.loads(line) for line in errors.splitlines()]
    assert process.returncode == 0
    failed = "/dev/full: writing failed (No space left on device): free space or name another place"
    assert [one["message"] for one in said if one["level"] == "warning"] == [f"the record is not whole: {failed}"]


def test_a_proxy_on_this_machine_names_the_client_over_ipv4_and_ipv6(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    try:
        server = serve(host="::")
    except InputError as error:
        pytest.skip(f"there is no IPv6 here: {error}")
    port = server._sockets[0].getsockname()[1]
    with caplog.at_level(logging.INFO, logger="balcony_runtime.serve.requests"):
        for host, client in (("127.0.0.1", "203.0.113.9"), ("[::1]", "2001:db8::9")):
            httpx.get(f"http://{host}:{port}/nothing", headers={"x-forwarded-for": client})
            until(lambda client=client: f'"client": "{client}"' in caplog.text)


def test_tls(serve: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(command, check=True, capture_output=True)
    server = serve(ssl_certfile=certificate, ssl_keyfile=key, limits=Limits(head_s=2.0))
    with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
        assert server.url.startswith("https://") and client.get("/health").json() == {"status": "ok"}
    subprocess.run(command, check=True, capture_output=True)  # it is renewed
    server.reload()
    renewed = ssl.create_default_context(cafile=str(certificate))
    key.write_text("")
    server.reload()
    assert "the certificate is as before" in caplog.text
    with httpx.Client(base_url=server.url, verify=renewed) as client:
        assert client.get("/health").json() == {"status": "ok"}
    with socket.create_connection(server._sockets[0].getsockname()[:2], 20) as silent:
        assert silent.recv(1) == b"", "it never began the handshake"
