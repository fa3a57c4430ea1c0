"""Messages of a broken or malicious client; another client is served meanwhile, and after it."""

import collections
import contextlib
import http.client
import io
import json
import logging
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import msgpack
import numpy as np
import psutil
import pytest
from PIL import Image
from serving_helpers import SECONDS, FakePolicy, clients, metric, observation, serve_fake, served, until
from serving_helpers import http as get
from websockets.exceptions import ConnectionClosed

import torchpi.serving.connection
from torchpi.bench.serve import server_process
from torchpi.errors import MissingExtraError
from torchpi.serving.log import LogFormatter, LogLimit
from torchpi_client import pack
from torchpi_client.images import encode_images

# Of keys that no embodiment reads a policy warns once.
pytestmark = pytest.mark.filterwarnings("ignore:Embodiment 'fake' ignores")

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
    assert get(url, "/healthz")[0] == 200
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


# ---- images ----


def scan_bomb(side, scans):
    """A progressive JPEG whose last scan, of a few bytes, is repeated: each costs a pass over the whole image."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (127, 127, 127)).save(file, "JPEG", progressive=True, optimize=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def with_jpeg(data):
    return {**observation(), "camera": {"torchpi/jpeg": data, "layout": "hwc"}}


def test_repeated_scans_keep_no_decoder_from_others():
    with served(FakePolicy()) as (url, server), clients(url, 8) as bombers, clients(url) as [good]:
        bomb = with_jpeg(scan_bomb(1000, 10_000))
        for client in bombers:
            client.send(bomb)
        assert "actions" in good.ask(encode_images(observation()))
        for client in bombers:
            assert "more than 32 scans" in json.loads(client.receive())["message"]
        assert not server._state.decoding


def test_decoding_has_the_deadline_and_ends_with_the_client_and_the_server(monkeypatch):
    free, decode = threading.Event(), torchpi.serving.connection.decode_encoded

    def decode_later(*arguments, **settings):
        assert free.wait(SECONDS)
        return decode(*arguments, **settings)

    monkeypatch.setattr(torchpi.serving.connection, "decode_encoded", decode_later)
    request = encode_images(observation())
    with contextlib.ExitStack() as stack:
        url, server = stack.enter_context(served(FakePolicy(), grace=0.0))
        with clients(url, 6) as [first, *others]:
            answer = json.loads(first.ask({**request, "torchpi/deadline": 0.05}))
            assert (answer["code"], "images were not decoded" in answer["message"]) == ("deadline_exceeded", True)
            for client in others:
                client.send(request)
            until(lambda: len(server._state.decoding) >= 5)
        running = len(server._state.decoders._threads)
        until(lambda: len(server._state.decoding) <= running)  # the others' wait no longer
        stack.close()  # the server ends although its decoders do not
        assert not server.join(0.0)
        free.set()
        assert server.join(SECONDS)


# ---- actions ----


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_not_sent_whatever_the_policy(bad):
    policy = FakePolicy()
    infer_all = policy.infer_batch

    def infer_batch(observations, **arguments):
        chunks = infer_all(observations, **arguments)
        for sent, chunk in zip(observations, chunks, strict=True):
            if sent["state"][0] == 7:
                chunk["actions"][1, 0] = bad
        return chunks

    policy.infer_batch = infer_batch
    with served(policy) as (url, _), clients(url) as [client]:
        answer = json.loads(client.ask(observation(7.0)))
        assert (answer["code"], "NaN or infinity" in answer["message"]) == ("unsafe_actions", True)
        assert np.isfinite(client.ask(observation())["actions"]).all()


def test_clipped_actions_are_counted():
    policy = FakePolicy()
    infer_all = policy.infer_batch
    policy.infer_batch = lambda *a, **b: [chunk | {"actions_clipped": 3} for chunk in infer_all(*a, **b)]
    with served(policy) as (url, _), clients(url) as [client]:
        assert client.ask(observation())["actions_clipped"] == 3
        assert metric(url, 'torchpi_clipped_answers_total{policy="p0"}') == 1


# ---- errors and the log ----

FORGED = "x\n2026-01-01 00:00:00,000 INFO ready: /forged\x1b[2J\u202e"


@pytest.mark.parametrize(
    "request_",
    [
        {f"k{i}" + "x" * 3000: 1 for i in range(900)},
        {f"k{i}" + "x" * 200: 1 for i in range(9000)},
        {FORGED: np.zeros((4, 4, 3)), **observation()},
        {"camera": {"torchpi/jpeg": b"x", "layout": "hwc", FORGED: 1}},
        {**observation(), "state": {FORGED * 3: 1.0}},
        {**observation(), f"torchpi/{FORGED}": 1},
        {FORGED.encode() * 100_000: 1},
        {**observation(), "state": {b"__ndarray__": True, **{f"{i}" + "x" * 3000: 1 for i in range(3000)}}},
        {**observation(), "state": np.zeros((1,) * 30)},
        {**observation(), "torchpi/rtc": {FORGED: "x" * 9000}},
    ],
)
def test_error_is_short_and_in_one_line_in_the_answer_the_log_and_the_dashboard(request_, caplog):
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        message = json.loads(client.ask(request_))["message"]
        dashboard = json.loads(get(url, "/dashboard.json")[1])
    shown = [message, *(robot["error"] for robot in dashboard["robots"]), *caplog.messages]
    for text in shown:
        assert len(text) < 1200
        assert text.isprintable()


def test_flattened_keys_need_no_more_memory_than_the_message():
    # Joined to each of its leaves, a key of 2 MB would need 18 GB.
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        assert "expected at most 256" in client.ask(
            {**observation(), "x" * 2_000_000: {f"{i}": 1 for i in range(9000)}}
        )
        assert "actions" in client.ask(observation())


def logged(*records):
    """The lines that the log of `torchpi serve` has of them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    handler.addFilter(LogLimit())
    for record in records:
        handler.handle(record)
    return stream.getvalue()


