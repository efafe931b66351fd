"""What ``pdtrim watch`` found, as Prometheus metrics in a registry of their own.

No metric and no label holds anything of a request. The gauges are those of the last hour that has
ended; a gauge that nothing is known of has no sample.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.watch import Hour, Watch
from pdtrim.keep.files import write_text

if TYPE_CHECKING:
    from prometheus_client.core import Metric

OF_AN_HOUR = {
    "kl": "Mean KL of dense to pair in the last hour, nats a token.",
    "kl_error": "Its standard error.",
    "agreement": "Share of tokens whose likeliest one is the dense model's, in the last hour.",
    "replayed": "Requests that were replayed in the last hour.",
    "hour_timestamp_seconds": "When the last hour began.",
    "p_value": "Of the test that the last hour costs no more than is borne.",
    "drift": "1 if the last hour calls for a new plan, else 0.",
}
"""Names behind ``pdtrim:watch_``, and what they are."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of who asks."""


class WatchMetrics:
    """The metrics of one plan.

    Raises:
        PdtrimError: prometheus-client is not installed.
    """

    def __init__(self, watch: Watch) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            raise PdtrimError(
                "metrics need prometheus-client: pip install 'pdtrim[metrics]'"
            ) from None
        self.watch = watch
        self.hour: Hour | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> list[Metric]:
        """The metrics as they are now, for the registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        watch, plan = self.watch, self.watch.plan.digest[:12]
        found: list[Metric] = []
        for name, (words, value) in self._gauges().items():
            gauge = GaugeMetricFamily(f"pdtrim:{name}", words, labels=["plan"])
            if value is not None:
                gauge.add_metric([plan], float(value))
            found.append(gauge)
        for name, words, count in (
            ("requests", "Requests in the log.", watch.requests),
            ("replayed_requests", "Requests that were replayed.", watch.replayed),
        ):
            counter = CounterMetricFamily(f"pdtrim:watch_{name}", words, labels=["plan"])
            counter.add_metric([plan], count)
            found.append(counter)
        skipped = CounterMetricFamily(
            "pdtrim:watch_skipped_requests",
            "Requests of the sample that were not replayed, by reason.",
            labels=["plan", "reason"],
        )
        for reason, count in watch.skipped.items():
            skipped.add_metric([plan, reason], count)
        return [*found, skipped]

    def text(self) -> str:
        """The page."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()

    def write(self, path: str) -> None:
        """The page as a file, whole or not at all, for node_exporter's textfile collector.

        Raises:
            PdtrimError: the system refuses.
        """
        write_text(path, self.text())

    def serve(self, host: str, port: int) -> tuple[HTTPServer, str]:
        """Answer on ``/metrics`` from a thread; the server, and its URL.

        Args:
            port: 0 for a free one.

        Raises:
            PdtrimError: the address cannot be had.
        """
        try:
            server = make_server(host, port, self._answer, _Server, _Handler)
        except OSError as error:
            raise PdtrimError(f"cannot listen on {host}:{port}: {error}") from error
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://{host}:{server.server_port}/metrics"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        """Plain text, whatever is asked for.

        In OpenMetrics prometheus-client (0.26) writes underscores for the colons of names.
        """
        found = environ["PATH_INFO"] == "/metrics"
        kind = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
        start("200 OK" if found else "404 Not Found", kind)
        return [self.text().encode() if found else b"the metrics are on /metrics\n"]

    def _gauges(self) -> dict[str, tuple[str, float | None]]:
        hour, expected = self.hour, self.watch.expected
        values: dict[str, float | None] = {}
        if hour is not None:
            values = {
                "kl": hour.kl,
                "kl_error": hour.kl_error,
                "agreement": hour.agreement,
                "replayed": len(hour.kls),
                "hour_timestamp_seconds": hour.start,
                "p_value": hour.p,
                "drift": hour.drift,
            }
        found = {f"watch_{name}": (words, values.get(name)) for name, words in OF_AN_HOUR.items()}
        found["watch_expected_kl"] = (
            "Mean KL of the text that the plan was judged on, nats a token.",
            None if expected is None else expected.kl,
        )
        found["watch_kv_bytes_per_token"] = (
            "Bytes that a token of a prompt is on the wire, in the last hour.",
            None if hour is None else hour.kv_bytes_per_token,
        )
        return found
