"""LeRobot robot in memory, whose joints are at the positions of the last action."""

from dataclasses import dataclass

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("hand_x", "hand_y", "hand_z", "gripper")
MAX_ACTIONS = 24
"""Number of actions after which the simulated user ends the run."""
ROBOTS = []
"""All created robots."""


@RobotConfig.register_subclass("mock")
@dataclass
class MockRobotConfig(RobotConfig):
    """No settings."""


class MockRobot(Robot):
    """Two cameras of noise and four joints."""

    config_class = MockRobotConfig
    name = "mock"

    def __init__(self, config):
        super().__init__(config)
        self.joints = dict.fromkeys(JOINTS, 0.1)
        self.sent = []
        self._connected = False
        ROBOTS.append(self)

    @property
    def observation_features(self):
        return {**{f"{name}.pos": float for name in JOINTS}, "base": (64, 64, 3), "wrist": (64, 64, 3)}

    @property
    def action_features(self):
        return {f"{name}.pos": float for name in JOINTS}

    @property
    def is_connected(self):
        return self._connected

    @property
    def is_calibrated(self):
        return True

    def connect(self, calibrate=True):
        self._connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        rng = np.random.default_rng(len(self.sent))
        images = {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in ("base", "wrist")}
        return {**{f"{name}.pos": value for name, value in self.joints.items()}, **images}

    def send_action(self, action):
        self.sent.append([action[f"{name}.pos"] for name in JOINTS])
        self.joints = {name: float(action[f"{name}.pos"]) for name in JOINTS}
        if len(self.sent) == MAX_ACTIONS:
            raise KeyboardInterrupt
        return action

    def disconnect(self):
        self._connected = False
