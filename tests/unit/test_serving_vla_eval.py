"""`torchpi serve --protocol vla-eval`, message by message; test_vla_eval_harness.py has the harness itself."""

import contextlib
import io
import json
import struct
import zlib

import msgpack
import numpy as np
import pytest
from PIL import Image
from serving_helpers import SECONDS, FakePolicy, http, metric, served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from torchpi.errors import ServingError
from torchpi.robots import Embodiment, get_embodiment
from torchpi.serving.settings import ServeSettings
from torchpi.serving.vla_eval import key_sources

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
RENAME = ("images.agentview=camera", "states=state")


def packed(kind, payload, seq=1, **fields):
    """A frame as vla-eval 0.8.0 packs it."""
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0, **fields}

    def encode(array):
        return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}

    return msgpack.packb(message, default=encode)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return {"__image__": True, "format": kind.lower(), "data": file.getvalue(), "shape": list(image.shape)}


def with_chunks(image, kind, data, count):
    """The PNG with `count` additional chunks."""
    png = encoded(image)
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png | {"data": png["data"][:33] + chunk * count + png["data"][33:]}


def observed(first=0.0, image=None, **fields):
    images = {"agentview": encoded(IMAGE) if image is None else image}
    return {"images": images, "states": np.array([first, 2.0]), "task_description": "go", **fields}


class Benchmark:
    """Connection to a server, message by message."""

    def __init__(self, url, stack):
        self.socket = stack.enter_context(connect(url, compression=None, proxy=None, open_timeout=SECONDS))
        self.seq = 0

    def send(self, kind, payload):
        self.seq += 1
        self.socket.send(packed(kind, payload, self.seq))

    def receive(self):
        message = msgpack.unpackb(self.socket.recv(timeout=SECONDS))
        assert sorted(message) == ["payload", "seq", "timestamp", "type"]
        return message

    def ask(self, kind, payload):
        """Type and payload of the answer, or the numbers of an action; the answer must have the request's seq."""
        self.send(kind, payload)
        answer = self.receive()
        assert answer["seq"] == self.seq
        if answer["type"] == "action":
            array = answer["payload"]["actions"]
            return np.frombuffer(array["data"], array["dtype"]).reshape(array["shape"])
        return answer["type"], answer["payload"]

    def error(self, kind, payload):
        answer, payload = self.ask(kind, payload)
        assert answer == "error"
        return payload["error"]


@contextlib.contextmanager
def benchmarks(policy, count=1, **settings):
    """Connected benchmarks after their hello."""
    settings = {"rename": RENAME, **settings}
    with served(policy, protocol="vla-eval", **settings) as (url, server), contextlib.ExitStack() as stack:
        server.scheduler.ready.result(SECONDS)
        connected = [Benchmark(url, stack) for _ in range(count)]
        for benchmark in connected:
            kind, hello = benchmark.ask(
                "hello", {"protocol_version": 1, "harness_version": "0.8.0", "benchmark": "b:B"}
            )
            assert (kind, hello["protocol_version"]) == ("hello", 1)
        yield url, connected


def test_steps_of_a_chunk_are_answered_one_by_one_then_a_new_chunk_is_inferred():
    policy = FakePolicy()  # execute_steps 2
    with benchmarks(policy) as (_, (benchmark,)):
        benchmark.send("episode_start", {"task": {"name": "x"}})
        actions = [benchmark.ask("observation", observed(first)) for first in (10.0, 11.0, 12.0)]
        assert policy.batches == [[10.0], [12.0]]
        assert all(action.shape == (2,) and action.dtype == np.float32 for action in actions)
        benchmark.send("episode_end", {"success": True})
        benchmark.send("episode_start", {"task": {"name": "x"}})
        benchmark.ask("observation", observed(13.0))  # not the rest of the last episode's chunk
        assert policy.batches == [[10.0], [12.0], [13.0]]


def test_images_arrive_as_sent_in_the_layout_of_the_policy():
    seen = []

    class Watching(FakePolicy):
        def prepare(self, observation):
            seen.append(observation["camera"])
            return super().prepare(observation)

    policy = Watching()
    camera = policy.embodiment.cameras[0]
    with benchmarks(policy) as (_, (benchmark,)):
        jpeg = encoded(IMAGE, "JPEG")
        for image, pixels in (
            (encoded(IMAGE), IMAGE),
            (IMAGE, IMAGE),
            (with_chunks(IMAGE, b"zTXt", b"x\0\0" + zlib.compress(bytes(2**24)), 20), IMAGE),  # 320 MiB of text
            (jpeg, np.array(Image.open(io.BytesIO(jpeg["data"])))),
        ):
            benchmark.send("episode_start", {})
            assert benchmark.ask("observation", observed(image=image)).shape == (2,)
            np.testing.assert_array_equal(seen[-1], pixels)
    object.__setattr__(camera, "layout", "chw")
    policy.example_observation = lambda: {"camera": np.zeros((3, 6, 8), np.uint8), "state": [-1.0, 2.0]}
    with benchmarks(policy) as (_, (benchmark,)):
        for image in (encoded(IMAGE), IMAGE):
            benchmark.send("episode_start", {})
            assert benchmark.ask("observation", observed(image=image)).shape == (2,)
            np.testing.assert_array_equal(seen[-1], np.moveaxis(IMAGE, -1, 0))


