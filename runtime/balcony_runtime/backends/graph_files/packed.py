"""Packed weights on disk, which several processes share.

ONNX Runtime repacks weights into the order in which its kernels read them, in private memory, for each session of each process.
It can also write the packed form next to an optimized graph and map it when that graph is loaded: then all processes share one
copy in the page cache. Packing depends on the processor and on ONNX Runtime's version. It is therefore done on the device, at
the first load, and kept in a directory named after these facts. The cost is a file as large as the weights, and pages of 4 kB
instead of the 2 MB that private memory may use (docs/LOG.md, "Huge pages").

Mapping the same weights again costs nothing. Each exit therefore also gets the graphs of its decode step joined into one, over
the same packed files, and a token is one run of ONNX Runtime instead of one run per graph.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnxruntime as ort

from balcony_edge.bundle.bundle import Bundle, sha256_file
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.device.machine import cpu_name, text_of
from balcony_edge.errors import BundleError, InputError
from balcony_edge.files import locked, partial_directory, remove_leftovers, sync_all
from balcony_runtime.backends.base import at_once
from balcony_runtime.backends.graph_files.join import Part, join

#: Name → size and SHA-256 of every other file of a directory of packed weights.
FILES = "files.json"
#: Files that are hashed at once; the weights of the bundle are hashed meanwhile.
HASHERS = 2


def packed_graphs(
    bundle: Bundle, directory: Path, pack: Callable[[Path, Path], None], *, verify_hashes: bool
) -> Mapping[str, Path]:
    """Name → path of the packed form of each graph that the runtime loads, and ``path_E`` of each exit's decode step.

    Missing files are made first.

    Args:
        bundle: bundle to pack.
        directory: directory of packed weights, with one subdirectory for each bundle, processor and version.
        pack: function that writes the packed form (second argument) of a graph's file (first argument); it raises OSError if
            the file cannot be written.
        verify_hashes: whether existing files are hashed; their sizes are always compared.

    Raises:
        BundleError: existing files are damaged, or those of the bundle are and nothing is packed yet.
        InputError: the directory cannot be read or written, or the disk is full.
    """
    lowered = "lowered" if bundle.manifest.cpu else "portable"
    facts = (bundle.manifest.fingerprint, lowered, ort.__version__, cpu_name(), platform.machine(), _cpu_features())
    home = directory / hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    graphs = {name: spec.file for name, spec in bundle.manifest.runnable.items() if name != "backbone"}
    paths = {f"path_{layer}": f"path_{layer}.onnx" for layer in bundle.manifest.exit_layers}
    try:
        packed = home.is_dir()
    except OSError as error:  # a private directory
        raise _unreadable(home, error) from error
    if packed:
        _check(home, verify_hashes)
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory, ".")  # also of bundles and versions that nobody will pack again
            with locked(directory), partial_directory(home) as part:  # a second process waits and then finds the files
                if not home.is_dir():
                    # What damaged weights give has hashes of its own, and would still be used once they are repaired.
                    Bundle.open(bundle.path)
                    for file in graphs.values():
                        pack(bundle.file(file), part / file)
                    for layer in bundle.manifest.exit_layers:
                        (part / paths[f"path_{layer}"]).write_bytes(joined_step(bundle.manifest, layer, part))
                    made = {file.name: [file.stat().st_size, sha256_file(file)] for file in sorted(part.iterdir())}
                    (part / FILES).write_text(json.dumps(made, indent=1))
                    sync_all(part)
                    part.rename(home)
        except OSError as error:
            if not home.is_dir():  # without locks, another process may have made them meanwhile
                raise InputError(
                    f"{directory}: packed weights cannot be written ({error.strerror}): free space or name another place"
                ) from error
    return {name: home / file for name, file in (graphs | paths).items()}


def _check(home: Path, verify_hashes: bool) -> None:
    """Refuse packed weights that changed since they were made, for example by an incomplete copy or a disk error."""
    try:
        made: dict[str, tuple[int, str]] = json.loads((home / FILES).read_text(encoding="utf-8"))
        intact = bool(made) and all((home / name).stat().st_size == size for name, (size, _) in made.items())
        if intact and verify_hashes:
            found = at_once(lambda name: sha256_file(home / name), list(made), HASHERS)
            intact = found == [digest for _, digest in made.values()]
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        intact = False
    except OSError as error:  # those of another user may be whole
        raise _unreadable(home, error) from error
    if not intact:
        raise BundleError(f"{home}: the packed weights are damaged: remove it; the next load makes them again")


def _unreadable(home: Path, error: OSError) -> InputError:
    cure = "make them readable, or name another place"
    return InputError(f"{home}: the packed weights cannot be read ({error.strerror}): {cure}")


def _cpu_features() -> str:
    """Instruction sets of the processor; virtual machines may give several generations the same name."""
    lines = (text_of(Path("/proc/cpuinfo")) or "").splitlines()
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")


def joined_step(
    manifest: Manifest, exit_layer: int, home: Path, keep: Iterable[str] = ("hidden_", "present_", "logits")
) -> bytes:
    """Join the graphs of one token at an exit, whose files are in ``home``, in their order; see :func:`.join.join`."""
    parts, state = [], f"hidden_{exit_layer}"
    for name in manifest.path_graphs(exit_layer):
        spec = manifest.runnable[name]
        passed = {}
        if not name.startswith("stage_"):
            passed = {tensor.name: state for tensor in spec.inputs if tensor.name in ("rows", "queries", "hidden")}
        if ends := [tensor.name for tensor in spec.outputs if tensor.name in ("hidden", "normed")]:
            (state,) = ends
        parts.append(Part((home / spec.file).read_bytes(), name, passed))
    return join(parts, keep)
