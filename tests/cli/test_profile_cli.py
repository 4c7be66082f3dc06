"""``profile``, ``plan`` and ``compare`` as programs, and the report in a real browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.device.profile import DeviceProfile, Moment, Power, QualityFigure, Sustained
from tests.support.command import invoke, invoke_here, refused, unmeasured

GRID = ("--quick", "-p", "16", "-n", "5", "-d", "0,40", "--pending", "2,5", "-r", "3", "--threads", "1")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def measured(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the tiny bundle."""
    path = tmp_path_factory.mktemp("profiles") / "p.json"
    done = invoke(
        "profile",
        tiny.path,
        *(word for end in ("json", "csv", "jsonl") for word in ("-o", f"{path.parent}/p.{end}")),
        *GRID,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert ("energy is not measured" in done.stderr) == (not DeviceProfile.load(path).power), "most test machines"
    return path


def test_the_grid_fits_what_the_engine_holds(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines may be built for fewer rows than the bundle's context."""
    from balcony_runtime.engine import Engine

    monkeypatch.setattr(Engine, "max_length", 100)
    done = invoke_here("profile", tiny.path, "-p", "120", "-o", tmp_path / "p.json")
    assert done.returncode == 1 and "-p: 121 tokens are needed, but this bundle's context holds 100" in done.stderr


def test_brackets_of_an_engine_are_shown(
    measured: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT and CUDA begin their messages with the place in brackets, which rich takes for a style."""
    note = "stopped by an error, with the measurements until then: [checkMacros.cpp::catchCudaError::181] out of memory"
    whole = DeviceProfile.load(measured)
    cut = whole.model_copy(update={"conditions": whole.conditions.model_copy(update={"notes": (note,)})})
    monkeypatch.setattr("balcony_runtime.profiler.run.measure_profile", lambda *_, **__: cut)
    done = invoke_here("profile", tiny.path, "-o", tmp_path / "p.json")
    assert done.returncode == 1 and note in done.stderr, done.stderr


def test_a_sustained_run_and_memory_are_shown_and_not_only_kept(
    measured: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without -o they would be kept nowhere, after five minutes of load."""
    whole = DeviceProfile.load(measured)
    hot = whole.model_copy(update={"sustained": throttled(whole)})
    monkeypatch.setattr("balcony_runtime.profiler.run.measure_profile", lambda *_, **__: hot)
    shown = " ".join(invoke_here("profile", tiny.path, "--sustain", "300s").stdout.split())
    assert (
        "sustained for 300 s: 6.00 ms a token at exit 5, 3.00 times as long as in the first seconds (2.00 ms)" in shown
    )
    assert f"{whole.memory.per_1k_tokens_bytes / 1e6:.1f} MB for 1,000 tokens" in shown


def test_every_format_has_the_same_numbers(measured: Path) -> None:
    profile = DeviceProfile.load(measured)
    assert profile.command.endswith("--threads 1") and profile.complete
    table = list(csv.DictReader(io.StringIO(measured.with_suffix(".csv").read_text())))
    assert [float(line["p50_ms"]) for line in table] == [entry.timing.p50_ms for entry in profile.entries]
    lines = [json.loads(line) for line in measured.with_suffix(".jsonl").read_text().splitlines()]
    assert [(line["rows"], line["p50_ms"]) for line in lines] == [(e.rows, e.timing.p50_ms) for e in profile.entries]


def test_plan_and_compare_print_for_people_and_programs(measured: Path, tiny: Any, tmp_path: Path) -> None:
    done = invoke_here("plan", "--profile", measured, "--tpot-ms", "1e6", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (
        document["feasible"] and document["shares"] == {"5": 1.0} and all(exit_["met"] for exit_ in document["exits"])
    )
    done = invoke_here("plan", "--profile", measured, "--tpot-ms", "1e6", "--bundle", tiny.path, "--json")
    assert done.returncode == 0 and "is not the bundle" not in done.stderr, done.stderr
    assert [exit_["agreement"] for exit_ in json.loads(done.stdout)["exits"]] == [None, None, 1.0]
    done = invoke_here("plan", "--profile", measured, "--tpot-ms", "1e-6")
    assert done.returncode == 0 and "no allowed exit meets every target" in done.stdout, done.stderr
    budget = tmp_path / "b.toml"
    budget.write_text("temperature_c = 70.0\n")
    done = invoke_here("plan", "--profile", measured, "--budget", budget)
    assert done.returncode == 0 and "temperature_c: this profile does not say" in done.stdout, done.stderr
    document = json.loads(invoke_here("compare", measured, measured, "-o", "json").stdout)
    assert {entry["ratio"] for entry in document["entries"]} == {1.0} and document["differences"] == []
    assert not any(entry["significant"] for entry in document["entries"])
    lines = invoke_here("compare", measured, measured, "-o", "csv").stdout.splitlines()
    assert lines[0].startswith("kind,exit_layer,") and len(lines) == len(document["entries"]) + 1
    done = invoke_here("compare", measured, measured)
    assert done.returncode == 0 and "0 of" in done.stdout, done.stderr
    assert invoke_here("compare", measured, measured, "-o", tmp_path / "diff.csv").stdout == ""
    assert (tmp_path / "diff.csv").read_text().splitlines() == lines
    refused("--all with -o: a file has all quantities anyway", "compare", measured, measured, "--all", "-o", "csv")
    refused("-o diff.txt: must be one of json", "compare", measured, measured, "-o", "diff.txt")


def test_profiles_that_share_only_passes_are_compared_by_these(measured: Path, tmp_path: Path) -> None:
    """As after `profile -d 0` and `profile -d 512`: an empty table would hide that the device is slower."""
    document = json.loads(measured.read_text())
    steps = ("prefill", "decode", "switch_up", "switch_down")
    document["entries"] = [entry for entry in document["entries"] if entry["kind"] not in steps]
    (tmp_path / "passes.json").write_text(json.dumps(document))
    done = invoke_here("compare", measured, tmp_path / "passes.json")
    assert done.returncode == 0 and "LM head" in done.stdout and "0 of 0" not in done.stdout, done.stdout


def test_bad_input_is_one_line(measured: Path, tiny: Any, bundle_copy: Path, tmp_path: Path) -> None:
    refused("there is no such directory", "profile", tmp_path / "none")
    (bundle_copy / "weights.bin").write_bytes(b"\0" * (bundle_copy / "weights.bin").stat().st_size)
    refused("differs from the manifest", "profile", bundle_copy)
    refused("this bundle's context holds 256", "profile", tiny.path, "-d", "0-4096+512")
    refused("is neither a number nor a range", "profile", tiny.path, "-p", "many")
    refused("--sustain soon: must be 1 s to a day", "profile", tiny.path, "--sustain", "soon")
    refused("-o p.xml: must be one of json, jsonl, csv, md", "profile", tiny.path, "-o", "p.xml")
    for two in (("-o", "json", "-o", "csv"), ("-o", tmp_path / "q.json", "--report", tmp_path / "q.json")):
        refused("-o, --report: two of them go to one place", "profile", tmp_path / "none", *two)
    (folder := tmp_path / "folder.json").mkdir()
    refused("is a directory: name a file in it", "profile", tiny.path, "-o", folder)
    refused("there is no such file: make one with `balcony-edge profile`", "compare", measured, tmp_path / "p.json")
    refused("give one of the two", "plan", "--profile", measured)
    (budget := tmp_path / "chat.toml").write_text("exit_layer = 4")
    done = invoke_here("plan", "--profile", measured, "--budget", budget)  # notes on the profile come before
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith(f"balcony-edge: {budget}: exit_layer = 4, but this bundle has"), (
        line
    )
    refused("the context holds 256", "plan", "--profile", measured, "--tpot-ms", "5", "-p", "200")
    (tmp_path / "p.json").write_text("{}")
    refused("schema_version = None", "compare", measured, tmp_path / "p.json")


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    quiet = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    program = f"{limit}{quiet}from balcony_edge.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", program, "profile", str(tiny.path), "-o", str(path), *GRID]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=unmeasured())
    assert done.returncode == 1 and "cannot be written" in done.stderr and "free space" in done.stderr, done.stderr
    assert "time between tokens" in done.stdout, "what was measured is shown all the same"
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_kept_where_nobody_reads_what_is_shown(
    measured: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `profile -o p.json | less`, which was left while the device was measured: rich then ends the process."""

    whole = DeviceProfile.load(measured)
    monkeypatch.setattr("balcony_runtime.profiler.run.measure_profile", lambda *_, **__: whole)
    monkeypatch.setattr("balcony_edge.cli.device.profile._show", lambda _: sys.exit(1))
    done = invoke_here("profile", tiny.path, "-o", tmp_path / "p.json")
    assert done.returncode == 1 and DeviceProfile.load(tmp_path / "p.json") == whole


def test_ctrl_c_writes_what_is_measured(tiny: Any, tmp_path: Path, interruptible: Any) -> None:
    path = tmp_path / "p.json"
    arguments = ["profile", str(tiny.path), "-o", str(path), *GRID[:-4], "--threads", "1", "--sustain", "200s"]
    program = (
        "import sys; from balcony_runtime.profiler import run\n"
        "real = run._sustain\n"
        "def told(*a):\n    print('sustained', file=sys.stderr, flush=True); return real(*a)\n"
        "run._sustain, run.BURST_S = told, 0.2\n"
        "from balcony_edge.cli import main; main()"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    process = interruptible(command, stderr=subprocess.PIPE, text=True)
    assert any("sustained" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    profile = DeviceProfile.load(path)
    assert not profile.complete and profile.select("decode")
    assert profile.sustained is None or profile.sustained.seconds < 150  # interrupted before its end


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    return found


def throttled(profile: DeviceProfile) -> Sustained:
    """Five minutes after which a token takes three times as long."""
    timing = profile.select("decode")[0].timing
    burst, end = (timing.model_copy(update={"p50_ms": ms}) for ms in (2.0, 6.0))
    moments = tuple(Moment(at_s=s, p50_ms=ms, celsius=c) for s, ms, c in ((0.0, 2.5, 51.0), (240.0, 6.0, 83.0)))
    return Sustained(exit_layer=5, seconds=300.0, burst=burst, sustained=end, moments=moments)


@pytest.fixture(scope="module")
def page(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceProfile, Path]:
    """The report of a profile that has every part, and names that would end a script element."""
    report = pytest.importorskip("balcony_runtime.profiler.report")
    pytest.importorskip("plotly", reason="the report is an extra: pip install 'balcony-edge[report]'")
    bare = DeviceProfile.load(measured)
    profile = bare.model_copy(
        update={
            "command": "balcony-edge profile '</script><script>throw 1</script>'",
            "quality": tuple(
                QualityFigure(exit_layer=layer, metric="agreement", on="a.txt", value=value)
                for layer, value in ((2, 0.53), (3, 0.61))
            ),
            "power": tuple(
                Power(exit_layer=layer, rail="cpu", source="rapl", busy_w=9.5, idle_w=3.25, joules_per_token=layer / 7)
                for layer in bare.bundle.exit_layers
            ),
            "sustained": throttled(bare),
        }
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(profile, path)
    return profile, path


def render(browser: str, path: Path, script: str = "", *options: str) -> tuple[str, list[str]]:
    """``(document after its scripts have run, console lines)``; ``script`` runs in the page when it has loaded."""
    probe = path.with_name("probe.html")
    text = path.read_text(encoding="utf-8")
    probe.write_text(text.replace("</body>", f"<script>addEventListener('load', () => {{{script}}})</script></body>"))
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--dump-dom",
    )
    command = [browser, *flags, *options, probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(document: str) -> Any:
    found = re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


#: Points that Plotly has drawn (``calcdata``, not its input), by chart and trace.
DRAWN = """
const drawn = {};
for (const chart of document.querySelectorAll('.js-plotly-plot'))
  drawn[chart.id] = chart.calcdata.map(trace => [trace[0].trace.name, trace.map(p => [p.x, p.y, p.s])]);
const pre = document.createElement('pre');
pre.id = 'probe';
const right = part => part.getBoundingClientRect().right;
const chart = document.querySelector('#chart-sustained');
pre.textContent = JSON.stringify({drawn, edge: right(chart.querySelector('.main-svg')),
  degrees: Math.max(...[...chart.querySelectorAll('.y2tick text')].map(right)), width: document.documentElement.scrollWidth,
  text: getComputedStyle(document.body).color, axis: document.querySelector('.xtick text').style.fill,
  requests: performance.getEntriesByType('resource').map(entry => entry.name)});
document.body.append(pre);
"""


def test_the_report_draws_the_profiles_numbers_and_fetches_nothing(
    browser: str, page: tuple[DeviceProfile, Path]
) -> None:
    profile, path = page
    document, console = render(browser, path, DRAWN)
    assert console == []
    seen = probed(document)
    assert seen["requests"] == []
    drawn = {name: dict(traces) for name, traces in seen["drawn"].items()}
    assert set(drawn) == {
        "chart-quality-latency", "chart-quality-energy", "chart-decode", "chart-parts", "chart-switches", "chart-sustained"
    }  # fmt: skip
    run = {name: [(x, y) for x, y, _ in points] for name, points in drawn["chart-sustained"].items()}
    assert run == {"exit 5": [(0, 2.5), (240, 6)], "burst": [(0, 2), (300, 2)], "°C": [(0, 51), (240, 83)]}
    assert "3.00 times as long as in the first seconds" in document
    assert seen["degrees"] <= seen["edge"], "numbers of the axis are cut off"
    assert len({entry.rows for entry in profile.select("prefill")}) == 1  # one prompt length: no chart of one point
    for layer in profile.bundle.exit_layers:
        entries = sorted(profile.select("decode", layer), key=lambda entry: entry.context)
        points = [(x, y) for x, y, _ in drawn["chart-decode"][f"exit {layer}"]]
        assert points == [(entry.context, entry.timing.p50_ms) for entry in entries]
        predicted = [y for _, y, _ in drawn["chart-decode"][f"exit {layer}, predicted"]]
        assert predicted == [entry.predicted_ms for entry in entries]
    (point,) = drawn["chart-quality-energy"]["exit 2"]
    assert point[:2] == [profile.joules_per_token(2, "cpu"), 0.53]
    # The parts of an exit add up to its price.
    bars = [[size for _, _, size in trace] for trace in drawn["chart-parts"].values()]
    for index, layer in enumerate(profile.bundle.exit_layers):
        assert sum(bar[index] for bar in bars) == pytest.approx(profile.costs.steady_ms(layer, 0), rel=1e-9)
    # The tables show the figures of the file, and the page embeds the file.
    cells = [float(value) for value in re.findall(r'data-value="([^"]+)"', document)]
    for entry in profile.select("prefill"):
        assert entry.timing.p50_ms in cells and entry.timing.p99_ms in cells
    embedded = re.search(r'<script type="application/json" id="profile">(.*?)</script>', document, re.DOTALL)
    assert embedded is not None and DeviceProfile.model_validate_json(embedded[1]) == profile
    assert "&lt;script&gt;throw 1" in document


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_follows_the_colour_scheme(scheme: str, browser: str, page: tuple[DeviceProfile, Path]) -> None:
    preference = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    document, console = render(browser, page[1], DRAWN, preference)
    seen = probed(document)
    assert console == []
    ink = "rgb(230, 237, 243)" if scheme == "dark" else "rgb(28, 33, 40)"
    assert seen["text"] == ink == seen["axis"]


def test_the_report_fits_a_phone(browser: str, page: tuple[DeviceProfile, Path]) -> None:
    """At 375 pixels, in a frame of the same origin: a window of headless Chromium is at least 500 wide."""
    frame = page[1].with_name("frame.html")
    inner = html.escape(page[1].read_text(encoding="utf-8"))
    frame.write_text(f'<body><iframe style="width:375px; height:800px; border:0" srcdoc="{inner}"></iframe></body>')
    measure = """
const page = document.querySelector('iframe').contentDocument, wide = [];
for (const part of page.querySelectorAll('body *'))
  if (part.getBoundingClientRect().right > 376 && !part.closest('.scroll')) wide.push(part.outerHTML.slice(0, 80));
const pre = document.createElement('pre');
pre.id = 'probe';
const charts = page.querySelectorAll('.main-svg').length;
pre.textContent = JSON.stringify({width: page.documentElement.scrollWidth, charts, wide});
document.body.append(pre);
"""
    seen = probed(render(browser, frame, measure)[0])
    assert seen["width"] <= 375 and seen["wide"] == [] and seen["charts"] > 0, seen


def test_a_profile_of_a_busy_device_says_so_whenever_it_is_used(measured: Path, tiny: Any, tmp_path: Path) -> None:
    document = json.loads(measured.read_text())
    note = "other processes used 89% of the CPU: measure again on a quiet device"
    document["conditions"] |= {"others_cpu_share": 0.89, "notes": [note]}
    busy = tmp_path / "busy.json"
    busy.write_text(json.dumps(document))
    uses = (
        ("plan", "--profile", busy, "--tpot-ms", "9"),
        ("plan", "--profile", busy, "--tpot-ms", "9", "--json"),
        ("simulate", "--profile", busy, "--tpot-ms", "9", "-n", "8"),
        ("compare", measured, busy),
        ("run", tiny.path, "the fox", "-n", "2", "--profile", busy),
    )
    for arguments in uses:
        # the engine logs it, which only a process of its own shows on stderr
        done = (invoke if arguments[0] == "run" else invoke_here)(*arguments)
        assert done.returncode == 0 and f"{busy}: while it was measured: {note}" in done.stderr, (arguments, done)
    from balcony_runtime.profiler.report import report

    assert f"While it was measured: {note}" in report(DeviceProfile.load(busy))


def test_a_report_has_the_memory_of_recurrent_layers(measured: Path) -> None:
    """Their states do not grow with the tokens: of Mamba nearly all memory of a reply."""
    from balcony_runtime.profiler.report import _facts

    profile = DeviceProfile.load(measured)
    memory = profile.memory.model_copy(update={"sequence_bytes": 86_000_000})
    assert "<td>86.0 MB</td>" in _facts(profile.model_copy(update={"memory": memory}))


def test_a_report_of_a_slow_device_has_its_rate(measured: Path) -> None:
    from balcony_runtime.profiler.report import _summary

    profile = DeviceProfile.load(measured)
    first = min(profile.select("decode"), key=lambda entry: entry.context)
    slow = first.model_copy(update={"timing": first.timing.model_copy(update={"p50_ms": 2500.0})})
    shown = _summary(profile.model_copy(update={"entries": (slow,)}))
    assert f"exit {slow.exit_layer}: 0.4 tokens a second" in shown


def test_a_script_that_fails_would_be_seen(browser: str, page: tuple[DeviceProfile, Path]) -> None:
    _, console = render(browser, page[1], "throw new Error('seen')")
    assert len(console) == 1 and "seen" in console[0]


def test_a_name_that_looks_like_a_cell_is_a_text(measured: Path) -> None:
    report = pytest.importorskip("balcony_runtime.profiler.report")
    pytest.importorskip("plotly", reason="the report is an extra: pip install 'balcony-edge[report]'")
    profile = DeviceProfile.load(measured)
    named = profile.residuals[0].model_copy(update={"part": "<td onclick=forged()>"})
    page = report.report(profile.model_copy(update={"residuals": (named,)}))
    assert "<td onclick=forged()>" not in page and "&lt;td onclick=forged()&gt;" in page


def test_ten_seconds_and_more_are_no_powers_of_ten(measured: Path) -> None:
    report = pytest.importorskip("balcony_runtime.profiler.report")
    pytest.importorskip("plotly", reason="the report is an extra: pip install 'balcony-edge[report]'")
    profile = DeviceProfile.load(measured)
    entry = profile.select("decode")[0].model_copy(update={"predicted_ms": 12345.678})
    page = report.report(profile.model_copy(update={"entries": (entry,)}))
    assert '<td data-value="12345.678">12346</td>' in page


def test_a_report_without_its_library_names_the_cure(tiny: Any, tmp_path: Path) -> None:
    program = "import sys; sys.modules['plotly'] = None; from balcony_edge.cli import main; main()"
    command = [sys.executable, "-c", program, "profile", str(tiny.path), "--report", str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "pip install 'balcony-edge[report]'" in done.stderr and done.stderr.count("\n") == 1
