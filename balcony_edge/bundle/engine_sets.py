"""Engine sets in a bundle's directory: made aside and then recorded in ``bundle.json`` in one step.

Owns the order in which files and manifest change, so that a process that is killed leaves the old set or the new one. It does
not know what graphs and engines hold: ``balcony_export.tensorrt`` and ``balcony_runtime.backends`` make them.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balcony_edge.bundle.bundle import ENGINES, manifest_lock, read_manifest, replace_manifest
from balcony_edge.bundle.manifest import EngineSet, Manifest
from balcony_edge.errors import BundleError
from balcony_edge.files import partial_directory, sync_all


@contextmanager
def new_engine_directory(bundle: Path, name: str) -> Iterator[Path]:
    """Make a directory for a new set; it is removed at the end unless :func:`record_engines` recorded it under ``name``.

    Raises:
        BundleError: the directory cannot be made or written.
    """
    home = bundle / ENGINES
    try:
        home.mkdir(exist_ok=True)
        with manifest_lock(bundle):  # a killed process may have left a set that it did not record
            recorded = read_manifest(bundle).engines.get(name)
            _keep_only(home, name, None if recorded is None else recorded.directory or name)
        with partial_directory(home / name) as part:
            yield part
    except OSError as error:
        raise BundleError(f"{home}: cannot be written ({error.strerror}): free space or make it writable") from error
    finally:
        with contextlib.suppress(OSError):  # it is not empty, or it was never made
            home.rmdir()


def record_engines(bundle: Path, name: str, engines: EngineSet, made: Path) -> Manifest:
    """Record a complete set in ``bundle.json`` and replace the set of the same name; the fingerprint does not change.

    The new set gets a directory of its own and ``bundle.json`` changes in one step, so a process that is killed leaves the
    old set or the new one. Directories of older sets of this name are removed.

    Args:
        bundle: directory of the bundle.
        name: name of the set.
        engines: description of the files in ``made``.
        made: directory from :func:`new_engine_directory`.

    Raises:
        BundleError: the directory is not a bundle or cannot be written.
    """
    home = bundle / ENGINES
    with manifest_lock(bundle):
        manifest = read_manifest(bundle)
        place = home / name
        while place.exists():
            place = home / f"{name}.{secrets.token_hex(4)}"
        sync_all(made)  # also before the set of this name is removed
        made.rename(place)
        entry = engines.model_copy(update={"directory": None if place.name == name else place.name})
        updated = manifest.model_copy(update={"engines": {**manifest.engines, name: entry}})
        try:
            replace_manifest(bundle, updated)
        except BaseException:
            if read_manifest(bundle) != updated:  # an interrupt may also come after the replacement
                shutil.rmtree(place, ignore_errors=True)
            raise
        _keep_only(home, name, place.name)
    return updated


def _keep_only(home: Path, name: str, kept: str | None) -> None:
    """Remove the complete sets of a name, but for the one that is recorded; the caller holds the manifest's lock."""
    for other in home.iterdir():
        if other.name != kept and (other.name == name or other.name.startswith(f"{name}.")):
            shutil.rmtree(other, ignore_errors=True)
