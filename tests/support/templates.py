"""Copies of a bundle with another chat template or tokenizer."""

from __future__ import annotations

from pathlib import Path

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import MANIFEST, Manifest
from balcony_runtime.text.codec import TextCodec


def manifest_of(bundle: Path) -> Manifest:
    """Only the manifest, because the test then changes the files."""
    return Manifest.model_validate_json((bundle / MANIFEST).read_text())


def write_template(bundle: Path, template: str) -> TextCodec:
    (bundle / "chat_template.jinja").write_text(template)
    return TextCodec(Bundle(bundle, manifest_of(bundle)))
