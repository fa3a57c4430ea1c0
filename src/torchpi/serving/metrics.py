"""What a server counts and times, for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds: a GPU infers in 10 ms to 100 ms, a CPU in up to a minute.
_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)


class Metrics:
    """The metrics of one server; safe to use from several threads.

    Quantiles come from the histograms' buckets, so that those of several servers can be put together:
    `histogram_quantile(0.95, sum by (le) (rate(torchpi_inference_seconds_bucket[5m])))`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "torchpi_requests_total",
            "Requests by outcome: answered; the codes of errors; client_left, before their answer",
            ["policy", "outcome"],
            registry=self._registry,
        )
        self.queue_seconds = self._histogram("torchpi_queue_seconds", "Time that a request waited for the model")
        self.inference_seconds = self._histogram(
            "torchpi_inference_seconds", "Time of one pass that succeeded, of a whole batch"
        )
        self.batch_size = Histogram(
            "torchpi_batch_size",
            "Requests in one pass that succeeded",
            ["policy"],
            registry=self._registry,
            buckets=_BATCH_SIZES,
        )
        self.queue_length = Gauge("torchpi_queue_length", "Requests that wait for the model", registry=self._registry)
        self.connections = Gauge("torchpi_connections", "Open websockets", registry=self._registry)
        self.refused = Counter(
            "torchpi_refused_connections_total", "Connections refused, by why", ["reason"], registry=self._registry
        )
        self.recorded = Counter(
            "torchpi_recorded_total", "Requests by what --record did: kept, lost", ["result"], registry=self._registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["policy"], registry=self._registry, buckets=_SECONDS)


_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
