"""One run of the node (connect, wait for the topics, control) and its heartbeat."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torchpi_client import ControlLoop, ControlReport, ControlSettings, Interrupt, WebsocketPolicy
from torchpi_client.clock import Clock
from torchpi_client.inference import Inference
from torchpi_ros2.bridge import Ros, RosPolicy, RosRobot, Sensors
from torchpi_ros2.config import Config
from torchpi_ros2.plan import Plan, make_plan

_log = logging.getLogger(__name__)

DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
HELD_SECONDS = 1.0
"""Seconds without a policy action after which the heartbeat warns, and without a step after which it is an error."""


class Control:
    """Run of the control loop between topics and a server.

    Args:
        connect: replacement for `WebsocketPolicy` in tests.
        simulated: use ROS time (of a simulation) instead of the machine's monotonic clock.
        clock: replacement for either clock in tests.
        make_inference: creates a replacement for the loop's threads from a policy, in tests.
    """

    def __init__(
        self,
        config: Config,
        ros: Ros,
        *,
        connect: Callable[..., Any] = WebsocketPolicy,
        simulated: bool = False,
        clock: Clock | None = None,
        make_inference: Callable[[RosPolicy], Inference] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._ros = ros
        self._connect = connect
        self._make_inference = make_inference
        self._monotonic = monotonic
        self._stopping = threading.Event()
        self._clock = RosClock(ros, self._stopping) if simulated and clock is None else clock
        self._interrupt = Interrupt()
        self._loop: ControlLoop | None = None
        self._sensors: Sensors | None = None
        self._phase = f"connecting to {config.server['url']}"
        self._error: str | None = None
        self._progress = _Progress(monotonic)
        self._publish = ros.advertise("/diagnostics", DIAGNOSTICS)

    def run(self, *, steps: int | None = None) -> ControlReport | None:
        """Control the robot until `stop`, or for a number of steps. None if `stop` was called before the robot moved.

        Raises:
            ValueError: the settings contradict the server's metadata.
            TimeoutError: a topic has no usable messages.
            Exception: those of `ControlLoop.run` and `WebsocketPolicy`. However the run ends, the robot is held.
        """
        try:
            report = self._run(steps)
        except BaseException as error:
            self._error = str(error)
            raise
        self._error = report.stopped if report is not None else None
        self._phase = "stopped"
        return report

    def stop(self) -> None:
        """End the run; may be called from a signal handler or another thread."""
        self._stopping.set()
        if self._loop is None:
            self._interrupt.set()
        else:
            self._loop.stop()

    def beat(self) -> None:
        """Publish the run's state as diagnostics."""
        level, message = self._status()
        types = self._ros.types
        status = types("diagnostic_msgs/msg/DiagnosticStatus")
        values = [types("diagnostic_msgs/msg/KeyValue")(key=key, value=value) for key, value in self._values().items()]
        nanoseconds = round(1e9 * self._ros.now())
        stamp = types("builtin_interfaces/msg/Time")(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
        url = self._config.server["url"]
        one = status(
            level=getattr(status, level), name="torchpi: control", message=message, hardware_id=url, values=values
        )
        self._publish(types(DIAGNOSTICS)(header=types("std_msgs/msg/Header")(stamp=stamp, frame_id=""), status=[one]))

    def _run(self, steps: int | None) -> ControlReport | None:
        try:
            connected = self._connect(
                **self._config.server, api_key=os.environ.get("TORCHPI_TOKEN"), interrupt=self._interrupt
            )
        except ConnectionError:
            if self._stopping.is_set():
                return None
            raise
        with connected as policy:
            plan = make_plan(self._config, policy.metadata)
            self._sensors = sensors = Sensors(self._config, plan, self._ros, monotonic=self._monotonic)
            self._phase = "waiting for topics"
            first = sensors.wait(self._config.wait, self._stopping)
            if first is None:
                return None
            settings = _settings_at(plan, sensors.state(first), policy.metadata)
            _, hz = settings.rates(policy.metadata.get("control_hz"))
            robot = RosRobot(sensors, plan, self._ros, 1 / hz)
            sensors.warn_of_other_publishers()
            robot.warn_of_topics()
            ros_policy = RosPolicy(policy, sensors)
            inference = None if self._make_inference is None else self._make_inference(ros_policy)
            self._loop = ControlLoop(robot, ros_policy, settings, clock=self._clock, inference=inference)
            if self._stopping.is_set():  # stop() was called just before the loop existed
                return None
            self._phase = "first inference"
            _log.info("Controlling %s at %g Hz", ", ".join(plan.action_names), hz)
            return self._loop.run(steps=steps)

    def _status(self) -> tuple[str, str]:
        """Level of DiagnosticStatus, and a message."""
        if self._error is not None:
            return "ERROR", f"stopped: {self._error}"
        problem = self._sensors.problem if self._sensors is not None else None
        because = f": {problem}" if problem else ""
        if self._loop is None or not self._loop.report.steps or self._phase == "stopped":
            return "WARN", f"{self._phase}{because}"
        still, held = self._progress.seconds(self._loop.report)
        if still > HELD_SECONDS + 2 / self._loop.control_hz:
            return "ERROR", f"the control loop has not advanced for {still:.1f} s"
        if held > HELD_SECONDS:
            return "WARN", f"the robot is held for {held:.1f} s{because or ': no chunk from the server'}"
        return ("WARN", f"no observation{because}") if problem else ("OK", "controlling")

    def _values(self) -> dict[str, str]:
        values = {}
        if self._loop is not None:
            report = self._loop.report
            for name in ("steps", "actions", "waits", "holds", "chunks", "late_chunks", "failed_requests"):
                values[name] = str(getattr(report, name))
            values["latency_ms"] = f"{1e3 * report.latency.mean:.1f}"
        if self._sensors is not None:
            for source, age in self._sensors.ages().items():
                values[f"age_ms {source}"] = "none" if age is None else f"{1e3 * age:.0f}"
        return values


def _settings_at(plan: Plan, state: Mapping[str, float], metadata: Mapping[str, Any]) -> ControlSettings:
    """Add the robot's current position to the settings as the start of step limits. Warns if it is outside the training
    range."""
    if not set(plan.action_names) <= set(state) or set(plan.commands) != {"position"}:
        return plan.settings
    start = np.array([state[name] for name in plan.action_names], np.float32)
    if (trained := metadata.get("action_range")) is not None:
        low, high = np.array(trained["low"]), np.array(trained["high"])
        margin = 0.1 * (high - low)
        for i in np.flatnonzero((start < low - margin) | (start > high + margin)):
            _log.warning(
                "%s is at %.4g, outside the training range, %.4g to %.4g: check its unit, direction and zero",
                plan.action_names[i],
                start[i],
                low[i],
                high[i],
            )
    limits = plan.settings.limits
    if limits is None or not np.isfinite(limits.max_step).any():
        return plan.settings
    return dataclasses.replace(plan.settings, start=start)


class _Progress:
    """Tracks the time since a report's counts changed."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._counts = (-1, -1)
        self._since = [0.0, 0.0]

    def seconds(self, report: ControlReport) -> list[float]:
        """Seconds since the last step and since the last action, as observed by earlier calls."""
        now = self._monotonic()
        counts = (report.steps + report.missed_steps, report.actions)
        for i, (count, before) in enumerate(zip(counts, self._counts, strict=True)):
            if count != before:
                self._since[i] = now
        self._counts = counts
        return [now - since for since in self._since]


class RosClock:
    """`torchpi_client.clock.Clock` in ROS time, so that control follows a simulation's speed and pauses."""

    def __init__(self, ros: Ros, stopping: threading.Event) -> None:
        self._ros = ros
        self._stopping = stopping
        self._last = 0.0

    def now(self) -> float:
        """Current time; raises a RuntimeError if it went backwards."""
        now = self._ros.now()
        if now < self._last:
            raise RuntimeError(
                f"Simulated time went back from {self._last:.3f} to {now:.3f} s: the simulation was restarted; restart "
                "this node, too."
            )
        self._last = now
        return now

    def sleep_until(self, moment: float) -> None:
        """Sleep until this time, or until the run is stopped."""
        while self.now() < moment and not self._stopping.wait(0.002):
            pass
