"""The ROS 2 node against `torchpi serve demo` on loopback: messages in, commands out, and a server that dies.

rclpy is a stand-in with the functions that the node calls; the messages are those of rosbags' type store.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import yaml
from ros2_helpers import FakeRos, compressed, image, joint_state

from torchpi_client import WebsocketPolicy

SETTINGS = {
    "server": {"timeout": 8, "answer_timeout": 30},
    "prompt": "open the drawer",
    "cameras": {
        "base": {"topic": "/base", "type": "sensor_msgs/msg/Image"},
        "wrist": {"topic": "/wrist", "type": "sensor_msgs/msg/CompressedImage"},
    },
    "joints": {
        **{name: {"scale": 1} for name in ("hand_x", "hand_y", "hand_z", "gripper")},
        **{name: {"scale": 2} for name in ("delta_x", "delta_y", "delta_z")},
    },
    "state": {"state": {"topic": "/hand", "dimensions": ["hand_x", "hand_y", "hand_z", "gripper"]}},
    "actions": [
        {
            "topic": "/commands",
            "type": "std_msgs/msg/Float64MultiArray",
            "dimensions": ["gripper", "delta_x", "delta_y", "delta_z"],
        }
    ],
    "max_age": 2.0,
    "slop": 1.0,
    # A chunk lasts 8 s, and arrives in time on a busy machine, too.
    "control": {"mode": "async", "control_hz": 4, "resample": "as_is", "execute_steps": 4},
}


@pytest.fixture
def rclpy(monkeypatch):
    """A stand-in for rclpy and the packages of messages; its node's topics are `.ros`."""
    ros = FakeRos()
    ros.now = time.time
    logged = []
    log = types.SimpleNamespace(**dict.fromkeys(("info", "warning", "error", "fatal"), logged.append))
    timers = []
    node = types.SimpleNamespace(
        create_subscription=lambda cls, topic, callback, qos: ros.subscribe(topic, cls.__msgtype__, callback),
        create_publisher=lambda cls, topic, qos: types.SimpleNamespace(publish=ros.advertise(topic, cls.__msgtype__)),
        get_publishers_info_by_topic=lambda topic: [],
        get_subscriptions_info_by_topic=lambda topic: [],
        get_clock=lambda: types.SimpleNamespace(now=lambda: types.SimpleNamespace(nanoseconds=time.time_ns())),
        get_logger=lambda: log,
        declare_parameter=lambda name, default: types.SimpleNamespace(value=module.config),
        get_parameter=lambda name: types.SimpleNamespace(value=False),
        create_timer=lambda period, callback: timers.append((period, callback)),
        destroy_node=lambda: None,
    )
    ended = threading.Event()

    def spin():
        while not ended.wait(timers[0][0]):
            timers[0][1]()

    executor = types.SimpleNamespace(add_node=lambda node: ended.clear(), spin=spin, shutdown=ended.set)
    module = types.SimpleNamespace(
        init=lambda args, signal_handler_options: None,
        create_node=lambda name: node,
        shutdown=lambda: None,
        config="",
        ros=ros,
        logged=logged,
    )
    parts = {
        "rclpy": module,
        "rclpy.executors": types.SimpleNamespace(SingleThreadedExecutor=lambda: executor),
        "rclpy.node": types.SimpleNamespace(Node=object),
        "rclpy.qos": types.SimpleNamespace(QoSProfile=dict, qos_profile_sensor_data={}),
        "rclpy.signals": types.SimpleNamespace(SignalHandlerOptions=types.SimpleNamespace(NO=0)),
    }
    for kind in ros.store.types:
        package, _, name = kind.split("/")
        messages = parts.setdefault(f"{package}.msg", types.SimpleNamespace())
        parts.setdefault(package, types.SimpleNamespace(msg=messages, __path__=[]))
        setattr(messages, name, ros.types(kind))
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.delitem(sys.modules, "torchpi_ros2.node", raising=False)
    return module


@contextlib.contextmanager
def served_demo():
    """`torchpi serve demo` as a process of its own; the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torchpi.cli", "serve", "demo", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, f"ws://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture
def sensors(rclpy):
    """Cameras and joints at 10 Hz."""
    ended = threading.Event()
    pixels = np.full((48, 64, 3), 90, np.uint8)

    def publish():
        while not ended.wait(0.1):
            now = time.time()
            rclpy.ros.send("/base", image(pixels, "bgr8", now, width=64, height=48))
            rclpy.ros.send("/wrist", compressed(pixels, "rgb8; jpeg compressed bgr8", now))
            joints = {"gripper": 0.5, "hand_z": 0.2, "hand_y": 0.6, "hand_x": 0.0}
            rclpy.ros.send("/hand", joint_state(joints, now))

    thread = threading.Thread(target=publish)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.fixture
def signals():
    """The handlers of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("sensors", "signals")
def test_commands_reach_their_topic_until_a_signal_or_the_death_of_the_server(rclpy, tmp_path):
    from torchpi_ros2.node import main

    rclpy.config = str(tmp_path / "robot.yaml")
    with served_demo() as (process, url):
        settings = {**SETTINGS, "server": {**SETTINGS["server"], "url": url}}
        (tmp_path / "robot.yaml").write_text(yaml.safe_dump(settings))
        with WebsocketPolicy(url, timeout=300):  # waits until it is there
            pass
        rclpy.ros.on_publish = after_commands(12, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main([]) == 0
        sent = commands_of(rclpy)
        assert 12 <= len(sent) <= 14
        assert not sent[-1, 1:].any()  # the last command holds the robot

        rclpy.ros.sent.clear()
        rclpy.ros.on_publish = after_commands(12, process.kill)
        assert main([]) == 1
    moving = commands_of(rclpy)[:, 1:].any(axis=1)
    assert moving[:12].all()
    # The rest of the chunk, then held: no increment, and the gripper's last effort.
    assert not moving[-2:].any()
    assert len(set(commands_of(rclpy)[-2:, 0])) == 1
    assert any("connection to the policy is lost" in line for line in rclpy.logged)
    last = rclpy.ros.sent["/diagnostics"][-1].status[0]
    assert last.level == 2
    assert "connection to the policy is lost" in last.message


def after_commands(number, function):
    return lambda topic, count: function() if (topic, count) == ("/commands", number) else None


def commands_of(rclpy):
    return np.array([message.data for message in rclpy.ros.sent["/commands"]])


@pytest.mark.usefixtures("signals")
def test_node_names_the_missing_settings(rclpy):
    from torchpi_ros2.node import main

    assert main([]) == 1
    assert rclpy.logged == ["There is no settings file ''; pass one as the parameter config."]
