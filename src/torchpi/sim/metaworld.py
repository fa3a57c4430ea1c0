"""Meta-World (MuJoCo): 50 table-top tasks of a Sawyer arm with scripted experts.

Source: Yu et al., Meta-World (arXiv:1910.10897), and its third version's package, `metaworld`.
"""

import sys
import tomllib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.assets import assets
from torchpi.extras import require
from torchpi.robots import metaworld
from torchpi.sim.environment import Simulator, check_action, episode_seed
from torchpi.sim.gl import Cameras, import_mujoco

IMAGE_SIZE = 96
MAX_STEPS = 500
EMBODIMENT = metaworld()
# For the predicted paths in videos, fitted to disturbed episodes of the expert: offset in metres from the mocap target,
# which pulls the hand, to the point between the fingers; and fraction of the distance to it that a step covers.
_TIP_OFFSET = np.array([0.004, 0.001, -0.05])
_FOLLOW_RATE = 0.13

INSTRUCTIONS: dict[str, str] = tomllib.loads((assets() / "metaworld.toml").read_text(encoding="utf-8"))


class MetaworldEnvironment:
    """One Meta-World task, with hidden goal markers. See `Environment` for the methods."""

    embodiment, max_steps = EMBODIMENT, MAX_STEPS

    def __init__(self, task: str, *, image_size: int = IMAGE_SIZE) -> None:
        mujoco = import_mujoco()
        require("metaworld", "sim")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self.instruction, self.image_size = task, INSTRUCTIONS[task], image_size
        self._env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        experts: Mapping[str, Any] = ENV_POLICY_MAP
        self._expert = experts[f"{task}-v3"]()
        self._env.max_path_length = sys.maxsize  # the caller ends the episode
        # Each reset places the objects at random, by the environment's own generator.
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        # The expert reads the goal's position, which the policy's observation does not contain.
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env.model.site_rgba[:, 3] = 0  # goal and debugging markers
        # The built-in corner cameras show the objects a few pixels large; this one is closer, and looks from the side.
        base = mujoco.MjvCamera()
        base.lookat[:] = (0, 0.66, 0.1)
        base.distance, base.azimuth, base.elevation = 1.05, 145, -35
        self._cameras = Cameras(self._env.model, {"base": base, "wrist": "gripperPOV"})
        self._full_observation = np.zeros(39)

    def reset(self, seed: int) -> None:
        self._env.seed(episode_seed(seed))
        self._full_observation, _ = self._env.reset()

    def observe(self) -> dict[str, Any]:
        """Both cameras uint8 [96, 96, 3]; state [4], the hand's position and the gripper's opening; the instruction."""
        images = self._cameras.render(self._env.data, self.image_size)
        return {**images, "state": self._full_observation[:4].copy(), "prompt": self.instruction}

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [4], clipped to ±1."""
        action = check_action(action, self.embodiment).clip(-1, 1)
        self._full_observation, _, _, _, info = self._env.step(action.astype(np.float32))
        return bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action [4], clipped to ±1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Constant(s) may be too high": they are clipped here
            action = self._expert.get_action(self._full_observation)
        return np.clip(action, -1, 1).astype(np.float32)

    def render(self, size: int) -> dict[str, np.ndarray]:
        return self._cameras.render(self._env.data, size)

    def hands(self) -> np.ndarray:
        return np.array(self._env.tcp_center)[None]

    def hands_after(self, chunk: np.ndarray) -> np.ndarray:
        """The hand's position after each action, [H, 1, 3]; the hand follows the mocap target, which actions move."""
        low, high, target = self._env.mocap_low, self._env.mocap_high, self._env.data.mocap_pos[0].copy()
        hand, path = self.hands()[0], []
        for action in np.asarray(chunk, np.float64):
            target = np.clip(target + action[:3].clip(-1, 1) * self._env.action_scale, low, high)
            hand = hand + _FOLLOW_RATE * (target + _TIP_OFFSET - hand)
            path.append(hand)
        return np.stack(path)[:, None]

    def project(self, points: np.ndarray, size: int) -> tuple[str, np.ndarray]:
        return "base", self._cameras.project(self._env.data, "base", points, size)

    def close(self) -> None:
        self._cameras.close()
        self._env.close()


SIMULATOR = Simulator(
    INSTRUCTIONS, EMBODIMENT, MAX_STEPS, IMAGE_SIZE, MetaworldEnvironment, tuple(INSTRUCTIONS), "metaworld"
)
