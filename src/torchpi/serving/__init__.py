"""Policies behind a websocket, for robots: openpi's protocol, which its clients and torchpi's speak."""

from torchpi.extras import require


def require_extra() -> None:
    """Refuse to continue without the extra 'serve' and torchpi-client."""
    for module in ("msgpack", "prometheus_client", "websockets", "torchpi_client"):
        require(module, "serve")
