"""`torchpi serve`: load policies, serve them, and end well."""

import asyncio
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpi.checkpoints.load import existing_folder
from torchpi.errors import ServingError
from torchpi.policy import Policy, load_policy
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi.serving.server import PolicyServer
from torchpi.serving.settings import ServeSettings

_log = logging.getLogger("torchpi.serving")

DEFAULT = "default"
"""The name of the policy that is given without one."""
_NOT_POLICIES = ("healthz", "metrics", "dashboard.json")


def run_serve(
    policy: str | None,
    named: Sequence[str],
    settings: ServeSettings,
    *,
    record: Path | None,
    load: Mapping[str, Any],
    device: str | None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        policy: what is served at "/".
        named: "name=path" of further ones; without `policy` the first of them is served at "/" as well.
        record: the folder of the data set, or, of several policies, of one per name.
        load: arguments of `load_policy` for `policy`.
        device: of all of them.
    """
    paths = policy_paths(policy, named)
    if load and policy is None:
        raise ServingError(f"{', '.join(load)} can only be given for POLICY, not for --policies, which say everything.")
    _check_paths(paths, unnamed=policy is not None)
    # What is asked for the policy at "/" holds for it alone.
    loaders: dict[str, Callable[[], Policy]] = {
        name: functools.partial(load_policy, path, device=device, **(load if name == DEFAULT else {}))
        for name, path in paths.items()
    }
    _log_to_stderr()
    if not settings.local and settings.token is None:
        _log.warning("everybody in the network of %s can use this server: give it a --token", settings.host)
    if record is None:
        ended = asyncio.run(_serve(loaders, settings, None))
    else:
        folders = {name: record if len(paths) == 1 else record / name for name in paths}
        with Recorder(folders, Metrics()) as recorder:
            ended = asyncio.run(_serve(loaders, settings, recorder))
    if not ended:  # it is inside of PyTorch, and the interpreter's own end would tear that down under it
        _log.warning("the model is still at work; ending without it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def policy_paths(policy: str | None, named: Sequence[str]) -> dict[str, str]:
    """The policies' paths by name, the one at "/" first."""
    paths = {} if policy is None else {DEFAULT: policy}
    for text in named:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not path:
            raise ServingError(
                f"--policies has {text!r}; expected name=path, the name of letters, digits, '.', '_', '-'."
            )
        if name in paths or name in _NOT_POLICIES:
            raise ServingError(f"--policies has the name {name!r}, which is taken; choose another one.")
        paths[name] = path
    if not paths:
        raise ServingError("serve needs a policy: torchpi serve POLICY, or --policies name=path ...")
    return paths


def _check_paths(paths: Mapping[str, str], *, unnamed: bool) -> None:
    """Loading takes long, and what is not on the disk is known before.

    Args:
        unnamed: whether `DEFAULT` is POLICY, and not one of --policies.
    """
    for name, path in paths.items():
        if "://" in path:
            continue
        try:
            existing_folder(path)
        except (FileNotFoundError, ValueError) as error:
            if unnamed and name == DEFAULT:
                raise
            raise type(error)(f"--policies {name}: {error}") from error


async def _serve(
    loaders: Mapping[str, Callable[[], Policy]], settings: ServeSettings, recorder: Recorder | None
) -> bool:
    """Serve until a signal; whether the model's thread has ended as well."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_once(signum: int) -> None:
        _log.info("%s: answering what has been received; once more ends at once", signal.Signals(signum).name)
        stop.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)  # the second one acts as if there were no handler

    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop_once, each)
    server = PolicyServer(loaders, settings, recorder=recorder)
    await server.run(
        stop,
        lambda address: _log.info(
            "listening at %s, warming up; dashboard at http%s", address, address.removeprefix("ws")
        ),
    )
    return server.scheduler.join(1.0)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("torchpi.serving.server.websockets").setLevel(logging.WARNING)  # it reports each /metrics
