"""The bundle loader names what is wrong: every kind of damage is one line, and nothing outside the directory is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle, fingerprint, read_manifest
from balcony_edge.bundle.manifest import MANIFEST, Estimate, Quality, TextQuality
from balcony_edge.bundle.quality import record_quality
from balcony_edge.errors import BundleError


def edit(bundle: Path, change: Callable[[dict[str, Any]], None], *, refresh: bool = True) -> None:
    """Change the manifest; ``refresh`` recomputes the fingerprint as a careful forger would."""
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    if refresh:
        document["fingerprint"] = fingerprint(document)
    path.write_text(json.dumps(document))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def refused(bundle: Path, pattern: str, **options: bool) -> None:
    with pytest.raises(BundleError, match=pattern) as caught:
        Bundle.open(bundle, **options)
    assert "\n" not in str(caught.value)


def test_a_bundle_opens_and_describes_itself(tiny: Any) -> None:
    manifest = Bundle.open(tiny.path).manifest
    assert manifest.exit_layers == (2, 3, 5)
    assert manifest.stage_bounds == ((0, 2), (2, 3), (3, 5))
    assert manifest.path_graphs(3) == ("stage_0", "stage_1", "balcony_3", "lm_head")
    assert manifest.path_graphs(5) == ("stage_0", "stage_1", "stage_2", "lm_head")  # the norm is inside
    assert Bundle.open(tiny.path).portable().manifest.path_graphs(5) == (
        "stage_0", "stage_1", "stage_2", "norm", "lm_head"
    )  # fmt: skip
    assert manifest.model.kv_width == 32
    assert manifest.embedding.tied


def test_bytes_per_token_are_those_of_the_parameters(tiny: Any) -> None:
    layer = sum(p.numel() for p in tiny.model.model.layers[0].parameters())
    head = tiny.model.lm_head.weight.numel()
    norm = tiny.model.model.norm.weight.numel()
    for bundle in (Bundle.open(tiny.path), Bundle.open(tiny.path).portable()):
        manifest = bundle.manifest
        assert manifest.bytes_per_token(2) == 4 * (
            3 * layer + norm + head
        )  # two layers, the balcony, its norm, the head
        assert manifest.bytes_per_token(5) == 4 * (5 * layer + norm + head)


@pytest.mark.parametrize("silent", [False, True])
def test_missing_directory_and_directory_without_manifest(
    tmp_path: Path, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``silent``: as from Python 3.14 on, where these say no for every error of the system."""
    if silent:
        for name, look in (("exists", os.path.exists), ("is_file", os.path.isfile)):
            monkeypatch.setattr(Path, name, look)
    refused(tmp_path / "nowhere", "no such directory")
    refused(tmp_path / ("x" * 300), r"x…: cannot be read \(File name too long\): make it readable")
    refused(tmp_path, "is not a bundle")


@pytest.mark.parametrize("name", ["weights.bin", "stage_1.onnx", "tokenizer.json", "backbone.onnx", "cpu_stage_1.onnx"])
def test_one_flipped_byte_is_found(bundle_copy: Path, name: str) -> None:
    flip(bundle_copy / name)
    refused(bundle_copy, rf"{re.escape(name)}: SHA-256 .* differs")
    assert Bundle.open(bundle_copy, verify_hashes=False).manifest.exit_layers == (2, 3, 5)


def test_weights_are_hashed_while_the_caller_works(bundle_copy: Path) -> None:
    with Bundle.opening(bundle_copy) as bundle:
        assert bundle.manifest.exit_layers == (2, 3, 5)
    flip(bundle_copy / "weights.bin")
    steps = []
    with pytest.raises(BundleError, match=r"weights\.bin: SHA-256"), Bundle.opening(bundle_copy):
        steps.append("worked")
    with pytest.raises(BundleError, match=r"weights\.bin: SHA-256") as raised, Bundle.opening(bundle_copy):
        raise ValueError("because of the weights")
    assert steps == ["worked"] and isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="for another reason"), Bundle.opening(bundle_copy, verify_hashes=False):
        raise ValueError("for another reason")


def test_missing_truncated_and_linked_files(bundle_copy: Path) -> None:
    whole = (bundle_copy / "weights.bin").read_bytes()
    (bundle_copy / "weights.bin").write_bytes(whole[:-1])
    refused(bundle_copy, r"weights\.bin: \d+ bytes, but the manifest says", verify_hashes=False)
    (bundle_copy / "weights.bin").unlink()
    refused(bundle_copy, r"weights\.bin: is missing")
    outside = bundle_copy.parent / "outside"
    outside.write_bytes(whole)
    (bundle_copy / "weights.bin").symlink_to(outside)
    # As `huggingface_hub` keeps it. `cp -r` copies links as links.
    refused(bundle_copy, r"weights\.bin: is a link, .*: copy it with what its links name \(cp -RL\) or export it again")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True])
