"""The client of a policy server: one observation per request, one action chunk per answer."""

from __future__ import annotations

import contextlib
import inspect
import logging
import socket
import threading
import time
from typing import Any, Callable, Iterator

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from torchpi_client.images import encode_images
from torchpi_client.protocol import DEADLINE, JPEG, ServerError, closing, content, require_support
from torchpi_client.watchdog import Watchdog
from torchpi_client.wire import pack

_log = logging.getLogger(__name__)

FIRST_DELAY, LAST_DELAY = 0.1, 2.0
"""First and largest delay in seconds between attempts to connect; it doubles each time."""

SERVER_FRACTION = 0.9
"""Fraction of the time until a request's deadline that the server may let it wait. The server's refusal must arrive
before the client's deadline, which closes the connection."""
CLOSE_TIMEOUT = 2.0
"""Time limit for closing, in seconds."""
MAX_WAIT = 1e6
"""Eleven days in seconds: the longest wait for a socket on some platforms."""

# From version 15 on websockets pings the server and closes the connection after 20 s without a pong; a server that
# compiles, or infers in its event loop as openpi's does, is busy for longer. Older versions lack the argument.
NO_PINGS: dict[str, Any] = {"ping_interval": None} if "ping_interval" in inspect.signature(connect).parameters else {}


