"""Sensors, robot and policy of the node, independent of rclpy: topics to observations, actions to command messages."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from torchpi_ros2.config import JOINT_STATE, CameraTopic, Config, StateTopic
from torchpi_ros2.errors import UnusableError
from torchpi_ros2.images import check_image
from torchpi_ros2.joints import command_message, read_joints, to_ros
from torchpi_ros2.plan import Plan
from torchpi_ros2.sync import Source, Synchronizer

_log = logging.getLogger(__name__)

STRING = "std_msgs/msg/String"
REPORT_SECONDS = 2.0
"""Seconds between log messages while waiting for topics."""
_MESSAGES, _PROBLEM = "torchpi_ros2/messages", "torchpi_ros2/problem"


class Ros(Protocol):
    """ROS functions that the node needs; implemented by `node.RclpyRos`."""

    def subscribe(self, topic: str, kind: str, callback: Callable[[Any], None]) -> None:
        """Call the function with each message, in any thread."""

    def advertise(self, topic: str, kind: str) -> Callable[[Any], None]:
        """Return a function that publishes a message."""

    def types(self, kind: str) -> Any:
        """Return the message class of a name such as "std_msgs/msg/Header"."""

    def publishers(self, topic: str) -> Sequence[str]:
        """Types with which the topic is currently published."""

    def subscribers(self, topic: str) -> Sequence[str]:
        """Types with which the topic is currently subscribed to."""

    def now(self) -> float:
        """ROS time in seconds: the system clock, or the simulation's with use_sim_time."""


