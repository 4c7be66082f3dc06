"""Output that several verbs share: replies and their summaries, engine sets, and doubts about a device profile.

Owns the wording and the tables. The consoles are :mod:`.console`; the live view is :mod:`.device.live`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from balcony_edge.cli.console import stdout, warn, write_text
from balcony_edge.errors import BalconyError

if TYPE_CHECKING:
    from balcony_edge.bundle.manifest import EngineSet
    from balcony_edge.device.profile import DeviceProfile
    from balcony_runtime.decoding.confident import Telemetry
    from balcony_runtime.reply import Reply, TokenStream


def say_doubts(path: Path, profile: DeviceProfile) -> None:
    """Print on stderr why a profile's numbers may be off, such as other busy processes or wide intervals."""
    for doubt in profile.doubts:
        warn(f"{path}: {doubt}")


def show_stream(stream: TokenStream, styles: dict[int, str] | None) -> bool:
    """Print tokens as they are made, coloured by exit (not at all without ``styles``); True if Ctrl-C ended the stream."""
    try:
        for token in stream:
            if styles is not None:
                write_text(token.text, styles[token.exit_layer])
    except KeyboardInterrupt:
        stream.close()
        return True
    except BalconyError:
        if styles is not None and stream.reply.tokens:
            write_text("\n")  # the error is a line of its own
        raise
    return False


def summary(reply: Reply) -> dict[str, Any]:
    """Cost of a reply as a JSON-ready mapping; times in milliseconds."""
    gaps = [token.latency_ms for token in reply.tokens[1:]]
    targets = sum(token.target_ms is not None for token in reply.tokens[1:])
    return {
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": len(reply.tokens),
        "finish_reason": reply.finish_reason,
        "ttft_ms": reply.ttft_ms,
        "tpot_mean_ms": reply.mean_tpot_ms,
        "tpot_p50_ms": median(gaps) if gaps else None,
        "tokens_per_exit": {str(layer): count for layer, count in reply.tokens_per_exit.items()},
        "exit_switches": sum(
            a.exit_layer != b.exit_layer for a, b in zip(reply.tokens, reply.tokens[1:], strict=False)
        ),
        "caught_up_rows": sum(token.caught_up_rows for token in reply.tokens),
        "speculated_tokens": sum(token.decision.drafted > 0 for token in reply.tokens),
        "forced_tokens": reply.forced_tokens,
        "late_tokens": reply.late_tokens if targets else None,
        "tokens_with_target": targets,
        "unseen_tokens": reply.unseen_tokens,
        "budget": [verdict.to_dict() for verdict in reply.verdicts],
    }


def show_summary(reply: Reply, styles: dict[int, str], console: Console) -> None:
    """Print the cost of a reply for people."""
    facts = summary(reply)
    if not reply.tokens:
        return
    table = Table("exit", "tokens", "share", "mean ms a token")
    for layer, count in reply.tokens_per_exit.items():
        times = [token.latency_ms for token in reply.tokens[1:] if token.exit_layer == layer and not token.forced]
        mean = f"{sum(times) / len(times):.1f}" if times else ""
        table.add_row(str(layer), str(count), f"{count / len(reply.tokens):.0%}", mean, style=styles[layer])
    console.print(table)
    parts = [
        f"{_counted(facts['new_tokens'], 'token')} after {facts['prompt_tokens']}",
        f"first after {facts['ttft_ms']:.0f} ms",
    ]
    if reply.mean_tpot_ms:  # 0 if all tokens after the first were forced
        rate = 1000 / reply.mean_tpot_ms
        shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"  # a slow device may reach only 0.4
        parts.append(f"then {reply.mean_tpot_ms:.1f} ms a token ({shown} tokens a second)")
    parts.append(f"{_counted(facts['exit_switches'], 'switch')}, {_counted(facts['caught_up_rows'], 'row')} caught up")
    if facts["forced_tokens"]:
        parts.append(f"{facts['forced_tokens']} forced")
    if facts["late_tokens"] is not None:
        parts.append(f"{facts['late_tokens']} of {facts['tokens_with_target']} late")
    if facts["unseen_tokens"]:
        parts.append(f"{facts['unseen_tokens']} without a reading for a ceiling")
    console.print(", ".join(parts))
    if reply.verdicts:
        verdicts = Table("budget", "asked", "reached", "free", "held")
        words: dict[bool | None, str] = {True: "[green]yes[/]", False: "[red]no[/]"}
        for one in reply.verdicts:
            reached = "" if one.reached is None else f"{reached_words(one.reached, one.asked)} ({one.how})"
            free = "" if one.margin is None else f"{one.margin:.0%}"
            unknown = "not measured" if one.reached is None else "unknown: the sensor has gone"
            verdicts.add_row(one.key, f"{one.asked:g}", reached, free, words.get(one.held, f"[yellow]{unknown}[/]"))
        console.print(verdicts)


def show_checks(quality: Mapping[int, Telemetry], console: Console) -> None:
    """Print what the full depth said about tokens of confidence exits, of all replies so far."""
    for layer, (checked, disagreed) in quality.items():
        if checked:
            console.print(f"exit {layer}: the full depth disagreed with {disagreed} of {checked} checked tokens")


def reached_words(value: float, asked: float) -> str:
    """Four digits, or more if these would be the asked value itself, or a power of ten (12345.6 MB)."""
    shown = f"{value:.4g}"
    return f"{value:g}" if "e" in shown or float(shown) == asked else shown


def _counted(count: int, noun: str) -> str:
    """``1 switch``, ``2 switches``."""
    plural = f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def engine_facts(engines: EngineSet, graph: str) -> dict[str, Any]:
    """Facts about one engine; ``bytes`` is None if it was not built."""
    spec, engine = engines.graphs[graph], engines.engines.get(graph)
    return {
        "graph": graph,
        "weight_bytes": spec.weight_bytes,
        "bytes": None if engine is None else engines.files[engine.file].bytes,
        "layers": None if engine is None else engine.layers,
        "attention": None if engine is None else engine.attention,
    }


def show_engines(name: str, engines: EngineSet) -> None:
    """One set of engines as a table."""
    made = f"{engines.builder} for {_capabilities(engines)}" if engines.engines else "graphs only: build on the device"
    title = f"tensorrt/{name}: {engines.operators} operators, caches of {engines.context_length} rows, {made}"
    table = Table("engine", "weights, MB", "with code, MB", "layers", "attention")
    for graph in engines.graphs:
        facts = engine_facts(engines, graph)
        size = "" if facts["bytes"] is None else f"{facts['bytes'] / 1e6:.1f}"
        weights = f"{facts['weight_bytes'] / 1e6:.1f}"
        table.add_row(escape(graph), weights, size, str(facts["layers"] or ""), facts["attention"] or "")
    stdout.print(escape(title), highlight=False)
    stdout.print(table)


def _capabilities(engines: EngineSet) -> str:
    from balcony_runtime.backends.accelerator.tensorrt_builder import gpus_of

    gpus = gpus_of(engines)
    return f"compute capability {', '.join(gpus)}" if gpus else "the GPU of the machine that built it"
