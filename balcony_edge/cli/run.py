"""``balcony-edge run``: generate or chat under a budget and see which exit every token took."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from balcony_edge.budget import Budget, load_budget
from balcony_edge.errors import BudgetError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from balcony_runtime.decoding.sampling import SamplingParams
    from balcony_runtime.reply import Reply, TokenStream


def run(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer or, with --raw, to continue. Without it: standard input where that is a file or a pipe, "
            "and a chat on a terminal."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Read the prompt from a file without its final newline; - is standard input."
        ),
    ] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target: milliseconds between two tokens.")] = None,
    exit_layer: Annotated[int | None, typer.Option("--exit", help="Always this exit.")] = None,
    budget: Annotated[Path | None, typer.Option(help="Target file (profiles/*.toml).")] = None,
    policy: Annotated[
        Literal["plain", "speculative", "confident", "lossless"] | None,
        typer.Option(
            help="How full-depth tokens are made, where it is measured to be faster: drafted at a shallow exit (speculative; "
            "lossless: full-depth tokens only), or by a shallow exit that is sure (confident, after `balcony-edge calibrate`)."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Device profile; without it, a target measures what exits cost at load.")
    ] = None,
    packed: Annotated[
        Path | None,
        typer.Option(help="Directory of packed weights, which processes then share; made at the first run."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Record what the controller saw and decided (JSON lines).")] = None,
    live: Annotated[bool, typer.Option("--live", help="Show exits, times, pace and sensors while it writes.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to make.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this share as likely as the likeliest; 0 keeps all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what prompt and reply hold.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0: less of what the reply holds.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the reply before this string; repeatable.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json: the likeliest tokens at each place.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (default: the CPUs of this process).")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda", "nv", "tensorrt"],
        typer.Option(help="auto: engines that fit the GPU, then ONNX Runtime on the GPU, then the CPU."),
    ] = "auto",
    engines: Annotated[str | None, typer.Option(help="Engine set, where the bundle has several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Generate one reply, or chat; every token is coloured by the exit that it took.

    The reply alone goes to stdout; what it cost goes to stderr.
    """
    import balcony_edge
    from balcony_edge.cli.chat import converse
    from balcony_edge.cli.console import depth_styles, stderr, stdout, write_text
    from balcony_edge.cli.live import show_live
    from balcony_edge.control.trace import TraceWriter
    from balcony_runtime.decoding.sampling import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
    )
    _refuse_idle(sampling, logprobs, as_json=as_json, live=live)
    text = _prompt(prompt, file)
    if text is None and (as_json or raw):
        raise InputError("--json or --raw without a prompt: a chat has neither; give a prompt")
    if raw and system is not None:
        raise InputError("--system with --raw: a text to continue has no system message; leave one of them out")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop or ()}
    asked = _budget(tpot_ms, exit_layer, budget, policy)
    where: dict[str, Any] = {"threads": threads, "packed": packed, "device": device, "engines": engines}
    with balcony_edge.load(bundle, budget=asked, profile=profile, **where) as llm:
        styles = depth_styles(llm.exit_layers)
        with nullcontext() if trace is None else TraceWriter(trace) as writer:
            if text is None:
                converse(llm, styles, system, options | {"trace": writer}, live=live)
                return
            asked_for: Any = text if system is None else [{"role": "system", "content": system}, _user(text)]
            ids = llm.encode(asked_for, chat=False if raw else None)
            stream = llm.stream(ids, logprobs=logprobs, trace=writer, **options)
            plain = None if as_json else styles
            interrupted = (
                show_live(stream, styles, llm.readings, lambda: llm.quality, lambda: llm.budget)
                if live
                else show_stream(stream, plain)
            )
        reply = stream.reply
        quality = {str(e): seen._asdict() for e, seen in llm.quality.items()} if asked.policy == "confident" else None
        if as_json:
            tokens = [token.to_dict() for token in reply.tokens]
            print(json.dumps({**summary(reply), "quality": quality, "text": reply.text, "tokens": tokens}))  # noqa: T201 - for programs
        else:
            if not (live and stdout.is_terminal):  # where the reply's last line is still open
                write_text("\n")
            show_summary(reply, styles, stderr)
            for layer, seen in (quality or {}).items():
                if seen["checked"]:
                    opinion = f"disagreed with {seen['disagreed']} of {seen['checked']} tokens that it was asked about"
                    stderr.print(f"exit {layer}: the full depth {opinion}")
    if interrupted:
        raise typer.Exit(130)


