"""Messages of a broken or malicious client; another client is served meanwhile, and after it."""

import contextlib
import json
import random
import socket
import struct

import msgpack
import numpy as np
import pytest
from serving_helpers import SECONDS, FakePolicy, clients, http, metric, observation, serve_fake, served
from websockets.exceptions import ConnectionClosed

from torchpi.bench.serve import server_process
from torchpi_client import pack

# Of keys that no embodiment reads a policy warns once.
pytestmark = pytest.mark.filterwarnings("ignore:Embodiment 'fake' doesn't read")

CODES = {"malformed_message", "bad_observation"}


def hostile_message(rng):
    """A message of a random kind of wrong; some are still valid."""
    request = observation(1.0, prompt="x", extra=[1, 2.5, None, True, {"a": b"b"}])
    packed = bytearray(pack(request))
    kind = rng.randrange(9)
    if kind == 0:  # truncated
        return bytes(packed[: rng.randrange(len(packed))])
    if kind == 1:  # some bytes of it are others
        for _ in range(rng.randrange(1, 5)):
            packed[rng.randrange(len(packed))] = rng.randrange(256)
        return bytes(packed)
    if kind == 2:  # noise
        return rng.randbytes(rng.randrange(200))
    if kind == 3:  # of wrong types
        wrong = rng.choice([None, -1, 1e308, "text", b"bytes", [], {}, [[1], [2, 3]], np.zeros((2, 2)), np.zeros(0)])
        return pack({**request, rng.choice(["camera", "state", "prompt"]): wrong})
    if kind == 4:  # an array that is none
        shape = rng.choice([[1 << 62], [-1], [4, 1 << 40], [1] * 70, [0, 1 << 62], ["4"], 4, [[4]], [True] * 4])
        dtype = rng.choice(["|O", "O", "V8", "f4,f4", "<c8", "M8[ns]", "<U9", "nonsense", "", 7, "object", "<f4"])
        array = {b"__ndarray__": True, b"data": bytes(16), b"dtype": dtype, b"shape": shape}
        return msgpack.packb({**msgpack.unpackb(packed), "state": array})
    if kind == 5:  # deeply nested
        depth = rng.choice([20, 600, 5000])
        return rng.choice([b"\x91", b"\x81\xa1x"]) * depth + b"\x90"
    if kind == 6:  # a header that promises much
        return rng.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb"]) + struct.pack(">I", rng.randrange(1 << 20, 1 << 32))
    if kind == 7:  # many objects in few bytes
        return b"\xdc\xff\xff" + b"\x80" * 65535
    return msgpack.packb({**msgpack.unpackb(packed), "state": msgpack.ExtType(rng.randrange(128), rng.randbytes(8))})


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def header(size):
    """Of a binary frame of so many bytes; `size` may be a lie."""
    return b"\x82\xff" + struct.pack(">Q", size) + b"mask"


@contextlib.contextmanager
def sockets(url):
    """Opens plain connections, sends them something, and closes them at the end."""
    host, port = url.removeprefix("ws://").split(":")
    with contextlib.ExitStack() as stack:

        def connected(data):
            connection = stack.enter_context(socket.create_connection((host, int(port)), SECONDS))
            connection.sendall(data)
            return connection

        yield connected


def stall(connected):
    """Connections that say nothing, not all, or one byte of what they have said would come."""
    connected(b"")
    connected(HANDSHAKE[:30])
    slow = connected(HANDSHAKE)
    slow.recv(1)
    slow.sendall(header(100_000) + b"x")


def bombard(url, count, seed):
    """Send so many hostile messages, next to connections that stall; a well-behaved client asks between them."""
    rng = random.Random(seed)
    with clients(url) as [good]:
        sent = 0
        while sent < count:
            with sockets(url) as connected, clients(url) as [bad], contextlib.suppress(ConnectionClosed):
                stall(connected)
                while sent < count:
                    sent += 1
                    answer = bad.ask(hostile_message(rng))
                    if isinstance(answer, str):
                        assert json.loads(answer)["code"] in CODES, answer
            if sent % 10 == 0:
                assert "actions" in good.ask(observation())
        assert "actions" in good.ask(observation())
    assert http(url, "/healthz")[0] == 200
    assert metric(url, 'torchpi_requests_total{outcome="internal",policy="p0"}') == 0


LIMITS = {"max_rate": 1e6, "max_message_mb": 1.0}


def test_hostile_messages_harm_no_other_client():
    with served(FakePolicy(), **LIMITS) as (url, _):
        bombard(url, 150, seed=0)


@pytest.mark.slow
def test_ten_thousand_hostile_messages_leave_the_memory_flat():
    with server_process(serve_fake, LIMITS) as (url, process):
        bombard(url, 3_000, seed=1)
        before = process.memory_info().rss / 2**20
        bombard(url, 7_000, seed=2)
        growth = process.memory_info().rss / 2**20 - before
        print(f"memory of the server: {before:.0f} MiB after 3000 messages, +{growth:.1f} after 10000")
        assert growth < 0.1 * before


def test_half_open_and_slow_connections_delay_nobody():
    with served(FakePolicy()) as (url, _), sockets(url) as connected, clients(url) as [good]:
        for _ in range(20):
            stall(connected)
        connected(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")  # TLS
        connected(b"POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n")
        connected(b"GET /" + b"x" * 5_000)
        assert metric(url, "torchpi_connections") == 21
        for _ in range(3):
            assert "actions" in good.ask(observation())


def test_frame_header_with_a_huge_length_is_refused_at_once():
    with served(FakePolicy()) as (url, _), sockets(url) as connected, clients(url) as [good]:
        liar = connected(HANDSHAKE)
        received = liar.recv(1)
        liar.sendall(header(1 << 62))
        while part := liar.recv(4096):
            received += part
        assert struct.pack(">H", 1009) in received
        assert "actions" in good.ask(observation())


def test_client_that_does_not_read_delays_nobody():
    with served(FakePolicy()) as (url, _), clients(url, 2, close_timeout=0.1) as [deaf, good]:
        for _ in range(20):
            deaf.send(observation())
        for _ in range(5):
            assert "actions" in good.ask(observation())
