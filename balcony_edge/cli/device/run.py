"""``balcony-edge run``: generates or chats under a budget and shows which exit made every token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from balcony_edge.budget import Budget, load_budget
from balcony_edge.cli.console import depth_styles, stderr, stdout, write_text
from balcony_edge.cli.options import Engines, NoSpin, OnDevice, Packed, Threads
from balcony_edge.cli.show import show_checks, show_stream, show_summary, summary
from balcony_edge.errors import BudgetError, InputError

if TYPE_CHECKING:
    from balcony_runtime.decoding.sampling import SamplingParams


def run(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Message to answer or, with --raw, text to continue. Without it: standard input if that is a file or a "
            "pipe; on a terminal, a chat."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Read the prompt from a file without its final newline; - is standard input."
        ),
    ] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target: milliseconds between two tokens.")] = None,
    exit_layer: Annotated[int | None, typer.Option("--exit", help="Use only this exit.")] = None,
    budget: Annotated[Path | None, typer.Option(help="Budget file (TOML), such as those in profiles/.")] = None,
    policy: Annotated[
        Literal["plain", "speculative", "confident", "lossless"] | None,
        typer.Option(
            help="How full-depth tokens are made, when that is measured to be faster. speculative: a shallow exit drafts "
            "them. lossless: the same, and all tokens are full-depth tokens. confident: a shallow exit gives them if its "
            "balcony is confident enough (thresholds: `balcony-edge calibrate`)."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Device profile; without it, a target needs a short measurement at load.")
    ] = None,
    packed: Packed = None,
    record: Annotated[
        Path | None, typer.Option(help="Record the controller's observations and decisions (JSON lines).")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Show exits, times, pace and sensors during the reply.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to make.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this total probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens with at least this share of the likeliest's probability; 0 keeps all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: makes tokens of the prompt and the reply less likely.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0: makes tokens of the reply less likely.")] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Above 0: makes tokens less likely each time that the reply has them.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the reply follows (extra \\[structured]).")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole reply matches.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File with a Lark or GBNF grammar that the reply follows.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the reply before this string; repeatable.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json: number of likeliest tokens to list at each position.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without a chat template.")] = False,
    control_tokens: Annotated[
        bool | None,
        typer.Option(
            help="Whether names of control tokens in the prompt, such as <|im_end|>, are those tokens (default: with --raw)."
        ),
    ] = None,
    threads: Threads = None,
    no_spin: NoSpin = False,
    device: OnDevice = "auto",
    engines: Engines = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Generate one reply, or chat; every token is coloured by the exit that made it.

    Only the reply goes to stdout; its cost goes to stderr.
    """
    import balcony_edge
    from balcony_edge.cli.budgets.budget import named_refusal
    from balcony_edge.cli.device.chat import converse
    from balcony_edge.cli.device.live import show_live
    from balcony_edge.control.trace import TraceWriter
    from balcony_runtime.decoding.sampling import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        json_schema=_text_of("--json-schema", json_schema),
        regex=regex,
        grammar=_text_of("--grammar", grammar),
    )
    _refuse_idle(sampling, logprobs, as_json=as_json, live=live)
    text = _prompt(prompt, file)
    if text is None and (as_json or raw):
        raise InputError("--json or --raw without a prompt: a chat supports neither: give a prompt")
    if raw and system is not None:
        raise InputError("--system with --raw: a text to continue has no system message: leave one of them out")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop or ()}
    asked = _budget(tpot_ms, exit_layer, budget, policy)
    where: dict[str, Any] = {
        "threads": threads,
        "spin": False if no_spin else None,
        "packed": packed,
        "device": device,
        "engines": engines,
    }
    # before the bundle: a place that cannot be written is refused now
    recorder = nullcontext() if record is None else TraceWriter(record)
    with named_refusal(None if policy else budget):  # of what does not fit this bundle
        loaded = balcony_edge.load(bundle, budget=asked, profile=profile, **where)
    with loaded as llm:
        styles = depth_styles(llm.exit_layers)
        with recorder as writer:
            if text is None:
                if not llm.codec.has_chat_template:
                    raise InputError(f"{bundle}: has no chat template: give a prompt, which it continues as a text")
                options |= {"trace": writer, "control_tokens": control_tokens}
                converse(llm, styles, system, options, live=live)
                return
            asked_for: Any = text
            if system is not None:
                asked_for = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            ids = llm.encode(asked_for, chat=False if raw else None, control_tokens=control_tokens)
            chat = llm.codec.has_chat_template and not raw  # its text begins, and does not go on with the prompt's
            stream = llm.stream(ids, chat=chat, logprobs=logprobs, trace=writer, **options)
            plain = None if as_json else styles
            interrupted = show_live(stream, styles, llm) if live else show_stream(stream, plain)
            reply, quality = stream.reply, llm.quality
            # before the trace is closed: it is shown even if its record cannot be kept
            if as_json:
                seen = {str(e): one._asdict() for e, one in quality.items()} if asked.policy == "confident" else None
                made = {"text": reply.text, "tokens": [token.to_dict() for token in reply.tokens]}
                print(json.dumps({**summary(reply), "quality": seen, **made}))  # noqa: T201 - for programs
            else:
                if not (live and stdout.is_terminal):  # the live view on a terminal has ended the reply's last line
                    write_text("\n")
                show_summary(reply, styles, stderr)
                show_checks(quality, stderr)
    if interrupted:
        raise typer.Exit(130)


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt, from the argument, a file or standard input; None for a chat."""
    if prompt is not None and file is not None:
        raise InputError("--file with a prompt: these are two prompts: give one of them")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        return None

    def content() -> str:
        if file is not None and file != Path("-"):
            return file.read_bytes().decode("utf-8-sig")  # editors on Windows begin a file with this mark
        return "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8-sig")  # None: stdin is closed

    where = "standard input" if file is None else f"--file {file}"
    return _read(where, content, "name a text file, or - for stdin").removesuffix("\n").removesuffix("\r")


def _text_of(option: str, file: Path | None) -> str | None:
    """Text of a file, or None without one."""
    if file is None:
        return None
    return _read(f"{option} {file}", lambda: file.read_text(encoding="utf-8-sig"), "name a text file")


def _read(where: str, content: Callable[[], str], cure: str) -> str:
    """A text that the user named.

    Raises:
        InputError: it is not readable, with this cure; or it is not UTF-8.
    """
    try:
        return content()
    except OSError as error:
        raise InputError(f"{where}: not readable ({error.strerror}): {cure}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error


def _refuse_idle(sampling: SamplingParams, logprobs: int | None, *, as_json: bool, live: bool) -> None:
    """Refuse options that would have no effect."""
    if as_json and live:
        raise InputError("--live with --json: a program cannot read the live view: give one of the two")
    if logprobs is not None and not as_json:
        raise InputError("--logprobs without --json: only the JSON document has them: add --json, or leave it out")
    given = {
        "--top-k": sampling.top_k != 0,
        "--top-p": sampling.top_p != 1,
        "--min-p": sampling.min_p != 0,
        "--seed": sampling.seed is not None,
    }
    for option, changed in given.items():
        if changed and sampling.temperature == 0:
            raise InputError(
                f"{option} with --temperature 0: greedy decoding always takes the likeliest token: give a --temperature "
                f"above 0, or leave {option} out"
            )


def _budget(tpot_ms: float | None, exit_layer: int | None, path: Path | None, policy: str | None) -> Budget:
    if path is not None and (tpot_ms is not None or exit_layer is not None):
        raise BudgetError("--budget with --tpot-ms or --exit: these are two budgets: give the file or the options")
    asked = Budget(tpot_ms=tpot_ms, exit_layer=exit_layer) if path is None else load_budget(path)
    if policy is None:
        return asked
    if asked.policy not in {"plain", policy}:
        raise BudgetError(f"{path}: policy = {asked.policy!r} with --policy {policy}: give one of the two")
    if asked.exit_layer is not None and policy != "plain":
        given = "--exit" if path is None else f"{path}: exit_layer"
        raise BudgetError(f"{given} with --policy {policy}: a fixed exit makes every token; give one of the two")
    return Budget.model_validate(asked.model_dump(exclude_defaults=True) | {"policy": policy})
