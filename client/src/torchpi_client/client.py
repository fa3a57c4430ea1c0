"""A policy behind a websocket: one observation goes out, one action chunk comes back."""

from __future__ import annotations

import contextlib
import inspect
import socket
import threading
import time
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from torchpi_client.images import encode_images
from torchpi_client.protocol import DEADLINE, JPEG, ServerError, content, require_support
from torchpi_client.watchdog import Watchdog
from torchpi_client.wire import pack

FIRST_DELAY, LAST_DELAY = 0.1, 2.0
"""Seconds from one attempt to connect to the next: from the one to the other, doubled each time."""

# From version 15 on websockets pings the server, and gives it up if 20 s pass without a pong; one that compiles, or
# infers in its event loop as openpi's does, is busy for longer. Older versions don't know the argument.
NO_PINGS: dict[str, Any] = {"ping_interval": None} if "ping_interval" in inspect.signature(connect).parameters else {}


class WebsocketPolicy:
    """A policy on a server: torchpi's (`torchpi serve`) or openpi's.

    A connection that is lost is made again by the next request, or by the one that is under way, which is then sent
    once more: inferring has no effects. A request whose deadline passes takes its connection with it, so that a late
    answer is never taken for the next one. Several threads may ask; their requests wait for each other. A server that
    knows `torchpi/deadline` is told what is left of it, so that its model doesn't begin with what nobody waits for.

    Args:
        url: "ws://HOST:PORT", or "wss://…" with TLS.
        api_key: sent as `Authorization: Api-Key …`.
        timeout: seconds to wait for a connection, and then for the metadata, the first time and again; requests whose
            deadlines are shorter share it. While the server refuses connections, for example because it is still
            loading, it is tried again.
        answer_timeout: the deadline of each request in seconds: reconnecting, sending and waiting together (a server's
            first answer may include a compilation); None: forever.
        jpeg_quality: send images as JPEG of this quality, 1 to 95, see `images`; None: as they are.

    Raises:
        ValueError: the URL is none, the metadata are not in the wire format, or the server doesn't read JPEG.
        ConnectionError: there is no policy server, or it doesn't let this client in (ConnectionRefusedError: it still
            refused after `timeout`).
        ServerError: the server sent an error in place of its metadata.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        answer_timeout: float | None = 600.0,
        jpeg_quality: int | None = None,
    ) -> None:
        _check_url(url)
        self.url = url
        self.reconnects = 0
        """Connections that were made after the first."""
        self.answer_timeout = answer_timeout
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._timeout = timeout
        self._jpeg_quality = jpeg_quality
        self._one_at_a_time = threading.Lock()
        self._closing = threading.Event()
        self._waiting: _Waiting | None = None  # while there is no connection
        self._link: _Link | None = self._open(_Waiting(timeout), None, again=False)
        self.metadata: dict[str, Any] = self._link.metadata
        """What the server says about its policy."""
        if jpeg_quality is not None:
            try:
                require_support(self.metadata, JPEG, "Send the images as they are: leave jpeg_quality out.")
            except ValueError:
                self.close()
                raise

    def infer(self, observation: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
        """Ask for actions.

        Args:
            observation: the robot's own keys; NumPy arrays and scalars, text, numbers, nested dicts and lists.
            timeout: the deadline of this request in seconds; None: `answer_timeout`.

        Returns:
            "actions" [H, a] in the robot's units, and what else the server adds ("policy_timing", "server_timing").

        Raises:
            ValueError: the observation cannot be packed, or the answer cannot be unpacked.
            ServerError: the server answered with an error, or came back with another policy.
            ConnectionError: there is no connection, and none could be made again.
            TimeoutError: no answer before the deadline.
        """
        seconds = self.answer_timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        if self._jpeg_quality is not None:
            observation = encode_images(observation, quality=self._jpeg_quality)
        # Answers carry no number: each belongs to the one request before it.
        if not self._one_at_a_time.acquire(timeout=-1 if deadline is None else _left(deadline)):
            raise self._no_answer(seconds)
        try:
            frame = self._exchange(observation, deadline)
        except TimeoutError as error:
            raise self._no_answer(seconds) from error
        finally:
            self._one_at_a_time.release()
        return content(frame, self.url)

    def close(self) -> None:
        """Close the connection; a second time does nothing. A request that is under way fails."""
        self._closing.set()
        link = self._link
        if link is not None:
            link.close()

    def __enter__(self) -> WebsocketPolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _exchange(self, observation: dict[str, Any], deadline: float | None) -> str | bytes:
        for attempt in (1, 2):
            link = self._connected(deadline)
            request = self._packed(observation, deadline)
            try:
                return link.ask(request, deadline)
            except ConnectionClosed as error:
                self._drop(link)
                if self._closing.is_set():
                    raise self._is_closed() from error
                if attempt == 2:  # it may be this request that ends it
                    raise ConnectionError(
                        f"the connection to {self.url} was closed twice during one request ({error})"
                    ) from error
            except BaseException:  # interrupted, or too late: the answer may still come
                self._drop(link)
                raise
        raise AssertionError("unreachable")

    def _packed(self, observation: dict[str, Any], deadline: float | None) -> bytes:
        """The request, with what is left until its deadline where the server knows what that is."""
        if deadline is None or self.metadata.get(DEADLINE) is not True:
            return pack(observation)
        if not (left := _left(deadline)):
            raise TimeoutError("the deadline passed before the request was sent")
        return pack({DEADLINE: left, **observation})

    def _connected(self, deadline: float | None) -> _Link:
        if self._link is None and not self._closing.is_set():
            if self._waiting is None or self._waiting.is_over:
                self._waiting = _Waiting(self._timeout)
            try:
                link = self._open(self._waiting, deadline, again=True)
            except TimeoutError:  # the next request goes on with the waiting
                raise
            except BaseException:
                self._waiting = None
                raise
            self._waiting = None
            if link.metadata != self.metadata:
                link.abort()
                raise ServerError(
                    f"{self.url} came back with another policy: its metadata were {self.metadata}, and are "
                    f"{link.metadata}; make a new client for it"
                )
            self._link = link
            self.reconnects += 1
        if self._closing.is_set() or self._link is None:
            self.close()  # it may have been called before there was a connection again
            raise self._is_closed()
        return self._link

    def _drop(self, link: _Link) -> None:
        self._link = None
        link.abort()

    def _open(self, waiting: _Waiting, deadline: float | None, *, again: bool) -> _Link:
        """A new connection.

        Args:
            waiting: how long it is tried, and when next.
            deadline: of the request that needs it; when it passes, that is a TimeoutError.
            again: there was a connection before: what may pass, as a network that is down, is waited for as well.
        """
        while True:
            pause = waiting.next_attempt - time.monotonic()
            if self._closing.wait(max(pause if deadline is None else min(pause, _left(deadline)), 0.0)):
                raise self._is_closed()
            if deadline is not None and not _left(deadline):
                raise TimeoutError("no connection before the deadline")
            waiting.begin_attempt()
            try:
                return _Link(self.url, self._headers, waiting, deadline)
            except (OSError, EOFError, WebSocketException) as error:
                if not _may_pass(error, again) or waiting.next_attempt > waiting.until:
                    raise self._no_connection(error) from error

    def _no_answer(self, seconds: float | None) -> TimeoutError:
        return TimeoutError(f"no answer from {self.url} in {seconds} s")

    def _is_closed(self) -> ConnectionError:
        return ConnectionError(f"the connection to {self.url} is closed; make a new client")

    def _no_connection(self, error: Exception) -> ConnectionError:
        if isinstance(error, ConnectionRefusedError):
            return ConnectionRefusedError(
                f"{self.url} refused the connection for {self._timeout:g} s ({error}); "
                "is the server running, on this port?"
            )
        if isinstance(error, _NoMetadataError):
            return ConnectionError(
                f"{self.url} accepted the connection but sent no metadata ({error}); is it a policy server?"
            )
        return ConnectionError(
            f"cannot connect to {self.url} ({error}); "
            "expected a policy server there, and its api_key if it asks for one"
        )


class _Waiting:
    """For a server that is away: until when, and when the next attempt is due. Pauses grow."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._delay = FIRST_DELAY
        self._accepted = False
        self.next_attempt = time.monotonic()
        self.until = self.next_attempt + timeout

    @property
    def is_over(self) -> bool:
        """Whether nobody has tried for so long that the next attempt is the first of another waiting."""
        return time.monotonic() > self.next_attempt + self._timeout

    def begin_attempt(self) -> None:
        """From now on the pause until the next one."""
        self.next_attempt = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LAST_DELAY)

    def accept(self) -> None:
        """The server takes connections again: from here on the timeout is that of its metadata."""
        if not self._accepted:
            self._accepted = True
            self.until = time.monotonic() + self._timeout


