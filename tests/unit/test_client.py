"""torchpi-client: the wire format against bytes that openpi-client wrote, the client against servers on loopback."""

import asyncio
import contextlib
import json
import queue
import re
import socket
import threading
import time

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from websockets.exceptions import ConnectionClosed
from websockets.server import ServerProtocol
from websockets.sync.server import serve

from torchpi_client import AsyncWebsocketPolicy, ServerError, WebsocketPolicy, pack, unpack
from torchpi_client.client import Interrupt
from torchpi_client.images import decode_images, encode_images, jpeg_cost
from torchpi_client.protocol import DEADLINE, JPEG, RTC, PreviousChunk
from torchpi_client.watchdog import Watchdog

METADATA = {"reset_pose": [0.0, -1.5], "name": "loopback"}


def same(a, b):
    """Assert equality of values and of all types; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b or (a != a and b != b))


# ---- the wire format ----


@pytest.fixture(scope="session")
def wire_cases(golden_root):
    """Packed bytes, object and name of the unpacked type for each case."""
    folder = golden_root / "msgpack"
    with np.load(folder / "expected.npz") as arrays:
        table = json.loads((folder / "expected.json").read_text(encoding="utf-8"))

        def build(node):
            kind = node["type"]
            if kind == "ndarray":
                return arrays[node["npz"]]
            if kind == "npgeneric":
                return np.dtype(node["dtype"]).type(node["value"])
            if kind == "dict":
                return {key: build(item) for key, item in node["items"].items()}
            if kind == "list":
                return [build(item) for item in node["items"]]
            return bytes.fromhex(node["hex"]) if kind == "bytes" else node["value"]

        return {
            name: ((folder / case["file"]).read_bytes(), build(case["expected"]), case["roundtrip_type"])
            for name, case in table.items()
            if isinstance(case, dict)
        }


def arriving(value):
    """np.float64 is a float to msgpack."""
    if isinstance(value, dict):
        return {key: arriving(item) for key, item in value.items()}
    if isinstance(value, list):
        return [arriving(item) for item in value]
    return float(value) if isinstance(value, np.float64) else value


def test_golden_bytes_pack_and_unpack(wire_cases):
    assert len(wire_cases) == 20
    for name, (data, value, kind) in wire_cases.items():
        assert pack(value) == data, name
        assert same(unpack(data), arriving(value)), name
        assert re.fullmatch(f"{kind}_?", type(unpack(data)).__name__ + "_"), name
        assert pack(unpack(data)) == data, name


def test_pack_is_independent_of_memory_layout():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array.T, array[::2, 1::3], array[::-1], np.asfortranarray(array), np.broadcast_to(array[0], (3, 6))):
        assert pack(view) == pack(np.ascontiguousarray(view))


def test_arrays_arrive_writable():
    array = unpack(pack({"a": np.zeros(3, np.float32)}))["a"]
    array += 1
    assert array.tolist() == [1, 1, 1]


NUMBERS = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness="=") | hnp.unsigned_integer_dtypes(endianness="=")
ARRAY_DTYPES = (
    NUMBERS
    | hnp.integer_dtypes()
    | hnp.floating_dtypes(sizes=(16, 32, 64))
    | hnp.unicode_string_dtypes(max_len=5)
    | hnp.byte_string_dtypes(max_len=5)
    | hnp.datetime64_dtypes()
)
SCALAR_DTYPES = NUMBERS | hnp.floating_dtypes(sizes=(16, 32), endianness="=")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | hnp.arrays(ARRAY_DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    | SCALAR_DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, ())).map(lambda array: array[()])
)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(NESTED)
def test_round_trip(value):
    data = pack(value)
    assert same(unpack(data), value)
    assert pack(unpack(data)) == data


def test_tuples_arrive_as_lists():
    assert unpack(pack((1, (2, "x")))) == [1, [2, "x"]]


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}]), "numpy.ndarray of dtype object"),
        (np.zeros(2, "f4,i4"), "numpy.ndarray of dtype"),
        (np.zeros(2, "V3"), "numpy.ndarray of dtype"),
        (np.zeros(2, complex), "numpy.ndarray of dtype complex128"),
        (np.complex64(1), "numpy.complex64"),
        (np.zeros(1, "f4,i4")[0], "numpy.void"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.timedelta64(5, "ns"), "timedelta64"),
        (np.longdouble(1), "numpy.longdouble|numpy.float128"),
        ({"a": [{1, 2}]}, "builtins.set"),
        (Custom(), "Custom"),
        (2**64, "65 bits"),
        (-(2**63) - 1, "64 bits"),
    ],
)
def test_pack_refuses(value, message):
    with pytest.raises(ValueError, match=rf"Cannot pack an? .*({message})"):
        pack(value)


def array_map(**changes):
    value = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    value.update({key.encode(): item for key, item in changes.items()})
    return {key: item for key, item in value.items() if item is not ...}


def scalar_map(data, dtype):
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


MALFORMED = [
    array_map(data=...),
    array_map(shape=...),
    array_map(more=1),
    array_map(data="text"),
    array_map(data=bytes(7)),
    array_map(data=bytes(9)),
    array_map(data=None),
    array_map(shape=[3]),
    array_map(shape=[-2]),
    array_map(shape=[-1, -2]),
    array_map(shape=[2.0]),
    array_map(shape=[True, 2]),
    array_map(shape=2),
    array_map(shape=[2] + [1] * 70),
    array_map(shape=[2**40, 2**40, 0], data=b""),
    array_map(shape=[2**63, 0], data=b""),
    array_map(shape=[10**18], data=b"", dtype="<U0"),
    *(
        array_map(dtype=dtype)
        for dtype in ("O", "|O", "V4", "c8", "f4,f4", "(2,)i2", "<f3", "", "S0", "T", "x", "f4\n", "M8[xx]", "{}")
    ),
    *(array_map(dtype=dtype) for dtype in (None, 4, b"<f4", [["a", "<f4"]], "U" + "9" * 30)),
    scalar_map(300, "|u1"),
    scalar_map(-1, "<u8"),
    scalar_map(1.0, "<i8"),
    scalar_map(1, "|b1"),
    scalar_map("1", "<f4"),
    scalar_map([1.0], "<f4"),
    scalar_map(None, "<f4"),
    scalar_map(1, "O"),
    scalar_map("x", "<U1"),
    scalar_map(1, "<M8[s]"),
    {b"__npgeneric__": True},
    {1: 2},  # only str and bytes are keys
]


@pytest.mark.parametrize("value", MALFORMED, ids=lambda value: f"{value!r:.60}")
def test_malformed_tags_are_refused(value):
    with pytest.raises(ValueError, match="Cannot unpack"):
        unpack(msgpack.packb({"a": [value]}))


def test_plain_dtype_names_are_read():
    assert same(unpack(msgpack.packb(array_map(dtype="float32"))), np.zeros(2, np.float32))


def test_truncated_bytes_are_refused(wire_cases):
    for data, _, _ in wire_cases.values():
        for end in range(0, len(data), max(1, len(data) // 60)):
            with pytest.raises(ValueError, match="Cannot unpack"):
                unpack(data[:end])
        with pytest.raises(ValueError, match="Cannot unpack"):
            unpack(data + b"\x00")


@given(st.data())
def test_damaged_bytes_are_read_or_refused(wire_cases, data):
    damaged = bytearray(data.draw(st.sampled_from([case for case, _, _ in wire_cases.values()])))
    for index, byte in data.draw(
        st.dictionaries(st.integers(0, len(damaged) - 1), st.integers(0, 255), max_size=4)
    ).items():
        damaged[index] = byte
    with contextlib.suppress(ValueError):
        unpack(bytes(damaged))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ValueError):
        unpack(data)


def test_nesting_depth_is_limited():
    value = []
    for _ in range(100):
        value = [value]
    assert unpack(pack(value)) == value
    for _ in range(1000):
        value = [value]
    with pytest.raises(ValueError, match="recursion limit"):
        pack(value)
    with pytest.raises(ValueError, match="Cannot unpack"):
        unpack(b"\x91" * 100_000 + b"\xc0")
    with pytest.raises(ValueError, match="Cannot unpack"):
        unpack(b"\xdd\xff\xff\xff\xff")  # a list of 2³² values in five bytes


# ---- the client ----


@pytest.fixture(autouse=True)
def environment_proxy(monkeypatch):
    """Set a proxy in the environment, which the client must ignore: server and robot are in one network."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "socks_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)


