"""The documentation keeps up: generated pages are fresh, links lead somewhere, examples of code are Python."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

import balcony_edge
from balcony_edge.bundle.manifest import MANIFEST, BlockSpec, Manifest
from balcony_edge.cli import app
from balcony_edge.cli.options import OnDevice
from balcony_edge.device.machine import Machine
from balcony_edge.simulation.plant import RANGES, Physics
from balcony_runtime.backends.choose import DeviceName
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply, Token, TokenStream
from balcony_runtime.sensors.jetson import _scope
from balcony_runtime.sensors.sampler import MAX_RATE_HZ
from balcony_runtime.serve.bodies.fields import COMPLETION, FOREIGN
from balcony_runtime.serve.bodies.refusal import _KINDS
from balcony_runtime.serve.http.connections import KEEP_ALIVE_S
from balcony_runtime.serve.work.metrics import Metrics
from balcony_runtime.serve.work.service import Limits
from tests.mutation.mutants import module_of

ROOT = Path(__file__).parents[1]
SKIPPED = {".cache", ".git", "dist", "node_modules"}  # what tools put into a checkout, next to environments


def pages() -> Iterator[Path]:
    """The pages of the project."""
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in SKIPPED and not Path(folder, name, "pyvenv.cfg").exists()]
        yield from (Path(folder, name) for name in files if name.endswith(".md"))


PAGES = sorted(pages())
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: lower case, spaces as hyphens, no punctuation, doubles numbered."""
    found: set[str] = set()
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} (.*?)#*$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w -]", "", words).replace(" ", "-")
        count = 0
        while (name := slug if count == 0 else f"{slug}-{count}") in found:
            count += 1
        found.add(name)
    return found


def test_the_page_of_the_server_names_every_field_that_is_refused() -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    told = text.split("so they are refused with 400:", 1)[1].split("Values", 1)[0]
    assert set(re.findall(r"`(\w+)`", told)) - {"n", "best_of", "max_tokens"} == set(FOREIGN)


def test_the_page_of_the_server_has_its_bounds() -> None:
    """Those without an option; the tests of the server set their own, which are shorter."""
    text, limits = (ROOT / "docs" / "server.md").read_text(encoding="utf-8"), Limits()
    for words in (
        f"sends its headers slowly | {limits.head_s:g} s from connecting",
        f"is silent within the TLS handshake | {limits.head_s:g} s |",
        f"keeps a connection idle between two requests | {KEEP_ALIVE_S} s, longer",
        f"sends its body slowly | 408 after {limits.body_s:g} s |",
        f"| 408 | `slow_body` | the body takes longer than {limits.body_s:g} s |",
        f"its reply is paused; after {limits.unread_s:g} s in which it read less",
        f"opens many connections | {limits.connections} at most",
        f"over {limits.bodies_bytes / 1e6:g} MB with those of others",
    ):
        assert words in text


def test_the_page_of_the_server_has_every_metric() -> None:
    """No more and no fewer; its names are what dashboards and alarms ask for."""
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    table = text.split("\n## Metrics\n", 1)[1].split("\n## ", 1)[0]
    gauges: dict[str, Any] = dict.fromkeys(("running", "waiting", "pending", "slowdown"), lambda: 0.0)
    page = Metrics((2, 5), kept={}, readings=tuple, **gauges).text().decode()
    shown = {name for name in re.findall(r"^# TYPE (\w+)", page, re.MULTILINE) if not name.endswith("_created")}
    assert shown == set(re.findall(r"`((?:gen_ai|balcony)_\w+)", table))


