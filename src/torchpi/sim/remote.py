"""A policy behind a websocket, asked as the simulated robot's client would ask it."""

import types
from collections.abc import Mapping
from typing import Any

NO_CLIENT = "evaluating a served policy needs torchpi-client: pip install torchpi-client"


def is_address(policy: Any) -> bool:
    """Whether this is the address of a server, not a path."""
    return isinstance(policy, str) and policy.startswith(("ws://", "wss://"))


class RemotePolicy:
    """Infers like a `Policy`, on a server; the noise and the number of Euler steps are the server's."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            ModuleNotFoundError: torchpi-client is not installed.
            ValueError: it is no address.
            ConnectionError: there is no policy server, or it answers with an error.
        """
        client = _import_client()
        self._server_error = client.ServerError
        try:
            self._client = client.WebsocketPolicy(address)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error
        self.metadata: dict[str, Any] = self._client.metadata

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """One observation to one chunk.

        Raises:
            ConnectionError: the server answers with an error, or not at all.
        """
        try:
            return self._client.infer(observation)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """End the connection."""
        self._client.close()


def _import_client() -> types.ModuleType:
    try:
        import torchpi_client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{NO_CLIENT} ({error})") from error
    return torchpi_client