@contextlib.contextmanager
def running(handler, port=0, **settings):
    """Run a server in a thread; yield its URL."""
    with serve(handler, "127.0.0.1", port, compression=None, max_size=None, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def echo(connection):
    """Send metadata, then answer each request with the request and the headers."""
    connection.send(pack(METADATA))
    for request in connection:
        observation = unpack(request)
        authorization = connection.request.headers.get("Authorization")
        connection.send(pack({"actions": observation["state"] * 2, "seen": observation, "key": authorization}))


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_metadata_and_answers_arrive():
    image = np.random.default_rng(0).integers(
        0, 256, (3, 720, 1280, 3), np.uint8
    )  # beyond websockets' default of 1 MiB
    observation = {"images": {"top": image}, "state": np.arange(7, dtype=np.float32), "prompt": "pick up the fork"}
    with running(echo) as url, WebsocketPolicy(url) as policy:
        assert policy.metadata == METADATA
        for _ in range(2):
            answer = policy.infer(observation)
            np.testing.assert_array_equal(answer["actions"], observation["state"] * 2)
            assert same(answer["seen"], observation)
            assert answer["key"] is None


def test_api_key_is_sent():
    with running(echo) as url, WebsocketPolicy(url, api_key="secret") as policy:
        assert policy.infer({"state": np.zeros(1)})["key"] == "Api-Key secret"


def test_threads_get_their_own_answers():
    with running(echo) as url, WebsocketPolicy(url) as policy:
        answers = {}

        def ask(i):
            answers[i] = [policy.infer({"state": np.full(2, i)})["actions"][0] for _ in range(20)]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {i: [2 * i] * 20 for i in range(4)}


def test_text_frame_raises_server_error_and_next_request_reconnects():
    def failing(connection):  # as openpi's server does
        connection.send(pack(METADATA))
        connection.recv()
        connection.send("Traceback: no camera 'top'")
        connection.close(1011)

    with running(failing) as url, WebsocketPolicy(url) as policy:
        for reconnects in range(3):
            with pytest.raises(ServerError, match="no camera 'top'") as caught:
                policy.infer({})
            assert isinstance(caught.value, RuntimeError)
            assert policy.reconnects == reconnects


def test_torchpi_server_errors_have_code():
    def failing(connection):
        connection.send(pack(METADATA))
        for _ in connection:
            connection.send('{"code": "bad_observation", "message": "no camera"}')

    with running(failing) as url, WebsocketPolicy(url) as policy:
        for _ in range(2):
            with pytest.raises(ServerError, match=r"no camera$") as caught:
                policy.infer({})
            assert caught.value.code == "bad_observation"
        assert policy.reconnects == 0


def test_unpackable_observation_keeps_connection():
    with running(echo) as url, WebsocketPolicy(url) as policy:
        with pytest.raises(ValueError, match="Cannot pack"):
            policy.infer({"state": object()})
        assert policy.infer({"state": np.ones(1)})["actions"][0] == 2


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        ("not today", ServerError, "not today"),
        (pack([1]), ValueError, "sent a value of type list"),
        (b"\xc1", ValueError, "Cannot unpack"),
        (None, ConnectionError, "sent no metadata"),
    ],
)
def test_first_message_without_metadata_is_an_error(first, error, message):
    def handler(connection):
        if first is not None:
            connection.send(first)

    with running(handler) as url, pytest.raises(error, match=message):
        WebsocketPolicy(url)


