"""The runtime inside a server: one engine, a thread per request, text that is sent as it is generated.

    python examples/embed_in_server.py BUNDLE [--port 8765]
    curl --no-buffer --data 'Why is the sky blue?' http://127.0.0.1:8765/

It uses the standard library's server to show four rules: share one ``LLM`` between all threads, open one stream per request,
close the stream when its reader disconnects, and free the engine last. Do not expose this server to an open network.
"""

from __future__ import annotations

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import balcony_edge
from balcony_edge import LLM

MAX_PROMPT_BYTES = 64_000


class Server(ThreadingHTTPServer):
    """Requests share ``llm``; closing the server waits for running ones."""

    daemon_threads = False

    def __init__(self, port: int, llm: LLM, tokens: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.llm, self.tokens = llm, tokens


class Handler(BaseHTTPRequestHandler):
    """One request: its body is the prompt, the answer is plain text."""

    server: Server
    timeout = 30  # an idle connection must not keep the program from ending

    def do_POST(self) -> None:
        """Stream a reply."""
        length = max(0, min(int(self.headers.get("Content-Length", 0)), MAX_PROMPT_BYTES))
        prompt = self.rfile.read(length).decode("utf-8", errors="replace")
        try:
            self._answer(prompt)
        except (BrokenPipeError, ConnectionResetError):
            self.log_message("the reader disconnected")

    def _answer(self, prompt: str) -> None:
        try:
            stream = self.server.llm.stream(prompt, max_new_tokens=self.server.tokens)
            first = next(stream, None)  # a full queue and a device that fails are told before the status is sent
        except balcony_edge.BalconyError as error:
            ours = isinstance(error, balcony_edge.BusyError | balcony_edge.DeviceError)
            self.send_error(503 if ours else 400, str(error))
            return
        with stream:  # closes the stream and frees its memory when the reader disconnects
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            for token in chain(() if first is None else (first,), stream):
                self.wfile.write(token.text.encode())
                self.wfile.flush()


def main() -> None:
    """Run the example until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve replies as plain text.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8765, help="port; 0 takes a free one")
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    with balcony_edge.load(options.bundle) as llm, Server(options.port, llm, options.tokens) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("waiting for unfinished replies")


if __name__ == "__main__":
    main()
