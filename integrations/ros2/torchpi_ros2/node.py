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
    """`bridge.Ros` implemented with rclpy."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def subscribe(self, topic: str, kind: str, callback: Callable[[Any], None]) -> None:
        """Call the function with each message, in the executor's thread."""
        # Best effort and volatile is compatible with every publisher's quality of service.
        self._node.create_subscription(self.types(kind), topic, callback, qos_profile_sensor_data)

    def advertise(self, topic: str, kind: str) -> Callable[[Any], None]:
        """Return a function that publishes a message."""
        # Reliable; the next command replaces one that was not sent yet.
        publisher = self._node.create_publisher(self.types(kind), topic, QoSProfile(depth=1))
        publish: Callable[[Any], None] = publisher.publish
        return publish

    def types(self, kind: str) -> Any:
        """Return the message class of a name."""
        package, folder, name = kind.split("/")
        return getattr(importlib.import_module(f"{package}.{folder}"), name)

    def publishers(self, topic: str) -> Sequence[str]:
        """Types with which the topic is currently published."""
        return [info.topic_type for info in self._node.get_publishers_info_by_topic(topic)]

    def subscribers(self, topic: str) -> Sequence[str]:
        """Types with which the topic is currently subscribed to."""
        return [info.topic_type for info in self._node.get_subscriptions_info_by_topic(topic)]

    def now(self) -> float:
        """ROS time in seconds."""
        return 1e-9 * float(self._node.get_clock().now().nanoseconds)


class _RosLog(logging.Handler):
    """Handler that forwards the client's and the node's log to ROS."""

    def __init__(self, node: Node) -> None:
        super().__init__(logging.INFO)
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        """Forward a record. rclpy identifies a logger call by its source line, so each level needs its own call."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        else:
            self._logger.info(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the node and return its exit status: 1 after an error, or if the run ended by itself."""
    # Signals must end the run first, because the last command, which holds the robot, needs ROS.
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
    # Errors of settings, server, topics and loop all have a message that says what to do.
    except Exception as error:
        node.get_logger().fatal(str(error))
        return 1
    if report is None:
        return 0
    node.get_logger().info(report.summary())
    return int(report.stopped is not None)


if __name__ == "__main__":
    sys.exit(main())