def test_other_protocol_version_is_refused_until_a_valid_hello():
    with benchmarks(FakePolicy()) as (url, _), contextlib.ExitStack() as stack:
        peer = Benchmark(url, stack)
        assert "protocol_version: observation came before a hello" in peer.error("observation", observed())
        for version in (2, "1", 1.0, True):
            text = peer.error("hello", {"protocol_version": version, "harness_version": "9.9.9"})
            assert text.startswith(f"protocol_version: The client (vla-eval '9.9.9') uses version {version!r} of")
            assert "this server uses version 1" in text
        assert "uses version <class 'dict'>" in peer.error("hello", {"protocol_version": {"x": [0] * 9000}})
        assert "uses version <class 'NoneType'>" in peer.error("hello", {})
        assert "came before a hello" in peer.error("episode_start", {})
        assert peer.ask("hello", {"protocol_version": 1})[0] == "hello"
        assert peer.ask("observation", observed()).shape == (2,)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"images": {}, "states": [0.0, 2.0]}, ["lacks images.agentview", "found states", "send_wrist_image"]),
        ({"images": {"agentview": IMAGE}, "task_description": "x"}, ["lacks states", "images.agentview"]),
        (observed(image=IMAGE[..., 0]), ["camera", "[6, 8]"]),
        (observed(image=encoded(IMAGE[..., 0])), ["PNG of camera", "mode L", "expected RGB"]),
        (observed(image=encoded(IMAGE) | {"data": encoded(IMAGE)["data"][:120]}), ["Cannot decode the PNG of camera"]),
        (observed(image=with_chunks(IMAGE, b"tEXt", b"", 10_000)), ["Cannot decode the PNG", "more than 10000 chunks"]),
        (observed(image=encoded(IMAGE) | {"data": b"GIF89a"}), ["it does not begin as a PNG file"]),
        (observed(image=encoded(IMAGE) | {"data": b"\x89PNG\r\n\x1a\n"}), ["Cannot decode the PNG of camera"]),
        (observed(image=encoded(IMAGE) | {"data": None}), ["camera is no valid image"]),
        (observed(states=np.zeros(3)), ["state", "[3]"]),
        (observed(states=np.array([np.nan, 2.0])), ["state", "NaN"]),
        (observed(states=None), ["state"]),
        (observed(task_description=7), ["prompt"]),
        ({**observed(), b"x": 1}, ["has the key b'x'; expected text"]),
        (observed(other=np.zeros(2, np.longdouble)), ["other", "64 bits"]),
    ],
)
def test_missing_observation_keys_are_named(payload, words):
    with benchmarks(FakePolicy()) as (url, (benchmark,)):
        benchmark.send("episode_start", {})
        text = benchmark.error("observation", payload)
        assert text.startswith("bad_observation: ")
        assert [word for word in words if word not in text] == []
        assert benchmark.ask("observation", observed()).shape == (2,)
        text = benchmark.error("observation", {"images": {}})  # even while the chunk has an action left
        assert "lacks" in text
        assert metric(url, 'torchpi_requests_total{outcome="bad_observation",policy="p0"}') == 2


def test_unknown_message_is_an_error_and_keeps_the_connection():
    with benchmarks(FakePolicy()) as (_, (benchmark,)):
        for kind in ("action", "reset", ""):
            text = benchmark.error(kind, {})
            assert text.startswith(f"unknown_message: The type is {kind!r}; expected hello, observation, episode_start")
        benchmark.send("error", {"error": "the simulator died"})  # an error from the client has no answer
        assert benchmark.ask("observation", observed()).shape == (2,)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("hello", "it is a text frame"),
        (b"\xc1", "Cannot read the message"),
        (msgpack.packb(7), "Cannot read the message"),
        (msgpack.packb({"type": "hello", "payload": {}}), "'seq'"),
        (packed("hello", [1]), "payload of type list"),
        (packed("hello", {}, seq="x"), "seq 'x'"),
        (packed("observation", {"images": {"agentview": {"__image__": True, "format": "gif"}}}), "format 'gif'"),
        (packed("observation", {"states": {"__ndarray__": True, "data": b"", "dtype": "O", "shape": [1]}}), "dtype"),
        (packed("observation", {"x": [0] * 20000}), "10000"),
    ],
)
def test_malformed_message_is_an_error_and_ends_the_connection(frame, words):
    with benchmarks(FakePolicy()) as (_, (benchmark,)):
        benchmark.socket.send(frame)
        answer = benchmark.receive()
        assert answer["type"] == "error"
        assert answer["payload"]["error"].startswith("malformed_message: Cannot read the message: ")
        assert words in answer["payload"]["error"]
        assert "expected vla-eval's msgpack map of type, payload, seq, timestamp" in answer["payload"]["error"]
        with pytest.raises(ConnectionClosed) as caught:
            benchmark.socket.recv(timeout=SECONDS)
        assert caught.value.rcvd.code == 1007