def test_late_answer_is_never_taken_for_next_one():
    requested, late = threading.Event(), threading.Event()

    def first_answer_is_late(connection):
        connection.send(pack(METADATA))
        for request in connection:
            if not requested.is_set():
                requested.set()
                late.wait()
            with contextlib.suppress(ConnectionClosed):
                connection.send(request)

    with running(first_answer_is_late) as url, WebsocketPolicy(url, answer_timeout=0.1) as policy:
        with pytest.raises(TimeoutError, match=r"No answer from ws://.* in 0.1 s"):
            policy.infer({"number": 1})
        late.set()
        assert policy.infer({"number": 2}, timeout=30.0) == {"number": 2}
        assert policy.reconnects == 1


def telling_servers(*, knows_deadlines):
    """Answers with the request."""

    def handler(connection):
        connection.send(pack({DEADLINE: True} if knows_deadlines else {}))
        for request in connection:
            connection.send(request)

    return running(handler)


def test_request_carries_time_left_if_server_supports_deadlines():
    with telling_servers(knows_deadlines=True) as url, WebsocketPolicy(url, answer_timeout=50.0) as policy:
        assert 40 < policy.infer({})[DEADLINE] <= 50
        assert 20 < policy.infer({}, timeout=30.0)[DEADLINE] <= 30
        assert policy.infer({DEADLINE: 7.0}) == {DEADLINE: 7.0}
        with pytest.raises(TimeoutError):
            policy.infer({}, timeout=0.0)
    with telling_servers(knows_deadlines=True) as url, WebsocketPolicy(url, answer_timeout=None) as policy:
        assert policy.infer({}) == {}
    with telling_servers(knows_deadlines=False) as url, WebsocketPolicy(url) as policy:
        assert policy.infer({}) == {}


