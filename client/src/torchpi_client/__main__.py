"""Print the chunks of a served policy: python -m torchpi_client ws://HOST:PORT --dry-run --observation X.npz"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import zipfile
from typing import Any

import numpy as np

from torchpi_client.client import WebsocketPolicy
from torchpi_client.images import jpeg_cost
from torchpi_client.limits import ActionLimits
from torchpi_client.protocol import ServerError
from torchpi_client.report import format_chunk


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # connection messages, on stderr
    try:
        _show_chunks(options)
    except (OSError, ValueError, ServerError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchpi_client",
        description="Send a recorded observation to a policy server and print the chunks that come back.",
    )
    parser.add_argument("url", help="ws://HOST:PORT, or wss://… with TLS")
    parser.add_argument("--dry-run", action="store_true", required=True, help="required: this command moves no robot")
    parser.add_argument(
        "--observation",
        required=True,
        help="an .npz file with the robot's own keys; nested keys are joined by '.', the prompt is a 0-d string",
    )
    parser.add_argument("--chunks", type=int, default=1, help="number of requests; default 1")
    parser.add_argument(
        "--jpeg", type=int, metavar="QUALITY", help="send images as JPEG, 1 to 95, and print its size, time and error"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("TORCHPI_TOKEN"),
        help="the server's token, sent as Authorization: Api-Key …; by default the environment variable TORCHPI_TOKEN, "
        "which, unlike options, other users of the machine cannot see",
    )
    return parser


def _show_chunks(options: argparse.Namespace) -> None:
    observation = load_observation(options.observation)
    if options.jpeg is not None:
        for cost in jpeg_cost(observation, quality=options.jpeg):
            print(cost)
    with WebsocketPolicy(options.url, api_key=options.api_key, jpeg_quality=options.jpeg) as policy:
        names = policy.metadata.get("action_names") or ()
        has_limits = any(policy.metadata.get(name) is not None for name in ("action_limits", "action_range"))
        limits = ActionLimits.from_metadata(policy.metadata) if has_limits else None
        for _ in range(options.chunks):
            start = time.perf_counter()
            chunk = np.asarray(policy.infer(observation)["actions"])
            print(f"{list(chunk.shape)} after {1e3 * (time.perf_counter() - start):.0f} ms")
            print(format_chunk(chunk, names, limits))


def load_observation(path: str) -> dict[str, Any]:
    """Load an observation from an .npz file, where nested keys are joined by '.'.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an .npz, or contains Python objects.
    """
    try:
        loaded = np.load(path)  # refuses Python objects by default
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not an .npz file; np.savez('observation.npz', **observation) writes one."
        ) from error
    if isinstance(loaded, np.ndarray):
        raise ValueError(f"{path} holds one array; expected an .npz with the observation's keys.")
    observation: dict[str, Any] = {}
    with loaded as arrays:
        for name in arrays.files:
            *parents, last = name.split(".")
            nested = observation
            for parent in parents:
                nested = nested.setdefault(parent, {})
            value = arrays[name]
            nested[last] = value.item() if value.dtype.kind == "U" and value.ndim == 0 else value
    return observation


if __name__ == "__main__":
    sys.exit(main())
