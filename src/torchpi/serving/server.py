"""The websocket server: policies by name behind one port, from the first connection to the last answer.

The protocol is openpi's, see `connection.py`; the path chooses the policy. HTTP on the same port is in `pages.py`.
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
"""Seconds that a client has for its part of closing a connection."""


class PolicyServer:
    """Serves policies by name; the first one also at the path "/".

    They are loaded by the functions `load`, in the model's thread. Recorder and view are closed by their owner.
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
        self._numbers = itertools.count()
        self._stopped = asyncio.Event()

    async def run(self, listening: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stop` is called; then answer the requests that were received, and close. As soon as connections
        are accepted, `listening` is called with the address, ws://HOST:PORT."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        server = await self._listen()
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            host, port = next(iter(server.sockets)).getsockname()[:2]
            listening(f"ws://{f'[{host}]' if ':' in host else host}:{port}")
            self.scheduler.start()
            loaded = asyncio.wrap_future(self.scheduler.ready)
            first: list[asyncio.Future[Any]] = [loaded, stopped]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
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
        with contextlib.suppress(RuntimeError):  # the loop has ended already
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
                compression=None,  # of images it costs more time than it saves
                max_size=settings.max_message_bytes,
                max_queue=1,  # frames of one connection that wait here for the answer to the one before them
                # A benchmark answers no ping while its simulator steps; TCP finds out whether it is there.
                ping_timeout=20 if settings.protocol == "openpi" else None,
                create_connection=self._memory.connect,  # type: ignore[arg-type]  # a factory will do
                close_timeout=_CLOSE_TIMEOUT,
                origins=[None],  # browsers say where a page comes from: no web page may use the robot's policy
                logger=logging.getLogger(f"{__name__}.websockets"),
            )
        except OSError as error:
            # Of one argument: str() of an OSError with a number begins with "[Errno …]".
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"Port {settings.port} of {settings.host} is taken; choose another one with --port (0: a free one)."
                ) from error
            unknown = isinstance(error, socket.gaierror)
            if unknown or error.errno in (errno.EADDRNOTAVAIL, None):  # asyncio gives no number from Python 3.13 on
                reason = f": {error.strerror}" if unknown else ""
                raise OSError(f"{settings.host} is no address of this machine{reason}.") from error
            raise

    async def _handle(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        assert isinstance(websocket, CountedConnection)
        policy = path_of(websocket.request)[1:] or self._state.names[0]
        kind = Connection if self._state.settings.protocol == "openpi" else BenchmarkConnection
        connection = kind(websocket, self._state, number=next(self._numbers), policy=policy)
        await connection.run(self._ready)

    async def _close(self, server: Server) -> None:
        """Refuse connections, answer the requests that were received within the grace period, and close."""
        state = self._state
        state.stopping = True
        server.close(close_connections=False)
        answering = {connection.websocket for connection in state.connections if connection.answering}
        await asyncio.gather(*(websocket.close(*GOODBYE) for websocket in server.connections - answering))
        self.scheduler.close()
        await self._until_answered(state.settings.grace)
        for connection in state.connections:
            connection.give_up(
                RequestError("shutting_down", "The server is shutting down, and had no time left for the request.")
            )
        await self._until_answered(_CLOSE_TIMEOUT)
        await asyncio.gather(*(websocket.close(*GOODBYE) for websocket in server.connections))
        await server.wait_closed()
        state.decoders.shutdown(wait=False, cancel_futures=True)

    def join(self, timeout: float) -> bool:
        """Wait at most so many seconds for the end of the model's thread and the decoders'; False: some are running."""
        decoding = concurrent.futures.wait([*self._state.decoding], timeout).not_done
        return self.scheduler.join(timeout) and not decoding

    async def _until_answered(self, timeout: float) -> None:
        """Wait until the clients that were being answered are gone, at most so many seconds."""
        gone = [each.websocket.wait_closed() for each in self._state.connections if each.answering]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*gone), timeout)


@contextlib.contextmanager
def running_server(
    load: Mapping[str, Callable[[], ServedPolicy]],
    settings: ServeSettings | None = None,
    *,
    recorder: Recorder | None = None,
    view: LiveView | None = None,
) -> Iterator[tuple[str, PolicyServer]]:
    """A server in a thread of this process until the block ends, for tests and measurements: its address ws://HOST:PORT,
    and the server, which listens from the beginning on, though its policies may not be warm yet."""
    server = PolicyServer(load, settings or ServeSettings(port=0), recorder=recorder, view=view)
    started: concurrent.futures.Future[str] = concurrent.futures.Future()
    with concurrent.futures.ThreadPoolExecutor(1, "torchpi-server") as thread:
        ended = thread.submit(asyncio.run, server.run(started.set_result))
        first: list[concurrent.futures.Future[Any]] = [started, ended]
        concurrent.futures.wait(first, return_when=concurrent.futures.FIRST_COMPLETED)
        if not started.done():
            ended.result()  # raises
        try:
            yield started.result(), server
        finally:
            server.stop()
            ended.result()
            server.join(1.0)
