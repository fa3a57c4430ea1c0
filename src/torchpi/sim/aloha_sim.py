"""ALOHA in MuJoCo (gym-aloha): two arms hand over a cube, or put a peg into a socket.

Source: Zhao et al., ACT (arXiv:2304.13705), and the package `gym_aloha`.
"""

from typing import Any

import numpy as np

from torchpi.extras import require
from torchpi.robots import ActionDim, Camera, Embodiment, aloha
from torchpi.sim.environment import Simulator, UnstableError, check_action, episode_seed
from torchpi.sim.gl import Cameras, import_mujoco
from torchpi.transforms.images import resize_with_pad

# openpi's policy was trained with this instruction for the cube.
INSTRUCTIONS = {"transfer_cube": "Transfer cube", "insertion": "Insert the peg into the socket"}
IMAGE_SIZE = 224  # as in openpi's client and models
MAX_STEPS = 300
_ROBOT = aloha()
EMBODIMENT = Embodiment(
    "aloha_sim",
    cameras=(Camera("base_0_rgb", "images.cam_high", layout="chw"),),
    state=_ROBOT.state,
    actions=tuple(ActionDim(action.name, action.unit, command=action.command) for action in _ROBOT.actions),
    control_hz=50,
    execute_steps=10,  # as in openpi's client for this simulator
)
_SUCCESS_REWARD = 4


class AlohaSimEnvironment:
    """One ALOHA task with the observations of openpi's client: only the top camera. See `Environment` for the methods.

    Images have the package's shadows and smooth edges, because a policy may depend on them.
    """

    embodiment, max_steps = EMBODIMENT, MAX_STEPS

    def __init__(self, task: str, *, image_size: int = IMAGE_SIZE) -> None:
        import_mujoco()  # before gym_aloha imports it with another backend
        self.task, self.instruction, self.image_size = task, INSTRUCTIONS[task], image_size
        # gym_aloha's step and reset render three cameras; this class uses its physics and task without rendering.
        env = require("gym_aloha.env", "aloha").AlohaEnv(task)._env
        self._physics, self._task, self._num_substeps = env.physics, env.task, env._n_sub_steps
        sides, name2id = ("left", "right"), self._physics.model.name2id
        self._fingers = [[name2id(f"vx300s_{arm}/10_{side}_gripper_finger", "geom") for side in sides] for arm in sides]
        self._cameras = Cameras(self._physics.model.ptr, {"cam_high": "top"}, effects=True)

    def reset(self, seed: int) -> None:
        from gym_aloha.tasks.sim import BOX_POSE
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose

        seed = episode_seed(seed)
        pose = sample_box_pose(seed) if self.task == "transfer_cube" else np.concatenate(sample_insertion_pose(seed))
        BOX_POSE[0] = pose  # the task's `initialize_episode` reads this global
        with self._physics.reset_context():
            self._task.initialize_episode(self._physics)

    def observe(self) -> dict[str, Any]:
        """cam_high uint8 [3, 224, 224], padded with black; joints and grippers' openings [14]; the instruction."""
        image = self._cameras.render(self._physics.data.ptr, 480, 640)["cam_high"]
        image = resize_with_pad(image, self.image_size, self.image_size)
        return {
            "images": {"cam_high": np.ascontiguousarray(np.moveaxis(image, -1, 0))},
            "state": self._task.get_qpos(self._physics),
            "prompt": self.instruction,
        }

    def step(self, action: np.ndarray) -> bool:
        from dm_control.rl.control import PhysicsError

        self._task.before_step(check_action(action, self.embodiment), self._physics)
        try:
            self._physics.step(self._num_substeps)
        except PhysicsError as error:
            raise UnstableError(str(error)) from error
        self._task.after_step(self._physics)
        return bool(self._task.get_reward(self._physics) == _SUCCESS_REWARD)

    def expert_action(self) -> np.ndarray:
        raise NotImplementedError("ALOHA's simulator has no scripted expert")

    def render(self, size: int) -> dict[str, np.ndarray]:
        """The top camera, uint8 [size, 4/3·size, 3]."""
        return self._cameras.render(self._physics.data.ptr, size, size * 4 // 3)

    def hands(self) -> np.ndarray:
        return _hands(self._physics.data.ptr, self._fingers)

    def hands_after(self, chunk: np.ndarray) -> np.ndarray:
        """Positions of the hands, [H, 2, 3], if the joints reached each action's targets."""
        mujoco, model = import_mujoco(), self._physics.model.ptr
        data = mujoco.MjData(model)
        path = []
        for action in np.asarray(chunk, np.float64):
            data.qpos[0:6], data.qpos[8:14] = action[0:6], action[7:13]
            data.qpos[[6, 7, 14, 15]] = self._physics.data.qpos[[6, 7, 14, 15]]
            mujoco.mj_kinematics(model, data)
            path.append(_hands(data, self._fingers))
        return np.stack(path)

    def project(self, points: np.ndarray, size: int) -> tuple[str, np.ndarray]:
        return "cam_high", self._cameras.project(self._physics.data.ptr, "cam_high", points, size, size * 4 // 3)

    def close(self) -> None:
        self._cameras.close()


def _hands(data: Any, fingers: list[list[int]]) -> np.ndarray:
    """Midpoint of each arm's two fingers, [2, 3]."""
    return np.stack([data.geom_xpos[pair].mean(axis=0) for pair in fingers])


SIMULATOR = Simulator(INSTRUCTIONS, EMBODIMENT, MAX_STEPS, IMAGE_SIZE, AlohaSimEnvironment, (), "gym-aloha", "aloha")
