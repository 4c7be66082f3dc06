"""LiteLLM's router over two servers, one of which is killed (SIGKILL) while streams run.

    pip install '.[cpu,serve]' litellm==1.110.2 pyyaml
    python examples/deploy/litellm_failover.py BUNDLE [--requests 200] [--clients 16] [--server balcony-edge]

The router has the settings of litellm.yaml, and the addresses of two servers that this script starts. After a third of the
requests has ended, one server is killed. A stream that has begun cannot go on elsewhere: its text would not continue. Every
other request must get its whole reply. The output ends with one JSON line; exit code 1 if a request was lost that had not
begun to stream, or if none was in progress at the server that was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

#: Pace of a reply, and bounds of its length in tokens: about a second, and not the same for all, so that at every moment some
#: begin and some are in progress.
REPLY = {"extra_body": {"ignore_eos": True, "budget": {"max_pace_tps": 40}}}
SHORTEST, LONGEST = 10, 80
#: Asks the servers here, whatever proxy the environment names.
HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def started(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that is starting; it says on stderr why it cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "BALCONY_EDGE_API_KEY"}
    return subprocess.Popen([*command, "--port", str(port)], env=environment)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def model_of(server: subprocess.Popen[bytes], port: int) -> str:
    """Name of the model of a server, once it is ready."""
    until = time.monotonic() + 300
    while True:
        try:
            with HERE.open(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > until:
                raise
            if server.poll() is not None:
                sys.exit("a server has ended")
            time.sleep(0.2)


def router_of(settings: dict[str, Any], servers: list[subprocess.Popen[bytes]], ports: list[int]) -> Any:
    """LiteLLM's router with the settings of the file, and our servers in it."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched
    litellm = importlib.import_module("litellm")
    for entry, server, port in zip(settings["model_list"], servers, ports, strict=True):
        name = model_of(server, port)
        entry["litellm_params"] = {
            "model": f"openai/{name}",
            "api_base": f"http://127.0.0.1:{port}/v1",
            "api_key": "none",
        }
    return litellm.Router(model_list=settings["model_list"], **settings["router_settings"])


async def ask(router: Any) -> tuple[str, str]:
    """Send a request; returns what became of it, and the error."""
    began = False
    try:
        stream = await router.acompletion(
            model="edge",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=random.randint(SHORTEST, LONGEST),
            stream=True,
            timeout=60,
            **REPLY,
        )
        async for piece in stream:
            began = True  # also by a piece without text: a token may be half of a character
            if piece.choices and piece.choices[0].finish_reason is not None:
                return "whole", ""
    except Exception as error:  # LiteLLM has a class for each provider's errors
        return "cut" if began else "lost", type(error).__name__
    return "cut" if began else "lost", "ended early"


def slots(port: int) -> int:
    """Number of replies in progress."""
    with HERE.open(f"http://127.0.0.1:{port}/slots", timeout=5) as answer:
        return len(json.load(answer))


async def run(
    router: Any, victim: subprocess.Popen[bytes], ports: list[int], requests: int, clients: int
) -> dict[str, Any]:
    """Send the requests, and kill the victim on the way."""
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    after: Counter[str] = Counter()
    left = iter(range(requests))
    in_progress: list[int] = []

    async def client() -> None:
        for _ in left:
            found, error = await ask(router)
            counts[found] += 1
            if error:
                errors[error] += 1
            if victim.poll() is not None:
                after[found] += 1
            elif sum(counts.values()) >= requests / 3 and not in_progress:
                in_progress.extend(slots(port) for port in ports)
                victim.kill()

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"requests": requests, "clients": clients, **{kind: counts[kind] for kind in ("whole", "cut", "lost")}} | {
        "in_progress_at_the_kill": in_progress,
        "errors": dict(errors),
        "after_the_kill": dict(after),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description="LiteLLM's router over two servers, one of which is killed.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--server", default="balcony-edge", help="the command (default: balcony-edge)")
    options = parser.parse_args()
    settings = yaml.safe_load(Path(__file__).with_name("litellm.yaml").read_text(encoding="utf-8"))
    ports = [free_port(), free_port()]
    command = [options.server, "serve", str(options.bundle)]
    servers = [started(command, port) for port in ports]
    try:
        router = router_of(settings, servers, ports)
        found = asyncio.run(run(router, servers[0], ports, options.requests, options.clients))
    finally:
        for server in servers:
            server.kill()
            server.wait()
    print(json.dumps({"example": "litellm_failover"} | found))
    sys.exit(1 if found["lost"] or not found["cut"] else 0)


if __name__ == "__main__":
    main()