class WebsocketPolicy:
    """A policy on a server: torchpi's (`torchpi serve`) or openpi's.

    A lost connection is re-established by the next request, or by the one in progress, which is then sent once more:
    inference has no side effects. When a request's deadline passes its connection is closed, so that a late answer is
    never taken for the next one. Requests of several threads run one after another. A server that supports
    `torchpi/deadline` receives the time left, so that its model does not start on expired requests.

    Args:
        url: "ws://HOST:PORT", or "wss://…" with TLS.
        api_key: sent as `Authorization: Api-Key …`.
        timeout: seconds to wait for a connection, and then for the metadata, at each (re)connection; requests with
            shorter deadlines share it. While the server refuses connections, for example because it is still loading,
            the client retries.
        answer_timeout: the deadline of each request in seconds, including reconnecting, sending and waiting (a server's
            first answer may include a compilation); None: no deadline.
        jpeg_quality: send images as JPEG of this quality, 1 to 95, see `images`; None: uncompressed.
        interrupt: ends connecting, from another thread.

    Raises:
        ValueError: the URL is invalid, the metadata are not in the wire format, or the server does not read JPEG.
        ConnectionError: there is no policy server, or it rejects this client (ConnectionRefusedError: it still refused
            after `timeout`).
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
        interrupt: Interrupt | None = None,
    ) -> None:
        _check_url(url)
        self.url = url
        self.reconnects = 0
        """Number of reconnections."""
        self.answer_timeout = answer_timeout
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._timeout = timeout
        self._jpeg_quality = jpeg_quality
        self._request_lock = threading.Lock()
        self._closed = False
        self._interrupt = interrupt or Interrupt()  # of the request that holds the lock
        self._retries: _RetrySchedule | None = None  # while there is no connection
        self._link: _Link | None = self._open(_RetrySchedule(timeout), None, self._interrupt, reconnecting=False)
        self.metadata: dict[str, Any] = self._link.metadata
        """The server's metadata of its policy."""
        if jpeg_quality is not None:
            try:
                require_support(self.metadata, JPEG, "Send uncompressed images: leave jpeg_quality out.", server=url)
            except ValueError:
                self.close()
                raise

    def infer(
        self, observation: dict[str, Any], *, timeout: float | None = None, interrupt: Interrupt | None = None
    ) -> dict[str, Any]:
        """Infer actions.

        Args:
            observation: the robot's own keys; NumPy arrays and scalars, text, numbers, nested dicts and lists.
            timeout: the deadline of this request in seconds; None: `answer_timeout`.
            interrupt: ends this request from another thread, with a ConnectionError.

        Returns:
            "actions" [H, a] in the robot's units, and the server's other entries ("policy_timing", "server_timing").

        Raises:
            ValueError: the observation is no dict, cannot be packed, or is larger than the server accepts; the answer
                cannot be unpacked.
            ServerError: the server answered with an error, or serves another policy after reconnecting.
            ConnectionError: the connection is lost, and reconnecting failed.
            TimeoutError: no answer before the deadline.
        """
        if not isinstance(observation, dict):
            raise ValueError(
                f"The observation for {self.url} is of type {type(observation).__name__}; expected a dict "
                "with the robot's keys."
            )
        interrupt = interrupt or Interrupt()
        seconds = self.answer_timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        if self._jpeg_quality is not None:
            with _naming(self.url):
                observation = encode_images(observation, quality=self._jpeg_quality)
        # One request at a time, because answers carry no id: each belongs to the request before it.
        if not self._request_lock.acquire(timeout=-1 if deadline is None else _remaining(deadline)):
            raise no_answer_error(self.url, seconds)
        try:
            self._interrupt = interrupt
            frame = self._exchange(observation, deadline, interrupt)
        except TimeoutError as error:
            raise no_answer_error(self.url, seconds) from error
        finally:
            self._request_lock.release()
        return content(frame, self.url)

    def close(self) -> None:
        """Close the connection, if it is open. A request in progress fails."""
        self._closed = True
        if not self._request_lock.acquire(blocking=False):
            self._interrupt.set()
            if not self._request_lock.acquire(timeout=CLOSE_TIMEOUT):
                return  # a connection attempt in progress ends with its own time-out
        try:
            if self._link is not None:
                self._link.close()
        finally:
            self._request_lock.release()

    def __enter__(self) -> WebsocketPolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _exchange(self, observation: dict[str, Any], deadline: float | None, interrupt: Interrupt) -> str | bytes:
        for attempt in (1, 2):
            link = self._connected(deadline, interrupt)
            with _naming(self.url):
                request = self._packed(observation, deadline)
            try:
                interrupt.watch(link.shut)
                self._check_active(interrupt)
                return link.request(request, deadline)
            except ConnectionClosed as error:
                self._drop(link)
                self._check_active(interrupt)
                if error.rcvd is not None and error.rcvd.code == CloseCode.MESSAGE_TOO_BIG:
                    raise ValueError(
                        f"The request has {len(request)} bytes, more than {self.url} accepts ({error.rcvd.reason}); "
                        "send smaller images or JPEG (jpeg_quality=), or start the server with a larger "
                        "--max-message-mb."
                    ) from error
                if attempt == 2:  # the request itself may be the cause
                    raise ConnectionError(
                        f"The connection to {self.url} was closed twice during one request (it {closing(error)})."
                    ) from error
                _log.warning("The connection to %s is lost (it %s); reconnecting", self.url, closing(error))
            except BaseException:  # interrupted or timed out: the answer may still arrive
                self._drop(link)
                raise
        raise AssertionError("unreachable")

    def _packed(self, observation: dict[str, Any], deadline: float | None) -> bytes:
        """The packed request, with the time left until its deadline if the server supports that."""
        if deadline is None or self.metadata.get(DEADLINE) is not True:
            return pack(observation)
        remaining = _remaining(deadline)
        if not remaining:
            raise TimeoutError("The deadline passed before the request was sent.")
        return pack({DEADLINE: SERVER_FRACTION * remaining, **observation})

    def _connected(self, deadline: float | None, interrupt: Interrupt) -> _Link:
        """The connection, re-established if it is lost."""
        self._check_active(interrupt)
        if self._link is not None:
            return self._link
        if self._retries is None or self._retries.is_over:
            self._retries = _RetrySchedule(self._timeout)
        retries = self._retries
        try:
            link = self._open(retries, deadline, interrupt, reconnecting=True)
        except TimeoutError:  # the next request continues this schedule
            raise
        except BaseException:
            self._retries = None
            raise
        self._retries = None
        if changes := _changes(self.metadata, link.metadata):
            link.abort()
            raise ServerError(
                f"{self.url} serves another policy after reconnecting: {changes}; make a new client for it."
            )
        _log.info("Reconnected to %s after %.1f s", self.url, retries.seconds)
        self._link = link
        self.reconnects += 1
        return link

    def _drop(self, link: _Link) -> None:
        self._link = None
        link.abort()

    def _open(
        self, retries: _RetrySchedule, deadline: float | None, interrupt: Interrupt, *, reconnecting: bool
    ) -> _Link:
        """Open a connection, with retries.

        Args:
            deadline: raise a TimeoutError at this time, the deadline of the request that needs the connection.
            reconnecting: also retry after transient errors, such as a network that is down.
        """
        while True:
            pause = retries.next_attempt - time.monotonic()
            interrupt.wait(max(pause if deadline is None else min(pause, _remaining(deadline)), 0.0))
            self._check_active(interrupt)
            if deadline is not None and not _remaining(deadline):
                raise TimeoutError("No connection before the deadline.")
            retries.begin_attempt()
            link = _Link(self.url)
            try:
                link.open(self._headers, retries, deadline, interrupt)
            except (OSError, EOFError, WebSocketException) as error:
                self._check_active(interrupt)
                if not _is_transient(error, reconnecting) or retries.next_attempt > retries.until:
                    raise self._connection_error(error) from error
                if not retries.has_failed:
                    retries.has_failed = True
                    _log.warning("No connection to %s (%s); trying for %g s", self.url, error, self._timeout)
            else:
                return link

    def _check_active(self, interrupt: Interrupt) -> None:
        """Raise a ConnectionError if the client is closed or the request interrupted."""
        if self._closed:
            raise closed_error(self.url)
        if interrupt.is_set:
            raise ConnectionError(f"The request to {self.url} was interrupted.")

    def _connection_error(self, error: Exception) -> ConnectionError:
        if isinstance(error, ConnectionRefusedError):
            return ConnectionRefusedError(
                f"{self.url} refused the connection for {self._timeout:g} s ({error}); "
                "is the server running, on this port?"
            )
        if isinstance(error, _NoMetadataError):
            return ConnectionError(
                f"{self.url} accepted the connection but sent no metadata ({error}); is it a policy server?"
            )
        if isinstance(error, InvalidStatus):
            status, body = error.response.status_code, error.response.body
            reply = bytes(body or b"").decode("utf-8", "replace").strip()[:300].rstrip(".")
            message = f"{self.url} refuses the connection, HTTP {status}"
            if reply:
                message += f": {reply}"
            advice = {401: "; pass its token as api_key", 404: "; the path after the port in the URL names the policy"}
            return ConnectionError(f"{message}{advice.get(status, '')}.")
        return ConnectionError(f"Cannot connect to {self.url} ({error}); expected a policy server there.")