class _Link:
    """One connection, with the metadata that it began with."""

    def __init__(self, url: str, headers: dict[str, str], waiting: _Waiting, deadline: float | None) -> None:
        def left(least: float) -> float:
            return max(_left(waiting.until if deadline is None else min(waiting.until, deadline)), least)

        self._watchdog = Watchdog(self._shut)
        with contextlib.ExitStack() as stack:
            stack.callback(self._watchdog.close)
            self._connection = _connect(stack, url, headers, left(1.0 if deadline is None else 0.001))
            waiting.accept()
            try:
                frame = self._connection.recv(timeout=left(0.0))
            except (TimeoutError, ConnectionClosed) as error:
                raise _NoMetadataError(str(error)) from error
            self.metadata = content(frame, url)
            self._stack = stack.pop_all()  # from here on the connection outlives this block

    def ask(self, request: bytes, deadline: float | None) -> str | bytes:
        """The next frame after this request; ConnectionClosed, or TimeoutError at the deadline."""
        if deadline is None:
            self._connection.send(request)
            return self._connection.recv()
        try:
            with self._watchdog.until(deadline):  # sending blocks while the server doesn't read
                self._connection.send(request)
        except ConnectionClosed as error:
            if _left(deadline) > 0:
                raise
            raise TimeoutError("the server doesn't read") from error
        return self._connection.recv(timeout=_left(deadline))

    def close(self) -> None:
        """With the closing handshake."""
        self._stack.close()

    def abort(self) -> None:
        """At once: the closing handshake would wait for a server that may be silent."""
        self._shut()
        self._stack.close()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._connection.socket, socket.SHUT_RDWR)