def test_asyncio_request_carries_time_left_after_earlier_tasks():
    async def ask(url):
        async with AsyncWebsocketPolicy(url, answer_timeout=50.0) as policy:
            first, second = await asyncio.gather(policy.infer({}), policy.infer({}, timeout=30.0))
            return first[DEADLINE], second[DEADLINE]

    with telling_servers(knows_deadlines=True) as url:
        first, second = asyncio.run(ask(url))
    assert 40 < first <= 50
    assert 20 < second <= 30


def test_deadline_includes_waiting_for_restarted_server_to_load():
    """Requests end at their deadlines until the server is ready and answers."""
    ready, connections = threading.Event(), []

    def loading(connection):
        connections.append(connection)
        if len(connections) > 1:
            ready.wait()
        with contextlib.suppress(ConnectionClosed):
            connection.send(pack(METADATA))
            connection.recv()
            if len(connections) > 1:
                connection.send(pack({"number": 1}))

    with running(loading) as url, WebsocketPolicy(url, timeout=30) as policy:
        for _ in range(2):
            with pytest.raises(TimeoutError, match=r"in 0.05 s"):
                policy.infer({}, timeout=0.05)
        ready.set()
        assert policy.infer({}, timeout=30.0) == {"number": 1}
        assert policy.reconnects == 1


def test_requests_with_short_deadlines_share_the_connection_timeout():
    def gone(connection):
        connection.send(pack(METADATA))

    with running(gone) as url:
        policy = WebsocketPolicy(url, timeout=0.5)
    with pytest.raises(TimeoutError):
        policy.infer({}, timeout=0.05)

    def ask_again_and_again():
        for _ in range(200):
            with contextlib.suppress(TimeoutError):
                policy.infer({}, timeout=0.05)

    with pytest.raises(ConnectionRefusedError, match=r"refused the connection for 0.5 s"):
        ask_again_and_again()
    port = int(url.rpartition(":")[2])
    with running(echo, port):  # the next request starts a new schedule
        assert policy.infer({"state": np.ones(1)}, timeout=30)["actions"] == [2]
    policy.close()


@contextlib.contextmanager
def non_reading_server(greeting):
    """Server that reads nothing after the handshakes. Only the first connection gets metadata."""
    connections = []

    def shake_hands():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                connections.append(sock)
                protocol = ServerProtocol()
                protocol.receive_data(sock.recv(65536))
                for request in protocol.events_received():
                    protocol.send_response(protocol.accept(request))
                if len(connections) == 1:
                    protocol.send_binary(greeting)
                sock.sendall(b"".join(protocol.data_to_send()))

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=shake_hands, daemon=True)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}", connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in (listener, *connections):
            each.close()


LARGE = {"image": np.zeros((4000, 4000, 3), np.uint8)}
"""More than the sockets' buffers hold."""


def test_deadline_includes_sending():
    with non_reading_server(pack(METADATA)) as (url, _), WebsocketPolicy(url) as policy, pytest.raises(TimeoutError):
        policy.infer(LARGE, timeout=0.2)


@contextlib.contextmanager
def asking(policy, observation):
    """Send a request in a thread, which ends with a ConnectionError."""
    caught = []

    def ask():
        with pytest.raises(ConnectionError, match="is closed") as error:
            policy.infer(observation)
        caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    thread.join(timeout=60)
    assert len(caught) == 1


