"""Prometheus metrics of a server."""

import functools

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# In seconds: inference takes 10 ms to 100 ms on a GPU, and up to a minute on a CPU.
_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Metrics of one server; thread-safe.

    Times are histograms, so that their quantiles can be aggregated over several servers:
    `histogram_quantile(0.95, sum by (le) (rate(torchpi_inference_seconds_bucket[5m])))`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self._registry)
        gauge = functools.partial(Gauge, registry=self._registry)
        histogram = functools.partial(Histogram, labelnames=["policy"], registry=self._registry)
        self.requests = counter(
            "torchpi_requests_total",
            "Requests by outcome: answered, client_left (before the answer), or an error code",
            ["policy", "outcome"],
        )
        self.cut_prompts = counter(
            "torchpi_cut_prompts_total", "Answered requests whose prompt was cut to max_token_len", ["policy"]
        )
        self.clipped = counter(
            "torchpi_clipped_answers_total", "Answers with actions clipped to the robot's limits", ["policy"]
        )
        self.uncertainty = histogram(
            "torchpi_uncertainty",
            "Spread of a request's samples: standard deviation over the training range, averaged over the chunk",
            buckets=_FRACTIONS,
        )
        self.queue_seconds = histogram("torchpi_queue_seconds", "Time a request waited for the model", buckets=_SECONDS)
        self.inference_seconds = histogram(
            "torchpi_inference_seconds", "Duration of a successful forward pass over a batch", buckets=_SECONDS
        )
        self.batch_size = histogram("torchpi_batch_size", "Requests per successful forward pass", buckets=_BATCH_SIZES)
        self.queue_length = gauge("torchpi_queue_length", "Requests waiting for the model")
        self.message_bytes = gauge("torchpi_message_bytes", "Memory held by the messages of all clients, in bytes")
        self.connections = gauge("torchpi_connections", "Open websockets")
        self.refused = counter("torchpi_refused_connections_total", "Refused connections by reason", ["reason"])
        self.recorded = counter("torchpi_recorded_total", "Requests for --record by result: kept, lost", ["result"])

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
