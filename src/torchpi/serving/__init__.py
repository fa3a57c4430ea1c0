"""Websocket server that gives robots access to policies, in the protocol of openpi's and torchpi's clients."""

from torchpi.extras import require


def require_extra() -> None:
    """Raise an error if the extra 'serve' or torchpi-client is not installed."""
    for module in ("msgpack", "prometheus_client", "websockets", "torchpi_client"):
        require(module, "serve")