def test_other_schema_versions_are_refused(bundle_copy: Path, version: object) -> None:
    edit(bundle_copy, lambda document: document.update(schema_version=version))
    refused(bundle_copy, "schema_version = .*this version of balcony-edge reads 2")


def test_a_tool_adds_files_and_no_keys(bundle_copy: Path) -> None:
    (bundle_copy / "licence.txt").write_text("x")
    Bundle.open(bundle_copy)
    edit(bundle_copy, lambda document: document.update(licence="x"))
    refused(bundle_copy, r"bundle\.json: licence: ")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"schema_version": 2}', "[" * 100_000, "\x00"])
def test_a_file_that_is_not_a_manifest(bundle_copy: Path, text: str) -> None:
    (bundle_copy / MANIFEST).write_text(text)
    refused(bundle_copy, r"bundle\.json: ")


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", ".hidden", "a/b", "", "a\\b", "x" * 200])
def test_file_names_stay_inside_the_directory(bundle_copy: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["files"][name] = document["files"].pop("weights.bin")

    edit(bundle_copy, change)
    refused(bundle_copy, r"bundle\.json: files\.")
    edit(bundle_copy, lambda document: document["embedding"].update(file=name))
    refused(bundle_copy, r"bundle\.json: ")


def test_a_forged_manifest_is_refused_by_what_it_lacks(bundle_copy: Path) -> None:
    original = (bundle_copy / MANIFEST).read_text()
    for change, pattern in (
        (lambda d: d["graphs"].pop("stage_1"), "does not list the graphs stage_1"),
        (lambda d: d["files"].pop("lm_head.onnx"), "does not list the files lm_head.onnx"),
        (lambda d: d["exits"].reverse(), "must ascend"),
        (lambda d: d["exits"].pop(), "end at the full depth 5"),
        (lambda d: d["embedding"].update(offset=10**9), "past the end of weights.bin"),
        (lambda d: d["embedding"].update(shape=[10**12, 32]), "differs from the model's vocabulary"),
        (lambda d: d["model"].update(num_layers=-1), "model.num_layers"),
        (lambda d: d.update(surprise=1), "surprise"),
    ):
        (bundle_copy / MANIFEST).write_text(original)
        edit(bundle_copy, change)
        refused(bundle_copy, pattern)
    (bundle_copy / MANIFEST).write_text(original)
    edit(bundle_copy, lambda d: d["graphs"]["norm"].update(parameters=1), refresh=False)
    refused(bundle_copy, "fingerprint differs")


def test_the_fingerprint_covers_graphs_and_weights_only(tiny: Any) -> None:
    document = json.loads((tiny.path / MANIFEST).read_text())
    before = fingerprint(document)
    document["tools"]["torch"] = "9"
    document["files"]["tokenizer.json"]["sha256"] = "0" * 64
    assert fingerprint(document) == before
    document["files"]["weights.bin"]["sha256"] = "0" * 64
    assert fingerprint(document) != before


def test_asking_for_a_file_that_is_not_listed(tiny: Any) -> None:
    bundle = Bundle.open(tiny.path)
    assert "tokenizer.json" in bundle.manifest.files and "secret" not in bundle.manifest.files
    with pytest.raises(BundleError, match="does not list secret"):
        bundle.file("secret")


def test_results_that_are_recorded_at_once_are_all_kept(bundle_copy: Path) -> None:
    """Two evaluations and a build may end together."""
    exits, own = Bundle.open(bundle_copy).manifest.exit_layers, read_manifest(bundle_copy).fingerprint
    estimate = Estimate(value=0.5, stderr=0.1)
    text = TextQuality(
        documents=1, tokens=10, window=128, kl=estimate, agreement=estimate, perplexity=Estimate(value=3.0, stderr=0.1)
    )

    def record(name: str) -> None:
        record_quality(bundle_copy, {layer: Quality(reference="full", text={name: text}) for layer in exits}, own)

    names = [f"text {number}" for number in range(12)]
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(record, names))
    (quality,) = {tuple(spec.quality.text) for spec in read_manifest(bundle_copy).exits if spec.quality is not None}
    assert sorted(quality) == sorted(names)
