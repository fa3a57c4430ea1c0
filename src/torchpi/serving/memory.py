"""The memory that clients' messages hold, bounded over all connections."""

import asyncio
import contextlib
import ctypes
import logging
import sys
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame

from torchpi.serving.metrics import Metrics

_log = logging.getLogger(__name__)

_GOODBYE = CloseCode.TRY_AGAIN_LATER, "messages of all clients fill the server's memory, yours most of it"
_GOODBYE_SECONDS = 0.2
_STEP = 2**18
"""Bytes of an incomplete frame by which the memory is counted."""

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
        connection.memory, self.num_bytes[connection] = self, 0
        return connection

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
