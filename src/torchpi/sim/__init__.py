"""Simulated robots: to record demonstrations from, and to evaluate policies in."""

from collections.abc import Sequence

from torchpi.errors import SimulationError, UnknownKeyError, did_you_mean, listed
from torchpi.sim import aloha_sim, libero, metaworld, robosuite, so101
from torchpi.sim.environment import Environment as Environment
from torchpi.sim.environment import Simulator as Simulator

_SIMULATORS = {
    "metaworld": metaworld.SIMULATOR,
    "aloha_sim": aloha_sim.SIMULATOR,
    "so101": so101.SIMULATOR,
    "robosuite": robosuite.PANDA,
    **libero.SIMULATORS,
}
ENVIRONMENTS = tuple(_SIMULATORS)


def environment_name(env: str, suite: str | None = None, protocol: str | None = None) -> str:
    """The environment of a command's --env, --suite and --protocol."""
    if env != "libero" and suite is None and protocol is None:
        return env
    suite = suite and suite.removeprefix("libero_")  # its own name, as other programs take it
    if env != "libero" or suite not in libero.NAMES or protocol not in (None, *libero.CLIENTS):
        options = {"env": env, "suite": suite, "protocol": protocol}
        given = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
        raise SimulationError(
            f"{given} is no environment; expected --env libero --suite {'|'.join(libero.NAMES)}, with --protocol "
            f"{listed(libero.CLIENTS, 'or')} or without."
        )
    return f"libero_{suite}{libero.CLIENTS[protocol or 'openpi'].suffix}"


def simulator(env: str) -> Simulator:
    """An environment by name; a KeyError if there is none."""
    if env not in _SIMULATORS:
        name = f"{env!r}{did_you_mean(env, ENVIRONMENTS)}"
        raise UnknownKeyError(f"There is no environment {name}; there are {', '.join(ENVIRONMENTS)}.")
    return _SIMULATORS[env]


def tasks_of(env: str) -> tuple[str, ...]:
    return tuple(simulator(env).instructions)


def check_tasks(env: str, tasks: Sequence[str]) -> None:
    """Raise an error unless an environment has these tasks, each named once."""
    known = tasks_of(env)
    if unknown := [task for task in tasks if task not in known]:
        names = ", ".join(f"{task!r}{did_you_mean(task, known)}" for task in unknown)
        raise UnknownKeyError(f"{env} has no task {names}; its tasks are {', '.join(known)}.")
    if not tasks or len(set(tasks)) < len(tasks):
        raise SimulationError(f"Expected at least one task of {env}, each once, got {', '.join(tasks) or 'none'}.")


def swapped_instructions(env: str, pairs: Sequence[str]) -> dict[str, str]:
    """The instructions of the tasks of each pair, "a:b", exchanged: shows whether a policy reads them."""
    own, swapped = simulator(env).instructions, dict[str, str]()
    for pair in pairs:
        tasks = pair.split(":")
        if len(tasks) != 2 or not all(tasks):
            raise SimulationError(f"A swap is two tasks with ':' between them, got {pair!r}.")
        check_tasks(env, [*swapped, *tasks])
        first, second = tasks
        if own[first] == own[second]:
            raise SimulationError(f"{first} and {second} of {env} have one instruction, {own[first]!r}; swap others.")
        swapped |= {first: own[second], second: own[first]}
    return swapped


def make_environment(env: str, task: str, *, image_size: int | None = None) -> Environment:
    """One task of a simulator; image_size is the height and width of its cameras, None: the environment's.

    Raises:
        KeyError: there is no such environment or task.
        ValueError: image_size is not positive.
        ModuleNotFoundError: the extra "sim" is not installed; the message says how.
        OpenGLError: no OpenGL that renders without a screen.
    """
    check_tasks(env, [task])
    place = simulator(env)
    size = place.image_size if image_size is None else image_size
    if size < 1:
        raise SimulationError(f"image_size is {size}; expected a positive number of pixels.")
    return place.make(task, image_size=size)


class LatestEnvironment:
    """The simulation of the latest task: making one takes a second, and each holds memory."""

    def __init__(self, env: str, *, image_size: int | None = None) -> None:
        self._env, self._image_size = env, image_size
        self._environment: Environment | None = None

    def of(self, task: str) -> Environment:
        """The environment of a task; see `make_environment` for the errors."""
        if self._environment is None or self._environment.task != task:
            self.close()
            self._environment = make_environment(self._env, task, image_size=self._image_size)
        return self._environment

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None
