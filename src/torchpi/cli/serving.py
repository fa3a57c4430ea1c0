"""The command serve."""

import dataclasses
import os
import pathlib
from typing import Annotated, Any

import tyro

from torchpi.cli.common import Load, SamplingOptions
from torchpi.serving import require_extra
from torchpi.serving.settings import ServeSettings
from torchpi.threads import spin_briefly


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a policy to robots, in openpi's websocket protocol: its clients and torchpi-client work.

    Connections are accepted once "listening" is logged; the policy's metadata are sent when it is loaded and warm.
    /healthz answers 200 from then on, /metrics is for Prometheus. In a browser http://HOST:PORT/ shows the robots'
    cameras, their action chunks and the latency; with a token, http://HOST:PORT/?token=TOKEN. Ctrl-C, SIGTERM or
    SIGHUP ends the server once the requests that it has received are answered.
    """

    policy: Annotated[str | None, tyro.conf.Positional] = None
    """A policy folder, a checkpoint, hf://…, gs://…, or "demo"."""
    policies: tuple[str, ...] = ()
    """Further policies as name=path, served at ws://HOST:PORT/NAME; the options of a checkpoint are not for them."""
    settings: Annotated[ServeSettings, tyro.conf.arg(name="")] = ServeSettings()
    record: pathlib.Path | None = None
    """Record requests and chunks as a LeRobot dataset in this folder, new or empty; of several policies, one dataset
    per name."""
    rerun: str | None = None
    """Show requests and chunks in Rerun: an .rrd file, new, or the address of its viewer, HOST:PORT."""
    load: Load = SamplingOptions()

    def run(self) -> None:
        require_extra()
        spin_briefly()
        from torchpi.serving.run import run_serve

        settings = self.settings
        if settings.token is None and "TORCHPI_TOKEN" in os.environ:
            settings = dataclasses.replace(settings, token=os.environ["TORCHPI_TOKEN"])
        load = self.load.given()
        run: dict[str, Any] = {name: load.pop(name) for name in ("device", "engine") if name in load}
        run_serve(self.policy, self.policies, settings, record=self.record, rerun=self.rerun, load=load, run=run)
