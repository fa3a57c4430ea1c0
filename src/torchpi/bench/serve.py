"""`bench serve`: overhead of a policy server, and fairness to many clients.

The client, the server and a minimal server (receive, infer, send) run in separate processes; the model is a pause.
Requests go to both servers in turn, so that other load on the machine affects both; compare their ratio.
"""

import asyncio
import contextlib
import multiprocessing
import signal
import statistics
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from websockets.asyncio.server import ServerConnection, serve

from torchpi.config import Pi0Config
from torchpi.errors import ServingError, UsageError, counted
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi.types import ActionChunk
from torchpi.ui.format import print_json
from torchpi.ui.tables import Column, PlainConsole, Table
from torchpi_client import WebsocketPolicy, pack, unpack

CAMERAS, SIZE = 3, 224
HORIZON, JOINTS = 50, 8
PERCENTILES = (50, 95, 99)


class PausePolicy:
    """Policy whose model is a pause that releases the GIL; its actions are the state."""

    engine = None

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.model = types.SimpleNamespace(config=Pi0Config(action_horizon=HORIZON, action_dim=32))
        joints = [f"joint_{i}" for i in range(JOINTS)]
        cameras = {f"camera_{i}_rgb": f"camera_{i}" for i in range(CAMERAS)}
        self.embodiment = Embodiment.generic("pause", cameras=cameras, state=joints, actions=joints)
        self.metadata: dict[str, Any] = {}

    def example_observation(self) -> dict[str, Any]:
        images = np.random.default_rng(0).integers(0, 256, (CAMERAS, SIZE, SIZE, 3), np.uint8)
        cameras = {f"camera_{i}": image for i, image in enumerate(images)}
        return {**cameras, "state": np.linspace(0, 1, JOINTS), "prompt": "work"}

    def prepare(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return self.embodiment.to_model(observation)

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], **_: Any) -> list[ActionChunk]:
        states = [self.prepare(observation)["state"] for observation in observations]
        time.sleep(self._seconds)
        chunks = [np.tile(state.astype(np.float32), (HORIZON, 1)) for state in states]
        return [ActionChunk(actions=chunk, policy_timing={}) for chunk in chunks]


# ---- servers, in separate processes ----


def serve_policy(pipe: Connection, model_ms: float, max_connections: int) -> None:
    """Run torchpi's server until the other end of the pipe is closed."""
    settings = ServeSettings(port=0, max_rate=1e6, max_connections=max_connections)
    with running_server({"pause": lambda: PausePolicy(model_ms / 1e3)}, settings) as (address, _):
        announce(pipe, address)


def serve_minimal(pipe: Connection, model_ms: float) -> None:
    """Run a minimal server until the other end of the pipe is closed.

    It uses asyncio, because that server of `websockets` is faster than the threaded one, especially at the 99th
    percentile.
    """
    policy = PausePolicy(model_ms / 1e3)

    async def converse(connection: ServerConnection) -> None:
        await connection.send(pack(policy.metadata))
        async for message in connection:
            assert isinstance(message, bytes)
            observation = unpack(message)
            start = time.perf_counter()
            (chunk,) = policy.infer_batch([observation])
            infer_ms = 1e3 * (time.perf_counter() - start)
            await connection.send(pack({**chunk, "server_timing": {"infer_ms": infer_ms}}))

    async def run() -> None:
        async with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            await asyncio.to_thread(announce, pipe, f"ws://127.0.0.1:{port}")

    asyncio.run(run())


def announce(pipe: Connection, address: str) -> None:
    """Send the server's address, and wait until the other end of the pipe is closed."""
    pipe.send(address)
    with contextlib.suppress(EOFError):
        pipe.recv()


@contextlib.contextmanager
def server_process(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[str, psutil.Process]]:
    """Run `target(pipe, *arguments)` in a process, and yield the server's address and the process."""
    context = multiprocessing.get_context("spawn")  # a fresh interpreter, as for `torchpi serve`
    pipe, server_pipe = context.Pipe()
    process = context.Process(target=_run_server, args=(target, server_pipe, *arguments), daemon=True)
    process.start()
    server_pipe.close()
    try:
        try:
            address = pipe.recv()
        except EOFError as error:
            raise ServingError("The server process exited before it was listening; see its error above.") from error
        yield address, psutil.Process(process.pid)
    finally:
        pipe.close()
        process.join(timeout=10)
        process.terminate()
        process.join()


