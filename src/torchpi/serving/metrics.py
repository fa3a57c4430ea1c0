"""Counts and times of a server, for Prometheus."""

import functools

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds: a GPU infers in 10 ms to 100 ms, a CPU in up to a minute.
_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The metrics of one server; safe to use from several threads.

    Quantiles come from the histograms' buckets, so that those of several servers can be put together:
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
            "Requests by outcome: answered; the code of an error; client_left, before the answer",
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
            "Spread of an answer's samples: standard deviation as a fraction of the training range, mean over a chunk",
            buckets=_FRACTIONS,
        )
        self.queue_seconds = histogram(
            "torchpi_queue_seconds", "Time that a request waited for the model", buckets=_SECONDS
        )
        self.inference_seconds = histogram(
            "torchpi_inference_seconds", "Time of one successful forward pass, of a whole batch", buckets=_SECONDS
        )
        self.batch_size = histogram(
            "torchpi_batch_size", "Requests in one successful forward pass", buckets=_BATCH_SIZES
        )
        self.queue_length = gauge("torchpi_queue_length", "Requests that wait for the model")
        self.message_bytes = gauge("torchpi_message_bytes", "Bytes that the messages of all clients hold")
        self.connections = gauge("torchpi_connections", "Open websockets")
        self.refused = counter("torchpi_refused_connections_total", "Refused connections by reason", ["reason"])
        self.recorded = counter("torchpi_recorded_total", "Requests to --record by result: kept, lost", ["result"])

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