def wait_until(condition):
    """Poll a condition for up to a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def test_close_ends_request_while_sending():
    """The server reads nothing, and the request has no deadline."""
    with non_reading_server(pack(METADATA)) as (url, _):
        policy = WebsocketPolicy(url, answer_timeout=None)
        with asking(policy, LARGE):
            wait_until(policy._request_lock.locked)
            policy.close()
        policy.close()


def test_close_ends_request_while_reconnecting():
    with non_reading_server(pack(METADATA)) as (url, connections):
        policy = WebsocketPolicy(url, answer_timeout=None)
        connections[0].shutdown(socket.SHUT_RDWR)
        with asking(policy, {}):
            wait_until(lambda: len(connections) == 2)  # the second one never gets metadata
            policy.close()


def test_connection_without_metadata_is_aborted_at_deadline_without_closing_handshake():
    with non_reading_server(pack(METADATA)) as (url, connections), WebsocketPolicy(url) as policy:
        connections[0].shutdown(socket.SHUT_RDWR)
        for count in (2, 3):
            with pytest.raises(TimeoutError):
                policy.infer({}, timeout=0.2)
            assert len(connections) == count
            sent = b""
            while part := connections[-1].recv(4096):
                sent += part
            assert sent == b""  # no closing handshake, which would wait for an answer


@pytest.mark.parametrize("seconds", [float("inf"), 1e15])
def test_infinite_timeouts_are_accepted(seconds):
    with running(echo) as url, WebsocketPolicy(url, timeout=seconds, answer_timeout=seconds) as policy:
        assert policy.infer({"state": np.ones(1)})["actions"] == [2]
        assert policy.infer({"state": np.ones(1)}, timeout=seconds)["actions"] == [2]


def test_observation_must_be_dict():
    with (
        running(echo) as url,
        WebsocketPolicy(url) as policy,
        pytest.raises(ValueError, match="is of type list; expected a"),
    ):
        policy.infer([1, 2, 3])


def test_request_above_server_size_limit_is_sent_once():
    requests = []

    def small(connection):
        connection.protocol.max_message_size = connection.protocol.max_size = 1000
        connection.send(pack(METADATA))
        for request in connection:
            requests.append(request)

    with running(small) as url, WebsocketPolicy(url) as policy:
        with pytest.raises(ValueError, match=r"request has 30\d\d bytes, more than ws://.* accepts .*JPEG"):
            policy.infer({"image": np.zeros((10, 100, 3), np.uint8)})
        assert (policy.reconnects, requests) == (0, [])


def test_watchdog_acts_at_deadline_of_current_block():
    acted_at = queue.Queue()
    watchdog = Watchdog(lambda: acted_at.put(time.monotonic()))
    with watchdog.until(time.monotonic() + 300):  # the watchdog's thread sleeps until then
        pass
    for seconds in (0.02, 0.05, 0.03):
        with watchdog.until(time.monotonic() + 0.01):  # ends earlier: the next block's deadline counts
            pass
        deadline = time.monotonic() + seconds
        with watchdog.until(deadline):
            assert acted_at.get(timeout=60) >= deadline
    assert acted_at.empty()
    watchdog.close()


def test_request_is_resent_after_lost_connection():
    connections = []

    def breaks_once(connection):
        connections.append(connection)
        if len(connections) == 1:
            connection.send(pack(METADATA))
            connection.recv()
            connection.socket.shutdown(socket.SHUT_RDWR)
        else:
            echo(connection)

    with running(breaks_once) as url, WebsocketPolicy(url) as policy:
        assert policy.infer({"state": np.ones(1)})["actions"] == [2]
        assert policy.infer({"state": np.ones(1)})["actions"] == [2]
        assert (policy.reconnects, len(connections)) == (1, 2)


def test_request_that_closes_connection_twice_fails():
    connections = []

    def poisoned(connection):
        connections.append(connection)
        connection.send(pack(METADATA))
        connection.recv()

    with running(poisoned) as url, WebsocketPolicy(url) as policy:
        with pytest.raises(ConnectionError, match="closed twice during one request"):
            policy.infer({})
        assert len(connections) == 2


def test_client_waits_for_restarting_server():
    def one_answer(connection):
        connection.send(pack(METADATA))
        connection.recv()
        connection.send(pack({}))

    with contextlib.ExitStack() as stack:
        with running(one_answer) as url:
            policy = stack.enter_context(WebsocketPolicy(url, timeout=30))
            policy.infer({"state": np.ones(1)})
        port = int(url.rpartition(":")[2])
        timer = threading.Timer(0.3, lambda: stack.enter_context(running(echo, port)))
        timer.start()
        assert policy.infer({"state": np.ones(1)})["actions"] == [2]
        assert policy.reconnects == 1
        timer.join()


def test_server_with_other_policy_after_reconnecting_is_refused():
    connections = []

    def changing(connection):
        connections.append(connection)
        connection.send(pack({"action_horizon": len(connections)}))
        connection.recv()

    message = r"serves another policy after reconnecting: its action_horizon was 1, and is 2;"
    with running(changing) as url, WebsocketPolicy(url) as policy, pytest.raises(ServerError, match=message):
        policy.infer({})


def test_metadata_with_arrays_and_nan_are_compared_after_reconnecting():
    def closes(connection):
        connection.send(pack({"low": np.array([0.0, np.nan]), "scale": float("nan")}))
        connection.send(connection.recv())

    with running(closes) as url, WebsocketPolicy(url) as policy:
        assert [policy.infer({"number": i}) for i in range(3)] == [{"number": i} for i in range(3)]
        assert policy.reconnects == 2


def test_close_ends_request_in_progress():
    requested = threading.Event()
    caught = []

    def silent(connection):
        connection.send(pack(METADATA))
        connection.recv()
        requested.set()
        for _ in connection:
            pass

    with running(silent) as url:
        policy = WebsocketPolicy(url)

        def ask():
            with pytest.raises(ConnectionError, match="closed") as error:
                policy.infer({})
            caught.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        requested.wait()
        policy.close()
        thread.join()
    assert len(caught) == 1


def test_asyncio_answers_concurrent_requests():
    async def ask_all(url):
        async with AsyncWebsocketPolicy(url) as policy:
            assert policy.metadata == METADATA
            answers = await asyncio.gather(*(policy.infer({"state": np.full(1, i)}) for i in range(5)))
            with pytest.raises(ValueError, match="Cannot pack"):
                await policy.infer({"state": object()})
        with pytest.raises(ConnectionError, match="is closed"):
            await policy.infer({"state": np.ones(1)})
        return [answer["actions"].tolist() for answer in answers]

    with running(echo) as url:
        assert asyncio.run(ask_all(url)) == [[0], [2], [4], [6], [8]]


def test_asyncio_deadline_includes_queueing_and_cancelled_request_ends():
    def silent_first(connection):
        connection.send(pack(METADATA))
        if not connections:
            connections.append(connection)
            requested.append(connection.recv())
            for _ in connection:
                pass
        else:
            connection.send(connection.recv())

    connections, requested = [], []

    async def ask(url):
        async with AsyncWebsocketPolicy(url) as policy:
            under_way = asyncio.ensure_future(policy.infer({"number": 1}))
            await asyncio.get_running_loop().run_in_executor(None, wait_until, lambda: requested)
            with pytest.raises(TimeoutError, match=r"No answer from ws://.* in 0.1 s"):
                await policy.infer({"number": 2}, timeout=0.1)
            assert not under_way.done()
            under_way.cancel()
            answer = await policy.infer({"number": 3}, timeout=60.0)
            with pytest.raises(asyncio.CancelledError):
                await under_way
            return answer

    with running(silent_first) as url:
        assert asyncio.run(ask(url)) == {"number": 3}


def test_asyncio_close_ends_connecting():
    async def close(url):
        policy = AsyncWebsocketPolicy(url)
        connecting = asyncio.ensure_future(policy.connect())
        await asyncio.get_running_loop().run_in_executor(None, wait_until, lambda: len(connections) == 1)
        await policy.close()
        with pytest.raises(ConnectionError, match="is closed"):
            await connecting

    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []
        thread = threading.Thread(target=lambda: connections.append(listener.accept()[0]))
        thread.start()
        asyncio.run(close(f"ws://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
        connections[0].close()


def test_asyncio_must_be_connected_first():
    with pytest.raises(ConnectionError, match=r"call connect\(\) first"):
        asyncio.run(AsyncWebsocketPolicy("ws://127.0.0.1:1").infer({}))


# ---- images as JPEG ----


def smooth_image(height=90, width=120):
    """A smooth image with an edge, uint8 [h, w, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 2, y * 2, (x + y)], axis=-1) % 256
    image[height // 3 :, width // 2 :] = (200, 30, 60)
    return image.astype(np.uint8)


def test_jpeg_keeps_layout_and_keys_and_approximates_pixels():
    image = smooth_image()
    observation = {"images": {"top": np.moveaxis(image, -1, 0), "wrist": image}, "state": np.ones(3), "prompt": "go"}
    encoded = unpack(pack(encode_images(observation)))
    assert len(pack(encoded)) < len(pack(observation)) / 4
    decoded = decode_images(encoded)
    assert decoded["images"]["top"].shape == (3, 90, 120)
    np.testing.assert_array_equal(np.moveaxis(decoded["images"]["top"], 0, -1), decoded["images"]["wrist"])
    assert np.abs(decoded["images"]["wrist"].astype(int) - image).mean() < 3
    assert same(decoded["state"], observation["state"])
    assert decoded["prompt"] == "go"
    assert observation["images"]["wrist"] is image


def test_jpeg_cost_reports_bytes_time_and_error():
    high, low = (jpeg_cost({"cam": {"top": smooth_image()}}, quality=quality)[0] for quality in (95, 30))
    assert (high.key, high.raw_bytes) == ("cam.top", 90 * 120 * 3)
    assert low.jpeg_bytes < high.jpeg_bytes < high.raw_bytes
    assert 0 < high.mean_error < low.mean_error
    assert "cam.top: 32 kB raw" in str(high)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"top": np.zeros((8, 8, 3), np.float32)}, r"top as JPEG: it is float32 \[8, 8, 3\]; expected uint8"),
        ({"top": np.zeros((8, 8, 4), np.uint8)}, r"uint8 \[8, 8, 4\]"),
        ({"state": np.zeros(3)}, "no image to send as JPEG"),
    ],
)
def test_observations_without_valid_images_are_refused_as_jpeg(observation, message):
    with pytest.raises(ValueError, match=message):
        encode_images(observation)


