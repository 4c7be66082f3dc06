"""Packed weights on disk, which several processes share.

ONNX Runtime repacks weights into the order in which its kernels read them, in memory of its own, for each session of each
process. It can also write the packed form beside an optimized graph and map it when that graph is loaded: then there is one
copy in the page cache, whoever uses it. Packing depends on the processor and on ONNX Runtime's version, so it is done on the
device, at the first load, and kept under a name that says what it is for. What it costs: a file as large as the weights, and
pages of 4 kB where a process's own memory may lie in pages of 2 MB (docs/LOG.md).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from balcony_edge.bundle import Bundle
from balcony_edge.device import this_device
from balcony_edge.errors import InputError


def packed_graphs(bundle: Bundle, directory: Path, pack: Callable[[Path, Path], None]) -> Mapping[str, Path]:
    """Name → path of the packed form of each graph that the runtime loads; made first where it is not there.

    Args:
        bundle: what to pack.
        directory: where packed weights are kept, one directory a bundle, processor and version.
        pack: makes the packed form (second argument) of a graph's file (first one).

    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """
    device = this_device()
    facts = (bundle.manifest.fingerprint, ort.__version__, device.cpu, device.architecture)
    home = directory / hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    graphs = {name: spec.file for name, spec in bundle.manifest.runnable.items() if name != "backbone"}
    if not home.is_dir():
        part = directory / f".{home.name}.partial-{os.getpid()}"
        try:
            part.mkdir(parents=True)
            for file in graphs.values():
                pack(bundle.file(file), part / file)
            part.rename(home)
        except OSError as error:
            if not home.is_dir():  # another process may have been first
                raise InputError(
                    f"{directory}: packed weights cannot be written ({error.strerror}): free space or name another place"
                ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {name: home / file for name, file in graphs.items()}
