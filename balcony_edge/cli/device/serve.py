"""``balcony-edge serve``: an HTTP server in OpenAI's shapes, with a budget for each request."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from balcony_edge.cli.console import VisibleLines
from balcony_edge.cli.options import Engines, NoSpin, OnDevice, Packed, Threads, finite
from balcony_edge.errors import InputError

#: Logger whose records are JSON already.
_REQUESTS = "balcony_runtime.serve.requests"
#: Lines that wait for stderr, after which others are lost; and the longest wait for them at the end, in seconds.
LINES, LAST_LINES_S = 1000, 2.0


class JsonLines(logging.Formatter):
    """Every record as one line of JSON with its time and level, so that a collector need not know two formats."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a request's own fields, or the text of any other record."""
        text = record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        own = record.name == _REQUESTS and record.exc_info is None
        line |= json.loads(text) if own else {"logger": record.name, "message": text}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class InThread(logging.Handler):
    """Hands records to a handler in a thread: a paused terminal or a collector that hangs must not hold the event loop."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._records: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, args=(handler,), name="log", daemon=True)
        self._thread.start()

    def _write(self, handler: logging.Handler) -> None:
        while (record := self._records.get()) is not None:
            handler.handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record, if there is room. A finalizer may log while this thread puts or gets: no other queue allows it."""
        if self._records.qsize() < LINES:
            self._records.put(record)

    def close(self) -> None:
        """Wait for the lines so far. The interpreter would wait for ever, or abort, for a thread that is in a write."""
        super().close()
        self._records.put(None)
        self._thread.join(LAST_LINES_S)
        if self._thread.is_alive():
            os._exit(1)


def serve(
    bundle: Annotated[Path, typer.Argument(help="Directory that `balcony-edge export` wrote.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all of IPv4, :: all of IPv4 and IPv6.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    budget: Annotated[
        Path | None, typer.Option(help="Budget file for requests that ask for nothing; without it, full depth.")
    ] = None,
    budgets: Annotated[
        Path | None, typer.Option(help="Directory of budget files (profiles/): each becomes the model NAME:file.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name of the model (default: the bundle's).")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BALCONY_EDGE_API_KEY",
            help="Key that requests must carry. Other users can see the option, but not the variable.",
        ),
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate for TLS (PEM).")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Key of the certificate (PEM).")] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a page elsewhere that may use the server, or *; may be given several times."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Most replies in progress; others wait in line.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Most replies in line; one more is refused.")] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MB.")] = 8,
    request_timeout: Annotated[
        float, typer.Option(min=1, callback=finite, help="Longest time of a request, in seconds.")
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        typer.Option(min=1, callback=finite, help="Seconds for requests in progress when the server is told to stop."),
    ] = 30.0,
    profile: Annotated[
        Path | None, typer.Option(help="Device profile; without it, prices are measured at the start.")
    ] = None,
    packed: Packed = None,
    prefix_mb: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="Megabytes of ended replies that are kept for prompts that begin alike."
        ),
    ] = 256.0,
    prefix_dir: Annotated[
        Path | None,
        typer.Option(help="Directory to keep them in from one start to the next, and for slots saved by name."),
    ] = None,
    saved_mb: Annotated[
        int, typer.Option(min=0, help="Megabytes of slots saved by name after which a new one is refused.")
    ] = 1000,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the decisions about replies at once as a trace, for `balcony-edge replay`."),
    ] = None,
    threads: Threads = None,
    no_spin: NoSpin = False,
    device: OnDevice = "auto",
    engines: Engines = None,
) -> None:
    """Serve a bundle over HTTP in OpenAI's shapes, with a budget for each request: in its body, headers or model name.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /tokenize, /detokenize, /health, /metrics,
    /props, /slots, and a page for people at /. One line of JSON for each completion and each error goes to stderr.
    """
    # In a container Linux ignores a signal that process 1 has no handler for. The server sets its own once its port is open.
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    import balcony_edge
    from balcony_edge.control.company.round_trace import RoundTraceWriter
    from balcony_runtime.serve.http.server import Server, Settings
    from balcony_runtime.serve.work.service import Limits

    handler = logging.StreamHandler(sys.stderr)
    is_read = sys.stderr is not None and sys.stderr.isatty()
    handler.setFormatter(VisibleLines() if is_read else JsonLines())  # a person reads the texts alone
    logging.basicConfig(level=logging.INFO, handlers=[InThread(handler)])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are one for each request that is not HTTP

    def open_llm() -> balcony_edge.LLM:
        llm = balcony_edge.load(
            bundle,
            budget=budget,
            profile=profile,
            packed=packed,
            threads=threads,
            spin=False if no_spin else None,
            device=device,
            engines=engines,
            prefix_mb=prefix_mb,
            prefix_directory=prefix_dir,
        )
        llm.record_rounds(rounds)
        return llm

    blank = os.environ.get("BALCONY_EDGE_API_KEY") == "" if api_key is None else not api_key.strip()
    if blank:
        raise InputError("--api-key or BALCONY_EDGE_API_KEY: is empty: give a key, or leave it out")
    if api_key is not None and not (api_key.strip().isascii() and api_key.strip().isprintable()):
        raise InputError(
            "--api-key or BALCONY_EDGE_API_KEY: has letters that clients encode differently: use ASCII only"
        )
    if name is not None and name.encode("utf-8", "replace").decode() != name:
        raise InputError("--served-model-name: is not valid UTF-8: give it as UTF-8")
    limits = Limits(
        parallel=parallel,
        queue=queue,
        body_bytes=max_body_mb * 1_000_000,
        bodies_bytes=max(8 * max_body_mb, 64) * 1_000_000,
        request_s=request_timeout,
        saved_bytes=saved_mb * 1_000_000,
    )
    settings = Settings(
        host=host,
        port=port,
        name=name,
        budget=budget,
        budgets=budgets,
        api_key=None if api_key is None else api_key.strip(),  # a secret from a file often ends in a newline
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        limits=limits,
        drain_s=drain_timeout,
        origins=allow_origin or (),
    )
    rounds = None if record is None else RoundTraceWriter(record)
    try:
        Server(open_llm, settings).run()
    finally:
        if rounds is not None:
            try:
                rounds.close()
            except InputError as error:  # a full disk ends the record, but neither replies nor the server
                logging.getLogger(__name__).warning("the record is not whole: %s", error)
