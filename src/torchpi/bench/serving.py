"""What a server adds to the model's own time, beside the smallest loop that could be one, and whether many clients are
served alike.

Client, server and loop are processes of their own; the model is a pause. Requests go to the server and to the loop in
turn, so that whatever else the machine does hits both alike: their ratio is what to compare.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from websockets.asyncio.server import ServerConnection, serve

from torchpi.bench.guided import GuidedTime, bench_guided
from torchpi.config import Pi0Config
from torchpi.errors import UsageError
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi.sim.workers import interrupts_held
from torchpi.types import ActionChunk, ActionPrefix
from torchpi_client import WebsocketPolicy, pack, unpack

CAMERAS, SIZE = 3, 224
HORIZON, JOINTS = 50, 8
PERCENTILES = (50, 95, 99)

# ---- what comes out ----


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Round trip minus inference of one client's requests, one after the other; "p50", "p95" and "p99" each."""

    server_ms: dict[str, float]
    loop_ms: dict[str, float]
    """Of the loop that only receives, infers and sends."""
    ratio: dict[str, float]
    """The server's over the loop's."""


@dataclasses.dataclass(frozen=True)
class Crowd:
    """What clients saw that asked the server at once, each again as soon as it was answered."""

    clients: int
    seconds: float
    requests_per_second: float
    """Of all clients together."""
    errors: int
    slowest_to_mean: float
    """Requests of the client with the fewest, as a part of the clients' mean: 1 is fair."""
    mean_batch: float
    """Requests in one pass, as each request saw it."""
    memory_mb: float
    """MiB that the server's process used at most."""
    memory_growth_mb: float
    """MiB that this rose by in the second half of the time."""


@dataclasses.dataclass(frozen=True)
class ServingResult:
    """Over loopback; requests have three cameras of 224 x 224 x 3 bytes."""

    model_ms: float
    """Of one pass, whatever its batch; asked for as a pause."""
    requests: int
    """In each run, of the server and of the loop."""
    overhead: Overhead
    """Per number the median over the runs, of the ratios too."""
    runs: list[Overhead]
    crowd: Crowd
    guided: list[GuidedTime]


# ---- the servers, in processes of their own ----


class PausePolicy:
    """A policy with three cameras whose model is a pause, in which Python can do other things, as with a GPU.

    Its actions are the state, again and again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._generator = np.random.default_rng(0)
        self.model = types.SimpleNamespace(config=Pi0Config(action_horizon=HORIZON, action_dim=32))
        self.embodiment = Embodiment.generic(
            "pause",
            cameras={f"camera_{i}_rgb": f"camera_{i}" for i in range(CAMERAS)},
            state=[f"joint_{i}" for i in range(JOINTS)],
            actions=[f"joint_{i}" for i in range(JOINTS)],
        )
        self.metadata: dict[str, Any] = {}

    def example_observation(self) -> dict[str, Any]:
        """A valid request."""
        images = np.random.default_rng(0).integers(0, 256, (CAMERAS, SIZE, SIZE, 3), np.uint8)
        cameras = {f"camera_{i}": image for i, image in enumerate(images)}
        return {**cameras, "state": np.linspace(0, 1, JOINTS), "prompt": "work"}

    def prepare(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The embodiment's check of one observation."""
        return self.embodiment.to_model(observation)

    def infer(self, observation: Mapping[str, Any]) -> ActionChunk:
        """As `Policy.infer`, which draws the noise itself."""
        noise = self._generator.standard_normal((1, HORIZON, 32), np.float32)
        return self.infer_batch([observation], noise=noise, num_steps=10)[0]

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray,
        num_steps: int,
        prefixes: Sequence[ActionPrefix | None] | None = None,
    ) -> list[ActionChunk]:
        """The chunks, after the pause."""
        states = [self.prepare(observation)["state"] for observation in observations]
        time.sleep(self._seconds)
        chunks = [np.tile(state.astype(np.float32), (HORIZON, 1)) for state in states]
        return [ActionChunk(actions=chunk, policy_timing={}) for chunk in chunks]