class Interrupt:
    """A handle that ends a request, or connecting, from another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._shut: Callable[[], None] | None = None

    @property
    def is_set(self) -> bool:
        """True after `set`."""
        return self._event.is_set()

    def set(self) -> None:
        """End the request."""
        self._event.set()
        if self._shut is not None:
            self._shut()

    def wait(self, seconds: float) -> None:
        """Sleep for up to this many seconds, or until `set`."""
        self._event.wait(seconds)

    def watch(self, shut: Callable[[], None]) -> None:
        """Register the function that ends the current wait for a connection; check `is_set` afterwards."""
        self._shut = shut


class _RetrySchedule:
    """Times of connection attempts to an unreachable server, with growing delays."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._delay = FIRST_DELAY
        self._accepted = False
        self.has_failed = False
        self._began = self.next_attempt = time.monotonic()
        self.until = self.next_attempt + timeout

    @property
    def seconds(self) -> float:
        """Seconds since the first attempt."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """True if the last attempt was so long ago that the next one should start a new schedule."""
        return time.monotonic() > self.next_attempt + self._timeout

    def begin_attempt(self) -> None:
        """Start an attempt and schedule the next one."""
        self.next_attempt = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LAST_DELAY)

    def accept(self) -> None:
        """Restart the timeout, for the metadata, when the server first accepts a connection."""
        if not self._accepted:
            self._accepted = True
            self.until = time.monotonic() + self._timeout


class _Link:
    """One connection and its metadata."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._socket: socket.socket | None = None
        self._stack = contextlib.ExitStack()
        self._watchdog = Watchdog(self.shut)
        self.metadata: dict[str, Any] = {}

    def open(
        self, headers: dict[str, str], retries: _RetrySchedule, deadline: float | None, interrupt: Interrupt
    ) -> None:
        """Connect and read the metadata."""

        def remaining() -> float:
            return _remaining(retries.until if deadline is None else min(retries.until, deadline))

        interrupt.watch(self.shut)
        with contextlib.ExitStack() as stack:
            stack.callback(self._watchdog.close)
            uri = parse_uri(self._url)
            # We open the socket ourselves, so that we can shut it down while the server is silent, and to bypass the
            # environment's proxies: robot and server are usually in one network.
            seconds = max(remaining(), 1.0 if deadline is None else 0.001)
            try:
                self._socket = stack.enter_context(socket.create_connection((uri.host, uri.port), seconds))
            except ValueError as error:  # an invalid host name
                raise ConnectionError(str(error)) from error
            self._socket.settimeout(None)
            if interrupt.is_set:
                raise ConnectionError("Interrupted.")
            self._connection = _connect(stack, self._url, self._socket, headers, seconds)
            self._socket = self._connection.socket
            stack.callback(self.shut)  # the closing handshake would also wait for a server that sends no metadata
            retries.accept()
            try:
                frame = self._connection.recv(timeout=remaining())
            except (TimeoutError, ConnectionClosed) as error:
                cause = f"it {closing(error)}" if isinstance(error, ConnectionClosed) else error
                raise _NoMetadataError(str(cause)) from error
            self.metadata = content(frame, self._url)
            self._stack = stack.pop_all()  # the connection outlives this block

    def request(self, request: bytes, deadline: float | None) -> str | bytes:
        """Send a request and return the next frame. Raises ConnectionClosed, or TimeoutError at the deadline."""
        if deadline is None:
            self._connection.send(request)
            return self._connection.recv()
        try:
            with self._watchdog.until(deadline):  # sending blocks while the server doesn't read
                self._connection.send(request)
        except ConnectionClosed as error:
            if _remaining(deadline) > 0:
                raise
            raise TimeoutError("The server doesn't read.") from error
        return self._connection.recv(timeout=_remaining(deadline))

    def close(self) -> None:
        """Close with the closing handshake."""
        self._connection.close()
        self._stack.close()

    def abort(self) -> None:
        """Close immediately: the closing handshake would wait for a server that may be silent."""
        self._stack.close()

    def shut(self) -> None:
        """Shut the socket down, so that a thread waiting for it sees a closed connection; from any thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # already closed
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _NoMetadataError(ConnectionError):
    """The server accepted the connection but sent no metadata."""


def _connect(
    stack: contextlib.ExitStack, url: str, sock: socket.socket, headers: dict[str, str], open_timeout: float
) -> ClientConnection:
    """Open a connection that `stack` closes."""
    try:
        # Compressing images costs more time than it saves. As a context manager: websockets 17 deprecates other uses.
        return stack.enter_context(
            connect(
                url,
                sock=sock,
                additional_headers=headers,
                compression=None,
                max_size=None,
                open_timeout=open_timeout,
                close_timeout=CLOSE_TIMEOUT,
                **NO_PINGS,
            )
        )
    except ValueError as error:  # an unreadable HTTP response
        raise ConnectionError(str(error)) from error


def _is_transient(error: Exception, reconnecting: bool) -> bool:
    """True if the next attempt may succeed."""
    if isinstance(error, InvalidStatus):
        return bool(error.response.status_code >= 500)  # a proxy whose server is not up yet
    return isinstance(error, ConnectionRefusedError) or reconnecting


@contextlib.contextmanager
def _naming(url: str) -> Iterator[None]:
    """Name the server in the error about a request that cannot be packed."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The request to {url} cannot be sent: {error}") from error


def no_answer_error(url: str, seconds: float | None) -> TimeoutError:
    """The error for a request whose deadline passed."""
    return TimeoutError(f"No answer from {url} in {seconds} s.")


def closed_error(url: str) -> ConnectionError:
    """The error for a request after `close`."""
    return ConnectionError(f"The connection to {url} is closed; make a new client.")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The differences between two versions of the metadata, or an empty string."""
    missing = "absent"
    # Compared after packing, because arrays have no single truth value and NaN is not equal to itself.
    changes = [
        f"its {key} was {old.get(key, missing)!r:.100}, and is {new.get(key, missing)!r:.100}"
        for key in dict.fromkeys([*old, *new])
        if pack(old.get(key, missing)) != pack(new.get(key, missing))
    ]
    return "; ".join(changes)


def _remaining(deadline: float) -> float:
    """Seconds until the deadline, between 0 and `MAX_WAIT`."""
    return min(max(deadline - time.monotonic(), 0.0), MAX_WAIT)


def _check_url(url: str) -> None:
    try:
        parse_uri(url)
    except (InvalidURI, ValueError) as error:
        raise ValueError(f"Cannot connect to {url!r} ({error}); expected ws://HOST:PORT or wss://HOST:PORT.") from error