def show_stream(stream: TokenStream, styles: dict[int, str] | None) -> bool:
    """Print tokens as they come, coloured by exit (not at all without ``styles``); True when Ctrl-C ended it."""
    from balcony_edge.cli.console import write_text

    try:
        for token in stream:
            if styles is not None:
                write_text(token.text, styles[token.exit_layer])
    except KeyboardInterrupt:
        stream.close()
        return True
    return False


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt, from wherever it is given; None for a chat."""
    if prompt is not None and file is not None:
        raise InputError("--file with a prompt: two prompts; give one of them")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        if file is not None and file != Path("-"):
            content = file.read_bytes()
        else:
            content = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None: it is closed
    except OSError as error:
        where = "standard input" if file is None else f"--file {file}"
        raise InputError(f"{where}: not readable ({error.strerror}): name a text file, or - for stdin") from error
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else f"--file {file}"
        raise InputError(f"{where}: is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error


def _refuse_idle(sampling: SamplingParams, logprobs: int | None, *, as_json: bool, live: bool) -> None:
    """Refuse options that would have no effect."""
    if as_json and live:
        raise InputError("--live with --json: a program reads no display; give one of the two")
    if logprobs is not None and not as_json:
        raise InputError("--logprobs without --json: only the document shows them; add --json, or leave it out")
    given = {"--top-k": sampling.top_k != 0, "--top-p": sampling.top_p != 1, "--min-p": sampling.min_p != 0}
    for option, changed in given.items():
        if changed and sampling.temperature == 0:
            raise InputError(
                f"{option} with --temperature 0: greedy decoding takes the likeliest token; give a --temperature above 0, "
                f"or leave {option} out"
            )


def _budget(tpot_ms: float | None, exit_layer: int | None, path: Path | None, policy: str | None) -> Budget:
    if path is not None and (tpot_ms is not None or exit_layer is not None):
        raise BudgetError("--budget with --tpot-ms or --exit: two budgets; give the file or the options")
    asked = Budget(tpot_ms=tpot_ms, exit_layer=exit_layer) if path is None else load_budget(path)
    if policy is None:
        return asked
    if asked.policy not in {"plain", policy}:
        raise BudgetError(f"{path}: policy = {asked.policy!r} with --policy {policy}: give one of the two")
    if asked.exit_layer is not None and policy != "plain":
        given = "--exit" if path is None else f"{path}: exit_layer"
        raise BudgetError(f"{given} with --policy {policy}: a fixed exit makes every token; give one of the two")
    return Budget.model_validate(asked.model_dump(exclude_defaults=True) | {"policy": policy})


def summary(reply: Reply) -> dict[str, Any]:
    """What a reply cost, as a JSON-ready mapping; times in milliseconds."""
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
        "late_tokens": reply.late_tokens if targets else None,
        "tokens_with_target": targets,
        "unseen_tokens": reply.unseen_tokens,
        "budget": [verdict.to_dict() for verdict in reply.verdicts],
    }


def show_summary(reply: Reply, styles: dict[int, str], console: Console) -> None:
    """What a reply cost, for people."""
    from rich.table import Table

    from balcony_edge.cli.console import counted

    facts = summary(reply)
    if not reply.tokens:
        return
    table = Table("exit", "tokens", "share", "mean ms a token")
    for layer, count in reply.tokens_per_exit.items():
        times = [token.latency_ms for token in reply.tokens[1:] if token.exit_layer == layer]
        mean = f"{sum(times) / len(times):.1f}" if times else ""
        table.add_row(str(layer), str(count), f"{count / len(reply.tokens):.0%}", mean, style=styles[layer])
    console.print(table)
    parts = [
        f"{counted(facts['new_tokens'], 'token')} after {facts['prompt_tokens']}",
        f"first after {facts['ttft_ms']:.0f} ms",
    ]
    if reply.mean_tpot_ms is not None:
        parts.append(f"then {reply.mean_tpot_ms:.1f} ms a token ({1000 / reply.mean_tpot_ms:.0f} tokens a second)")
    parts.append(f"{counted(facts['exit_switches'], 'switch')}, {counted(facts['caught_up_rows'], 'row')} caught up")
    if facts["late_tokens"] is not None:
        parts.append(f"{facts['late_tokens']} of {facts['tokens_with_target']} late")
    if facts["unseen_tokens"]:
        parts.append(f"{facts['unseen_tokens']} without a reading for a ceiling")
    console.print(", ".join(parts))
    if reply.verdicts:
        verdicts = Table("budget", "asked", "reached", "free", "held")
        words = {True: "[green]yes[/]", False: "[red]no[/]", None: "[yellow]not measured[/]"}
        for one in reply.verdicts:
            reached = "" if one.reached is None else f"{one.reached:.4g} ({one.how})"
            free = "" if one.margin is None else f"{one.margin:.0%}"
            verdicts.add_row(one.key, f"{one.asked:g}", reached, free, words[one.held])
        console.print(verdicts)
