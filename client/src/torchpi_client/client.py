"""A policy behind a websocket: one observation goes out, one action chunk comes back."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from torchpi_client.wire import pack, unpack

RETRY_SECONDS = 0.5

# From version 15 on websockets pings the server, and gives it up if 20 s pass without a pong; one that compiles, or
# infers in its event loop as openpi's does, is busy for longer. Older versions don't know the argument.
NO_PINGS: dict[str, Any] = {"ping_interval": None} if "ping_interval" in inspect.signature(connect).parameters else {}


class ServerError(RuntimeError):
    """The server answered with an error; the message holds its text."""


class WebsocketPolicy:
    """A policy on a server: torchpi's (`torchpi serve`) or openpi's.

    Args:
        url: "ws://HOST:PORT", or "wss://…" with TLS.
        api_key: sent as `Authorization: Api-Key …`.
        timeout: seconds to wait for a connection, and then for the metadata. While the server refuses connections, for
            example because it is still loading, it is tried again.
        answer_timeout: seconds to wait for one answer (a server's first may include a compilation); None: forever.

    Raises:
        ValueError: the URL is none, or the metadata are not in the wire format.
        ConnectionError: there is no policy server, or it doesn't let this client in (ConnectionRefusedError: it still
            refused after `timeout`).
        ServerError: the server sent an error in place of its metadata.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 60.0, answer_timeout: float | None = 600.0
    ) -> None:
        self.url = url
        self._answer_timeout = answer_timeout
        self._one_at_a_time = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._connection = _connect(stack, url, api_key, timeout)
            try:
                frame = self._connection.recv(timeout=timeout)
            except (TimeoutError, ConnectionClosed) as error:
                raise ConnectionError(
                    f"{url} accepted the connection but sent no metadata ({error}); is it a policy server?"
                ) from error
            self.metadata: dict[str, Any] = self._content(frame)
            """What the server says about its policy."""
            self._stack = stack.pop_all()  # from here on the connection outlives this block

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Ask for actions.

        Args:
            observation: the robot's own keys; NumPy arrays and scalars, text, numbers, nested dicts and lists.

        Returns:
            "actions" [H, a] in the robot's units, and what else the server adds ("policy_timing", "server_timing").

        Raises:
            ValueError: the observation cannot be packed, or the answer cannot be unpacked.
            ServerError: the server answered with an error.
            ConnectionError: the connection is closed.
            TimeoutError: no answer in `answer_timeout` seconds; the connection is closed then.
        """
        request = pack(observation)
        # Answers carry no number: each belongs to the one request before it.
        with self._one_at_a_time:
            try:
                self._connection.send(request)
                frame = self._connection.recv(timeout=self._answer_timeout)
            except ConnectionClosed as error:
                raise ConnectionError(
                    f"the connection to {self.url} is closed ({error}); connect again with a new WebsocketPolicy"
                ) from error
            except TimeoutError as error:
                self.close()
                raise TimeoutError(f"no answer from {self.url} in {self._answer_timeout} s") from error
            except BaseException:  # interrupted: the answer that is still to come would be taken for the next one
                self.close()
                raise
        return self._content(frame)

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        self._stack.close()

    def __enter__(self) -> WebsocketPolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _content(self, frame: str | bytes) -> dict[str, Any]:
        """The dict in a frame; a text frame is an error message."""
        if isinstance(frame, str):
            raise ServerError(f"the server at {self.url} reports an error:\n{frame}")
        content = unpack(frame)
        if not isinstance(content, dict):
            raise ValueError(f"{self.url} sent a {type(content).__name__}; expected a dict: is it a policy server?")
        return content


def _connect(stack: contextlib.ExitStack, url: str, api_key: str | None, timeout: float) -> ClientConnection:
    """A connection that `stack` closes; refused ones are tried again for `timeout` seconds."""
    try:
        parse_uri(url)
    except (InvalidURI, ValueError) as error:
        raise ValueError(f"cannot connect to {url!r} ({error}); expected ws://HOST:PORT or wss://HOST:PORT") from error
    headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    deadline = time.monotonic() + timeout
    while True:
        try:
            # Compressing images costs more time than it saves. As a context: websockets 17 deprecates all other uses.
            return stack.enter_context(
                connect(
                    url,
                    additional_headers=headers,
                    compression=None,
                    max_size=None,
                    open_timeout=max(deadline - time.monotonic(), 1.0),
                    close_timeout=2.0,
                    **NO_PINGS,
                )
            )
        except ConnectionRefusedError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise ConnectionRefusedError(
                    f"{url} refused the connection for {timeout:g} s ({error}); is the server running, on this port?"
                ) from error
            time.sleep(RETRY_SECONDS)
        except (OSError, EOFError, ValueError, WebSocketException) as error:
            raise ConnectionError(
                f"cannot connect to {url} ({error}); expected a policy server there, and its api_key if it asks for one"
            ) from error