def serve_policy(pipe: Connection, model_ms: float, max_connections: int) -> None:
    """torchpi's server, until the other end of the pipe is closed."""
    settings = ServeSettings(port=0, max_rate=1e6, max_connections=max_connections)
    with running_server({"pause": lambda: PausePolicy(model_ms / 1e3)}, settings) as (address, _):
        report_memory(pipe, address)


def serve_loop(pipe: Connection, model_ms: float) -> None:
    """The smallest server that answers one client, until the other end of the pipe is closed.

    Of the two servers in `websockets` that for asyncio is the faster one here, above all at the 99th percentile.
    """
    policy = PausePolicy(model_ms / 1e3)

    async def converse(connection: ServerConnection) -> None:
        await connection.send(pack(policy.metadata))
        async for message in connection:
            assert isinstance(message, bytes)
            observation = unpack(message)
            start = time.perf_counter()
            chunk = policy.infer(observation)
            infer_ms = 1e3 * (time.perf_counter() - start)
            await connection.send(pack({**chunk, "server_timing": {"infer_ms": infer_ms}}))

    async def run() -> None:
        async with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            await asyncio.to_thread(report_memory, pipe, f"ws://127.0.0.1:{port}")

    asyncio.run(run())


def report_memory(pipe: Connection, address: str) -> None:
    """Say where the server listens, and the peak of this process's memory whenever something is sent."""
    pipe.send(address)
    with contextlib.suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(_peak_mb())


