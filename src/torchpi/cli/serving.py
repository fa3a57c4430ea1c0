"""The serve command."""

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
    """Serve a policy to robots over openpi's websocket protocol; openpi's clients and torchpi-client can connect.

    The server accepts connections once it logs "listening", and sends the policy's metadata once the policy is loaded
    and warmed up. From then on /healthz returns 200. /metrics is for Prometheus. http://HOST:PORT/ shows the robots'
    cameras, action chunks and latency in a browser; with a token, open http://HOST:PORT/?token=TOKEN. On Ctrl-C,
    SIGTERM or SIGHUP the server answers the requests already received, then exits.
    """

    policy: Annotated[str | None, tyro.conf.Positional] = None
    """Policy folder, checkpoint, hf://… or gs://… address, or "demo"."""
    policies: tuple[str, ...] = ()
    """Additional policies as NAME=PATH, served at ws://HOST:PORT/NAME; checkpoint options do not apply to them."""
    settings: Annotated[ServeSettings, tyro.conf.arg(name="")] = ServeSettings()
    record: pathlib.Path | None = None
    """New or empty folder in which to record requests and chunks as a LeRobot dataset, one per policy."""
    rerun: str | None = None
    """Show requests and chunks in Rerun: a new .rrd file, or the HOST:PORT of a running viewer."""
    load: Load = SamplingOptions()

    def run(self) -> None:
        require_extra()
        spin_briefly()
        from torchpi.serving.run import run_serve

        settings = self.settings
        if settings.token is None and "TORCHPI_TOKEN" in os.environ:
            settings = dataclasses.replace(settings, token=os.environ["TORCHPI_TOKEN"])
        load = self.load.given()
        for_all: dict[str, Any] = {name: load.pop(name) for name in ("device", "engine") if name in load}
        run_serve(self.policy, self.policies, settings, record=self.record, rerun=self.rerun, load=load, run=for_all)