class Sensors:
    """Subscriptions to the topics of an observation.

    Args:
        monotonic: monotonic clock, in seconds.
    """

    def __init__(
        self, config: Config, plan: Plan, ros: Ros, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan = plan
        self._ros = ros
        self._stop_after = config.stop_after
        self._monotonic = monotonic
        self._prompt = config.prompt
        self._needs_prompt = config.prompt_topic if config.prompt is None else None
        self._unusable_since: float | None = None
        self._damaged: str | None = None  # why the last messages could not be decoded
        self._cameras = [(Source(one.topic.key, one.topic.topic), one) for one in plan.cameras]
        self._parts = [(Source(part.key, part.topic), part) for part in config.state]
        self._sync = Synchronizer(
            [source for source, _ in (*self._cameras, *self._parts)],
            max_age=config.max_age,
            slop=config.slop,
            by_header=config.time == "header",
            monotonic=monotonic,
            now=ros.now,
        )
        for source, camera in self._cameras:
            ros.subscribe(camera.topic.topic, camera.topic.type, self._camera_callback(source, camera.topic))
        for source, part in self._parts:
            ros.subscribe(part.topic, JOINT_STATE, self._joints_callback(source, part))
        if config.prompt_topic is not None:
            ros.subscribe(config.prompt_topic, STRING, self._take_prompt)

    @property
    def problem(self) -> str | None:
        """Reason why there is currently no observation, or None."""
        return self._problem_of(self._present()) or self._damaged

    def ages(self) -> dict[str, float | None]:
        """Seconds since the last usable message of each topic."""
        return self._sync.ages()

    def wait(self, seconds: float, stopping: threading.Event) -> dict[str, Any] | None:
        """Wait for the first usable snapshot; None if `stopping` was set before.

        Raises:
            TimeoutError: there was none in this time; the message names the topics.
        """
        begin = self._monotonic()
        report = begin + REPORT_SECONDS
        while not stopping.is_set():
            snapshot = self._present()
            if (problem := self._problem_of(snapshot)) is None:
                return snapshot
            if (now := self._monotonic()) > begin + seconds:
                raise TimeoutError(f"No observation after {seconds:g} s: {problem}{self._about_publishers()}.")
            if now > report:
                report = now + REPORT_SECONDS
                _log.info("Waiting for an observation: %s%s", problem, self._about_publishers())
            stopping.wait(0.05)
        return None

    def warn_of_other_publishers(self) -> None:
        """Log cameras whose topic has several publishers, because their images alternate."""
        for source, camera in self._cameras:
            if (count := len(self._ros.publishers(camera.topic.topic))) > 1:
                _log.warning("%s has %d publishers: images of several cameras would alternate", source, count)

    def snapshot(self) -> dict[str, Any]:
        """Messages of the current observation for `decode`, or the reason why there is none.

        Raises:
            TimeoutError: there was no observation for longer than `stop_after`.
        """
        if (since := self._unusable_since) is not None and self._monotonic() - since > self._stop_after:
            raise TimeoutError(f"No usable observation for {self._stop_after:g} s (stop_after): {self.problem}.")
        return self._present()

    def decode(self, snapshot: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a snapshot to an observation; further fields are copied.

        Raises:
            UnusableError: the snapshot has no observation, or an image can't be decoded.
        """
        fields = dict(snapshot)
        messages, problem = fields.pop(_MESSAGES, None), fields.pop(_PROBLEM, None)
        try:
            if messages is None:
                raise UnusableError(problem)
            observation = self._observation(messages)
        except UnusableError:
            if self._unusable_since is None:
                self._unusable_since = self._monotonic()
            raise
        self._unusable_since = None
        return {**observation, **fields}

    def state(self, snapshot: Mapping[str, Any]) -> dict[str, float]:
        """State values of a snapshot, by dimension name."""
        found: dict[str, float] = {}
        for source, part in self._parts:
            values = read_joints(snapshot[_MESSAGES][source], part.dimensions)
            assert values is not None  # messages without these joints are not kept
            found.update(zip((dimension.name for dimension in part.dimensions), map(float, values), strict=True))
        return found

    def _present(self) -> dict[str, Any]:
        try:
            return {_MESSAGES: self._sync.match()}
        except UnusableError as error:
            return {_PROBLEM: str(error)}

    def _problem_of(self, snapshot: Mapping[str, Any]) -> str | None:
        if self._needs_prompt is not None and self._prompt is None:
            return f"no instruction received on {self._needs_prompt}"
        return snapshot.get(_PROBLEM)

    def _observation(self, messages: Mapping[Source, Any]) -> dict[str, Any]:
        observation: dict[str, Any] = {}
        for source, camera in self._cameras:
            try:
                _put(observation, camera.topic.key, camera.read(messages[source]))
            except UnusableError as error:
                self._damaged = f"{source}: {error}"
                raise UnusableError(self._damaged) from error
        self._damaged = None
        state = self.state({_MESSAGES: messages})
        for key, names in self._plan.state.items():
            _put(observation, key, np.array([state[name] for name in names], np.float32))
        if self._prompt is not None:
            observation["prompt"] = self._prompt
        return observation

    def _camera_callback(self, source: Source, topic: CameraTopic) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            self._take(source, message, lambda: check_image(message, topic.type, topic.depth_unit))

        return take

    def _joints_callback(self, source: Source, part: StateTopic) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            if not {dimension.joint for dimension in part.dimensions}.isdisjoint(message.name):
                self._take(source, message, lambda: read_joints(message, part.dimensions))
            elif not source.messages:
                self._sync.refuse(source, f"its messages have other joints: {', '.join(message.name) or 'none'}")

        return take

    def _take(self, source: Source, message: Any, check: Callable[[], object]) -> None:
        before = source.problem
        try:
            check()
        except UnusableError as error:
            self._sync.refuse(source, str(error))
        else:
            self._sync.add(source, message, message.header)
        if source.problem is not None and before is None:
            _log.warning("Ignored a message of %s: %s", source, source.problem)

    def _take_prompt(self, message: Any) -> None:
        if text := message.data.strip():
            _log.info("New instruction: %r", text)
            self._prompt = text
        else:
            _log.warning("Ignored an empty instruction; keeping %r", self._prompt)

    def _about_publishers(self) -> str:
        """Describe topics without a publisher, or with an unexpected type."""
        expected = {camera.topic.topic: camera.topic.type for _, camera in self._cameras}
        expected.update({part.topic: JOINT_STATE for _, part in self._parts})
        found = []
        for topic, kind in expected.items():
            kinds = sorted(set(self._ros.publishers(topic)))
            if not kinds:
                found.append(f"nothing publishes {topic}")
            elif kinds != [kind]:
                found.append(f"{topic} is published as {', '.join(kinds)}, expected {kind}")
        return f" ({'; '.join(found)})" if found else ""


@dataclasses.dataclass
class RosRobot:
    """`torchpi_client.Robot` that reads and publishes topics."""

    sensors: Sensors
    plan: Plan
    ros: Ros
    period: float
    """Control period in seconds."""

    def __post_init__(self) -> None:
        self._publish = [self.ros.advertise(output.topic, output.type) for output in self.plan.outputs]

    def warn_of_topics(self) -> None:
        """Log command topics without subscribers, or with other publishers."""
        for output in self.plan.outputs:
            kinds = sorted(set(self.ros.subscribers(output.topic)))
            if output.type not in kinds:
                _log.warning(
                    "Nothing subscribes to %s as %s%s: is the controller active, and is this its topic?",
                    output.topic,
                    output.type,
                    f", only as {', '.join(kinds)}" if kinds else "",
                )
            if (count := len(self.ros.publishers(output.topic))) > 1:
                _log.warning("%d other publishers of %s: the robot also gets their commands", count - 1, output.topic)

    def observe(self) -> dict[str, Any]:
        """Snapshot of the current messages, which `RosPolicy` decodes in its own thread."""
        return self.sensors.snapshot()

    def act(self, action: np.ndarray) -> None:
        """Publish one command."""
        values = dict(zip(self.plan.action_names, zip(action, self.plan.commands, strict=True), strict=True))
        for output, publish in zip(self.plan.outputs, self._publish, strict=True):
            numbers = [to_ros(float(values[one.name][0]), one, values[one.name][1]) for one in output.dimensions]
            publish(command_message(self.ros.types, output, numbers, self.period))


class RosPolicy:
    """Policy whose observations are snapshots of `Sensors`.

    Without a usable observation it raises a TimeoutError, as for an unanswered request: the control loop executes its
    remaining actions, holds the robot, and sends a new request.
    """

    def __init__(self, policy: Any, sensors: Sensors) -> None:
        self._policy = policy
        self._sensors = sensors
        self.url = policy.url

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the server."""
        metadata: Mapping[str, Any] = self._policy.metadata
        return metadata

    @property
    def reconnects(self) -> int:
        """Number of reconnections of the client."""
        return int(self._policy.reconnects)

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """Request the chunk for a snapshot, which may have further fields."""
        try:
            decoded = self._sensors.decode(observation)
        except UnusableError as error:
            raise TimeoutError(f"No observation: {error}") from error
        answer: Mapping[str, Any] = self._policy.infer(decoded)
        return answer


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a key, whose nested keys are joined by '.'."""
    *folders, last = key.split(".")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