def test_damaged_jpeg_is_refused():
    good = encode_images({"top": smooth_image()})["top"]
    cut = good[JPEG][: len(good[JPEG]) // 2]
    for bad in ({**good, "more": 1}, {**good, "layout": "hw"}, {JPEG: "text", "layout": "hwc"}):
        with pytest.raises(ValueError, match="top is no valid image"):
            decode_images({"top": bad})
    for data in (b"", b"\x89PNG\r\n\x1a\n", cut):
        with pytest.raises(ValueError, match="Cannot decode the JPEG of top"):
            decode_images({"top": {JPEG: data, "layout": "hwc"}})
    with pytest.raises(ValueError, match=r"120×90 pixels.*at most 100"):
        decode_images({"top": good}, max_pixels=100)


def test_jpeg_is_sent_only_to_servers_that_support_it():
    def server(connection):
        connection.send(pack({JPEG: True}))
        for request in connection:
            connection.send(pack(decode_images(unpack(request))))

    with running(server) as url, WebsocketPolicy(url, jpeg_quality=90) as policy:
        answer = policy.infer({"top": smooth_image()})
        assert answer["top"].shape == (90, 120, 3)
        assert not np.array_equal(answer["top"], smooth_image())
    with running(echo) as url, pytest.raises(ValueError, match=r"doesn't support torchpi/jpeg.*leave jpeg_quality out"):
        WebsocketPolicy(url, jpeg_quality=90)


# ---- the prefix of real-time chunking ----


def test_previous_chunk_survives_wire_format():
    sent = PreviousChunk(np.ones((3, 2), np.float32), delay=2, execution_horizon=5)
    wire = unpack(pack({RTC: sent.to_wire()}))[RTC]
    assert wire["action_prefix"].shape == (3, 2)  # not padded to the horizon
    read = PreviousChunk.from_wire(wire)
    assert same(read.actions, sent.actions)
    assert (read.delay, read.execution_horizon) == (2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_prefix": np.full((3, 2), np.nan, np.float32)}, "NaN or infinity"),
        ({"action_prefix": np.zeros((0, 2), np.float32)}, r"float32 \[0, 2\]"),
        ({"action_prefix": [[1.0]]}, "of type list"),
        ({"delay": 4}, r"delay is 4; expected an integer, 0 to 3"),
        ({"delay": 1.0}, r"delay is 1.0"),
        ({"execution_horizon": 0}, "at least 1"),
        ({"more": 1}, "expected a dict of action_prefix, delay, execution_horizon"),
    ],
)
def test_invalid_previous_chunk_is_refused(change, message):
    wire = PreviousChunk(np.ones((3, 2), np.float32), delay=2, execution_horizon=5).to_wire()
    with pytest.raises(ValueError, match=message):
        PreviousChunk.from_wire({**wire, **change})


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numpys_integers_are_integers_of_a_previous_chunk(kind):
    wire = PreviousChunk(np.ones((3, 2), np.float32), delay=kind(2), execution_horizon=kind(5)).to_wire()
    assert same((wire["delay"], wire["execution_horizon"]), (2, 5))


