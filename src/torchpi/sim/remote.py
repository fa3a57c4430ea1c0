"""A policy behind a websocket, asked as the simulated robot's client would ask it."""

import http
from collections.abc import Mapping
from typing import Any

from torchpi.extras import require


def is_address(policy: Any) -> bool:
    """Whether this is the address of a server, not a path."""
    return isinstance(policy, str) and policy.startswith(("ws://", "wss://"))


class RemotePolicy:
    """Infers like a `Policy`, on a server; the noise and the number of Euler steps are the server's."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        """Connect.

        Args:
            token: what the server asks for; None: nothing.
        """
        client = require("torchpi_client", "client")
        self._server_error = client.ServerError
        try:
            self._client = client.WebsocketPolicy(address, api_key=token)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error
        except ConnectionError as error:
            if _status(error) != http.HTTPStatus.UNAUTHORIZED:
                raise
            found = "asks for a token, but none was given" if token is None else "does not accept the token"
            raise ConnectionError(
                f"{address} {found} (HTTP 401); expected the one that its server was started with: give it as --token, "
                "as TORCHPI_TOKEN in the environment, or in Python as token=."
            ) from error
        self.metadata: dict[str, Any] = self._client.metadata

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """One observation to one chunk."""
        try:
            return self._client.infer(observation)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """End the connection."""
        self._client.close()


def _status(error: ConnectionError) -> int | None:
    """The HTTP status with which the server turned the client away; None: the error is another one."""
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
