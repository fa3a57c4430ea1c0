"""The memory that clients' messages hold, bounded over all connections."""

import asyncio
import contextlib
import ctypes
import logging
import sys
from typing import Any

import websockets
from websockets.asyncio import messages
from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import State
from websockets.server import ServerProtocol

from torchpi.errors import MissingExtraError
from torchpi.serving.metrics import Metrics

_log = logging.getLogger(__name__)

_GOODBYE = CloseCode.TRY_AGAIN_LATER, "messages of all clients fill the server's memory, yours most of it"
_GOODBYE_SECONDS = 0.2
_STEP = 2**18
"""Bytes of an incomplete frame by which the memory is counted, and bytes that a client may leave unread."""
_MAX_HANDSHAKES = 64
"""Connections whose handshake is not complete; any number would use up the files that a process may open."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class MessageMemory:
    """The bytes that all connections hold; beyond the limit those that hold most are disconnected."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self.num_bytes: dict[CountedConnection, int] = {}
        """Per connection, in the thread of the event loop."""
        self._total = 0
        self._goodbyes: set[asyncio.Task[None]] = set()
        metrics.message_bytes.set_function(lambda: self._total)

    def connect(self, *arguments: Any, **settings: Any) -> "CountedConnection":
        """A new connection, for `websockets.serve`."""
        connection = CountedConnection(*arguments, **settings)
        connection.memory = self
        return connection

    def admit(self, connection: "CountedConnection") -> None:
        """Begin to count; of too many connections without a handshake the oldest is closed."""
        self.num_bytes[connection] = 0
        waiting = [each for each in self.num_bytes if each.protocol.state is State.CONNECTING]
        if len(waiting) > _MAX_HANDSHAKES:
            self._metrics.refused.labels("handshakes").inc()
            self.forget(waiting[0])
            waiting[0].transport.abort()

    def count(self, connection: "CountedConnection", change: int) -> None:
        """Count bytes that a connection holds from now on, or less than 0: no more."""
        if connection in self.num_bytes:  # else it is lost, and its handler is about to end
            self.num_bytes[connection] += change
            self._total += change

    def forget(self, connection: "CountedConnection") -> None:
        self._total -= self.num_bytes.pop(connection, 0)

    def check(self) -> None:
        """Disconnect who holds most, until the limit is kept."""
        while self._total > self._limit:
            connection = max(self.num_bytes, key=lambda each: self.num_bytes[each])
            _log.warning("a client's messages hold %d bytes; it is disconnected", self.num_bytes[connection])
            self._metrics.refused.labels("memory").inc()
            self.forget(connection)
            connection.transport.pause_reading()
            connection.drop_buffers()
            goodbye = asyncio.create_task(_disconnect(connection))
            self._goodbyes.add(goodbye)
            goodbye.add_done_callback(self._goodbyes.discard)


async def _disconnect(connection: ServerConnection) -> None:
    """Say why, and do not wait for what the client is sending."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(connection.close(*_GOODBYE), _GOODBYE_SECONDS)
    connection.transport.abort()


class CountedConnection(ServerConnection):
    """A websocket whose messages count as they arrive; its handler counts the rest, and what is done with."""

    memory: MessageMemory
    _arriving = _counted = 0
    """Bytes since the last complete frame, and those of them that count already."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.memory.admit(self)

    def count(self, change: int) -> None:
        self.memory.count(self, change)
        self.memory.check()

    def data_received(self, data: bytes) -> None:
        self._arriving += len(data)
        super().data_received(data)
        if self._arriving - self._counted >= _STEP:  # each byte that arrives would cost requests per second
            self.memory.count(self, self._arriving - self._counted)
            self._counted = self._arriving
            self.memory.check()
        if self.transport.get_write_buffer_size() > _STEP:  # answers to pings, which do not wait until they are read
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def process_event(self, event: Any) -> None:
        is_data = isinstance(event, Frame) and event.opcode in DATA_OPCODES
        self.memory.count(self, (len(event.data) if is_data else 0) - self._counted)
        self._arriving = self._counted = 0
        super().process_event(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self.memory.forget(self)
        super().connection_lost(exc)
        self.drop_buffers()
        if self.protocol.parser_exc is not None:  # its frames have the last message
            self.protocol.parser_exc.__traceback__ = None

    def drop_buffers(self) -> None:
        """Free what has arrived and is not read: reference cycles would hold it until the garbage collector comes."""
        self.protocol.reader.discard()
        if (frames := self.recv_messages.frames).get_waiter is None:  # else one is about to be taken out
            frames.queue.clear()


def require_internals() -> None:
    """Raise an error for a version of websockets in which memory would not be counted, or not be bounded; called in
    the event loop."""
    arriving = messages.Assembler()
    needed = {
        "Connection": (vars(ServerConnection.__base__), "data_received", "connection_lost", "resume_writing"),
        "ServerConnection": (vars(ServerConnection), "process_event"),
        "ServerProtocol": (dir(ServerProtocol()), "reader", "parser_exc"),
        "StreamReader": (dir(ServerProtocol().reader), "discard"),
        "Assembler": (dir(arriving), "frames", "paused"),
        "SimpleQueue": (dir(arriving.frames), "queue", "get_waiter"),
        "messages": (vars(messages), "MAX_FRAGMENTS"),  # before 17.4 a message could have any number of empty ones
    }
    if lacks := [f"{where}.{name}" for where, (has, *names) in needed.items() for name in names if name not in has]:
        raise MissingExtraError(
            f"websockets {websockets.__version__} has no {', '.join(lacks)}, by which the server bounds its memory; "
            "expected a version from 17.4 on: pip install 'torchpi[serve]', or websockets==17.4."
        )


def size_of(value: Any) -> int:
    """Bytes of the arrays and byte strings in an observation."""
    if isinstance(value, dict | list):
        return sum(map(size_of, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))


def return_large_buffers() -> None:
    """Let glibc return buffers of 1 MiB and more to the system when they are freed.

    By itself it takes larger ones into its heap, the larger the buffers that it has freed, and keeps that: five times
    what the messages held.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # else another libc
        libc.mallopt(_MMAP_THRESHOLD, 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 2**25)
