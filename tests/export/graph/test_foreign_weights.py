"""Bundles of strangers whose graphs have weights in files that the manifest does not list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import WEIGHTS
from balcony_edge.errors import BundleError
from balcony_export import verify as verify_module
from balcony_export.quantize.blocks import stored_weights
from balcony_export.tensorrt.graphs import Format, tensorrt_graphs


@pytest.mark.parametrize("name", ["stage_0", "backbone", "cpu_stage_0"])
def test_weights_in_other_files_are_not_read(
    bundle_copy: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By `build` or `verify`, which also reads the weights of int4 bundles.

    In its own directory a bundle is ".", where onnx_ir compares no path with a directory.
    """
    manifest = Bundle.open(bundle_copy).manifest
    path = bundle_copy / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    places[0].value = "../secret"
    path.write_bytes(model.SerializeToString())
    (bundle_copy.parent / "secret").write_bytes((bundle_copy / WEIGHTS).read_bytes())
    monkeypatch.chdir(bundle_copy)
    bundle = Bundle(Path(), manifest)
    with pytest.raises(BundleError, match=r"has weights in '\.\./secret', which the manifest does not list"):
        if name == "backbone":
            verify_module._backbone(bundle, tiny.exits, [])
        elif name == "cpu_stage_0":
            list(stored_weights(bundle))
        else:
            tensorrt_graphs(bundle, Format(capacity=64))