def test_failure_of_the_policy_is_an_error_message():
    policy = FakePolicy()
    with benchmarks(policy) as (_, (benchmark,)):
        policy.failure = RuntimeError("out of memory")
        assert benchmark.error("observation", observed()).startswith("internal: ")
        policy.failure = None
        assert benchmark.ask("observation", observed()).shape == (2,)


def test_health_page_reports_readiness():
    policy = FakePolicy(held=True)
    with served(policy, protocol="vla-eval", rename=RENAME) as (url, server), contextlib.ExitStack() as stack:
        assert http(url, "/health") == (503, '{"status": "not ready"}\n')
        with pytest.raises(InvalidStatus, match="503"):  # the client retries
            Benchmark(url, stack)
        policy.release()
        server.scheduler.ready.result(SECONDS)
        assert http(url, "/config") == (200, '{"config": {"max_batch_size": 3}}\n')
        assert json.loads(http(url, "/health")[1]) == {"status": "ok"}
        status, text = http(url, "/config?max_batch_size=8")
        assert (status, "--max-batch" in text) == (422, True)
    with served(FakePolicy()) as (url, _):  # these pages do not exist with openpi's protocol
        assert http(url, "/health")[0] == 404


def test_hello_describes_liberos_observations_and_actions():
    policy = FakePolicy()
    policy.embodiment = get_embodiment("pi05_libero")
    policy.example_observation = policy.embodiment.example_observation
    policy.infer_batch = lambda observations, **_: [{"actions": np.zeros((10, 7), np.float32)} for _ in observations]
    with served(policy, protocol="vla-eval") as (url, server), contextlib.ExitStack() as stack:
        server.scheduler.ready.result(SECONDS)
        benchmark = Benchmark(url, stack)
        name = "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark"
        _, hello = benchmark.ask("hello", {"protocol_version": 1, "benchmark": name})
        wanted = {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
        assert hello["observation_params"] == wanted
        assert sorted(hello["observation_spec"]) == ["agentview", "language", "state", "wrist"]
        assert hello["action_spec"]["gripper"]["format"] == "binary_close_positive"
        images = {"agentview": encoded(IMAGE), "wrist": encoded(IMAGE)}
        payload = {"images": images, "states": np.zeros(8), "task_description": "x", "controller_states": np.zeros(8)}
        assert benchmark.ask("observation", payload).shape == (7,)
        assert "lacks images.wrist" in benchmark.error("observation", {**payload, "images": {"agentview": IMAGE}})


def test_benchmark_keys_are_checked_at_the_start():
    robot = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=["x"], actions=["x"])
    rename = ["images.primary=front", "state.robot0_eef=state"]
    assert key_sources(robot, rename) == {"front": "images.primary", "state": "state.robot0_eef"}
    for wrong in ([], rename[:1]):
        with pytest.raises(ServingError, match=r"'arm' reads .*state, but no benchmark key is given for that"):
            key_sources(robot, wrong)
    for wrong in ([*rename, "a=other"], [*rename, "a=state"], ["=front"], ["front"]):
        with pytest.raises(ServingError, match=r"expected BENCHMARK_KEY=KEY, once for each key of .*front, state"):
            key_sources(robot, wrong)
    # Keys like LIBERO's do not make another robot LIBERO's.
    cameras = {"base_0_rgb": "observation/image", "left_wrist_0_rgb": "observation/wrist_image"}
    joints = [f"joint_{i}" for i in range(7)]
    other = Embodiment.generic("other", cameras=cameras, state=joints, actions=joints, state_key="observation/state")
    with pytest.raises(ServingError, match="no benchmark key is given for that"):
        key_sources(other, ())
    with pytest.raises(ServingError, match="rename needs --protocol vla-eval"):
        ServeSettings(rename=("a=b",))
    with pytest.raises(ServingError, match="cannot send a token"):
        ServeSettings(protocol="vla-eval", token="secret")
