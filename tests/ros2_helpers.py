"""Fake ROS for the node: messages from rosbags' type store, serialized with CDR as over a network."""

import io

import numpy as np
from PIL import Image
from rosbags.typesys import Stores, get_typestore

from torchpi_client.inference import Answer

STORE = get_typestore(Stores.ROS2_HUMBLE)


class FakeRos:
    """Topics in memory, and a clock set by the test."""

    def __init__(self, time=1000.0, store=STORE):
        self.time = time
        self.store = store
        self.callbacks = {}
        self.on_publish = lambda topic, count: None
        """Called with the number of messages on the topic so far."""
        self.sent = {}
        """Published messages per topic, as a subscriber receives them."""
        self.other_publishers = {}
        """Message types of other publishers per topic."""
        self.listeners = {}
        """Message types of other subscribers per topic."""

    def subscribe(self, topic, kind, callback):
        self.callbacks.setdefault(topic, []).append((kind, callback))

    def advertise(self, topic, kind):
        sent = self.sent.setdefault(topic, [])

        def publish(message):
            assert message.__msgtype__ == kind
            sent.append(self.transmitted(message))
            self.on_publish(topic, len(sent))

        return publish

    def types(self, kind):
        """rclpy's messages take lists; rosbags' take arrays of the right type."""
        cls = self.store.types[kind]
        arrays = {"positions", "velocities", "accelerations", "effort", "data"}

        def make(**fields):
            return cls(**{k: np.array(v, np.float64) if k in arrays else v for k, v in fields.items()})

        for constant in ("__msgtype__", "OK", "WARN", "ERROR"):
            setattr(make, constant, getattr(cls, constant, None))
        return make

    def publishers(self, topic):
        return self.other_publishers.get(topic, [])

    def subscribers(self, topic):
        return self.listeners.get(topic, [])

    def now(self):
        return self.time

    def transmitted(self, message):
        kind = message.__msgtype__
        return self.store.deserialize_cdr(bytes(self.store.serialize_cdr(message, kind)), kind)

    def send(self, topic, message):
        message = self.transmitted(message)
        for kind, callback in self.callbacks.get(topic, []):
            if kind == message.__msgtype__:  # other types do not connect
                callback(message)


def header(stamp, store=STORE):
    nanoseconds = round(1e9 * stamp)
    time = store.types["builtin_interfaces/msg/Time"](sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    return store.types["std_msgs/msg/Header"](stamp=time, frame_id="camera")


def image(data, encoding, stamp=1000.0, *, width, height, step=None, big_endian=False):
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    data = data.ravel()
    return STORE.types["sensor_msgs/msg/Image"](
        header=header(stamp),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(big_endian),
        step=data.size // height if step is None else step,
        data=data,
    )


def rgb(colour=(10, 20, 30), stamp=1000.0, *, width=4, height=2):
    return image(np.full((height, width, 3), colour, np.uint8), "rgb8", stamp, width=width, height=height)


def compressed(pixels, text, stamp=1000.0, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if "png" in text else "JPEG", **options)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    return STORE.types["sensor_msgs/msg/CompressedImage"](header=header(stamp), format=text, data=data)


def joint_state(joints, stamp=1000.0, **arrays):
    """Joints by name and position; other arrays unchanged."""
    fields = {"position": list(joints.values()), "velocity": [], "effort": [], **arrays}
    fields = {name: np.array(values, np.float64) for name, values in fields.items()}
    return STORE.types["sensor_msgs/msg/JointState"](header=header(stamp), name=list(joints), **fields)


def text(data):
    return STORE.types["std_msgs/msg/String"](data=data)


class FakeServer:
    """Client of a scripted server: `answers` maps an observation to a chunk or raises."""

    url = "ws://fake:8000"
    reconnects = 0

    def __init__(self, metadata, answers):
        self.metadata, self.answers = metadata, answers
        self.requests = []

    def __call__(self, **arguments):
        self.arguments = arguments
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, observation):
        self.requests.append(observation)
        return {"actions": np.asarray(self.answers(observation), np.float32)}


class StepClock:
    """Virtual clock. Each sleep also advances the ROS time, and calls `on_step` with the number of the step."""

    def __init__(self, ros, on_step=lambda step: None):
        self.ros, self.on_step, self.step = ros, on_step, 0

    def now(self):
        return self.ros.time

    def sleep_until(self, moment):
        self.ros.time = max(self.ros.time, moment)
        self.step += 1
        self.on_step(self.step)


class DirectInference:
    """Inference that answers immediately, in the loop's thread."""

    def __init__(self, policy, ros):
        self.policy, self.ros, self.answer = policy, ros, None

    @property
    def busy(self):
        return self.answer is not None

    def start(self, observation):
        content, problem = None, None
        try:
            content = self.policy.infer(observation)
        except Exception as error:
            problem = error
        self.answer = Answer(content, problem, self.ros.time)

    def poll(self):
        return self.wait(0)

    def wait(self, seconds):
        answer, self.answer = self.answer, None
        return answer