def _peak_mb() -> float:
    """MiB of memory that this process has used at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextlib.contextmanager
def server_process(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    """A process that runs `target(pipe, *arguments)`.

    Yields:
        Its address; and what returns the peak of its memory in MiB.
    """
    context = multiprocessing.get_context("spawn")  # as `torchpi serve` would begin: nothing of this process is in it
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    with interrupts_held():
        process.start()
    theirs.close()

    def peak_mb() -> float:
        pipe.send(None)
        return float(pipe.recv())

    try:
        try:
            address = pipe.recv()
        except EOFError as error:
            raise RuntimeError("The server's process ended before it listened; its error is above.") from error
        yield address, peak_mb
    finally:
        pipe.close()
        process.join(timeout=10)
        process.terminate()
        process.join()


# ---- the measurement ----


def bench_serving(
    *, model_ms: float, runs: int, requests: int, clients: int, seconds: float, guided: Sequence[str], pairs: int
) -> ServingResult:
    """Measure; a line per run on stderr.

    Args:
        model_ms: how long one pass of the model takes.
        runs: of a single client.
        requests: in each of these, of the server and of the loop.
        clients: that ask at once.
        seconds: that they do so.
        guided: models for `bench_guided`.
        pairs: of samplings.
    """
    counts = {"runs": runs, "requests": requests - 1, "clients": clients, "seconds": seconds, "pairs": pairs}
    if wrong := [name for name, value in counts.items() if value <= 0] + ["model_ms"] * (model_ms < 0):
        raise UsageError(f"{wrong[0]} is too small; expected a positive number, and at least two requests.")
    # No bar that moves by itself: drawing it would take the client's time, and be measured.
    say = functools.partial(Console(stderr=True, highlight=False).print, soft_wrap=True)
    observation = PausePolicy(0.0).example_observation()
    overheads = []
    with server_process(serve_policy, model_ms, clients + 1) as (address, peak_mb):
        with server_process(serve_loop, model_ms) as (loop_address, _):
            for run in range(runs):
                overheads.append(_overhead(address, loop_address, observation, requests))
                say(
                    f"run {run + 1} of {runs}: p50 {_beside(overheads[-1], 'p50')}; p99 {_beside(overheads[-1], 'p99')}"
                )
        say(f"{clients} clients, {seconds:g} s")
        crowd = _crowd(address, observation, clients, seconds, peak_mb)
    times = []
    for name in guided:
        say(f"{name}: sampling with guidance and without, {pairs} times")
        times.append(bench_guided(name, pairs=pairs))
    return ServingResult(model_ms, requests, _median(overheads), overheads, crowd, times)


def _beside(overhead: Overhead, name: str) -> str:
    server, loop, ratio = (getattr(overhead, field)[name] for field in ("server_ms", "loop_ms", "ratio"))
    return f"{server:.2f} ms beside {loop:.2f} ms, {ratio:.2f} x"


def _median(overheads: Sequence[Overhead]) -> Overhead:
    def median(field: str) -> dict[str, float]:
        numbers: list[dict[str, float]] = [getattr(overhead, field) for overhead in overheads]
        return {name: statistics.median(each[name] for each in numbers) for name in numbers[0]}

    return Overhead(median("server_ms"), median("loop_ms"), median("ratio"))


def _overhead(address: str, loop_address: str, observation: dict[str, Any], requests: int) -> Overhead:
    """One run."""
    with WebsocketPolicy(address) as server, WebsocketPolicy(loop_address) as loop:
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(requests):
            for client, times in zip((server, loop), both, strict=True):
                start = time.perf_counter()
                answer = client.infer(observation)
                times.append(1e3 * (time.perf_counter() - start) - answer["server_timing"]["infer_ms"])
    server_ms, loop_ms = (
        {f"p{q}": float(value) for q, value in zip(PERCENTILES, np.percentile(times, PERCENTILES), strict=True)}
        for times in both
    )
    return Overhead(server_ms, loop_ms, {name: server_ms[name] / loop_ms[name] for name in server_ms})


def _crowd(
    address: str, observation: dict[str, Any], clients: int, seconds: float, peak_mb: Callable[[], float]
) -> Crowd:
    counts, errors = [0] * clients, [0] * clients
    batches: list[int] = []

    def ask(client: WebsocketPolicy, number: int) -> None:
        while time.perf_counter() < end:
            try:
                batches.append(client.infer(observation)["server_timing"]["batch_size"])
                counts[number] += 1
            except (RuntimeError, OSError):
                errors[number] += 1

    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(WebsocketPolicy(address)) for _ in range(clients)]
        threads = [threading.Thread(target=ask, args=(each, i), daemon=True) for i, each in enumerate(connections)]
        end = time.perf_counter() + seconds
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        half = peak_mb()
        for thread in threads:
            thread.join()
    peak = peak_mb()
    return Crowd(
        clients=clients,
        seconds=seconds,
        requests_per_second=sum(counts) / seconds,
        errors=sum(errors),
        slowest_to_mean=min(counts) / max(statistics.mean(counts), 1e-9),
        mean_batch=statistics.mean(batches) if batches else 0.0,
        memory_mb=peak,
        memory_growth_mb=peak - half,
    )


def run_bench_serving(*, as_json: bool, **sizes: Any) -> None:
    """Measure and print; `sizes` as for `bench_serving`."""
    result = bench_serving(**sizes)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result, Console(highlight=False))


def print_result(result: ServingResult, console: Console) -> None:
    """What was measured, for a terminal."""
    console.print(
        f"three cameras of {SIZE} x {SIZE}, a model of {result.model_ms:g} ms, loopback; round trip minus inference of "
        f"one client, medians of {len(result.runs)} runs of {result.requests} requests",
        soft_wrap=True,
    )
    table = Table("", *(f"p{q} ms" for q in PERCENTILES))
    for column in table.columns[1:]:
        column.justify = "right"
    for title, numbers in (
        ("torchpi serve", result.overhead.server_ms),
        ("receive, infer, send", result.overhead.loop_ms),
        ("ratio", result.overhead.ratio),
    ):
        table.add_row(title, *(f"{value:.2f}" for value in numbers.values()))
    console.print(table)
    crowd = result.crowd
    console.print(
        f"{crowd.clients} clients, {crowd.seconds:g} s: {crowd.requests_per_second:.0f} requests/s, {crowd.errors} "
        f"errors, {crowd.mean_batch:.1f} requests per pass; the slowest client had {crowd.slowest_to_mean:.2f} of the "
        f"mean; the server's memory {crowd.memory_mb:.0f} MiB, +{crowd.memory_growth_mb:.1f} in the second half",
        soft_wrap=True,
    )
    for each in result.guided:
        console.print(
            f"{each.model}, sampling: {1e3 * each.plain_seconds:.1f} ms, with guidance "
            f"{1e3 * each.guided_seconds:.1f} ms, {each.ratio:.2f} x (medians of {each.pairs} pairs)",
            soft_wrap=True,
        )
