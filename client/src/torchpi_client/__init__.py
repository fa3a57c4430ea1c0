"""Client and robot control loop for π₀ and π₀.₅ policy servers of torchpi or openpi, without torch."""

from torchpi_client.aio import AsyncWebsocketPolicy
from torchpi_client.client import Interrupt, WebsocketPolicy
from torchpi_client.limits import ActionLimits
from torchpi_client.protocol import ServerError
from torchpi_client.report import ControlReport
from torchpi_client.rerun_log import RerunLog
from torchpi_client.robot import Robot
from torchpi_client.runner import ControlLoop
from torchpi_client.settings import ControlSettings
from torchpi_client.wire import pack, unpack

__version__ = "0.1.0.dev0"

__all__ = [
    "ActionLimits",
    "AsyncWebsocketPolicy",
    "ControlLoop",
    "ControlReport",
    "ControlSettings",
    "Interrupt",
    "RerunLog",
    "Robot",
    "ServerError",
    "WebsocketPolicy",
    "pack",
    "unpack",
]