# ---- errors name the server ----


@pytest.mark.parametrize(
    "frame", [b"<html>502 Bad Gateway</html>", pack({"actions": np.zeros((4, 2))})[:-5], pack([1])]
)
@pytest.mark.parametrize("instead_of", ["metadata", "answer"])
def test_unreadable_frames_name_the_server(frame, instead_of):
    def handler(connection):
        connection.send(frame if instead_of == "metadata" else pack(METADATA))
        for _ in connection:
            connection.send(frame)

    def ask(url):
        with WebsocketPolicy(url) as policy:
            policy.infer({"state": np.zeros(2)})

    with running(handler) as url, pytest.raises(ValueError, match=re.escape(url)):
        ask(url)


@pytest.mark.parametrize("observation", [{"x": {1, 2}}, {"prompt": "go \ud800"}, {"a\ud800": 1}, [1], {"x": 2**70}])
def test_requests_that_cannot_be_sent_name_the_server_and_keep_the_connection(observation):
    with running(echo) as url, WebsocketPolicy(url) as policy:
        with pytest.raises(ValueError, match=re.escape(url)):
            policy.infer(observation)
        assert policy.infer({"state": np.ones(1)})["actions"] == 2
        assert policy.reconnects == 0


def test_other_errors_name_the_server():
    def busy(connection):
        connection.send(pack(METADATA))
        connection.recv()
        connection.send(json.dumps({"code": "queue_full", "message": "later"}))
        connection.recv()
        connection.close()

    with running(busy) as url, WebsocketPolicy(url) as policy:
        with pytest.raises(ServerError, match=re.escape(url)):
            policy.infer({"state": np.zeros(1)})
        stopped = Interrupt()
        stopped.set()
        with pytest.raises(ConnectionError, match=f"{url} was interrupted"):
            policy.infer({"state": np.zeros(1)}, interrupt=stopped)
    with running(echo) as url, pytest.raises(ValueError, match=f"{url} doesn't support {JPEG}"):
        WebsocketPolicy(url, jpeg_quality=90)


