"""The text that thresholds are calibrated on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from balcony_edge.bundle.bundle import Bundle, read_manifest
from balcony_edge.bundle.manifest import ConfidenceSpec
from balcony_edge.bundle.quality import record_confidence
from balcony_edge.cli.device.calibrate import _documents
from balcony_runtime.text.codec import TextCodec
from tests.support.command import invoke_here


def test_little_of_a_large_file_is_tokenized(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has no memory for the tokens of all, and the same pieces are taken as if it had."""
    file, bundle, encode = tmp_path / "t.jsonl", Bundle.open(tiny.path), TextCodec.encode
    file.write_text("\n".join(json.dumps({"text": f"the fox {number} and the dog " * 9}) for number in range(2000)))
    encoded: list[Any] = []

    def counting(codec: TextCodec, prompt: Any, **options: Any) -> list[int]:
        encoded.append(prompt)
        return encode(codec, prompt, **options)

    monkeypatch.setattr(TextCodec, "encode", counting)
    whole = _documents(file, bundle, 10**9, 16)
    assert len(encoded) == 2000
    for most in (1, 100, 1000):
        encoded.clear()
        some = _documents(file, bundle, most, 16)
        assert sum(map(len, some)) == most and some[:-1] == whole[: len(some) - 1]
        assert some[-1] == whole[len(some) - 1][: len(some[-1])] and len(encoded) < 1000


def test_a_pipe_is_read_once(bundle_copy: Path) -> None:
    """`calibrate BUNDLE --text <(zcat t.jsonl.gz) --document-tokens 999`, where the context is shorter than that."""
    reads, writes = os.pipe()
    os.write(writes, b'{"text": "the quick brown fox jumps over the lazy dog"}\n' * 90)
    os.close(writes)
    options = ("--document-tokens", "999", "--max-disagreement", "90%")
    done = invoke_here("calibrate", bundle_copy, "--text", f"/dev/fd/{reads}", *options)
    os.close(reads)
    assert done.returncode == 0, done


def test_a_bundle_of_which_no_exit_keeps_the_promise_has_nothing_to_check(bundle_copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 90)
    none = ConfidenceSpec(measure="top1", max_disagreement=0.02, confidence=0.95, text="t", tokens=1000, thresholds={})
    record_confidence(bundle_copy, none, read_manifest(bundle_copy).fingerprint)
    done = invoke_here("calibrate", bundle_copy, "--check", file)
    assert done.returncode == 1 and "has no thresholds to check: calibrate it with --text first" in done.stderr


def test_a_bundle_without_balconies_has_nothing_to_calibrate(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run --policy confident`` sends its user here, and the number of exits was a divisor."""
    manifest = read_manifest(bundle_copy)
    alone = Bundle(bundle_copy, manifest.model_copy(update={"exits": manifest.exits[-1:]}))
    monkeypatch.setattr(Bundle, "open", lambda _: alone)
    done = invoke_here("calibrate", bundle_copy, "--text", __file__)
    assert done.returncode == 1 and "has the full depth only" in done.stderr