def test_logged_text_forges_no_line():
    error = ValueError(FORGED)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "client %s", (FORGED,), (ValueError, error, None))
    first, *traceback = logged(record).splitlines()
    assert first == r"INFO client x\n2026-01-01 00:00:00,000 INFO ready: /forged\x1b[2J\u202e"
    assert all(line.startswith("    ") and line.isprintable() for line in traceback)
    assert len(logged(logging.LogRecord("x", logging.INFO, "x", 1, "x" * 10**7, (), None))) < 2000


def test_log_has_a_number_of_lines_per_second():
    lines = logged(*(logging.LogRecord("x", logging.INFO, "x", 1, "line", (), None) for _ in range(1000))).splitlines()
    assert 200 <= len(lines) < 300


# ---- memory ----


def test_memory_of_all_messages_is_bounded_and_who_holds_most_is_disconnected():
    # Twelve clients each begin a message of 1 MiB, of which the last byte does not come; 4 MiB are for all.
    limits = {"max_message_mb": 1.0, "max_memory_mb": 4.0}
    with served(FakePolicy(), **limits) as (url, server), sockets(url) as connected, clients(url) as [good]:
        for _ in range(12):
            liar = connected(HANDSHAKE)
            liar.recv(1)
            with contextlib.suppress(OSError):
                liar.sendall(header(2**20) + bytes(2**20 - 1))
            assert server._memory._total <= 4 * 2**20
        assert "actions" in good.ask(observation())
        assert metric(url, 'torchpi_refused_connections_total{reason="memory"}') >= 8
        assert metric(url, "torchpi_message_bytes") <= 4 * 2**20


def test_who_does_not_read_the_answers_to_pings_is_not_read():
    pings = (b"\x89\xfdmask" + bytes(125)) * 2000
    with served(FakePolicy()) as (url, _), sockets(url) as connected, clients(url) as [good]:
        client = connected(HANDSHAKE)
        client.recv(1)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            collections.deque(map(client.sendall, [pings] * 200))  # of 52 MB the systems' buffers have some
        assert "actions" in good.ask(observation())


def test_connections_without_a_handshake_are_bounded():
    with served(FakePolicy()) as (url, server), sockets(url) as connected:
        for _ in range(200):
            connected(b"")
        with clients(url) as [good]:
            assert "actions" in good.ask(observation())
        assert len(server._memory.num_bytes) <= 65


def test_websockets_that_would_not_bound_the_memory_is_an_error_at_the_start(monkeypatch):
    monkeypatch.delattr("websockets.asyncio.messages.MAX_FRAGMENTS")
    with pytest.raises(MissingExtraError, match=r"has no messages\.MAX_FRAGMENTS.*pip install"), served(FakePolicy()):
        pass


