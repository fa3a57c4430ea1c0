"""`torchpi serve`: load policies and serve them until a signal."""

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpi.checkpoints.address import REMOTE
from torchpi.checkpoints.checkpoint import open_policy
from torchpi.checkpoints.sizes import read_config
from torchpi.devices import usable_device
from torchpi.engine import check_device
from torchpi.errors import ServingError, TorchpiError
from torchpi.policy import Policy, load_policy
from torchpi.robots import get_embodiment
from torchpi.serving.live import LiveView
from torchpi.serving.log import log_to_stderr
from torchpi.serving.memory import return_large_buffers
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi.serving.server import PolicyServer
from torchpi.serving.settings import ServeSettings
from torchpi.serving.vla_eval import key_sources
from torchpi.threads import limit_threads

_log = logging.getLogger("torchpi.serving")

DEFAULT = "default"
"""Name of the POLICY argument."""
_RESERVED_NAMES = ("healthz", "metrics", "dashboard.json", "health", "config")


def run_serve(
    policy: str | None,
    named: Sequence[str],
    settings: ServeSettings,
    *,
    record: Path | None,
    load: Mapping[str, Any],
    run: Mapping[str, Any],
    rerun: str | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Args:
        policy: path of the policy served at "/". Without it, the first of `named` is.
        named: further policies as "name=path".
        record: folder of recorded datasets, see `Recorder`.
        load: arguments of `load_policy` for `policy`.
        run: arguments of `load_policy` for all policies (device, engine).
        rerun: see `LiveView`.
    """
    paths = policy_paths(policy, named)
    if load and policy is None:
        raise ServingError(f"{', '.join(load)} can only be given for POLICY, not for --policies.")
    arguments = {name: {**run, **(load if name == DEFAULT else {})} for name in paths}
    for name, path in paths.items():
        try:
            _check_policy(path, settings, **arguments[name])
        except TorchpiError as error:
            if name == DEFAULT and policy is not None:
                raise
            raise type(error)(f"--policies {name}: {error}") from error
    loaders: dict[str, Callable[[], Policy]] = {
        name: functools.partial(_load_policy, path, settings, len(paths) == 1, **arguments[name])
        for name, path in paths.items()
    }
    log_to_stderr()
    return_large_buffers()
    logging.getLogger("torchpi.serving.server.websockets").setLevel(logging.WARNING)  # it logs each HTTP request
    if not settings.local and settings.token is None:
        _log.warning("everybody in the network of %s can use this server; protect it with --token", settings.host)
    with contextlib.ExitStack() as stack:
        observers: dict[str, Any] = {}
        if record is not None:
            folders = {name: record if len(paths) == 1 else record / name for name in paths}
            observers["recorder"] = stack.enter_context(Recorder(folders, Metrics()))
        if rerun is not None:
            observers["view"] = stack.enter_context(LiveView(rerun))
        ended = asyncio.run(_serve(loaders, settings, observers))
    if not ended:  # exiting normally would tear PyTorch down while the model's thread is running it
        _log.warning("the model or a decoder is still running; exiting anyway")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _check_policy(
    path: str, settings: ServeSettings, *, device: str | None = None, engine: str = "auto", **load: Any
) -> None:
    """Raise errors about options and files before the server listens; `_load_policy` runs after that."""
    check_device(engine, usable_device(device))
    if path.startswith(REMOTE):  # downloaded later, by `_load_policy`
        if "config" in load:
            read_config(load["config"])
        if "embodiment" in load:
            get_embodiment(load["embodiment"])
        return
    _, spec = open_policy(path, **{name: load[name] for name in load.keys() - {"verify", "emulate_fp8"}})
    if settings.protocol == "vla-eval" and spec.embodiment is not None:
        key_sources(spec.embodiment, settings.rename)


def _load_policy(path: str, settings: ServeSettings, is_only_policy: bool, **load: Any) -> Policy:
    policy = load_policy(path, **load)
    if settings.protocol == "vla-eval":
        key_sources(policy.embodiment, settings.rename)  # raises before the warm-up
    if is_only_policy:  # the number of threads holds for the whole process
        limit_threads(policy.model)
    return policy


def policy_paths(policy: str | None, named: Sequence[str]) -> dict[str, str]:
    """Paths of the policies by name; the policy at "/" comes first."""
    paths = {} if policy is None else {DEFAULT: policy}
    for text in named:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not path:
            raise ServingError(
                f"--policies has {text!r}; expected name=path, with a name of letters, digits, '.', '_', '-'."
            )
        if name in paths or name in _RESERVED_NAMES:
            raise ServingError(f"--policies has the name {name!r}, which is taken; choose another one.")
        paths[name] = path
    if not paths:
        raise ServingError("serve needs a policy: torchpi serve POLICY, or --policies name=path ...")
    return paths


async def _serve(
    loaders: Mapping[str, Callable[[], Policy]], settings: ServeSettings, observers: Mapping[str, Any]
) -> bool:
    """Serve until a signal; False if the thread of the model or of a decoder is still running."""
    server = PolicyServer(loaders, settings, **observers)
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signals.append(signal.SIGHUP)

    def stop(signum: int) -> None:
        name = signal.Signals(signum).name
        _log.info("%s: answering the requests that were received; a second signal ends at once", name)
        server.stop()
        for each in signals:
            loop.remove_signal_handler(each)  # a second signal has its default effect

    def on_listening(address: str) -> None:
        dashboard = f"http{address.removeprefix('ws')}"
        _log.info("listening at %s, warming up; dashboard at %s", address, dashboard)
        for each in signals:
            loop.add_signal_handler(each, stop, each)

    await server.run(on_listening)
    return server.join(1.0)
