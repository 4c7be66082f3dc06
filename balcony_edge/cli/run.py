"""``balcony-edge run``: generate under a budget and see which exit every token took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from balcony_edge.budget import Budget, load_budget
from balcony_edge.errors import BudgetError

if TYPE_CHECKING:
    from balcony_runtime.generate import Reply, Token


def run(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    prompt: Annotated[str, typer.Argument(help="What to answer or, with --raw, to continue.")],
    tpot_ms: Annotated[float | None, typer.Option(help="Target: milliseconds between two tokens.")] = None,
    exit_layer: Annotated[int | None, typer.Option("--exit", help="Always this exit.")] = None,
    budget: Annotated[Path | None, typer.Option(help="Target file (profiles/*.toml).")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to make.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [default: the CPUs of this process].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Generate one reply; every token is coloured by the exit that it took."""
    import balcony_edge
    from balcony_edge.cli.console import depth_styles, stdout
    from balcony_runtime.generate import Reply
    from balcony_runtime.sampling import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p, seed)
    with balcony_edge.load(bundle, budget=_budget(tpot_ms, exit_layer, budget), threads=threads) as llm:
        ids = llm.encode(prompt, chat=False if raw else None)
        styles = depth_styles(llm.exit_layers)
        tokens: list[Token] = []
        interrupted = False
        try:
            for token in _noted(llm.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling), tokens):
                if not as_json:
                    stdout.print(token.text, style=styles[token.exit_layer], end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            interrupted = True
        reply = Reply("".join(token.text for token in tokens), tuple(tokens), len(ids))
        if as_json:
            print(json.dumps({**summary(reply), "text": reply.text, "tokens": [asdict(token) for token in tokens]}))  # noqa: T201
        else:
            stdout.print()
            _show(reply, styles)
    if interrupted:
        raise typer.Exit(130)


def _budget(tpot_ms: float | None, exit_layer: int | None, path: Path | None) -> Budget:
    if path is not None:
        if tpot_ms is not None or exit_layer is not None:
            raise BudgetError("--budget with --tpot-ms or --exit: two budgets; give the file or the options")
        return load_budget(path)
    return Budget(tpot_ms=tpot_ms, exit_layer=exit_layer)


def _noted(stream: Iterator[Token], tokens: list[Token]) -> Iterator[Token]:
    for token in stream:
        tokens.append(token)
        yield token


def summary(reply: Reply) -> dict[str, Any]:
    """What a reply cost, as a JSON-ready mapping; times in milliseconds."""
    if not reply.tokens:
        return {"prompt_tokens": reply.prompt_tokens, "new_tokens": 0}
    gaps = sorted(token.latency_ms for token in reply.tokens[1:]) or [float("nan")]
    targets = sum(token.target_ms is not None for token in reply.tokens[1:])
    return {
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": len(reply.tokens),
        "finish_reason": reply.finish_reason,
        "ttft_ms": reply.ttft_ms,
        "tpot_mean_ms": reply.mean_tpot_ms,
        "tpot_p50_ms": gaps[len(gaps) // 2] if len(reply.tokens) > 1 else None,
        "tokens_per_exit": {str(layer): count for layer, count in reply.tokens_per_exit.items()},
        "exit_switches": sum(
            a.exit_layer != b.exit_layer for a, b in zip(reply.tokens, reply.tokens[1:], strict=False)
        ),
        "caught_up_rows": sum(token.caught_up_rows for token in reply.tokens),
        "late_tokens": reply.late_tokens if targets else None,
        "tokens_with_target": targets,
    }


def _show(reply: Reply, styles: dict[int, str]) -> None:
    from rich.table import Table

    from balcony_edge.cli.console import stdout

    facts = summary(reply)
    if not reply.tokens:
        return
    table = Table("exit", "tokens", "share", "mean ms a token")
    for layer, count in reply.tokens_per_exit.items():
        times = [token.latency_ms for token in reply.tokens[1:] if token.exit_layer == layer]
        mean = f"{sum(times) / len(times):.1f}" if times else ""
        table.add_row(str(layer), str(count), f"{count / len(reply.tokens):.0%}", mean, style=styles[layer])
    stdout.print(table)
    parts = [f"{facts['new_tokens']} tokens after {facts['prompt_tokens']}", f"first after {facts['ttft_ms']:.0f} ms"]
    if reply.mean_tpot_ms is not None:
        parts.append(f"then {reply.mean_tpot_ms:.1f} ms a token ({1000 / reply.mean_tpot_ms:.0f} tokens a second)")
    parts.append(f"{facts['exit_switches']} switches, {facts['caught_up_rows']} rows caught up")
    if facts["late_tokens"] is not None:
        parts.append(f"{facts['late_tokens']} of {facts['tokens_with_target']} late")
    stdout.print(", ".join(parts))
