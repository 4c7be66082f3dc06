"""Metrics for Prometheus, in a registry of their own; names of OpenTelemetry's GenAI conventions where there are any.

Owns the names and the buckets. Counting happens in the event loop. :meth:`Metrics.text`, and with it every function
that gives a value, runs in a thread, while the event loop may change what these functions read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from balcony_runtime.reply import Token
from balcony_runtime.serve.work.energy import Readings
from balcony_runtime.serve.work.jobs import Cost

#: Seconds; OpenTelemetry's advice for the three histograms that have its names, and further ones up to what a request may
#: take: Prometheus shows no quantile above the last. Waiting is a part of the time to the first token.
_DURATIONS = tuple(0.01 * 2**step for step in range(17))
_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_FIRST = (*_SHORT, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
#: Seconds between two tokens; finer, because a budget asks for single milliseconds. Ceilings slow a reply to one a second.
_GAPS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_MODEL = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_PROVIDER = "balcony-edge"
#: Field of a sensor's reading → name and help of the gauge that shows it.
_SENSED = {
    "watts": ("balcony_power_watts", "Power of a part."),
    "celsius": ("balcony_temperature_celsius", "Temperature of a part."),
    "utilization": ("balcony_utilization_ratio", "Busy share of a part, by all its users."),
    "charge": ("balcony_battery_charge_ratio", "Charge of a battery."),
}


class Metrics:
    """What the server counts.

    Args:
        exits: exits of the bundle.
        running: gives the number of replies in progress.
        waiting: gives the number of replies that have not begun.
        pending: gives the number of pending rows of all replies.
        slowdown: gives how many times slower than its prices the device is.
        kept: place → gives the bytes of ended replies that are kept there.
        readings: gives the latest reading of every sensor.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        pending: Callable[[], float],
        slowdown: Callable[[], float],
        kept: Mapping[str, Callable[[], float]],
        readings: Readings,
    ) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Sensed(readings))

        def histogram(name: str, help_: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _MODEL) -> Histogram:
            return Histogram(name, help_, labels, buckets=buckets, registry=registry)

        self._duration = histogram(
            "gen_ai_server_request_duration_seconds", "Time of a request.", _DURATIONS, (*_MODEL, "error_type")
        )
        self._first = histogram("gen_ai_server_time_to_first_token_seconds", "Time to the first token.", _FIRST)
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean time of a token after the first.", _PER_TOKEN
        )
        self._gap = histogram("balcony_token_gap_seconds", "Gap between two tokens.", _GAPS, ())
        self._requests = Counter("balcony_requests", "Requests by status.", ("endpoint", "status"), registry=registry)
        self._prompt = Counter("balcony_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            "balcony_cached_prompt_tokens", "Tokens of prompts whose rows were there already.", registry=registry
        )
        self._hits = Counter("balcony_prefix_hits", "Answers that began with rows of others.", registry=registry)
        kept_bytes = Gauge("balcony_prefix_bytes", "Bytes of ended replies.", ("place",), registry=registry)
        for place, value in kept.items():
            kept_bytes.labels(place).set_function(value)
        tokens = Counter("balcony_tokens", "Tokens by the exit that made them.", ("exit",), registry=registry)
        self._tokens = {layer: tokens.labels(str(layer)) for layer in exits}
        self._forced = Counter(
            "balcony_forced_tokens", "Tokens that a reply's structure left no choice about.", registry=registry
        )
        self._timed = Counter("balcony_timed_tokens", "Tokens after the first that had tpot_ms.", registry=registry)
        self._late = Counter("balcony_late_tokens", "Tokens after the first that missed tpot_ms.", registry=registry)
        self._unseen = Counter(
            "balcony_unseen_tokens", "Tokens at which no sensor measured a ceiling of their budget.", registry=registry
        )
        self._rejections = Counter(
            "balcony_rejections", "Requests that were refused, by reason.", ("reason",), registry=registry
        )
        for name, help_, value in (
            ("balcony_replies_running", "Replies in progress.", running),
            ("balcony_replies_waiting", "Replies that have not begun.", waiting),
            ("balcony_pending_rows", "Rows that the deepest stage has not taken in yet, of all replies.", pending),
            ("balcony_slowdown", "How many times slower than its prices the device is.", slowdown),
        ):
            Gauge(name, help_, registry=registry).set_function(value)

    def token(self, token: Token, *, first: bool) -> None:
        """Count a token."""
        (self._forced if token.forced else self._tokens[token.exit_layer]).inc()
        self._unseen.inc(token.decision.unseen)
        if not first:
            self._gap.observe(token.latency_ms / 1000)
            self._timed.inc(token.target_ms is not None)
            self._late.inc(token.late)

    def request(self, endpoint: str, status: int, reason: str | None) -> None:
        """Count an answer to any request."""
        self._requests.labels(endpoint, str(status)).inc()
        if reason is not None:
            self.rejected(reason)

    def rejected(self, reason: str) -> None:
        """Count an error by its code."""
        self._rejections.labels(reason).inc()

    def prompts(self, tokens: int, cached: int) -> None:
        """Count the tokens of an answer's prompts, and those whose rows were there already."""
        self._prompt.inc(tokens)
        self._cached.inc(cached)
        self._hits.inc(cached > 0)

    def reply(self, operation: str, model: str, cost: Cost, seconds: float, error: str) -> None:
        """Record the cost of an answer."""
        self._duration.labels(operation, _PROVIDER, model, error).observe(seconds)
        if cost.ttft_ms is not None:
            self._first.labels(operation, _PROVIDER, model).observe(cost.ttft_ms / 1000)
        if cost.gaps:
            self._per_token.labels(operation, _PROVIDER, model).observe(cost.gaps_ms / cost.gaps / 1000)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)


class _Sensed(Collector):
    """The latest readings of the sensors, taken when Prometheus asks. Energy counts from the first time.

    A sensor's own counter may be lower in the next process (RAPL's wraps at 262 kJ). Prometheus would take that for one that
    began at 0, and count all of it as energy of that moment.
    """

    def __init__(self, readings: Readings) -> None:
        self._readings = readings
        self._first: dict[tuple[str, str], float] = {}

    def collect(self) -> Iterator[Metric]:
        labels, readings = ("source", "scope"), self._readings()
        energy = CounterMetricFamily("balcony_energy_joules", "Energy of a part.", labels=labels)
        for reading in readings:
            if reading.joules is not None:
                part = reading.source, reading.scope
                energy.add_metric(part, reading.joules - self._first.setdefault(part, reading.joules))
        yield energy
        for field, (name, help_) in _SENSED.items():
            gauge = GaugeMetricFamily(name, help_, labels=labels)
            for reading in readings:
                if (value := getattr(reading, field)) is not None:
                    gauge.add_metric((reading.source, reading.scope), value)
            yield gauge
