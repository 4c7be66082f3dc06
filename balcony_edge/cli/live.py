"""The live view of ``balcony-edge run --live``: the reply as it is written, and beside it what the controller does.

Owns the display and nothing else: it shows tokens that somebody makes and readings that somebody takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from balcony_edge.telemetry import Reading
    from balcony_runtime.confident import Telemetry
    from balcony_runtime.reply import Token, TokenStream

#: Decisions shown, and tokens that the mean is taken over.
LAST_DECISIONS, MEAN_TOKENS = 5, 16
#: Lines of the reply that stay in view: with facts and decisions they fill a terminal of 24.
REPLY_LINES = 8


def show_live(
    stream: TokenStream,
    styles: dict[int, str],
    readings: Callable[[], tuple[Reading, ...]],
    quality: Callable[[], Mapping[int, Telemetry]] = dict,
) -> bool:
    """Draw until the stream ends; True when Ctrl-C ended it."""
    from balcony_edge.cli.console import stdout

    view = LiveView(styles, readings, quality)
    try:
        with Live(view, console=stdout, refresh_per_second=8, vertical_overflow="crop"):
            for token in stream:
                view.add(token)
    except KeyboardInterrupt:
        stream.close()
        return True
    return False


class LiveView:
    """What is on the display: the text by exit, the last tokens and decisions, and the sensors at every redraw.

    Tokens are added by one thread and drawn by another.
    """

    def __init__(
        self,
        styles: dict[int, str],
        readings: Callable[[], tuple[Reading, ...]],
        quality: Callable[[], Mapping[int, Telemetry]] = dict,
    ) -> None:
        self._styles, self._readings, self._quality = styles, readings, quality
        self._lock = threading.Lock()
        self._text = Text()
        self._tokens: deque[Token] = deque(maxlen=MEAN_TOKENS)
        self._decisions: deque[tuple[int, int, str]] = deque(maxlen=LAST_DECISIONS)
        self._count = 0

    def add(self, token: Token) -> None:
        """One more token; a decision is new where exit or reason differ from the last one's."""
        with self._lock:
            self._count += 1
            self._text.append(token.text, style=self._styles[token.exit_layer])
            if self._count > 1:  # the first one's time is the prompt's
                self._tokens.append(token)
            if not self._decisions or self._decisions[-1][1:] != (token.exit_layer, token.reason):
                self._decisions.append((self._count, token.exit_layer, token.reason))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            yield self._drawn(console, options.max_width)

    def _drawn(self, console: Console, width: int) -> Group:
        lines = list(self._text.wrap(console, max(width - 4, 20)))[-REPLY_LINES:]
        decisions = Table("token", "exit", "reason", title="last decisions", title_justify="left", expand=True)
        for count, exit_layer, reason in self._decisions:
            decisions.add_row(str(count), Text(str(exit_layer), self._styles[exit_layer]), reason)
        return Group(self._facts(self._readings()), Panel(Text("\n").join(lines)), decisions)

    def _facts(self, readings: tuple[Reading, ...]) -> Table:
        facts = Table.grid(padding=(0, 3))
        cells = [f"{self._count} tokens"]
        if self._tokens:
            last = self._tokens[-1]
            mean_ms = sum(token.latency_ms for token in self._tokens) / len(self._tokens)
            cells.append(f"exit {last.exit_layer}")
            target = "" if last.target_ms is None else f" of {last.target_ms:g}"
            cells.append(f"{mean_ms:.1f} ms{target} a token")
            if last.decision.price_ms:
                cells.append(f"slowdown {last.decision.predicted_ms / last.decision.price_ms:.2f}")
            if last.decision.period_ms:
                cells.append(f"paced to {1000 / last.decision.period_ms:.1f} a second")
            cells.append(f"{last.pending_rows} rows pending")
        watts = next(
            (f"{reading.watts:.1f} W {reading.scope}" for reading in readings if reading.watts is not None), None
        )
        degrees = [reading.celsius for reading in readings if reading.celsius is not None]
        cells += [watts] if watts else []
        cells += [f"{max(degrees):.0f} °C"] if degrees else []
        checked = {e: seen for e, seen in self._quality().items() if seen.checked}
        cells += [f"{seen.disagreed} of {seen.checked} checked at {e} differ" for e, seen in checked.items()]
        facts.add_row(*cells)
        return facts
