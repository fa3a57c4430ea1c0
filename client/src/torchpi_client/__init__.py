"""Ask a π₀ or π₀.₅ policy server for actions: torchpi's and openpi's protocol, without torch."""

from torchpi_client.client import ServerError, WebsocketPolicy
from torchpi_client.wire import pack, unpack

__version__ = "0.1.0.dev0"

__all__ = ["ServerError", "WebsocketPolicy", "pack", "unpack"]
