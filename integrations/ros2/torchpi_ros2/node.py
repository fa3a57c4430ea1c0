"""The node: `ros2 run torchpi_ros2 control --ros-args -p config:=robot.yaml`. The only module that imports rclpy."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions

from torchpi_ros2.config import load_config
from torchpi_ros2.control import Control


class RclpyRos:
    """`bridge.Ros` by rclpy."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def subscribe(self, topic: str, kind: str, callback: Callable[[Any], None]) -> None:
        """Call back with each message, in the executor's thread."""
        # Best effort and volatile: the one quality of service that fits every publisher's.
        self._node.create_subscription(self.types(kind), topic, callback, qos_profile_sensor_data)

    def advertise(self, topic: str, kind: str) -> Callable[[Any], None]:
        """The function that publishes a message."""
        # Reliable; a command that was not sent yet is replaced by the next.
        publisher = self._node.create_publisher(self.types(kind), topic, QoSProfile(depth=1))
        publish: Callable[[Any], None] = publisher.publish
        return publish

    def types(self, kind: str) -> Any:
        """The class of messages of this name."""
        package, folder, name = kind.split("/")
        return getattr(importlib.import_module(f"{package}.{folder}"), name)

    def publishers(self, topic: str) -> Sequence[str]:
        """The types with which the topic is published at present."""
        return [info.topic_type for info in self._node.get_publishers_info_by_topic(topic)]

    def subscribers(self, topic: str) -> Sequence[str]:
        """The types with which the topic is subscribed to at present."""
        return [info.topic_type for info in self._node.get_subscriptions_info_by_topic(topic)]

    def now(self) -> float:
        """ROS time in seconds."""
        return 1e-9 * float(self._node.get_clock().now().nanoseconds)


class _RosLog(logging.Handler):
    """The client's and the node's log in ROS's."""

    def __init__(self, node: Node) -> None:
        super().__init__(logging.INFO)
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on; ROS tells levels apart by the place of the call, so that each has one of its own."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        else:
            self._logger.info(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the node and return its exit status: 1 after an error, or if the run ended by itself."""
    # Signals end the run first: the last command, which holds the robot, needs ROS.
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("torchpi_control")
    log = _RosLog(node)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(log)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, daemon=True, name="torchpi_ros2 spin")
    try:
        return _run(node, spinning)
    finally:
        logging.getLogger().removeHandler(log)
        executor.shutdown()
        if spinning.is_alive():
            spinning.join(2.0)
        node.destroy_node()
        rclpy.shutdown()


def _run(node: Node, spinning: threading.Thread) -> int:
    try:
        config = load_config(node.declare_parameter("config", "").value)
        control = Control(config, RclpyRos(node), simulated=node.get_parameter("use_sim_time").value)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: control.stop())
        node.create_timer(1 / config.heartbeat_hz, control.beat)
        spinning.start()
        report = control.run()
        control.beat()
    # Of the settings, the server, a topic, the loop: each message says what to do.
    except Exception as error:
        node.get_logger().fatal(str(error))
        return 1
    if report is None:
        return 0
    node.get_logger().info(report.summary())
    return int(report.stopped is not None)


if __name__ == "__main__":
    sys.exit(main())
