"""The documentation keeps up: generated pages are fresh, links lead somewhere, examples of code are Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.bundle.manifest import MANIFEST, Manifest
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply, Token, TokenStream

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("balconies/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_command_lines_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_cli.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.relative_to(ROOT)}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.relative_to(ROOT)}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_compiles(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, str(page), "exec")
        if language == "json":
            json.loads(code)


def test_every_page_is_linked() -> None:
    linked = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in ROOT.glob("docs/[!R]*.md"):  # docs/README.md is the index
        assert f"{page.name})" in linked or f"{page.name}#" in linked, f"no page links to docs/{page.name}"


def test_the_api_page_names_everything() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    names = [*balcony_edge.__all__, *Budget.model_fields]
    for kind in (LLM, Token, Reply, TokenStream, SamplingParams):
        members = {*vars(kind), *getattr(kind, "__annotations__", {})}
        names += [kind.__name__, *(name for name in members if not name.startswith("_"))]
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_the_format_page_names_every_key() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")

    def keys(schema: object) -> set[str]:
        if isinstance(schema, dict):
            found = set(schema.get("properties", {}))
            return found.union(*(keys(value) for value in schema.values()))
        return set().union(*(keys(value) for value in schema)) if isinstance(schema, list) else set()

    assert MANIFEST in text
    assert not [key for key in sorted(keys(Manifest.model_json_schema())) if not re.search(rf"\b{key}\b", text)]
