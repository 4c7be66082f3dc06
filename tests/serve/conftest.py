"""A real server over the tiny bundle, on a free port, in a thread."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.device.readings import Reading
from balcony_runtime.engine import Engine
from balcony_runtime.serve.http.server import Server, Settings
from balcony_runtime.text.codec import TextCodec

BUDGETS = {
    "voice": "tpot_ms = 30\nprobability = 0.9\n",
    "saver": "energy_j_per_token = 1.0\n",
    "shallow": "exit_layer = 2\n",
    "slow": "exit_layer = 3\nmax_pace_tps = 20\n",
    "strict": 'tpot_ms = 0.000001\non_infeasible = "error"\n',
}

#: Shows names of tools only, because the tiny context has no room for schemas.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}<assistant>"
    "{{ mood }}{% for one in documents or [] %}{{ one.text }}{% endfor %}"
)


@pytest.fixture(scope="module")
def serve(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers with settings of their own; they end with the test's module, because their sensors cost time."""
    folder = tmp_path_factory.mktemp("budgets")
    for name, text in BUDGETS.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    running: list[tuple[Server, threading.Thread]] = []

    def start(
        path: Path = tiny.path,
        prefix_directory: Path | None = None,
        readings: Callable[[], tuple[Reading, ...]] | None = None,
        **settings: Any,
    ) -> Server:
        def open_llm() -> balcony_edge.LLM:
            if readings is None:
                return balcony_edge.load(path, prefix_directory=prefix_directory)
            bundle = Bundle.open(path)
            return balcony_edge.LLM(Engine.open(path), TextCodec(bundle), Budget(), readings=readings)

        server = Server(open_llm, Settings(port=0, budgets=folder, **settings))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + 60
        while not server.ready:
            assert time.monotonic() < until and thread.is_alive()
            time.sleep(0.01)
        return server

    yield start
    for server, _ in running:
        server.stop()
    for _, thread in running:
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Server:
    """The server that most tests share."""
    return serve(name="tiny")


def with_template(bundle: Path, folder: Path, template: str) -> Path:
    """A copy of a bundle with another chat template."""
    copy, text = Path(shutil.copytree(bundle, folder / "bundle")), template.encode()
    (copy / "chat_template.jinja").write_bytes(text)
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    manifest["files"]["chat_template.jinja"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (copy / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def tool_server(serve: Callable[..., Server], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server over the tiny bundle with a chat template that shows tools."""
    return serve(path=with_template(tiny.path, tmp_path_factory.mktemp("tools"), TEMPLATE), name="tiny")


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain client of it."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def budgets(server: Server) -> Path:
    """Its folder of budget files."""
    assert server.service.folder is not None
    return server.service.folder
