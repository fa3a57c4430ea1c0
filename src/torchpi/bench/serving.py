"""What a server adds to the model's own time, and whether many clients are served alike."""

import dataclasses
import json
import resource
import statistics
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from torchpi.config import Pi0Config
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi.types import ActionChunk, ActionPrefix
from torchpi_client import WebsocketPolicy

CAMERAS, SIZE = 3, 224


@dataclasses.dataclass(frozen=True)
class ServingResult:
    """Loopback, clients and server in one process; requests have three cameras of 224 x 224 x 3 bytes."""

    model_ms: float
    """Of one pass, whatever its batch; asked for as a pause."""
    overhead_ms: dict[str, float]
    """p50, p95, p99 of round trip minus the pass: one client, one request after the other."""
    clients: int
    seconds: float
    requests_per_second: float
    """Of all clients together."""
    errors: int
    slowest_to_mean: float
    """Requests of the client with the fewest, as a part of the clients' mean: 1 is fair."""
    mean_batch: float
    """Requests in one pass, as each request saw it."""
    memory_growth_mb: float
    """MiB that the process's peak rose by in the second half of the time."""


class PausePolicy:
    """A policy with three cameras whose model is a pause, in which Python can do other things, as with a GPU."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.model = types.SimpleNamespace(config=Pi0Config(action_horizon=50, action_dim=32))
        self.embodiment = Embodiment.generic(
            "pause",
            cameras={f"camera_{i}_rgb": f"camera_{i}" for i in range(CAMERAS)},
            state=[f"joint_{i}" for i in range(8)],
            actions=[f"joint_{i}" for i in range(8)],
        )
        self.metadata: dict[str, Any] = {}

    def example_observation(self) -> dict[str, Any]:
        """A valid request."""
        images = np.random.default_rng(0).integers(0, 256, (CAMERAS, SIZE, SIZE, 3), np.uint8)
        return {**{f"camera_{i}": image for i, image in enumerate(images)}, "state": np.zeros(8), "prompt": "work"}

    def prepare(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The embodiment's check of one observation."""
        return self.embodiment.to_model(observation)

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray,
        num_steps: int,
        prefixes: Sequence[ActionPrefix | None] | None = None,
    ) -> list[ActionChunk]:
        """The noise as actions, after the pause."""
        for observation in observations:
            self.prepare(observation)
        time.sleep(self._seconds)
        return [ActionChunk(actions=one[:, :8], policy_timing={}) for one in noise]


def bench_serving(*, model_ms: float, clients: int, seconds: float, requests: int) -> ServingResult:
    """Measure.

    Args:
        model_ms: how long one pass of the model takes.
        clients: that ask at once, each again as soon as it is answered.
        seconds: that they do so.
        requests: of the single client.
    """
    policy = PausePolicy(model_ms / 1e3)
    settings = ServeSettings(port=0, max_rate=1e6, max_connections=clients + 1)
    with running_server({"pause": lambda: policy}, settings) as (address, _):
        observation = policy.example_observation()
        overheads = _overheads(address, observation, requests)
        peak = _peak_mb()
        half = [_crowd(address, observation, clients, seconds / 2)]
        before, peak = peak, _peak_mb()
        half.append(_crowd(address, observation, clients, seconds / 2))
        growth = _peak_mb() - peak
        assert peak >= before
    counts = [a + b for a, b in zip(half[0].counts, half[1].counts, strict=True)]
    quantiles = statistics.quantiles(overheads, n=100)
    return ServingResult(
        model_ms=model_ms,
        overhead_ms={f"p{q}": quantiles[q - 1] for q in (50, 95, 99)},
        clients=clients,
        seconds=seconds,
        requests_per_second=sum(counts) / seconds,
        errors=half[0].errors + half[1].errors,
        slowest_to_mean=min(counts) / statistics.mean(counts),
        mean_batch=statistics.mean(half[0].batches + half[1].batches),
        memory_growth_mb=growth,
    )


def _overheads(address: str, observation: dict[str, Any], requests: int) -> list[float]:
    """Milliseconds of each round trip that were not the model's."""
    overheads = []
    with WebsocketPolicy(address) as client:
        client.infer(observation)
        for _ in range(requests):
            start = time.perf_counter()
            answer = client.infer(observation)
            overheads.append(1e3 * (time.perf_counter() - start) - answer["server_timing"]["infer_ms"])
    return overheads


@dataclasses.dataclass
class _Crowd:
    """What clients saw that asked at once."""

    counts: list[int]
    """Answers per client."""
    batches: list[int]
    errors: int = 0


def _crowd(address: str, observation: dict[str, Any], clients: int, seconds: float) -> _Crowd:
    crowd = _Crowd([0] * clients, [])
    start = threading.Barrier(clients)

    def ask(number: int) -> None:
        with WebsocketPolicy(address) as client:
            start.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                try:
                    crowd.batches.append(client.infer(observation)["server_timing"]["batch_size"])
                    crowd.counts[number] += 1
                except (RuntimeError, OSError):
                    crowd.errors += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return crowd


def _peak_mb() -> float:
    """MiB of memory that this process has used at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def run_bench_serving(*, model_ms: float, clients: int, seconds: float, requests: int, as_json: bool) -> None:
    """Measure and print."""
    result = bench_serving(model_ms=model_ms, clients=clients, seconds=seconds, requests=requests)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    overhead = ", ".join(f"{name} {value:.2f} ms" for name, value in result.overhead_ms.items())
    Console(highlight=False).print(
        f"three cameras of {SIZE} x {SIZE}, a model of {model_ms:g} ms; loopback, one process\n"
        f"  one client, above the model's time   {overhead}\n"
        f"  {clients} clients, {seconds:g} s             {result.requests_per_second:.0f} requests/s, "
        f"{result.errors} errors, {result.mean_batch:.1f} requests per pass\n"
        f"  the slowest client                   {result.slowest_to_mean:.2f} of the mean\n"
        f"  memory                               +{result.memory_growth_mb:.1f} MiB in the second half"
    )