def test_the_page_of_the_server_has_every_error_code() -> None:
    """No more and no fewer: the codes of all refusals in the server's code."""
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| \d{3}[^|]*\| ([^|]+) \|", text.split("\n## Errors\n", 1)[1], re.MULTILINE)
    given = {"method_not_allowed", *(reason for _, _, reason, _ in _KINDS)}
    for file in (ROOT / "runtime" / "balcony_runtime" / "serve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = {"RefusedError": 2, "busy": 1}.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and place is not None and isinstance(node.args[place], ast.Constant):
                given.add(str(node.args[place].value))
    assert given - {""} == set(re.findall(r"`(\w+)`", " ".join(cells)))


def test_the_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.relative_to(ROOT)}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{page.relative_to(ROOT)}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "export", ROOT / "runtime", page.parent)
    for path in re.findall(r"`([\w./-]+/[\w-]+\.(?:py|toml|md|ipynb))`", page.read_text(encoding="utf-8")):
        assert any((root / path).exists() for root in roots), (
            f"{page.relative_to(ROOT)} names {path}, which is not there"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_log_is_cited_by_a_link(page: Path) -> None:
    outside_of_links = re.sub(r"\[[^\]]*\]\([^)]*\)", "", page.read_text(encoding="utf-8"))
    assert not re.search(r"\bLOG\.md", outside_of_links), (
        f"{page.relative_to(ROOT)}: link to the heading of docs/LOG.md"
    )


def test_code_cites_headings_of_the_log() -> None:
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^#+ (.+)$", log, re.MULTILINE))
    for folder in ("balcony_edge", "export", "runtime", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = re.sub(
                r"\s*\n\s*(#:?)?\s*", " ", path.read_text(encoding="utf-8")
            )  # citations may be broken over lines
            cited = re.findall(r"docs/LOG\.md(?:, \"([^\"]+)\")?", text)
            assert set(cited) <= headings, f"{path.relative_to(ROOT)}: name a heading of docs/LOG.md after it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_compiles(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, str(page), "exec")
        if language == "json":
            json.loads(code)


def test_pages_for_contributors_run_the_python_of_make() -> None:
    """Nothing tells them to activate `.venv`, and another Python lacks the packages."""
    for page in ("CONTRIBUTING.md", "docs/mutation.md", ".github/pull_request_template.md"):
        assert not re.search(r"(?<!/)\bpython \w+/", (ROOT / page).read_text(encoding="utf-8")), page


@pytest.mark.parametrize(
    "file", ["balcony_edge/budget.py", "export/balcony_export/output.py", "runtime/balcony_runtime/sensors/__init__.py"]
)
def test_a_mutant_has_the_name_that_its_module_is_imported_by(file: str) -> None:
    """mutmut compares the two: under another name no mutant ever runs, and all of them survive."""
    spec = importlib.util.find_spec(module_of(file))
    assert spec is not None and spec.origin == str(ROOT / file)


def test_the_readme_stays_a_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150 and len(text.encode()) <= 9_000, "move details from README.md to docs/"
    assert "docs/variants.md#width-and-depth-together" in text, "when to cut a model too"


def test_pages_tell_the_speed_of_int4_as_the_readme_measured_it() -> None:
    row = re.search(
        r"\| ms a token[^|]*\| [\d., ]*?([\d.]+); int4 [\d., ]*?([\d.]+) \|",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert row
    for page in ("README.md", "first-ten-minutes.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"{float(row[1]) / float(row[2]):.1f} times as fast" in text, page


def test_terms_that_the_architecture_uses_are_in_its_table() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## Terms\n", 1)[1].split("\n## ", 1)[0]
    terms = {term for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for term in row.split(", ")}
    assert terms >= {"prices", "slowdown", "pace", "round", "member", "portable set", "lowered set"}


def test_the_page_of_the_controller_has_the_constants_that_no_profile_replaces() -> None:
    """The others are the profile's, or depend on it: as `physics` of `simulate` takes them."""
    text = (ROOT / "docs" / "controller.md").read_text(encoding="utf-8")
    replaced = {"noise", "base_memory_bytes", "row_bytes", "idle_w", "busy_w", "throttle_c", "kelvin_per_watt"}
    (others,) = re.findall(r"^\| the others \| (.+) \|$", text, re.MULTILINE)
    told = {key: float(value) for key, value in re.findall(r"`(\w+)=([\d.]+)`", others)}
    assert told == {key: float(getattr(Physics(), key)) for key in RANGES.keys() - replaced}


def test_every_page_is_linked() -> None:
    linked = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in ROOT.glob("docs/[!R]*.md"):  # docs/README.md is the index
        assert f"{page.name})" in linked or f"{page.name}#" in linked, f"no page links to docs/{page.name}"


def test_budgets_and_profiles_of_examples_are_in_the_repository() -> None:
    """Or the page makes them, with `-o`."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/[!L]*.md")):
        text = page.read_text(encoding="utf-8")
        made = set(re.findall(r"-o (\S+\.json)", text)) | {"my-device.json"}  # docs/profiling.md
        named = set(re.findall(r"--(?:budget|profile) (\S+\.(?:toml|json))", text)) - made
        assert not [name for name in named if not (ROOT / name).exists()], page


def test_the_api_page_names_everything() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    names = [*balcony_edge.__all__]  # the fields of Budget are in docs/budget-file.md
    for kind in (LLM, Token, Reply, TokenStream, SamplingParams, balcony_edge.CallReader):
        members = {*vars(kind), *getattr(kind, "__annotations__", {})}
        names += [kind.__name__, *(name for name in members if not name.startswith("_"))]
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_the_architecture_names_every_module_of_the_decisions() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    folder = ROOT / "balcony_edge" / "control"
    modules = [path.name for path in (*folder.glob("[!_]*.py"), *folder.glob("company/[!_]*.py"))]
    assert not [name for name in modules if f"/{name}`" not in text and f"`{name}`" not in text]
    packages = [path.parent.name for path in (ROOT / "runtime" / "balcony_runtime").glob("*/__init__.py")]
    assert not [name for name in packages if f"| `balcony_runtime.{name}` |" not in text]


def test_a_name_that_has_several_places_is_in_all_of_them() -> None:
    """Devices and sampling parameters are named again on the command line and by the server."""
    assert get_args(get_args(OnDevice)[0]) == get_args(DeviceName)
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - {"logit_bias"} <= {option.name for option in get_command(app).commands["run"].params}
    assert names - {"regex"} <= COMPLETION.keys()  # guided_regex


def test_the_page_of_profiling_has_what_makes_a_profile_doubtful() -> None:
    """All keys of the device but its kernel: firmware and updates change that without a change of the costs."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8"))
    told = text.split("warns if it runs on another device (", 1)[1].split(")", 1)[0].lower()
    words = {"cpus": "number of cpus", "memory_bytes": "memory", "power_mode": "power mode"}
    keys = Machine.model_fields.keys() - {"system"}
    assert sorted(told.split(", ")) == sorted(words.get(key, key) for key in keys)


def test_the_page_of_sensors_lists_the_sources_in_order_of_trust(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "sensors.md").read_text(encoding="utf-8")
    table = text.split("\n## Sources\n", 1)[1].split("\n###", 1)[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert told == [source.name for source in balcony_edge.device_sources(tmp_path)]


def test_the_page_of_sensors_has_the_rate_of_reading() -> None:
    default = inspect.signature(balcony_edge.Sensors).parameters["rate_hz"].default
    told = f"reads it `rate_hz` times a second ({default:g}; {MAX_RATE_HZ:g} at most)"
    assert told in (ROOT / "docs" / "sensors.md").read_text(encoding="utf-8")


def test_the_errors_of_a_reply_are_named() -> None:
    """A program that catches what is named must not end by a budget for other exits, or by a full queue."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    told = page.split("Options of `stream` and `generate`:", 1)[1].split("\n## ", 1)[0]
    reply = ("InputError", "ContextLengthError", "InfeasibleError", "MissingDependencyError")
    for name in (*reply, "BudgetError", "BusyError", "DeviceError"):
        assert f" {name}: " in str(LLM.stream.__doc__) and f"`{name}`" in told, name


def test_the_errors_of_a_sequence_are_named() -> None:
    """On a CPU, too, a pass that fails is the device's error."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    told = page.split("\n## Engine and TokenSequence\n", 1)[1].split("\n## ", 1)[0]
    for name in ("InputError", "ContextLengthError", "DeviceError"):
        assert f" {name}: " in str(balcony_edge.TokenSequence.advance.__doc__) and f"`{name}`" in told, name


@pytest.mark.parametrize(("page", "name"), [("server.md", "infeasible"), ("python-api.md", "InfeasibleError")])
def test_pages_say_that_a_hot_device_ends_a_reply(page: str, name: str) -> None:
    """Also of a budget that does not ask for an error: ``Decision.stops``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert re.search(rf"`{name}`[^`]+(?:`[^`]+`)?[^`]*`critical_temperature_c`", text)


def test_pages_and_examples_import_the_device_side_from_the_top() -> None:
    """Only what needs a workstation, such as the adapter of lm-evaluation-harness, lies deeper."""
    deeper = re.compile(r"balcony_runtime\.|(?:from|import) balcony_edge\.|\bbalcony_edge\.[a-z]+\.\w")
    for file in (ROOT / "README.md", *ROOT.glob("docs/[!L]*.md"), *ROOT.glob("examples/*.py")):
        assert not deeper.findall(file.read_text(encoding="utf-8")), file


def test_the_format_page_names_every_key() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")

    def keys(schema: object) -> set[str]:
        if isinstance(schema, dict):
            found = set(schema.get("properties", {}))
            return found.union(*(keys(value) for value in schema.values()))
        return set().union(*(keys(value) for value in schema)) if isinstance(schema, list) else set()

    assert MANIFEST in text
    assert not [key for key in sorted(keys(Manifest.model_json_schema())) if not re.search(rf"\b{key}\b", text)]


def test_the_manifest_and_the_format_page_list_the_same_files() -> None:
    """Both show the files of a bundle as an indented block that begins with its directory."""

    def files(text: str) -> set[str]:
        (block,) = re.findall(r"^    bundle/\n((?:      .+\n)+)", text, re.MULTILINE)
        return set(re.findall(r"[\w<>*]+\.(?:json|onnx|bin|jinja)\b|\btensorrt/<name>/", block))

    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert files(page) == files((ROOT / "balcony_edge" / "bundle" / "manifest.py").read_text(encoding="utf-8"))


def test_the_format_page_says_how_a_token_table_is_stored() -> None:
    """A reader of another project has this page only."""
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    _, _, rules = text.partition("\n## The token table\n")
    rules, _, _ = rules.partition("\n## ")
    keys = ("offset", "dtype", "scale", "blocks", *BlockSpec.model_fields)
    assert not [key for key in keys if f"`{key}`" not in rules]
    assert "little-endian" in rules and "low bits" in rules


def test_the_format_page_says_which_tensors_are_in_the_graphs() -> None:
    from balcony_export.graph.weights import INLINE_BYTES

    text = re.sub(r"\s+", " ", (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8"))
    assert f"except tensors below {INLINE_BYTES:,} bytes, which are in the graphs" in text


def test_the_format_page_has_the_graphs_of_a_real_bundle(tiny: Any) -> None:
    """Each graph of the set ``graphs`` has the inputs and outputs of its line in the table, no more and no fewer."""
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(stage_<i>|balcony_<e>|norm|lm_head)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    written = {name: tuple(_tensors(part) for part in parts) for name, *parts in lines}
    manifest = Manifest.model_validate_json((tiny.path / MANIFEST).read_text(encoding="utf-8"))
    model = manifest.model
    widths = {"D": model.hidden_size, "F": model.num_kv_heads * model.head_dim, "V": model.vocab_size}
    symbols = {"B": "batch", "T": "rows", "Q": "queries", "S": "capacity", **widths}
    seen = set()
    for graph, spec in manifest.graphs.items():
        if graph == "backbone":  # all stages in one graph
            continue
        kind = re.sub(r"^balcony_\d+$", "balcony_<e>", re.sub(r"^stage_\d+$", "stage_<i>", graph))
        seen.add(kind)
        for ports, told in zip((spec.inputs, spec.outputs), written[kind], strict=True):
            there = [(_without_layer(port.name), port.dtype, tuple(port.shape)) for port in ports]
            assert set(there) == {
                (name, "float32" if dtype == "float" else dtype, tuple(symbols[size] for size in shape))
                for name, dtype, shape in told
            }, graph
    assert seen == set(written)


def _tensors(part: str) -> set[tuple[str, str, tuple[str, ...]]]:
    """Tensors of a cell: name without its layer, type, shape."""
    found = set()
    for names, dtype, shape in re.findall(r"`([^`]+)` (\w+) \(([^)]*)\)", part):
        for choice in re.sub(r".*\{(.*)\}.*", r"\1", names).split(",") if "{" in names else [""]:
            name = re.sub(r"\{.*\}", choice, names)
            found.add(
                (re.sub(r"_<.*>$", "", name), dtype, tuple(dim for dim in shape.replace(" ", "").split(",") if dim))
            )
    return found


def _without_layer(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def test_the_command_line_page_has_every_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")

    def leaves(command: Any) -> list[Any]:
        inner = getattr(command, "commands", {}).values()
        return [leaf for one in inner for leaf in leaves(one)] if inner else [command]

    options = [
        option for leaf in leaves(get_command(app)) for one in leaf.params for option in one.opts if option[:2] == "--"
    ]
    assert len(options) > 100 and not [option for option in options if option not in text]


def test_the_page_of_quantization_knows_the_gptq_of_onnx_runtime() -> None:
    """It comes with the package, without a module of its own to install."""
    (home,) = importlib.util.find_spec("onnxruntime").submodule_search_locations  # type: ignore[union-attr,misc]
    assert "def gptq_quantize" in Path(home, "quantization/neural_compressor/weight_only.py").read_text(
        encoding="utf-8"
    )
    assert "Runtime brings a copy of neural-compressor's" in (ROOT / "docs/quantization.md").read_text(encoding="utf-8")


def test_no_optimizer_is_called_that_of_the_paper() -> None:
    """Its section 4.1 gives a rate and a cosine, and names no optimizer and no warm-up (docs/training.md)."""
    files = [*PAGES, *(ROOT / "benchmarks" / "paper").glob("*.py")]
    for file in files:
        text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
        assert not re.search(r"paper's optimizer|AdamW[^.:]*, as in the paper", text), file


def test_the_page_of_training_has_the_files_that_a_run_leaves() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("\n## What a run leaves\n", 1)[1].split("\n\n", 1)[0]
    files = ("export/balcony_export/train/trainer.py", "balcony_edge/cli/workstation/train.py")
    code = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    names = set(re.findall(r'work / "([\w.]+)"', code))
    assert names >= {"curve.png", "states.bin"} and not [name for name in names if name not in table]


def test_the_model_card_adds_up() -> None:
    """Tokens of all runs, and their share of the pretraining as `train` prints it."""
    text = (ROOT / "balconies" / "smollm2-135m-instruct" / "README.md").read_text(encoding="utf-8")
    (runs, total) = re.findall(r"^\| Training cost in tokens \| (.+) = ([\d.]+)M \|$", text, re.MULTILINE)[0]
    assert round(sum(map(float, re.findall(r"[\d.]+", runs))), 1) == float(total)
    (share,) = re.findall(r"^\| Percentage of pretraining tokens \| (\S+) % \|$", text, re.MULTILINE)
    assert share == f"{100 * float(total) / 2e6:.2g}"  # 2 T tokens: the model card of SmolLM2-135M


def test_the_model_card_has_the_recipes_of_its_runs() -> None:
    """The record is the seventeenth run's; the first five compared the whole vocabulary, which is not the default any more."""
    home = ROOT / "balconies" / "smollm2-135m-instruct"
    text, index = (home / "README.md").read_text(encoding="utf-8"), json.loads((home / "balconies.json").read_text())
    recipe = index["exits"]["14"]["training"]["recipe"]
    for row, option in (("step", "batch_rows"), ("schedule", "warmup_steps")):
        (cell,) = re.findall(rf"^\| {row} \| (.+) \|$", text, re.MULTILINE)
        assert f"{recipe[option]} from the fourteenth run on" in cell
    commands = re.findall(r"^balcony-edge train (.+)$", text.replace("\\\n", " "), re.MULTILINE)
    first, fifth = (one for one in commands[:5] if "--reuse" not in one)  # the others fail today
    assert "--vocabulary 0 " in first and "--vocabulary 0 " in fifth


def test_the_page_of_tensorrt_names_the_architectures_that_are_built() -> None:
    """The builder was given no others."""
    tests = (ROOT / "tests" / "export" / "graph" / "test_tensorrt.py").read_text(encoding="utf-8")
    (built,) = re.findall(r"^ARCHITECTURES = (\([^()]*\))$", tests, re.MULTILINE)
    text = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    told = re.findall(r"`(\w+)`", text.split("tiny models of", 1)[1].split("No other architecture", 1)[0])
    assert set(told) == {name.partition("-")[0] for name in ast.literal_eval(built)}


@pytest.mark.parametrize("page", ["streams.md", "tensorrt.md"])
def test_pages_say_which_engines_share_no_passes(page: str) -> None:
    """The only ones for JetPack 7.0 and 7.1; ONNX Runtime shares passes over the same graphs."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert "TensorRT engines with `--operators plain`" in text


@pytest.mark.parametrize("page", ["first-ten-minutes.md", "tensorrt.md"])
def test_pages_name_the_driver_that_an_nvidia_card_needs(page: str) -> None:
    """Release notes of CUDA 13: driver 580 or newer; the package of the extra has the number in its name."""
    assert "tensorrt-rtx-cu13>=" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "driver 580 or newer" in (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("rail", ["cpu", "gpu"])
def test_the_page_of_sensors_names_the_boards_with_a_rail(rail: str) -> None:
    """Those of its table of Jetsons on which a budget with this `power_rail` is measured, and no others."""
    text = (ROOT / "docs" / "sensors.md").read_text(encoding="utf-8")
    (told,) = re.findall(rf"^\| `{rail}` \| .+; (.+) \|$", text, re.MULTILINE)
    boards = re.findall(r"^\| ([^|]+) \| ((?:VDD|POM)[^|]+) \|", text, re.MULTILINE)
    measured = [names for names, rails in boards if rail in map(_scope, re.findall(r"\w+", rails))]
    assert told == ", ".join(measured)


def test_the_udev_rule_of_rapl_is_for_a_group_that_the_page_makes() -> None:
    """Debian and Ubuntu have no group `power`, so chgrp would fail and the counters stay root's."""
    text = (ROOT / "docs" / "sensors.md").read_text(encoding="utf-8")
    (group,) = re.findall(r"/bin/chgrp (\S+) ", text)
    assert f"groupadd --system {group}`" in text and f"usermod -aG {group} " in text


@pytest.mark.parametrize("page", ["first-ten-minutes.md", "jetson.md"])
def test_a_device_makes_an_environment_before_it_installs(page: str) -> None:
    """Debian's and Ubuntu's own Python refuses `pip install` (PEP 668), and has no venv before `python3-venv`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    install = text.index("py3-none-any.whl[cpu]'")
    block = text[text.rindex("\n\n", 0, install) : install]
    assert block.index("python3-venv") < block.index("python3 -m venv")