def _run_server(target: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the measuring process
    target(*arguments)


# ---- measurement ----


def run_bench_serving(
    *, model_ms: float, runs: int, requests: int, clients: int, seconds: float, as_json: bool = False
) -> None:
    """Run the benchmark of the command and print the result, with a line per run on stderr."""
    minimums = {"runs": (runs, 1), "requests": (requests, 2), "clients": (clients, 1), "model_ms": (model_ms, 0)}
    wrong = [name for name, (value, minimum) in minimums.items() if value < minimum]
    if wrong or seconds <= 0:
        name = (wrong or ["seconds"])[0]
        raise UsageError(f"{name} is too small; expected a positive number, and at least two requests.")
    # No progress bar: drawing it would be part of the client's measured time.
    console = PlainConsole(stderr=True, soft_wrap=True)
    observation = PausePolicy(0.0).example_observation()
    results = []
    with server_process(serve_policy, model_ms, clients + 1) as (address, process):
        with server_process(serve_minimal, model_ms) as (minimal_address, _):
            for run in range(runs):
                results.append(_measure_overhead(address, minimal_address, observation, requests))
                ratios = ", ".join(f"{name} {value:.2f}" for name, value in results[-1]["ratio"].items())
                console.print(f"run {run + 1} of {runs}, ratio to the minimal server: {ratios}")
        console.print(f"{counted(clients, 'client')}, {seconds:g} s")
        load = _measure_load(address, observation, clients, seconds, process)
    overhead = {
        key: {name: statistics.median(result[key][name] for result in results) for name in percentiles}
        for key, percentiles in results[0].items()
    }
    if as_json:
        summary = {"model_ms": model_ms, "requests": requests, "overhead": overhead, "runs": results, "load": load}
        print_json(summary)
        return
    console = PlainConsole(soft_wrap=True)
    console.print(
        f"three cameras of {SIZE} x {SIZE}, a model of {model_ms:g} ms, loopback; round trip minus inference for one "
        f"client, medians of {counted(runs, 'run')} with {counted(requests, 'request')} each"
    )
    titles = {"server_ms": "torchpi serve, ms", "minimal_ms": "minimal server, ms", "ratio": "ratio"}
    rows = [(title, *(f"{value:.2f}" for value in overhead[key].values())) for key, title in titles.items()]
    columns = [Column(""), *(Column(name, "number") for name in overhead["ratio"])]
    console.print(Table(columns, rows).to_rich(), crop=False)
    console.print(
        f"{counted(clients, 'client')}, {seconds:g} s: {load['requests_per_second']:.0f} requests/s, "
        f"{load['errors']} errors, {load['mean_batch']:.1f} requests per batch; slowest client at "
        f"{load['slowest_to_mean']:.2f} of the mean rate; server memory {load['memory_mb']:.0f} MiB, "
        f"{load['memory_growth_mb']:+.1f} in the second half"
    )


def _measure_overhead(
    address: str, minimal_address: str, observation: dict[str, Any], requests: int
) -> dict[str, dict[str, float]]:
    """Percentiles of round trip minus inference for both servers, and their ratios."""
    times: tuple[list[float], list[float]] = ([], [])
    with WebsocketPolicy(address) as server, WebsocketPolicy(minimal_address) as minimal:
        for _ in range(requests):
            for client, client_times in zip((server, minimal), times, strict=True):
                start = time.perf_counter()
                response = client.infer(observation)
                client_times.append(1e3 * (time.perf_counter() - start) - response["server_timing"]["infer_ms"])
    server_ms, minimal_ms = (np.percentile(client_times, PERCENTILES) for client_times in times)
    rows = {"server_ms": server_ms, "minimal_ms": minimal_ms, "ratio": server_ms / minimal_ms}
    names = [f"p{q}" for q in PERCENTILES]
    return {key: dict(zip(names, row.tolist(), strict=True)) for key, row in rows.items()}


def _measure_load(
    address: str, observation: dict[str, Any], num_clients: int, seconds: float, process: psutil.Process
) -> dict[str, int | float]:
    """Load test with concurrent clients, each of which sends a request as soon as the previous one is answered."""
    counts, errors = [0] * num_clients, [0] * num_clients
    batch_sizes: list[int] = []

    def send_requests(client: WebsocketPolicy, index: int) -> None:
        while time.perf_counter() < end:
            try:
                batch_sizes.append(client.infer(observation)["server_timing"]["batch_size"])
                counts[index] += 1
            except (RuntimeError, OSError):
                errors[index] += 1

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WebsocketPolicy(address)) for _ in range(num_clients)]
        threads = [threading.Thread(target=send_requests, args=(c, i), daemon=True) for i, c in enumerate(clients)]
        end = time.perf_counter() + seconds
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        memory_at_half = process.memory_info().rss
        for thread in threads:
            thread.join()
    memory = process.memory_info().rss
    return {
        "clients": num_clients,
        "seconds": seconds,
        "requests_per_second": sum(counts) / seconds,
        "errors": sum(errors),
        "slowest_to_mean": min(counts) / max(statistics.mean(counts), 1e-9),  # 1 is fair
        "mean_batch": statistics.mean(batch_sizes) if batch_sizes else 0.0,
        "memory_mb": memory / 2**20,
        "memory_growth_mb": (memory - memory_at_half) / 2**20,
    }
