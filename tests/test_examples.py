"""Every example runs as its docstring says, on a tiny bundle."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

import balcony_edge
from balcony_edge.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"


def command(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, arguments)]


def run(name: str, *arguments: str | Path, typed: str = "") -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command(name, *arguments),
        input=typed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_many_streams_answer_with_a_budget_each(tiny: Any) -> None:
    told = run("many_streams.py", tiny.path)
    assert told.count("tokens by exit: ") == 3 and told.count("no target") == 1
    assert re.search(r"tpot_ms (held|missed), ttft_ms (held|missed)", told) and re.search(
        r"deadline_s (held|missed)", told
    )


def test_stream(tiny: Any) -> None:
    out = run("stream.py", tiny.path, "--tokens", "8", "--tpot-ms", "1000")
    assert re.search(r"ended by (stop|length); tokens per exit: \{5: \d\}", out)


def test_an_example_shows_one_line_for_what_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(command("stream.py", tmp_path), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("stream.py: ") and done.stderr.count("\n") == 1 and "is not a bundle" in done.stderr


def test_chat_catches_up_while_it_waits(tiny: Any) -> None:
    out = run("chat.py", tiny.path, "--tokens", "6", typed="the fox\n\nthe dog\nand the balcony\n")
    assert "the next reply comes from the full depth" in out
    exits = re.findall(r"\(exit (\d) ×\d; (\d+) rows caught up while waiting; history: (\d) messages\)", out)
    assert [exit_layer for exit_layer, _, _ in exits] == ["2", "5", "2"]
    assert [history for _, _, history in exits] == ["3", "5", "7"]


def test_two_replies_in_one_event_loop(tiny: Any) -> None:
    out = run("async_stream.py", tiny.path, "--tokens", "8")
    assert len(re.findall(r"tokens, ended by (?:stop|length)\)", out)) == 2
    assert len(re.findall(r"\(\d+ tokens, ended by", run("async_stream.py", tiny.path, "--seconds", "0"))) == 2


def test_a_server_answers_refuses_and_ends(tiny: Any, interruptible: Any) -> None:
    arguments = command("embed_in_server.py", tiny.path, "--port", "0", "--tokens", "8")
    process = interruptible(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline().split()[0]
    with urllib.request.urlopen(urllib.request.Request(url, b"the fox"), timeout=60) as answer:
        assert answer.status == 200 and answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="the prompt is empty") as refused:
        urllib.request.urlopen(urllib.request.Request(url, b" "), timeout=60)
    assert refused.value.code == 400
    refused.value.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "waiting for unfinished replies" in out and "Traceback" not in err


def test_the_budget_timeline(tiny: Any, tmp_path: Path) -> None:
    why = "the picture needs matplotlib: pip install 'balcony-edge[plot]'"
    pytest.importorskip(
        "matplotlib.font_manager", reason=why
    )  # it finds the fonts once, and says so where that is slow
    picture = tmp_path / "pictures" / "timeline.png"
    out = run("budget_timeline.py", tiny.path, "--tokens", "30", "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    # a sampled reply may end before the budget has changed twice
    assert 1 <= out.count("target ") <= 3 and "exits in order: " in out
    assert re.search(r"\d+ of \d+ tokens late", out)


def test_the_unit_and_the_container_start_the_server_of_today() -> None:
    """Neither systemd nor a builder of containers runs here: their commands parse, and their extras exist."""
    verb: Any = getattr(get_command(app), "commands", {})["serve"]
    unit, container = ((EXAMPLES / "deploy" / name).read_text() for name in ("balcony-edge.service", "Containerfile"))
    (started,), (entry,) = (
        re.findall(f"^{key}(.+)$", text, re.MULTILINE)
        for key, text in (("ExecStart=", unit), ("ENTRYPOINT ", container))
    )
    for program, name, *arguments in (shlex.split(started), json.loads(entry)):
        assert Path(program).name == "balcony-edge" and name == "serve"
        verb.make_context("serve", arguments)
    assert "CacheDirectoryMode=0700\nUMask=0077\n" in unit, "other users must not read the files of --prefix-dir"
    # done again, it must not make bundle/bundle, nor write into the weights that the running server has mapped
    assert "cp -rT --remove-destination bundle /srv/balcony/bundle &&" in unit
    # a system user is in no group: CUDA then finds no GPU on a Jetson, Vulkan none at all, and no watts come from a Pi's PMIC
    assert re.search(r"^#   usermod -aG video,render balcony\b", unit, re.MULTILINE)
    known = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in (unit, container):
        (extras,) = re.findall(r"\[([a-z,]+)\]", text)
        assert set(extras.split(",")) <= set(known)


@pytest.mark.slow
def test_litellms_router_loses_no_request_of_a_server_that_is_killed(tiny: Any) -> None:
    if importlib.util.find_spec("litellm") is None:
        pytest.skip("litellm is not installed: pip install --group dev")
    asked = ("--requests", "60", "--clients", "12", "--server", Path(sys.executable).with_name("balcony-edge"))
    done = subprocess.run(
        command("deploy/litellm_failover.py", tiny.path, *asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"] == 0 < found["cut"] and found["whole"] + found["cut"] == 60


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


def module_of(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_timelines_axis_hides_no_late_token(tiny: Any, tmp_path: Path) -> None:
    """A token ten times as late as its target is on the picture, and the title counts it."""
    plt = pytest.importorskip(
        "matplotlib.pyplot", reason="the picture needs matplotlib: pip install 'balcony-edge[plot]'"
    )
    module = module_of("budget_timeline.py")
    with balcony_edge.load(tiny.path, budget=balcony_edge.Budget(tpot_ms=500)) as llm:
        reply = llm.generate("the fox", max_new_tokens=8, ignore_eos=True)
        slow = tuple(
            token._replace(latency_ms=5000.0 if index == 3 else 20.0) for index, token in enumerate(reply.tokens)
        )
        module.plot(dataclasses.replace(reply, tokens=slow), llm, tmp_path / "timeline.png")
    top = plt.gcf().axes[0]
    low, high = top.get_ylim()
    assert low < 20 and high > 5000 and top.get_title().endswith("1 of 7 tokens late")
    plt.close("all")


def test_a_server_tells_what_is_refused_at_the_first_token() -> None:
    """A full queue is known only there; the answer was 200 and empty, with a traceback in the log."""
    module = module_of("embed_in_server.py")

    def full() -> Iterator[Any]:
        raise balcony_edge.BusyError("64 replies wait for others to end: try again later")
        yield

    with module.Server(0, SimpleNamespace(stream=lambda prompt, **_: full()), 8) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            with pytest.raises(urllib.error.HTTPError, match="64 replies wait") as refused:
                urllib.request.urlopen(urllib.request.Request(url, b"the fox"), timeout=60)
        finally:
            server.shutdown()
    assert refused.value.code == 503
    refused.value.close()