def test_memory_of_messages_is_given_back():
    junk = np.zeros(100_000, np.uint8)
    with served(FakePolicy()) as (url, server), clients(url, 3) as three:
        for client in three:
            for _ in range(3):
                client.ask({**observation(), "junk": junk})
        kept = junk.nbytes + 6 * 8 * 3 + 8  # the last observation of each is on the dashboard
        until(lambda: server._memory._total == 3 * kept)
        for client in three:
            client.ask({"state": 1})
        until(lambda: server._memory._total == 3 * kept)
    assert server._memory._total == 0


# ---- HTTP ----


def ask_http(url, method, path, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection(url.removeprefix("ws://"), timeout=SECONDS)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, response.headers, response.read()


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/dashboard.json", "/p0"])
def test_no_method_but_get_and_head_is_answered(path):
    with served(FakePolicy()) as (url, _), clients(url):
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X" * 100):
            status, headers, _ = ask_http(url, method, path)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        if path != "/p0":
            body = ask_http(url, "GET", path)[2]
            status, headers, nothing = ask_http(url, "HEAD", path)
            assert (status, nothing) == (200, b"")
            assert path in ("/metrics", "/dashboard.json") or int(headers["Content-Length"]) == len(body)


@pytest.mark.parametrize("path", ["/", "/metrics", "/dashboard.json"])
def test_pages_of_other_hosts_read_neither_metrics_nor_dashboard(path):
    with served(FakePolicy()) as (url, _), clients(url):
        host = url.removeprefix("ws://")
        assert ask_http(url, "GET", path, Host=host)[1]["Cross-Origin-Resource-Policy"] == "same-origin"
        assert ask_http(url, "GET", path, Host="evil.example")[0] == 403
        for origin in ("https://evil.example", "null", f"http://{host}"):
            assert ask_http(url, "GET", path, Host=host, Origin=origin)[0] == 403
    with served(FakePolicy(), token="t") as (url, _):
        given = {"Authorization": "Bearer t", "Host": "robot.example"}
        assert ask_http(url, "GET", path, **given)[0] == 200
        assert ask_http(url, "GET", path, **given, Origin="https://evil.example")[0] == 403


# ---- the process ----


@contextlib.contextmanager
def serving_process(folder, *arguments):
    """`torchpi serve demo`: its address, log and process."""
    # SIGHUP as at a terminal: under nohup it is ignored, also by the processes that the tests start.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from torchpi.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "demo", "--port", "0", *arguments]
    log = folder / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            until_logged(log, "ready: ")
            yield re.search(r"ws://\S+?:\d+", log.read_text())[0], log, process
        finally:
            process.kill()


def until_logged(log, text):
    pause = threading.Event()
    for _ in range(1200):
        if text in log.read_text():
            return
        pause.wait(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signal_ends_the_process_after_the_grace_while_bombs_arrive(name, tmp_path):
    with (
        serving_process(tmp_path, "--grace", "1") as (url, log, process),
        clients(url, 8, close_timeout=0.1) as bombers,
    ):
        for client in bombers:
            client.send({**observation(), "base": {"torchpi/jpeg": scan_bomb(3300, 20), "layout": "hwc"}})
        began = time.monotonic()
        process.send_signal(signal.Signals[name])
        assert process.wait(60) == 0
        print(f"{name}: {time.monotonic() - began:.1f} s")
        assert f"{name}: answering" in log.read_text()


@pytest.mark.slow
def test_many_large_messages_leave_the_memory_of_the_process_bounded():
    settings = {"max_message_mb": 8.0, "max_memory_mb": 64.0, "max_rate": 1e6}
    with server_process(serve_fake, settings) as (url, process), sockets(url) as connected:
        before = process.memory_info().rss / 2**20
        for _ in range(64):
            liar = connected(HANDSHAKE)
            liar.recv(1)
            with contextlib.suppress(OSError):
                liar.sendall(header(8 * 2**20) + bytes(8 * 2**20 - 1))
        growth = psutil.Process(process.pid).memory_info().rss / 2**20 - before
        print(f"memory of the server: {before:.0f} MiB, {growth:+.0f} MiB with 64 × 8 MiB on their way")
        assert growth < 3 * 64  # buffers grow by more than what arrives
        with clients(url) as [good]:
            assert "actions" in good.ask(observation())
