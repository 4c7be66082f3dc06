"""The live view of ``balcony-edge run --live``: the reply on the normal screen, and a status area below it.

Owns only the display; tokens and readings are passed in. A line of the reply is printed as soon as it is full, so it stays in
the terminal's scrollback. The status area holds the unfinished line, the facts, and as many of the latest decisions as the
terminal has room for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, get_args

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from balcony_edge.budget import Budget, Rail
from balcony_edge.cli.console import stderr, stdout, visible, write_text
from balcony_edge.device.readings import adding_up

if TYPE_CHECKING:
    from balcony_edge.device.readings import Reading
    from balcony_runtime.decoding.confident import Telemetry
    from balcony_runtime.llm import LLM
    from balcony_runtime.reply import Token, TokenStream

#: Most decisions shown, and number of tokens in the mean.
LAST_DECISIONS, MEAN_TOKENS = 5, 16
#: Text between two facts on a line.
SEPARATOR = " · "


def show_live(stream: TokenStream, styles: dict[int, str], llm: LLM) -> bool:
    """Draw until the stream ends; True if Ctrl-C ended it.

    If stdout is not a terminal, it gets only the text, and the status area goes to stderr.
    """
    view = LiveView(styles, llm.readings, lambda: llm.quality, lambda: llm.budget)
    on_screen, stopped = stdout.is_terminal, False
    # Redirected, a reply for a file or a pipe would go to the terminal of stderr.
    console, redirected = (stdout, True) if on_screen else (stderr, False)
    with Live(view, console=console, refresh_per_second=8, redirect_stdout=redirected) as live:
        try:
            for token in stream:
                if not on_screen:
                    write_text(token.text)
                for line in view.add(token, live.console.width):
                    if on_screen:
                        live.console.print(line)
        except KeyboardInterrupt:
            stream.close()
            stopped = True
        if (rest := view.finish()) and on_screen:
            live.console.print(rest)
    if not live.console.is_terminal:
        live.console.line()  # rich does not end the last line of a file
    return stopped


class LiveView:
    """Content of the status area: the unfinished line, the facts, and the latest decisions.

    One thread adds tokens, another draws them.
    """

    def __init__(
        self,
        styles: dict[int, str],
        readings: Callable[[], tuple[Reading, ...]],
        quality: Callable[[], Mapping[int, Telemetry]],
        budget: Callable[[], Budget],
    ) -> None:
        self._styles, self._readings, self._quality, self._budget = styles, readings, quality, budget
        self._lock = threading.Lock()
        self._line = Text()
        self._tokens: deque[Token] = deque(maxlen=MEAN_TOKENS)
        self._decisions: deque[tuple[int, int, str]] = deque(maxlen=LAST_DECISIONS)
        self._count = 0

    def add(self, token: Token, width: int) -> list[Text]:
        """Add a token and return the lines of the reply that it completes, each at most ``width`` columns wide.

        A decision is new if its exit or its reason differs from the last one's.
        """
        with self._lock:
            self._count += 1
            self._line.append(visible(token.text), style=self._styles[token.exit_layer])
            if self._count > 1:  # the time of the first token is that of the prompt
                self._tokens.append(token)
            if not self._decisions or self._decisions[-1][1:] != (token.exit_layer, token.reason):
                self._decisions.append((self._count, token.exit_layer, token.reason))
            if self._line.cell_len <= width and "\n" not in self._line.plain:
                return []
            lines: list[Text] = []
            for paragraph in self._line.split("\n", allow_blank=True):
                lines += paragraph.wrap(_PLAIN, width) or [Text()]
            if self._line.plain.endswith(" ") and not lines[-1].plain.endswith(" "):
                lines[-1].append(" ")  # wrapping drops a space at the edge; the next word needs it
            *full, self._line = lines
            return full

    def finish(self) -> Text:
        """End the reply and return its last line, which leaves the status area."""
        with self._lock:
            rest, self._line = self._line, Text()
            return rest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            yield self._drawn(options.max_width, console.size.height)

    def _drawn(self, width: int, height: int) -> Group:
        lines = list(self._line.wrap(_PLAIN, width))[-1:]  # one line, even if the terminal became narrower
        lines += self._facts(width)[: max(height - 3, 1)]
        room = height - 1 - len(lines)
        if self._decisions and room > 1:
            lines.append(Text("last decisions, newest last", style="dim"))
            for count, exit_layer, reason in list(self._decisions)[-(room - 1) :]:
                lines.append(
                    Text.assemble(f"{count:>6} ", (f"exit {exit_layer}", self._styles[exit_layer]), f" {reason}")
                )
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Group(*lines)

    def _facts(self, width: int) -> list[Text]:
        """The facts, as many on a line as fit; no fact is broken across lines."""
        lines: list[str] = []
        for fact in [*self._progress(), *self._seen(self._readings()), *self._checked()]:
            if lines and len(lines[-1]) + len(SEPARATOR) + len(fact) <= width:
                lines[-1] += SEPARATOR + fact
            else:
                lines.append(fact)
        return [Text(line, style="bold") for line in lines]

    def _progress(self) -> list[str]:
        facts = [f"{self._count} token{'s' * (self._count != 1)}"]
        if self._tokens:
            last = self._tokens[-1]
            mean_ms = sum(token.latency_ms for token in self._tokens) / len(self._tokens)
            facts.append(f"exit {last.exit_layer}")
            target = "" if last.target_ms is None else f" of {last.target_ms:g}"
            facts.append(f"{mean_ms:.1f} ms{target} a token")
            if last.decision.price_ms:
                facts.append(f"slowdown {last.decision.predicted_ms / last.decision.price_ms:.2f}")
            if last.decision.period_ms:
                facts.append(f"paced to {1000 / last.decision.period_ms:.1f} a second")
            facts.append(f"{last.pending_rows} rows pending")
        return facts

    def _seen(self, readings: tuple[Reading, ...]) -> list[str]:
        """Readings of everything that the budget limits; also watts and degrees if a sensor measures them."""
        asked = self._budget().model_dump(exclude_none=True)

        def ceiling(key: str, unit: str) -> str:
            return f" of {asked[key]:g} {unit}" if key in asked else f" {unit}"

        facts, limited = [], asked.keys() & {"power_w", "energy_j_per_token"}
        measured = [reading for reading in readings if reading.watts is not None]
        known = (one for one in get_args(Rail) if any(reading.scope == one for reading in measured))
        rail = asked["power_rail"] if limited else next(known, None)
        powered = [reading for reading in measured if reading.scope == rail]
        if powered:
            watts = sum(reading.watts or 0.0 for reading in adding_up(powered, powered[0].scope))
            facts.append(f"{watts:.1f}{ceiling('power_w', 'W')} {rail}")
            if "energy_j_per_token" in asked and self._tokens:
                mean_s = sum(token.latency_ms for token in self._tokens) / len(self._tokens) / 1000
                facts.append(f"{watts * mean_s:.3g}{ceiling('energy_j_per_token', 'J')} a token")
        elif limited:
            facts.append(f"no reading of {rail} power")
        degrees = [reading.celsius for reading in readings if reading.celsius is not None]
        if degrees:
            key = "temperature_c" if "temperature_c" in asked else "critical_temperature_c"
            facts.append(f"{max(degrees):.0f}{ceiling(key, '°C')}")
        elif asked.keys() & {"temperature_c", "critical_temperature_c"}:
            facts.append("no reading of temperature")
        for key, scope, field, scale, limit, name in _CEILINGS:
            if key in asked:
                values = [getattr(r, field) for r in readings if r.scope == scope and getattr(r, field) is not None]
                found = f"{name} {values[0] * scale:.0f} {limit(asked[key])}" if values else f"no reading of {name}"
                facts.append(found)
        return facts

    def _checked(self) -> list[str]:
        checked = {e: seen for e, seen in self._quality().items() if seen.checked}
        return [f"{seen.disagreed} of {seen.checked} checked at {e} differ" for e, seen in checked.items()]


#: Console for wrapping, which uses only its tab size and the like.
_PLAIN = Console(width=80)
#: Other ceilings of a budget: key; scope, field and factor of the reading; words for the limit; name of the quantity.
_CEILINGS: tuple[tuple[str, str, str, float, Callable[[float], str], str], ...] = (
    ("cpu_utilization", "cpu", "utilization", 100, lambda share: f"of {share * 100:g} %", "CPU"),
    ("gpu_utilization", "gpu", "utilization", 100, lambda share: f"of {share * 100:g} %", "GPU"),
    ("battery_floor_percent", "battery", "charge", 100, lambda floor: f"%, floor {floor:g} %", "battery"),
    ("memory_mb", "process", "memory_bytes", 1e-6, lambda limit: f"of {limit:g} MB", "memory"),
)
