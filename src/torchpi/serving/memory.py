"""Limit on the memory held by clients' messages, over all connections."""

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
_GOODBYE_TIMEOUT = 0.2
_STEP = 2**18
"""An incomplete frame is counted in steps of this many bytes; a client may leave this many bytes unread."""
_MAX_HANDSHAKES = 64
"""Connections with an incomplete handshake. Without a limit they could use up the process' file descriptors."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


class MessageMemory:
    """Memory held by all connections in bytes. Beyond the limit, the connections that hold most are closed."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self.num_bytes: dict[CountedConnection, int] = {}
        """Per connection; only used in the event loop's thread."""
        self._total = 0
        self._goodbyes: set[asyncio.Task[None]] = set()
        metrics.message_bytes.set_function(lambda: self._total)

    def connect(self, *arguments: Any, **settings: Any) -> "CountedConnection":
        """Create a connection, for `websockets.serve`."""
        connection = CountedConnection(*arguments, **settings)
        connection.memory = self
        return connection

    def admit(self, connection: "CountedConnection") -> None:
        """Start counting a connection. If too many handshakes are incomplete, the oldest connection is closed."""
        self.num_bytes[connection] = 0
        handshaking = [each for each in self.num_bytes if each.protocol.state is State.CONNECTING]
        if len(handshaking) > _MAX_HANDSHAKES:
            self._metrics.refused.labels("handshakes").inc()
            self.forget(handshaking[0])
            handshaking[0].transport.abort()

    def count(self, connection: "CountedConnection", change: int) -> None:
        """Add `change` to the bytes that a connection holds; it is negative when memory is released."""
        if connection in self.num_bytes:  # otherwise it is lost, and its handler is about to end
            self.num_bytes[connection] += change
            self._total += change

    def forget(self, connection: "CountedConnection") -> None:
        self._total -= self.num_bytes.pop(connection, 0)

    def check(self) -> None:
        """Disconnect the clients that hold most until the rest is within the limit."""
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
    """Send the reason, and close without waiting for the rest of a message."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(connection.close(*_GOODBYE), _GOODBYE_TIMEOUT)
    connection.transport.abort()


class CountedConnection(ServerConnection):
    """Websocket that counts messages as they arrive. Its handler counts what it keeps of them, and releases them."""

    memory: MessageMemory
    _arriving = _counted = 0
    """Bytes received since the last complete frame, and the part of them counted so far."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.memory.admit(self)

    def count(self, change: int) -> None:
        self.memory.count(self, change)
        self.memory.check()

    def data_received(self, data: bytes) -> None:
        self._arriving += len(data)
        super().data_received(data)
        if self._arriving - self._counted >= _STEP:  # in steps: counting on every call costs throughput
            self.count(self._arriving - self._counted)
            self._counted = self._arriving
        if self.transport.get_write_buffer_size() > _STEP:  # pongs, which are sent even if the client does not read
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
        if self.protocol.parser_exc is not None:  # its traceback's stack frames hold the last message
            self.protocol.parser_exc.__traceback__ = None

    def drop_buffers(self) -> None:
        """Free received data that was not read. Reference cycles would keep it until the next garbage collection."""
        self.protocol.reader.discard()
        frames = self.recv_messages.frames
        if frames.get_waiter is None:  # otherwise a frame is about to be taken out
            frames.queue.clear()


def require_internals() -> None:
    """Raise an error if this version of websockets lacks the internals needed to count and limit memory.

    Call it in the event loop.
    """
    assembler = messages.Assembler()
    required = {
        "Connection": (vars(ServerConnection.__base__), "data_received", "connection_lost", "resume_writing"),
        "ServerConnection": (vars(ServerConnection), "process_event"),
        "ServerProtocol": (dir(ServerProtocol()), "reader", "parser_exc"),
        "StreamReader": (dir(ServerProtocol().reader), "discard"),
        "Assembler": (dir(assembler), "frames", "paused"),
        "SimpleQueue": (dir(assembler.frames), "queue", "get_waiter"),
        "messages": (vars(messages), "MAX_FRAGMENTS"),  # before 17.4 a message had any number of empty fragments
    }
    missing = [
        f"{owner}.{name}"
        for owner, (attributes, *names) in required.items()
        for name in names
        if name not in attributes
    ]
    if missing:
        raise MissingExtraError(
            f"websockets {websockets.__version__} has no {', '.join(missing)}, which the server needs to limit its "
            "memory; expected version 17.4 or newer: pip install 'torchpi[serve]', or websockets==17.4."
        )


def size_of(value: Any) -> int:
    """Size of the arrays and byte strings in an observation, in bytes."""
    if isinstance(value, dict | list):
        return sum(map(size_of, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))


def return_large_buffers() -> None:
    """Make glibc return buffers of 1 MiB and more to the system when they are freed.

    By default glibc raises its mmap threshold when a large buffer is freed, and then keeps such buffers in its heap: up
    to five times the memory that the messages held.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # other C libraries lack mallopt
        libc.mallopt(_MMAP_THRESHOLD, 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 2**25)
