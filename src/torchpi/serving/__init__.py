"""Policies behind a websocket, for robots: openpi's protocol, which its clients and torchpi's speak."""

from torchpi.errors import MissingExtraError

try:
    import msgpack  # noqa: F401
    import prometheus_client  # noqa: F401
    import websockets  # noqa: F401

    import torchpi_client  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "Serving needs the extra 'serve' and torchpi-client: pip install ./client '.[serve]' in torchpi's repository "
        f"({error})."
    ) from error
