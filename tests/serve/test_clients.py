"""Clients that people use: curl, llm, LiteLLM, and the reading of ``vllm bench serve``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from balcony_runtime.serve.http.server import Server
from balcony_runtime.serve.work import answers
from tests.serve.client import HELLO


def curl(server: Server, *arguments: str, body: dict[str, Any] | None = None) -> str:
    """What curl prints."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--max-time", "30", *arguments]
    if body is not None:
        command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_curl_reads_a_stream(server: Server) -> None:
    found = curl(server, "--no-buffer", f"{server.url}/v1/chat/completions", body=HELLO | {"stream": True})
    *events, done, end = found.split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and all(event.startswith("data: {") for event in events)
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length" and pieces[-1]["balcony"]["tokens_per_exit"] == {
        "5": 6
    }
    whole = json.loads(curl(server, f"{server.url}/v1/chat/completions", body=HELLO))
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
    assert text == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (HELLO | {"temperature": -1, "stream": True}, 400, "invalid_value"),
        (HELLO | {"model": "gpt-4"}, 404, "model_not_found"),
        (HELLO | {"model": "tiny:strict", "stream": True}, 422, "infeasible"),
    ],
)
def test_curl_sees_errors(server: Server, body: dict[str, Any], status: int, code: str, tmp_path: Path) -> None:
    """Also before a stream begins: ``curl --fail`` ends with an error."""
    url, head = f"{server.url}/v1/chat/completions", tmp_path / "head"
    answer = curl(server, "--dump-header", str(head), url, body=body)
    assert json.loads(answer)["error"]["code"] == code
    told = head.read_text()
    assert f" {status} " in told.splitlines()[0] and f"x-balcony-reason: {code}\n" in told
    with pytest.raises(subprocess.CalledProcessError) as failed:
        curl(server, "--fail", url, body=body)
    assert failed.value.returncode == 22 and str(status) in failed.value.stderr


def test_curl_sends_what_is_too_large(server: Server, tmp_path: Any) -> None:
    """Curl asks before it sends a large body (Expect: 100-continue), and gets its answer."""
    large = tmp_path / "large.json"
    large.write_bytes(b" " * 20_000_000)
    arguments = ["--output", "-", "--write-out", "%{http_code}", "--data-binary", f"@{large}"]
    assert curl(server, *arguments, f"{server.url}/v1/completions").endswith("}413")


def test_the_llm_command(server: Server, tmp_path: Path) -> None:
    """Simon Willison's llm, set up as in docs/server.md."""
    models = f"- model_id: edge\n  model_name: tiny:shallow\n  api_base: {server.url}/v1\n  api_key_name: edge\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm"]
    subprocess.run([*command, "keys", "set", "edge", "--value", "none"], check=True, env=environment, timeout=60)
    command += ["-m", "edge", "hello", "-o", "temperature", "0", "-o", "max_tokens", "6"]
    made = [
        subprocess.run(
            [*command, *flags], check=True, env=environment, capture_output=True, text=True, timeout=60
        ).stdout
        for flags in ([], ["--no-stream"])
    ]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO | {"model": "tiny:shallow"}).json()
    assert made == [answer["choices"][0]["message"]["content"] + "\n"] * 2


def test_litellm(server: Server) -> None:
    """Completions whole and streamed with a budget, and an error as LiteLLM's own class."""
    script = """
import json, litellm, sys
asked = {
    "model": "openai/tiny", "api_base": sys.argv[1] + "/v1", "api_key": "none", "temperature": 0, "max_tokens": 6,
    "messages": [{"role": "user", "content": "hello"}], "extra_body": {"budget": {"exit_layer": 3}},
}
whole = litellm.completion(**asked)
pieces = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
try:
    litellm.completion(**asked | {"temperature": -1})
    error = None
except litellm.BadRequestError as refused:
    error = str(refused)
print(json.dumps({
    "text": whole.choices[0].message.content,
    "exits": whole.balcony["tokens_per_exit"],
    "streamed": "".join(p.choices[0].delta.content or "" for p in pieces if p.choices),
    "tokens": pieces[-1].usage.completion_tokens,
    "error": error,
}))
"""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # its table of prices is not fetched
    command = [sys.executable, "-c", script, server.url]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(said.splitlines()[-1])  # before it, advice for the one who sees an error
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=HELLO | {"budget": {"exit_layer": 3}}).json()
    assert found["text"] == found["streamed"] == answer["choices"][0]["message"]["content"]
    assert found["exits"] == {"3": 6} and found["tokens"] == 6
    assert "temperature = -1" in found["error"]


def texts_by_blocks(reads: Iterable[bytes]) -> Iterator[str]:
    """Texts as ``vllm bench serve`` reads them: it strips each read, and drops a block that begins with a comment."""
    held = ""
    for read in reads:
        held += read.decode().strip()
        *blocks, held = held.split("\n\n")
        if held.startswith("data: {") and held.endswith("}"):  # the empty line after it was stripped
            blocks, held = [*blocks, held], ""
        for block in blocks:
            if not block.startswith(":"):
                (choice,) = json.loads(block.removeprefix("data: "))["choices"]
                yield (choice["text"] if "text" in choice else choice["delta"].get("content")) or ""


@pytest.mark.parametrize("body", [HELLO, {"prompt": "hello", "max_tokens": 6}], ids=["chat", "completion"])
def test_no_text_is_lost_after_a_comment(server: Server, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEEPALIVE_S", 0.005)  # a token comes every 25 ms
    (token,) = server.service.llm.encode("z", chat=False)
    body = body | {"logit_bias": {str(token): 1000}, "budget": {"max_pace_tps": 40}, "stream": True}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with httpx.stream("POST", f"{server.url}{path}", json=body) as answer:
        reads = list(answer.iter_raw())
    assert any(read.startswith(b": waiting") for read in reads)
    assert "".join(texts_by_blocks(reads)) == "z" * 6
