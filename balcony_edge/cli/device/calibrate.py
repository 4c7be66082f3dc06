"""``balcony-edge calibrate``: thresholds of confidence exits, with a guarantee."""

from __future__ import annotations

import json
import math
import zlib
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import ConfidenceSpec, one_line
from balcony_edge.cli.console import progress_bar, stdout
from balcony_edge.cli.options import refuse_given
from balcony_edge.errors import BundleError, InputError
from balcony_edge.files import require_writable

if TYPE_CHECKING:
    from balcony_runtime.decoding.thresholds import Held

#: A piece of a document: its first token and the document's place among all, and its tokens.
_Part = tuple[tuple[int, int], list[int]]


def calibrate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    text: Annotated[
        Path | None, typer.Option(help='Text that resembles the replies: JSON Lines with "text", .txt or .raw.')
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --text: measure the bundle's thresholds on text that they were not calibrated on."
        ),
    ] = None,
    max_disagreement: Annotated[
        str,
        typer.Option(
            help="Largest share of tokens that exit early with another token than the full depth: 2% or 0.02."
        ),
    ] = "2%",
    confidence: Annotated[str, typer.Option(help="Probability that this limit holds.")] = "95%",
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to calibrate on.")] = 20_000,
    document_tokens: Annotated[
        int, typer.Option(min=8, help="Largest number of tokens of one piece of a document.")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure how confident each balcony must be, and write the thresholds into the bundle's manifest (not its fingerprint)."""
    from balcony_edge.bundle.quality import record_confidence
    from balcony_runtime.decoding.thresholds import MIN_TOKENS, compare_exits, held_out, learn, least_tokens
    from balcony_runtime.engine import Engine

    path = text if check is None else check
    if path is None or None not in (text, check):
        raise InputError("--text and --check: give exactly one: --text to calibrate, --check to test on other text")
    shares = [
        _share(name, value) for name, value in (("--max-disagreement", max_disagreement), ("--confidence", confidence))
    ]
    opened = Bundle.open(bundle)
    if len(opened.manifest.exits) == 1:
        raise InputError(f"{bundle}: has the full depth only, and no balcony to calibrate: export it with exits")
    known: ConfidenceSpec | None = None
    if check is None:
        require_writable(bundle, str(bundle), BundleError, "make it writable: the thresholds go into its manifest")
    else:
        options = {"max_disagreement": "--max-disagreement", "confidence": "--confidence"}
        refuse_given(context, options, " with --check: the thresholds have the promise that they were made for")
        if (known := opened.manifest.confidence) is None or not known.thresholds:
            raise InputError(f"{bundle}: has no thresholds to check: calibrate it with --text first")
    longest = min(document_tokens, opened.manifest.model.context_length)
    documents = _documents(path, opened, tokens, longest)  # first, because loading may take minutes
    least = MIN_TOKENS if known is not None else least_tokens(len(opened.manifest.exits) - 1, *shares)
    if (count := sum(map(len, documents))) < least:
        cure = "" if least <= tokens else f", with --tokens {least}"
        raise InputError(f"{path}: {count} tokens are taken: give {least} or more{cure}, thousands are better")
    with progress_bar() as progress, Engine.of(opened) as engine:
        if engine.max_length < longest:  # an engine set
            documents = _documents(path, opened, tokens, engine.max_length)
        compared = compare_exits(engine, documents, lambda done: progress("comparing exits", done))
    if known is not None:
        _show_held(known, *held_out(compared, known), path, as_json=as_json)
        return
    found = learn(compared, one_line(path.name), *shares)
    try:
        _show(found, opened.manifest.exit_layers, path, as_json=as_json)  # first: it is shown even if it cannot be kept
    finally:  # it is kept even if nobody reads stdout any more
        record_confidence(bundle, found, opened.manifest.fingerprint)


def _show(found: ConfidenceSpec, exit_layers: tuple[int, ...], text: Path, *, as_json: bool) -> None:
    """Print the thresholds and their promise."""
    if as_json:
        print(json.dumps(found.model_dump(mode="json")))  # noqa: T201 - programs read this
        return
    promise = f"at most {_percent(found.max_disagreement)} of tokens, with {_percent(found.confidence)} confidence"
    table = Table("exit", f"least {found.measure}", "tokens that exit there", "other than the full depth's")
    for exit_layer in exit_layers[:-1]:
        spec = found.thresholds.get(exit_layer)
        cells = ("none keeps it", "", "") if spec is None else (
            f"{spec.threshold:.4f}", f"{spec.exit_share:.1%}", f"{spec.disagreement:.2%}"
        )  # fmt: skip
        table.add_row(str(exit_layer), *cells)
    stdout.print(f"{found.tokens} tokens of {text}; promised: {promise}", markup=False)
    stdout.print(table)


def _show_held(spec: ConfidenceSpec, count: int, found: dict[int, Held], text: Path, *, as_json: bool) -> None:
    """Print results of the bundle's thresholds on a text, next to the promised limit."""
    if as_json:
        exits = {e: {**held._asdict(), "kept": held.disagreement <= spec.max_disagreement} for e, held in found.items()}
        print(json.dumps({"text": text.name, "tokens": count, "promised": spec.max_disagreement, "exits": exits}))  # noqa: T201 - programs read this
        return
    table = Table(
        "exit", "tokens that exit there", "other than the full depth's", "promised on text like the calibration's"
    )
    for exit_layer, held in found.items():
        promise = f"{_percent(spec.max_disagreement)}, " + (
            "kept" if held.disagreement <= spec.max_disagreement else "not kept"
        )
        table.add_row(str(exit_layer), f"{held.exit_share:.1%}", f"{held.disagreement:.2%}", promise)
    stdout.print(f"{count} tokens of {text}; thresholds from {spec.text}", markup=False)
    stdout.print(table)


def _percent(share: float) -> str:
    """A share with all its digits: 0.04 % is no promise of 0.0 %, and 99.9 % are not 100 %."""
    return f"{100 * share:.6g}%"


def _share(name: str, text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise InputError(f"{name} {text}: must be above 0 and below 1: write 2 % as 2% or 0.02")
    return share


def _documents(path: Path, bundle: Bundle, most: int, longest: int) -> list[list[int]]:
    """Pieces of the documents of a file: the first piece of each, then the second of each, up to a number of tokens.

    Taking a few long documents whole would calibrate on little that resembles replies. Most of a large file is only
    read: what would come after enough other pieces is not tokenized.
    """
    from balcony_export.data.documents import read_documents
    from balcony_runtime.text.codec import TextCodec

    codec, parts, held, end = TextCodec(bundle), list[_Part](), 0, (math.inf, 0)
    for number, one in enumerate(document.text for document in read_documents(path)):
        # Mixed, in the same order every time: a file may begin with one kind of text.
        place = zlib.crc32(str(number).encode())
        if not one.strip() or (0, place) > end:
            continue
        ids = codec.encode(one, chat=False)[:most]
        # every piece begins as a text does: a model that expects its start token fails without it
        begin = ids[:1] if ids[:1] == [bundle.manifest.model.bos_token_id] else []
        ids, step = ids[len(begin) :], longest - len(begin)
        parts += [((start, place), begin + ids[start : start + step]) for start in range(0, len(ids), step)]
        held += len(ids)
        if held >= 2 * most:
            parts = _first(parts, most)
            held, end = most, parts[-1][0]
    return [ids for _, ids in _first(parts, most)]


def _first(parts: list[_Part], most: int) -> list[_Part]:
    """The first pieces by their places, up to a number of tokens."""
    found: list[_Part] = []
    for place, ids in sorted(parts, key=itemgetter(0)):
        if most <= 0:
            break
        found.append((place, ids[:most]))
        most -= len(found[-1][1])
    return found
