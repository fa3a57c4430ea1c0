"""Ask a π₀ or π₀.₅ policy server for actions: torchpi's and openpi's protocol, without torch."""

from torchpi_client.aio import AsyncWebsocketPolicy
from torchpi_client.client import WebsocketPolicy
from torchpi_client.protocol import ServerError
from torchpi_client.wire import pack, unpack

__version__ = "0.1.0.dev0"

__all__ = ["AsyncWebsocketPolicy", "ServerError", "WebsocketPolicy", "pack", "unpack"]
