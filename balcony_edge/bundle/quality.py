"""Measurements of a bundle's exits, recorded in ``bundle.json``: results of evaluations and thresholds of confidence exits.

Owns which results are comparable and may be kept side by side. It does not know how anything is measured. The fingerprint
covers graphs and weights only, so nothing recorded here changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from balcony_edge.bundle.bundle import manifest_lock, read_manifest, replace_manifest
from balcony_edge.bundle.manifest import ConfidenceSpec, Manifest, Quality, TextQuality
from balcony_edge.errors import BundleError


def record_confidence(directory: Path, found: ConfidenceSpec, fingerprint: str) -> None:
    """Write the thresholds of confidence exits to ``bundle.json``.

    Args:
        directory: directory of the bundle.
        found: the thresholds.
        fingerprint: that of the bundle on which they were found.

    Raises:
        BundleError: the directory is not a bundle, holds another one by now, or cannot be written.
    """
    with manifest_lock(directory):
        manifest = _unchanged(directory, fingerprint)
        replace_manifest(directory, manifest.model_copy(update={"confidence": found}))


def record_quality(directory: Path, measured: Mapping[int, Quality], fingerprint: str) -> Manifest:
    """Add evaluation results to ``bundle.json``; earlier results on other texts and tasks stay.

    Exits are compared with each other. An exit that was not measured now therefore loses its results on the same texts and
    tasks if they cover other documents or examples.

    Args:
        directory: directory of the bundle.
        measured: exit layer → results on the same texts and tasks; not empty. If their reference differs from the earlier one,
            earlier results on texts are dropped, because numbers against two references are not comparable.
        fingerprint: that of the bundle that was measured.

    Raises:
        BundleError: the directory is not a bundle, holds another one by now, lacks an exit, or cannot be written.
    """
    with manifest_lock(directory):
        manifest = _unchanged(directory, fingerprint)
        if unknown := measured.keys() - set(manifest.exit_layers):
            raise BundleError(
                f"{directory}: has no exit {min(unknown)}: it has {', '.join(map(str, manifest.exit_layers))}: "
                "evaluate those"
            )
        latest = next(iter(measured.values()))
        found = {exit_.exit_layer: exit_.quality and _comparable(exit_.quality, latest) for exit_ in manifest.exits}
        found |= {layer: _merged(found[layer], quality) for layer, quality in measured.items()}
        # Averages over different tasks are not comparable, so only exits with the same tasks keep theirs.
        averaged = {_averaged(found[layer]) for layer in measured}
        exits = []
        for exit_ in manifest.exits:
            quality = found[exit_.exit_layer]
            if quality is not None and _averaged(quality) not in averaged:
                quality = quality.model_copy(update={"summary": None})
            exits.append(exit_.model_copy(update={"quality": quality}))
        updated = manifest.model_copy(update={"exits": tuple(exits)})
        replace_manifest(directory, updated)
    return updated


def _unchanged(directory: Path, fingerprint: str) -> Manifest:
    """The manifest of a bundle, if it is still the one that was measured."""
    manifest = read_manifest(directory)
    if manifest.fingerprint != fingerprint:
        raise BundleError(f"{directory}: another bundle has taken its place while it was measured: measure again")
    return manifest


def _averaged(quality: Quality | None) -> tuple[str, ...]:
    """Names of the tasks in the average of ``quality``."""
    return () if quality is None or quality.summary is None else quality.summary.tasks


def _comparable(old: Quality, new: Quality) -> Quality:
    """Drop earlier results that are not comparable with the new ones (other reference, documents or examples)."""
    text = old.text if old.reference == new.reference or not new.text else {}
    text = {
        name: one for name, one in text.items() if name not in new.text or _coverage(one) == _coverage(new.text[name])
    }
    tasks = {
        name: one
        for name, one in old.tasks.items()
        if name not in new.tasks or one.examples == new.tasks[name].examples
    }
    summary = old.summary if old.summary is not None and tasks.keys() >= set(old.summary.tasks) else None
    return Quality(reference=old.reference, text=text, tasks=tasks, summary=summary)


def _coverage(text: TextQuality) -> tuple[int, int, int]:
    return text.documents, text.tokens, text.window


def _merged(old: Quality | None, new: Quality) -> Quality:
    if old is None:
        return new
    # An average over more tasks stays unless one of them was measured again.
    known = _averaged(old)
    stays = len(known) > len(_averaged(new)) and not new.tasks.keys() & set(known)
    return Quality(
        reference=new.reference if new.text else old.reference,
        text={**old.text, **new.text},
        tasks={**old.tasks, **new.tasks},
        summary=old.summary if stays else new.summary,
    )