def test_closed_client_refuses_requests():
    with running(echo) as url:
        policy = WebsocketPolicy(url)
        policy.close()
        policy.close()
        with pytest.raises(ConnectionError, match="is closed"):
            policy.infer({"state": np.ones(1)})


def test_refused_connection_raises_after_timeout():
    url = f"ws://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(
        ConnectionRefusedError, match=rf"{url} refused the connection for 0.7 s .*is the server running"
    ):
        WebsocketPolicy(url, timeout=0.7)
    assert time.monotonic() - start < 30


def test_client_waits_for_loading_server():
    port = free_port()
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(0.3, lambda: stack.enter_context(running(echo, port)))
        timer.start()
        with WebsocketPolicy(f"ws://127.0.0.1:{port}", timeout=30) as policy:
            assert policy.metadata == METADATA
        timer.join()


def test_http_rejection_raises_connection_error_with_remedy():
    def forbid(connection, request):
        return connection.respond(*answers[0])

    answers = [(401, "who are you?")]
    with running(echo, process_request=forbid) as url:
        with pytest.raises(ConnectionError, match=r"HTTP 401: who are you\?; pass its token as api_key"):
            WebsocketPolicy(url)
        answers = [(404, "there is no policy at /arm; this server has /default.\n")]
        with pytest.raises(
            ConnectionError, match=r"HTTP 404: .* has /default; the path after the port in the URL names"
        ):
            WebsocketPolicy(url)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_server_of_other_protocol_raises_connection_error(greeting):
    def answer():
        with listener.accept()[0] as sock:
            sock.recv(4096)
            sock.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ConnectionError, match="expected a policy server there"):
            WebsocketPolicy(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout=5)
        thread.join()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:8000", "ws://", "ws://127.0.0.1:80000", "demo"])
def test_invalid_url_is_refused(url):
    with pytest.raises(ValueError, match="expected ws://HOST:PORT"):
        WebsocketPolicy(url)


def test_unknown_host_raises_connection_error():
    url = f"ws://{'a' * 64}.example:8000"  # a label too long for any name server
    with pytest.raises(ConnectionError, match=f"Cannot connect to {url}"):
        WebsocketPolicy(url)
