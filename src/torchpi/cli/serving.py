"""The command serve."""

import os
import pathlib
from typing import Annotated

import tyro

from torchpi.cli.common import Checkpoint, CheckpointOptions


def serve(
    policy: Annotated[str | None, tyro.conf.Positional] = None,
    policies: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    num_steps: int = 10,
    seed: int = 0,
    max_batch: int = 8,
    max_queue: int = 64,
    deadline: float = 30.0,
    max_connections: int = 64,
    max_message_mb: float = 32.0,
    max_rate: float = 200.0,
    grace: float = 10.0,
    record: pathlib.Path | None = None,
    device: str | None = None,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Serve a policy to robots, in openpi's websocket protocol: its clients and torchpi-client work.

    Connections are accepted once "listening" is logged; the policy's metadata follow when it is loaded and warm.
    /healthz answers 200 from then on, /metrics is for Prometheus. In a browser http://HOST:PORT/ shows what the robots
    see, their chunks and the latency; with a token, http://HOST:PORT/?token=TOKEN. Ctrl-C or SIGTERM ends it, when what
    has been received is answered.

    Args:
        policy: a policy folder, a checkpoint, hf://…, gs://…, or "demo".
        policies: further ones as name=path, served at ws://HOST:PORT/NAME; they say everything themselves.
        host: where to listen; 0.0.0.0: on every network of this machine.
        port: 0: a free one.
        token: what clients must send as Authorization: Bearer TOKEN, or Api-Key TOKEN; by default what the environment
            has as TORCHPI_TOKEN, or else nothing is asked for.
        num_steps: Euler steps of a request that does not say.
        seed: of the noise of requests that bring none.
        max_batch: requests in one pass of the model. They are answered as if each were alone.
        max_queue: requests that may wait for the model.
        deadline: seconds that a request may wait for the model; then it is dropped, and its client told.
        max_connections: clients at once.
        max_message_mb: size of a request in MiB.
        max_rate: requests per second of one client.
        grace: seconds in which what has been received is answered at the end.
        record: keep requests and chunks as a LeRobot data set in this folder, new or empty; of several policies, one
            set per name.
        device: for example cuda or cpu; by default cuda where there is one.
        checkpoint: what POLICY's checkpoint does not say itself.
    """
    from torchpi.serving.settings import ServeSettings

    settings = ServeSettings(
        host=host, port=port, token=os.environ.get("TORCHPI_TOKEN") if token is None else token, num_steps=num_steps,
        seed=seed, max_batch=max_batch, max_queue=max_queue, deadline=deadline, max_connections=max_connections,
        max_message_mb=max_message_mb, max_rate=max_rate, grace=grace,
    )  # fmt: skip
    # Last, because it brings torch.
    from torchpi.serving.run import run_serve

    run_serve(policy, policies, settings, record=record, load=checkpoint.given(), device=device)
