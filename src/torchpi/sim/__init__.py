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
    """Name of the environment that the options --env, --suite and --protocol select."""
    if env != "libero" and suite is None and protocol is None:
        return env
    suite = suite and suite.removeprefix("libero_")  # other programs write the prefix
    if env == "libero" and suite in libero.NAMES and protocol in (None, *libero.CLIENTS):
        return f"libero_{suite}{libero.CLIENTS[protocol or 'openpi'].suffix}"
    options = {"env": env, "suite": suite, "protocol": protocol}
    given = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    raise SimulationError(
        f"{given} is not an environment; expected --env libero --suite {'|'.join(libero.NAMES)}, with --protocol "
        f"{listed(libero.CLIENTS, 'or')} or without."
    )


def simulator(env: str) -> Simulator:
    """The description of an environment; a KeyError for an unknown name."""
    if env not in _SIMULATORS:
        name = f"{env!r}{did_you_mean(env, ENVIRONMENTS)}"
        raise UnknownKeyError(f"There is no environment {name}; expected {listed(ENVIRONMENTS, 'or')}.")
    return _SIMULATORS[env]


def tasks_of(env: str) -> tuple[str, ...]:
    return tuple(simulator(env).instructions)


def check_tasks(env: str, tasks: Sequence[str]) -> None:
    """Raise an error unless the environment has these tasks, and each is named once."""
    known = tasks_of(env)
    if unknown := [task for task in tasks if task not in known]:
        names = ", ".join(f"{task!r}{did_you_mean(task, known)}" for task in unknown)
        raise UnknownKeyError(f"{env} has no task {names}; its tasks are {', '.join(known)}.")
    if not tasks or len(set(tasks)) < len(tasks):
        raise SimulationError(f"Expected at least one task of {env}, each once, got {', '.join(tasks) or 'none'}.")


def swapped_instructions(env: str, pairs: Sequence[str]) -> dict[str, str]:
    """Exchange the instructions of the two tasks of each pair "a:b", to show whether a policy follows instructions."""
    instructions, swapped = simulator(env).instructions, dict[str, str]()
    for pair in pairs:
        tasks = pair.split(":")
        if len(tasks) != 2 or not all(tasks):
            raise SimulationError(f"A swap is two tasks with ':' between them, got {pair!r}.")
        check_tasks(env, [*swapped, *tasks])
        first, second = tasks
        if instructions[first] == instructions[second]:
            raise SimulationError(
                f"{first} and {second} of {env} have the same instruction, {instructions[first]!r}; swap other tasks."
            )
        swapped |= {first: instructions[second], second: instructions[first]}
    return swapped


def make_environment(env: str, task: str, *, image_size: int | None = None) -> Environment:
    """Make the environment of one task.

    Args:
        image_size: height and width of the camera images in pixels; None: the simulator's default.

    Raises:
        KeyError: there is no such environment or task.
        ValueError: image_size is not positive.
        ModuleNotFoundError: the extra that installs the simulator is missing; the message has the command.
        OpenGLError: no OpenGL that renders without a screen.
    """
    check_tasks(env, [task])
    sim = simulator(env)
    size = sim.image_size if image_size is None else image_size
    if size < 1:
        raise SimulationError(f"image_size is {size}; expected a positive number of pixels.")
    return sim.make(task, image_size=size)


class LatestEnvironment:
    """Cache of one environment: making one takes a second, and each holds memory."""

    def __init__(self, env: str, *, image_size: int | None = None) -> None:
        self._env, self._image_size = env, image_size
        self._environment: Environment | None = None

    def of(self, task: str) -> Environment:
        """The environment of a task, which replaces that of another task; see `make_environment` for the errors."""
        if self._environment is None or self._environment.task != task:
            self.close()
            self._environment = make_environment(self._env, task, image_size=self._image_size)
        return self._environment

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None