class _NoMetadataError(ConnectionError):
    """The connection is there, but no metadata came."""


def _connect(stack: contextlib.ExitStack, url: str, headers: dict[str, str], open_timeout: float) -> ClientConnection:
    """A connection that `stack` closes."""
    try:
        # Compressing images costs more time than it saves. As a context: websockets 17 deprecates all other uses.
        return stack.enter_context(
            connect(
                url,
                additional_headers=headers,
                compression=None,
                max_size=None,
                open_timeout=open_timeout,
                close_timeout=2.0,
                **NO_PINGS,
            )
        )
    except ValueError as error:  # an HTTP answer that cannot be read, a host that cannot be looked up
        raise ConnectionError(str(error)) from error


def _may_pass(error: Exception, again: bool) -> bool:
    """Whether the next attempt may succeed."""
    if isinstance(error, InvalidStatus):
        return bool(error.response.status_code >= 500)  # a proxy, before its server
    return isinstance(error, ConnectionRefusedError) or again


def _left(deadline: float) -> float:
    """Seconds until then, at least 0."""
    return max(deadline - time.monotonic(), 0.0)


def _check_url(url: str) -> None:
    try:
        parse_uri(url)
    except (InvalidURI, ValueError) as error:
        raise ValueError(f"cannot connect to {url!r} ({error}); expected ws://HOST:PORT or wss://HOST:PORT") from error
