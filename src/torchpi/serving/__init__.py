"""Policies behind a websocket, for robots: openpi's protocol, which its clients and torchpi's speak."""

from torchpi.extras import require

for _module in ("msgpack", "prometheus_client", "websockets", "torchpi_client"):
    require(_module, "serve")
