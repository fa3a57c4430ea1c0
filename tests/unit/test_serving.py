"""`torchpi serve` on loopback, with a policy controlled by the test."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import socket
import subprocess
import sys
import threading

import msgpack
import numpy as np
import pytest
from serving_helpers import (
    SECONDS,
    A,
    Client,
    FakePolicy,
    H,
    clients,
    http,
    metric,
    observation,
    one_thread,
    served,
    until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from torchpi.policy import load_policy
from torchpi.serving.messages import MAX_DEPTH, MAX_ITEMS, MAX_TEXT, RequestError, read_request
from torchpi.serving.metrics import Metrics
from torchpi.serving.run import policy_paths, run_serve
from torchpi.serving.scheduler import Request, Scheduler
from torchpi.serving.server import PolicyServer, running_server
from torchpi.serving.settings import RateLimit, ServeSettings
from torchpi_client import ServerError, WebsocketPolicy, pack, unpack
from torchpi_client.images import encode_images


def code(answer):
    """Code of an error frame."""
    assert isinstance(answer, str)
    return json.loads(answer)["code"]


def close_code(client):
    with pytest.raises(ConnectionClosed) as caught:
        client.socket.recv(timeout=SECONDS)
    return caught.value.rcvd.code


# ---- the protocol ----


def test_server_sends_metadata_then_a_chunk_per_observation():
    with served(FakePolicy(), seed=3) as (url, _), contextlib.ExitStack() as stack:
        client = Client(url, stack)
        metadata = client.metadata()
        assert metadata["reset_pose"] == [0.0, -1.5]
        assert metadata["torchpi/noise"] is True
        answer = client.ask(observation(5.0, prompt="x"))
        assert answer["actions"].shape == (H, 2)
        assert answer["actions"].dtype == np.float32
        assert answer["policy_timing"] == {"infer_ms": 1.0}
        assert set(answer["server_timing"]) == {"queue_ms", "infer_ms", "batch_size"}
        assert client.ask(observation())["server_timing"]["prev_total_ms"] > 0


def test_path_selects_policy():
    with served(FakePolicy(name="a"), FakePolicy(name="b")) as (url, _), contextlib.ExitStack() as stack:
        names = [Client(url + path, stack).metadata()["name"] for path in ("/", "/p0", "/p1", "/p1?x=1")]
        assert names == ["a", "a", "b", "b"]
        with pytest.raises(InvalidStatus, match="404"):
            Client(url + "/p2", stack)
        assert http(url, "/p2") == (404, "There is no policy at /p2; this server has /p0, /p1.\n")


def test_request_sets_noise_and_num_steps():
    noise = np.random.default_rng(0).standard_normal((H, A))
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        answer = client.ask({**observation(5.0), "torchpi/noise": noise, "torchpi/num_steps": 2})
        np.testing.assert_allclose(answer["actions"], 2 * noise[:, :2].astype(np.float32) + [5, 2], rtol=1e-6)


def test_rtc_request_gets_a_separate_batch():
    policy, rest = FakePolicy(), np.ones((2, 2), np.float32)
    with served(policy) as (url, _), clients(url) as [client]:
        rtc = {"action_prefix": rest, "delay": 1, "execution_horizon": 2}
        client.ask(observation())
        assert "actions" in client.ask({**observation(1.0), "torchpi/rtc": rtc})
        [prefix] = policy.prefixes[1]
        np.testing.assert_array_equal(prefix.actions, rest)
        assert (prefix.delay, prefix.execution_horizon) == (1, 2)
        for wrong in ({**rtc, "delay": 3}, {**rtc, "execution_horizon": 4}, {"delay": 1}, 1):
            assert code(client.ask({**observation(), "torchpi/rtc": wrong})) == "bad_observation"


def test_jpeg_images_are_decoded():
    image = np.full((6, 8, 3), 77, np.uint8)
    policy = FakePolicy()
    with served(policy, max_message_mb=0.01) as (url, _), clients(url) as [client]:
        assert client.ask(encode_images({**observation(), "camera": image}))["actions"].shape == (H, 2)
        for wrong in ({"torchpi/jpeg": b"x", "layout": "hwc"}, {"torchpi/jpeg": "x" * 9}):
            assert code(client.ask({**observation(), "camera": wrong})) == "bad_observation"
        large = encode_images({**observation(), "camera": np.zeros((100, 100, 3), np.uint8)})
        assert code(client.ask(large)) == "bad_observation"


def test_same_requests_in_the_same_order_get_the_same_noise():
    def actions():
        with served(FakePolicy(), seed=7) as (url, _), clients(url, 2) as both:
            return [client.ask(observation())["actions"] for client in (*both, *both)]

    first = actions()
    np.testing.assert_array_equal(first, actions())
    assert len({chunk.tobytes() for chunk in first}) == 4


def test_connection_with_an_origin_is_refused():
    with (
        served(FakePolicy()) as (url, _),
        contextlib.ExitStack() as stack,
        pytest.raises(InvalidStatus, match="403"),
    ):
        Client(url, stack, origin="https://example.org")


# ---- warm-up and long inference ----


def test_connections_wait_for_the_warm_up_and_pings_do_not():
    policy = FakePolicy(held=True)
    with served(policy) as (url, _), contextlib.ExitStack() as stack:
        policy.wait_until_begun()
        client = Client(url, stack)
        assert http(url, "/healthz")[0] == 503
        assert client.socket.ping().wait(SECONDS)
        with pytest.raises(TimeoutError):
            client.socket.recv(timeout=0)
        policy.release()
        assert client.metadata()["embodiment"] == "fake"
        assert http(url, "/healthz") == (200, "ready\n")


def test_pings_and_other_clients_are_answered_during_inference():
    policy = FakePolicy()
    with served(policy) as (url, _), clients(url, 2) as [client, other]:
        policy.hold()
        client.send(observation())
        policy.wait_until_begun()
        assert client.socket.ping().wait(SECONDS)
        assert code(other.ask({"camera": 1, "torchpi/num_steps": 0})) == "bad_observation"
        policy.release()
        assert "actions" in client.receive()


def test_a_policy_that_cannot_be_loaded_ends_the_server():
    def fails():
        raise ValueError("There is nothing")

    with pytest.raises(ValueError, match="There is nothing"), running_server({"p": fails}, ServeSettings(port=0)):
        pass


def test_error_names_the_policy_that_cannot_be_loaded():
    def fails():
        raise ValueError("There is nothing")

    load = {"arm": FakePolicy, "hand": fails}
    server = PolicyServer(load, ServeSettings(port=0))
    with pytest.raises(ValueError, match="There is nothing") as caught:
        asyncio.run(server.run(lambda address: None))  # returns without `stop`
    assert caught.value.__notes__ == ["(policy hand)"]


# ---- several clients ----


def test_waiting_requests_are_one_batch_with_the_answers_of_single_requests():
    policy = FakePolicy()
    noise = np.random.default_rng(0).standard_normal((4, H, A))
    with served(policy) as (url, server), clients(url, 4) as four:
        requests = [{**observation(float(i)), "torchpi/noise": noise[i]} for i in range(4)]
        alone = [client.ask(request) for client, request in zip(four, requests, strict=True)]
        policy.hold()
        four[0].send(requests[0])
        policy.wait_until_begun()
        for i in (1, 2, 3):
            four[i].send(requests[i])
            until(lambda i=i: len(server.scheduler._waiting) == i)
        policy.release()
        together = [client.receive() for client in four]
        assert [answer["server_timing"]["batch_size"] for answer in together] == [1, 3, 3, 3]
        assert policy.batches[4:] == [[0.0], [1.0, 2.0, 3.0]]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a["actions"], b["actions"])


@one_thread()
def test_batch_of_a_real_policy_has_the_answers_of_single_requests():
    policy = load_policy("demo", device="cpu")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, *policy.model.config.chunk_shape), np.float32)
    example = policy.example_observation()
    observations = [
        {**example, "state": rng.uniform(-0.1, 0.1, 4), "prompt": "open the drawer" + " now" * i} for i in range(3)
    ]
    scheduler = Scheduler({"p": lambda: policy}, ServeSettings(num_steps=2, max_batch=3), Metrics())

    async def answered():
        requests = [Request("p", each, noise[i], 2) for i, each in enumerate(observations)]
        for request in requests:
            scheduler.submit(request)
        scheduler.start()
        return await asyncio.wait_for(asyncio.gather(*(request.answer for request in requests)), SECONDS)

    answers = asyncio.run(answered())
    scheduler.close()
    assert [answer.batch_size for answer in answers] == [3, 3, 3]
    for i, answer in enumerate(answers):
        alone = policy.infer(observations[i], noise=noise[i], num_steps=2)
        np.testing.assert_allclose(answer.chunk["actions"], alone["actions"], atol=1e-5)


def test_requests_with_different_num_steps_are_not_batched():
    policy = FakePolicy()
    with served(policy) as (url, server), clients(url, 3) as three:
        policy.hold()
        three[0].send(observation(0.0))
        policy.wait_until_begun()
        three[1].send({**observation(1.0), "torchpi/num_steps": 3})
        until(lambda: len(server.scheduler._waiting) == 1)
        three[2].send(observation(2.0))
        until(lambda: len(server.scheduler._waiting) == 2)
        policy.release()
        for client in three:
            assert "actions" in client.receive()
        assert policy.batches == [[0.0], [1.0], [2.0]]


def test_a_client_that_sends_many_requests_does_not_get_ahead_of_the_others():
    policy = FakePolicy()
    with served(policy, max_batch=1) as (url, server), clients(url, 2) as [greedy, modest]:
        policy.hold()
        for i in range(3):
            greedy.send(observation(10.0 + i))
        policy.wait_until_begun()
        modest.send(observation(0.0))
        until(lambda: len(server.scheduler._waiting) == 1)
        policy.release()
        assert "actions" in modest.receive()
        for i in range(3):
            np.testing.assert_allclose(greedy.receive()["actions"][:, 0].round() // 100, 0, err_msg=str(i))
        assert policy.batches == [[10.0], [0.0], [11.0], [12.0]]


def test_bad_observation_fails_alone_and_keeps_its_connection():
    policy = FakePolicy()
    with served(policy) as (url, server), clients(url, 4) as four:
        policy.hold()
        four[0].send(observation(0.0))
        policy.wait_until_begun()
        for i, request in enumerate((observation(1.0), observation(np.nan), observation(3.0)), 1):
            four[i].send(request)
            until(lambda i=i: len(server.scheduler._waiting) == i)
        policy.release()
        answers = [client.receive() for client in four]
        assert [isinstance(answer, str) for answer in answers] == [False, False, True, False]
        error = json.loads(answers[2])
        assert error["code"] == "bad_observation"
        assert "state" in error["message"]
        assert "actions" in four[2].ask(observation())


def test_log_describes_end_of_connection(caplog):
    caplog.set_level("INFO")
    with served(FakePolicy()) as (url, _):
        with clients(url) as [client]:
            host, port = client.socket.socket.getsockname()[:2]
            client.socket.socket.shutdown(socket.SHUT_RDWR)
            until(lambda: f"client 0, {host}:{port}, went away without closing" in caplog.text)
        with clients(url) as [client]:
            client.socket.close()
            until(lambda: re.search(r"client 1, [\d.:]+, closed the connection$", caplog.text, re.MULTILINE))
        with clients(url) as [client]:
            client.socket.close(4000, "battery is empty")
            until(lambda: "closed the connection: battery is empty" in caplog.text)
        with clients(url) as [client]:
            client.send(b"nothing")
            until(lambda: "was disconnected: malformed message" in caplog.text)
    assert "close frame" not in caplog.text


def test_policy_failure_is_logged_and_not_sent(caplog):
    policy = FakePolicy()
    with served(policy) as (url, _), clients(url) as [client]:
        policy.failure = ValueError("a secret of the server")
        answer = client.ask(observation())
        assert code(answer) == "internal"
        assert "secret" not in answer
        assert "a secret of the server" in caplog.text
        policy.failure = None
        assert "actions" in client.ask(observation())


def test_queue_is_bounded_and_has_deadlines(caplog):
    policy = FakePolicy()
    with served(policy, max_queue=1) as (url, server), clients(url, 3) as [first, late, surplus]:
        policy.hold()
        first.send(observation())
        policy.wait_until_begun()
        late.send({**observation(), "torchpi/deadline": 0.2})
        until(lambda: server.scheduler._waiting)
        assert code(surplus.ask(observation())) == "queue_full"
        assert code(late.receive()) == "deadline_exceeded"
        policy.release()
        assert "actions" in first.receive()
        assert "actions" in late.ask(observation())
        assert policy.batches == [[0.0], [0.0]]
        assert metric(url, 'torchpi_requests_total{outcome="deadline_exceeded",policy="p0"}') == 1
    assert not [record for record in caplog.records if record.name == "asyncio"]  # the logger of unretrieved exceptions


def test_deadline_error_arrives_before_the_client_gives_up():
    policy = FakePolicy()
    with served(policy) as (url, _), clients(url) as [first], WebsocketPolicy(url) as late:
        policy.hold()
        first.send(observation())
        policy.wait_until_begun()
        with pytest.raises(ServerError, match="The model was busy") as caught:
            late.infer(observation(), timeout=2.0)
        assert caught.value.code == "deadline_exceeded"
        policy.release()
        assert "actions" in late.infer(observation())
        assert late.reconnects == 0


def test_a_request_whose_client_leaves_is_dropped():
    policy = FakePolicy()
    with served(policy) as (url, server), clients(url) as [first]:
        policy.hold()
        first.send(observation(1.0))
        policy.wait_until_begun()
        with clients(url) as [leaving]:
            leaving.send(observation(2.0))
            until(lambda: server.scheduler._waiting)
        until(lambda: not server.scheduler._waiting)
        policy.release()
        assert "actions" in first.receive()
        assert policy.batches == [[1.0]]
        assert metric(url, 'torchpi_requests_total{outcome="client_left",policy="p0"}') == 1


# ---- what is refused ----


def test_token_is_accepted_as_bearer_or_api_key():
    with served(FakePolicy(), token="s3cret") as (url, _), contextlib.ExitStack() as stack:
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic s3cret"}):
            with pytest.raises(InvalidStatus, match="401"):
                Client(url, stack, additional_headers=wrong)
        for scheme in ("Bearer", "Api-Key", "bearer"):
            client = Client(url, stack, additional_headers={"Authorization": f"{scheme} s3cret"})
            assert client.metadata()["embodiment"] == "fake"
        assert http(url, "/metrics")[0] == 401
        assert http(url, "/metrics", "Bearer s3cret")[0] == 200
        assert http(url, "/healthz")[0] == 200


def refusals(caplog):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused ")]


def test_refused_connections_are_logged_once_per_reason_and_counted(caplog):
    with served(FakePolicy(), token="s3cret") as (url, _):
        for _ in range(3):
            assert http(url, "/")[0] == 401
        [line] = refusals(caplog)
        assert re.fullmatch(r"refused 127\.0\.0\.1:\d+: A valid token is needed; in a browser: .*", line)
        assert metric(url, 'torchpi_refused_connections_total{reason="token"}', "Bearer s3cret") == 3
        assert http(url, "/nothing", "Bearer s3cret")[0] == 404
        assert "There is no policy at /nothing" in refusals(caplog)[1]


def test_logged_path_has_no_control_characters(caplog):
    with served(FakePolicy()) as (url, _):
        address = url.removeprefix("ws://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=SECONDS) as raw:
            raw.sendall(b"GET /\x1b[2J" + b"x" * 5000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert raw.makefile("rb").readline() == b"HTTP/1.1 404 Not Found\r\n"
        [line] = refusals(caplog)
        assert r"There is no policy at /\x1b[2Jxxx" in line
        assert len(line) < 600


def test_taken_port_error_names_the_option_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="is taken") as caught, served(FakePolicy(), port=port):
            pass
    assert str(caught.value) == f"Port {port} of 127.0.0.1 is taken; choose another one with --port (0: a free one)."


def test_host_of_another_machine_is_an_error():
    # 192.0.2.1 is reserved for documentation.
    with pytest.raises(OSError, match=r"^192\.0\.2\.1 is not an address of this machine\.$"), served(host="192.0.2.1"):
        pass


def test_connections_are_limited_and_freed():
    with served(FakePolicy(), max_connections=1) as (url, _), contextlib.ExitStack() as stack:
        with clients(url), pytest.raises(InvalidStatus, match="503"):
            Client(url, stack)
        until(lambda: metric(url, "torchpi_connections") == 0)
        assert Client(url, stack).metadata()


def test_request_rate_is_limited_per_connection():
    with served(FakePolicy(), max_rate=1.0) as (url, _), clients(url, 2) as [eager, other]:
        answers = [eager.ask(observation()) for _ in range(5)]
        assert "rate_limited" in {code(answer) for answer in answers if isinstance(answer, str)}
        assert "actions" in other.ask(observation())


def test_rate_limit_refills_with_time():
    limit = RateLimit(2.0, now=0.0)
    assert [limit.allows(now) for now in (0.0, 0.0, 0.0, 0.4, 0.5, 0.6, 9.0, 9.0, 9.0)] == [
        *(True, True, False),
        *(False, True, False),
        *(True, True, False),
    ]


def test_oversized_message_ends_only_its_connection():
    with served(FakePolicy(), max_message_mb=0.01) as (url, _), clients(url, 2) as [client, other]:
        client.send(bytes(20_000))
        assert close_code(client) == 1009
        assert "actions" in other.ask(observation())


@pytest.mark.parametrize(
    "frame",
    [
        "text",
        b"",
        b"\xc1",
        pack(observation())[:-1],
        pack(observation()) + b"\x00",
        msgpack.packb(msgpack.ExtType(1, b"x")),
        msgpack.packb({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [1 << 40]}}),
        msgpack.packb({"state": {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "|O", b"shape": [1]}}),
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x90",
    ],
    ids=["text", "empty", "reserved", "truncated", "surplus", "ext", "huge", "object", "length", "deep"],
)
def test_malformed_frame_gets_an_error_and_ends_only_its_connection(frame):
    with served(FakePolicy()) as (url, _), clients(url, 2) as [client, other]:
        if frame != msgpack.packb(msgpack.ExtType(1, b"x")):
            assert code(client.ask(frame)) == "malformed_message"
            assert close_code(client) == 1007
        else:
            assert code(client.ask(frame)) == "bad_observation"
        assert "actions" in other.ask(observation())


def nested(depth):
    return {"x": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([observation()], "A request is a map"),
        (nested(MAX_DEPTH + 1), "nested more than"),
        ({b"x": 2}, "the key b.x.; expected text"),
        ({"prompt": "x" * (MAX_TEXT + 1)}, "prompt is a text of"),
        ({"prompt": np.array("x" * (MAX_TEXT + 1))}, "prompt is text of"),
        ({"torchpi/rtx": 1}, "unknown option torchpi/rtx"),
        ({"torchpi/noise": np.zeros((H, A + 1), np.float32)}, r"float32 \[4, 4\]; expected .* \[4, 3\]"),
        ({"torchpi/noise": np.full((H, A), np.inf)}, "NaN or infinity"),
        ({"torchpi/num_steps": 10**9}, "expected a whole number from 1 to 100"),
        ({"torchpi/num_steps": True}, "expected a whole number from 1 to 100"),
        ({"torchpi/deadline": float("nan")}, "expected a positive number"),
    ],
)
def test_invalid_request_is_refused(request_, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_request(pack(request_), noise_shape=(H, A))
    assert caught.value.code == "bad_observation"


def test_number_of_entries_in_a_message_is_limited():
    many = {"a": [0] * 100, "b": {str(i): i for i in range(10)}}
    assert unpack(pack(many), max_items=112) == many
    with pytest.raises(ValueError, match="more than 111 entries"):
        unpack(pack(many), max_items=111)
    for data in (b"\x91" * 900 + b"\x90", b"\xdd\x00\x01\x00\x00" * 900, pack([[{}] * 100] * (MAX_ITEMS // 50))):
        with pytest.raises((RequestError, ValueError)):
            unpack(data, max_items=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"port": 65536}, "port is 65536"),
        ({"num_steps": 101}, "expected 1 to 100"),
        ({"token": " "}, "token"),
        ({"token": "naïve"}, "ASCII"),
        ({"grace": -1.0}, "grace is -1.0"),
        ({"grace": float("nan")}, "grace is nan"),
        ({"seed": -1}, "The seed is -1"),
        ({"seed": 2**64}, "The seed is 18446744073709551616; expected a whole number from 0 to 18446744073709551615"),
        ({"max_memory_mb": float("inf")}, "max_memory_mb is inf; expected a finite number of at least 128"),
        ({"max_memory_mb": float("inf"), "max_message_mb": float("inf")}, "max_memory_mb is inf"),
        ({"max_memory_mb": 100.0}, "max_memory_mb is 100; expected a finite number of at least 128"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeSettings(**settings)


# ---- the end ----


@contextlib.contextmanager
def stopping(stack):
    """Stop the server of this stack; it has ended when the block ends."""
    thread = threading.Thread(target=stack.close)
    thread.start()
    yield
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_shutdown_answers_received_requests():
    policy = FakePolicy()
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as connections:
        url, server = stack.enter_context(running_server({"p": lambda: policy}, ServeSettings(port=0, max_batch=1)))
        [idle, first, second] = connections.enter_context(clients(url, 3))
        policy.hold()
        first.send(observation(1.0))
        policy.wait_until_begun()
        second.send(observation(2.0))
        until(lambda: server.scheduler._waiting)
        with stopping(stack):
            assert close_code(idle) == 1001
            with pytest.raises((OSError, InvalidStatus)), connect(url, proxy=None):
                pass
            policy.release()
            for client in (first, second):
                assert "actions" in client.receive()
                assert close_code(client) == 1001


def test_waiting_clients_get_an_error_after_the_grace_period():
    policy = FakePolicy()
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as connections:
        settings = ServeSettings(port=0, max_batch=1, grace=0.0)
        url, server = stack.enter_context(running_server({"p": lambda: policy}, settings))
        [first, second] = connections.enter_context(clients(url, 2))
        policy.hold()
        first.send(observation(1.0))
        policy.wait_until_begun()
        second.send(observation(2.0))
        until(lambda: server.scheduler._waiting)
        with stopping(stack):
            for client in (first, second):
                assert code(client.receive()) == "shutting_down"
                assert close_code(client) == 1001
            policy.release()
    assert policy.batches == [[1.0]]


# ---- metrics ----


def test_metrics_count_requests_batches_and_connections():
    with served(FakePolicy()) as (url, _), clients(url, 2) as [client, _other]:
        client.ask(observation())
        client.ask({"state": 1})
        assert metric(url, "torchpi_connections") == 2
        assert metric(url, 'torchpi_requests_total{outcome="answered",policy="p0"}') == 1
        assert metric(url, 'torchpi_requests_total{outcome="bad_observation",policy="p0"}') == 1
        for name in ("torchpi_queue_seconds", "torchpi_inference_seconds"):
            assert metric(url, f'{name}_count{{policy="p0"}}') == 1
        # A forward pass that failed on a bad observation is not counted.
        assert metric(url, 'torchpi_batch_size_count{policy="p0"}') == 1
        assert metric(url, "torchpi_queue_length") == 0


def test_cut_prompts_are_counted_and_reported_in_the_answer():
    policy = FakePolicy()
    infer_all = policy.infer_batch

    def infer_batch(observations, **arguments):
        chunks = infer_all(observations, **arguments)
        return [chunk | {"prompt_tokens_cut": 7} if "cut" in observations[0]["prompt"] else chunk for chunk in chunks]

    policy.infer_batch = infer_batch
    policy.example_observation = lambda: observation(-1.0, prompt="go")
    with served(policy) as (url, _), clients(url) as [client]:
        answers = [client.ask(observation(prompt=text)) for text in ("cut", "go", "cut")]
        assert [answer.get("prompt_tokens_cut") for answer in answers] == [7, None, 7]
        assert metric(url, 'torchpi_cut_prompts_total{policy="p0"}') == 2


def test_recommendation_beyond_the_chunk_is_logged(caplog):
    policy = FakePolicy()
    policy.embodiment = dataclasses.replace(policy.embodiment, execute_steps=9)
    with served(policy) as (url, _), clients(url):
        assert "policy p0: execute_steps is 9, but its chunk has only 4 actions" in caplog.text


# ---- the command ----


def test_missing_extra_error_has_the_install_command():
    program = "import sys; sys.modules['msgpack'] = None; from torchpi.cli import main; main(['serve', 'demo'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    assert "pip install ./client '.[serve]' in torchpi's repository" in done.stderr.splitlines()[-1]


def test_policies_are_parsed_by_name():
    assert policy_paths("a", []) == {"default": "a"}
    assert policy_paths("a", ["b=c", "d=hf://x/y=z"]) == {"default": "a", "b": "c", "d": "hf://x/y=z"}
    for wrong in (["b"], ["=c"], ["b="], ["b/c=d"], ["metrics=d"], ["b=c", "b=d"], ["default=c"]):
        with pytest.raises(ValueError, match="--policies has"):
            policy_paths("a", wrong)
    with pytest.raises(ValueError, match="needs a policy"):
        policy_paths(None, [])


def test_options_for_a_single_policy_are_refused_with_several():
    with pytest.raises(ValueError, match="embodiment can only be given for POLICY, not for --policies"):
        run_serve(None, ["arm=demo"], ServeSettings(port=0), record=None, load={"embodiment": "aloha"}, run={})


@pytest.mark.parametrize(
    ("policy", "named", "message"),
    [
        (
            "nowhere",
            ["arm=demo"],
            r"^There is no checkpoint at nowhere; expected a folder, hf://ORG/NAME, gs://BUCKET/PATH, or demo,",
        ),
        ("demo", ["arm=hf://a/b", "hand=nowhere"], r"^--policies hand: There is no checkpoint at nowhere; expected"),
        (None, ["default=nowhere"], r"^--policies default: There is no checkpoint at nowhere; expected"),
    ],
)
def test_missing_checkpoint_is_an_error_before_any_policy_is_loaded(policy, named, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchpi.serving.run.load_policy", lambda *_, **__: pytest.fail("A policy was loaded"))
    with pytest.raises(FileNotFoundError, match=message):
        run_serve(policy, named, ServeSettings(port=0), record=None, load={}, run={})


@pytest.mark.parametrize(
    ("policy", "settings", "load", "run", "message"),
    [
        ("demo", {}, {"config": "typo"}, {}, "'typo' is neither a file nor a preset"),
        ("demo", {}, {"embodiment": "typo"}, {}, "Unknown embodiment 'typo'"),
        ("demo", {}, {"tokenizer": "nowhere"}, {}, "No tokenizer file at nowhere"),
        ("demo", {}, {"norm_stats": "nowhere"}, {}, "No normalization statistics at nowhere"),
        ("demo", {}, {"lora_alpha": (1.0, 2.0)}, {}, "belongs to a checkpoint with LoRA"),
        ("demo", {}, {}, {"device": "tpu0"}, "Unknown device 'tpu0'"),
        ("demo", {}, {}, {"device": "cpu", "engine": "graph"}, "captures CUDA graphs"),
        ("demo", {"protocol": "vla-eval", "rename": ("a=b",)}, {}, {}, "--rename has 'a=b'"),
        ("hf://a/b", {}, {"config": "typo"}, {}, "'typo' is neither a file nor a preset"),
        ("hf://a/b", {}, {"embodiment": "typo"}, {}, "Unknown embodiment 'typo'"),
        ("hf://a/b", {}, {}, {"device": "tpu0"}, "Unknown device 'tpu0'"),
    ],
)
def test_invalid_option_is_refused_before_the_server_listens(policy, settings, load, run, message, caplog):
    with caplog.at_level(logging.INFO), pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        run_serve(policy, (), ServeSettings(port=0, **settings), record=None, load=load, run=run)
    assert not caplog.text
