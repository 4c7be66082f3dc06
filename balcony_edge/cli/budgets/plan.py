"""``balcony-edge plan``: the expected effect of a budget on a profiled device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.cli.console import depth_styles, folded, stderr, stdout
from balcony_edge.cli.show import reached_words, say_doubts
from balcony_edge.errors import ContextLengthError

if TYPE_CHECKING:
    from balcony_edge.simulation.plan import Check, Plan


def plan(
    profile: Annotated[Path, typer.Option(help="Device profile that `balcony-edge profile` wrote.")],
    budget: Annotated[Path | None, typer.Option(help="Budget file (profiles/*.toml).")] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Target instead of a budget file: milliseconds between two tokens.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle whose evaluation to use, if the device profile has none.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1, help="Length of the prompt.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show for each exit whether it meets each target, with which probability, and what the controller would do."""
    from balcony_edge.cli.budgets.budget import asked_budget, named_refusal
    from balcony_edge.device.profile import DeviceProfile
    from balcony_edge.simulation.plan import REPLY_TOKENS, make_plan

    asked, measured = asked_budget(budget, tpot_ms), DeviceProfile.load(profile)
    total = prompt_tokens + (asked.expected_tokens or REPLY_TOKENS)
    if total > measured.bundle.context_length:
        fits = total - prompt_tokens < measured.bundle.context_length
        cure = "give a shorter prompt" if fits else "lower expected_tokens, or take a profile of a longer context"
        raise ContextLengthError(
            f"--prompt-tokens {prompt_tokens}: prompt and reply take {total} tokens, but the context holds "
            f"{measured.bundle.context_length}: {cure}"
        )
    say_doubts(profile, measured)
    quality = None
    if bundle is not None:
        from balcony_runtime.profiler.results import quality_figures

        manifest = Bundle.open(bundle, verify_hashes=False).manifest
        if manifest.fingerprint != measured.bundle.fingerprint:
            stderr.print(f"{bundle} is not the bundle of the device profile", style="yellow", markup=False)
        has_text = any(figure.metric == "agreement" for figure in measured.quality)
        quality = measured.quality if has_text else quality_figures(manifest)
    with named_refusal(budget):
        found = make_plan(measured, asked, prompt_tokens=prompt_tokens, quality=quality)
    if as_json:
        exits = [{**asdict(exit_), "met": exit_.met} for exit_ in found.exits]
        print(json.dumps({**asdict(found), "exits": exits}))  # noqa: T201 - programs read this
        return
    _show(found)


def _show(found: Plan) -> None:
    styles = depth_styles(tuple(exit_.exit_layer for exit_ in found.exits))
    table = Table("exit", "tokens/s", "first, ms", "J/token", "agrees", folded("targets"), "share")
    for exit_ in found.exits:
        checks = "\n".join(map(_words, exit_.checks)) if exit_.allowed else "not allowed by the budget"
        table.add_row(
            str(exit_.exit_layer),
            f"{exit_.tokens_per_s:.1f}",
            f"{exit_.ttft_ms:.1f}",
            "" if exit_.joules_per_token is None else f"{exit_.joules_per_token:.3f}",
            "" if exit_.agreement is None else f"{exit_.agreement:.1%}",
            checks or "none asked for",
            f"{found.shares.get(exit_.exit_layer, 0.0):.0%}",
            style=styles[exit_.exit_layer],
        )
    stdout.print(table)
    known = [f"{found.tokens_per_s:.1f} tokens a second"]
    if found.joules_per_token is not None:
        known.append(f"{found.joules_per_token:.3f} joules a token")
    if found.agreement is not None:
        known.append(f"agreement with the full model {found.agreement:.1%}")
    stdout.print(f"the controller: {found.reason}", markup=False, soft_wrap=True)
    stdout.print(f"expected: {', '.join(known)}", markup=False, soft_wrap=True)
    if not found.feasible:
        near = ", ".join(f"{target} = {_reachable(target, value)}" for target, value in found.nearest.items())
        stdout.print(
            f"[red]no allowed exit meets every target[/]; nearest values that one meets: {near}", soft_wrap=True
        )
    for note in found.notes:
        stdout.print(note, style="yellow", markup=False, soft_wrap=True)


def _reachable(target: str, value: float) -> str:
    """Four digits of a value that an exit meets, rounded to the side on which the exit meets it."""
    if value <= 0:
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    rounded = math.floor if target == "min_agreement" else math.ceil
    return f"{rounded(value / unit) * unit:g}"


def _words(check: Check) -> str:
    answer = {True: "met", False: "missed", None: "unknown"}[check.met]
    # cut off: 0.8996 misses a probability of 0.9, and would be shown as that
    odds = "" if check.probability is None else f", p={math.floor(100 * check.probability + 1e-9) / 100:.2f}"
    expected = "not measured" if check.expected is None else reached_words(check.expected, check.asked)
    return f"{check.target} {check.asked:g}: {answer} ({expected}{odds})"
