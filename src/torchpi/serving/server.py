"""Websocket server for one or more policies on one port.

The URL's path names the policy. `connection.py` has the protocol, and `pages.py` the HTTP pages on the same port.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import itertools
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve

from torchpi.serving.connection import GOODBYE, Connection, ServerState
from torchpi.serving.live import LiveView
from torchpi.serving.memory import CountedConnection, MessageMemory, require_internals
from torchpi.serving.messages import RequestError
from torchpi.serving.metrics import Metrics
from torchpi.serving.pages import Pages, path_of
from torchpi.serving.recorder import Recorder
from torchpi.serving.scheduler import Scheduler, ServedPolicy
from torchpi.serving.settings import ServeSettings
from torchpi.serving.vla_eval import BenchmarkConnection

_log = logging.getLogger(__name__)

_CLOSE_TIMEOUT = 2.0
"""Seconds that a client has to complete the closing handshake."""


class PolicyServer:
    """Serves policies by name; the first one also at the path "/".

    The functions `load` are called in the model's thread. The caller closes `recorder` and `view`.
    """

    def __init__(
        self,
        load: Mapping[str, Callable[[], ServedPolicy]],
        settings: ServeSettings,
        *,
        recorder: Recorder | None = None,
        view: LiveView | None = None,
    ) -> None:
        metrics = recorder.metrics if recorder else Metrics()
        observers = tuple(observer for observer in (recorder, view) if observer is not None)
        self.scheduler = Scheduler(load, settings, metrics)
        self._state = ServerState(settings, list(load), metrics, self.scheduler, observers)
        self._memory = MessageMemory(int(settings.max_memory_mb * 2**20), metrics)
        self._client_numbers = itertools.count()
        self._stopped = asyncio.Event()

    async def run(self, on_listening: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stop` is called, then answer the requests received so far, and close.

        Args:
            on_listening: called with the address, ws://HOST:PORT, once connections are accepted.
        """
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        server = await self._listen()
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            host, port = next(iter(server.sockets)).getsockname()[:2]
            on_listening(f"ws://{f'[{host}]' if ':' in host else host}:{port}")
            self.scheduler.start()
            loaded = asyncio.wrap_future(self.scheduler.ready)
            awaited: list[asyncio.Future[Any]] = [loaded, stopped]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if loaded.done():
                self._state.policies = loaded.result()
                self._ready.set_result(None)
                _log.info("ready: %s", ", ".join(f"/{name}" for name in self._state.names))
            await stopped
        finally:
            stopped.cancel()
            await self._close(server)

    def stop(self) -> None:
        """End `run`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended already
            self._loop.call_soon_threadsafe(self._stopped.set)

    async def _listen(self) -> Server:
        settings = self._state.settings
        require_internals()
        try:
            return await serve(
                self._handle,
                settings.host,
                settings.port,
                process_request=Pages(self._state).respond,
                compression=None,  # compressing images costs more time than it saves
                max_size=settings.max_message_bytes,
                max_queue=1,  # frames buffered per connection while the previous one is being answered
                # A benchmark answers no pings while its simulator steps; TCP detects a lost connection.
                ping_timeout=20 if settings.protocol == "openpi" else None,
                create_connection=self._memory.connect,  # type: ignore[arg-type]  # a factory also works
                close_timeout=_CLOSE_TIMEOUT,
                origins=[None],  # only browsers send an Origin, and no web page may use the robot's policy
                logger=logging.getLogger(f"{__name__}.websockets"),
            )
        except OSError as error:
            # The new errors get a message only: str() of an OSError with an errno begins with "[Errno …]".
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"Port {settings.port} of {settings.host} is taken; choose another one with --port (0: a free one)."
                ) from error
            is_unknown_name = isinstance(error, socket.gaierror)
            if is_unknown_name or error.errno in (errno.EADDRNOTAVAIL, None):  # None: asyncio from Python 3.13 on
                reason = f": {error.strerror}" if is_unknown_name else ""
                raise OSError(f"{settings.host} is not an address of this machine{reason}.") from error
            raise

    async def _handle(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        assert isinstance(websocket, CountedConnection)
        policy = path_of(websocket.request)[1:] or self._state.names[0]
        connection_class = Connection if self._state.settings.protocol == "openpi" else BenchmarkConnection
        connection = connection_class(websocket, self._state, number=next(self._client_numbers), policy=policy)
        await connection.run(self._ready)

    async def _close(self, server: Server) -> None:
        """Refuse new connections, answer the requests received so far within the grace period, and close."""
        state = self._state
        state.stopping = True
        server.close(close_connections=False)
        answering = {connection.websocket for connection in state.connections if connection.answering}
        await asyncio.gather(*(websocket.close(*GOODBYE) for websocket in server.connections - answering))
        self.scheduler.close()
        await self._wait_until_answered(state.settings.grace)
        for connection in state.connections:
            connection.give_up(
                RequestError("shutting_down", "The server shut down before it could answer this request.")
            )
        await self._wait_until_answered(_CLOSE_TIMEOUT)
        await asyncio.gather(*(websocket.close(*GOODBYE) for websocket in server.connections))
        await server.wait_closed()
        state.decoders.shutdown(wait=False, cancel_futures=True)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the threads of model and decoders; False if any is still running."""
        decoding = concurrent.futures.wait([*self._state.decoding], timeout).not_done
        return self.scheduler.join(timeout) and not decoding

    async def _wait_until_answered(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until the clients that are being answered have disconnected."""
        closed = [each.websocket.wait_closed() for each in self._state.connections if each.answering]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closed), timeout)


@contextlib.contextmanager
def running_server(
    load: Mapping[str, Callable[[], ServedPolicy]],
    settings: ServeSettings | None = None,
    *,
    recorder: Recorder | None = None,
    view: LiveView | None = None,
) -> Iterator[tuple[str, PolicyServer]]:
    """Run a server in a thread of this process, for tests and benchmarks.

    Yields its address, ws://HOST:PORT, and the server. It is listening, but its policies may not be warm yet.
    """
    server = PolicyServer(load, settings or ServeSettings(port=0), recorder=recorder, view=view)
    listening: concurrent.futures.Future[str] = concurrent.futures.Future()
    with concurrent.futures.ThreadPoolExecutor(1, "torchpi-server") as thread:
        ended = thread.submit(asyncio.run, server.run(listening.set_result))
        awaited: list[concurrent.futures.Future[Any]] = [listening, ended]
        concurrent.futures.wait(awaited, return_when=concurrent.futures.FIRST_COMPLETED)
        if not listening.done():
            ended.result()  # raises
        try:
            yield listening.result(), server
        finally:
            server.stop()
            ended.result()
            server.join(1.0)
