"""The interface of a simulated environment, for running policies and recording episodes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from torchpi.errors import SimulationError
from torchpi.randomness import checked_seed, generator_at
from torchpi.robots import Embodiment


@runtime_checkable
class Environment(Protocol):
    """One simulated task in one process. Only `observe` and `render` render images; `step` never does."""

    task: str
    """Name of the task, as `make_environment` takes it."""
    instruction: str
    """Default prompt, part of every observation."""
    embodiment: Embodiment
    """The simulated robot: the keys of `observe`, the dimensions of an action, the control rate."""
    max_steps: int
    """Actions after which an episode has failed."""

    def reset(self, seed: int) -> None:
        """Begin an episode. The same seed gives the same episode, whatever ran before.

        Raises:
            ValueError: the seed is not a whole number from 0 to 2³² - 1.
        """

    def observe(self) -> dict[str, Any]:
        """The current observation in the embodiment's keys, with rendered camera images."""

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [a] and return whether the task is done, by the simulator's definition of success.

        Raises:
            ValueError: the action is not [a], or not finite.
            UnstableError: the simulation cannot continue from this state.
        """

    def expert_action(self) -> np.ndarray:
        """The scripted expert's next action, [a]; NotImplementedError if the task has no expert."""

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Each camera's view for display, uint8 [h, w, 3] with a height of `size` pixels."""

    def close(self) -> None:
        """Release the simulator's resources."""


@runtime_checkable
class HasInitialStates(Protocol):
    """An environment of a benchmark that ships the initial states for evaluations."""

    def reset_to(self, episode: int, seed: int) -> None:
        """Begin the n-th evaluation episode with a seed; a ValueError if there is no such initial state."""


@runtime_checkable
class DefersRendering(Protocol):
    """An environment whose rendering costs far more than its physics.

    A recording renders only successful episodes, and only the frames that it needs.
    """

    def snapshot(self) -> Any:
        """The current state, for a later `observe_snapshot` in the same episode."""

    def observe_snapshot(self, snapshot: Any, *, images: bool = True) -> dict[str, Any]:
        """The observation that `observe` would have returned; without images it is far cheaper."""


@runtime_checkable
class ShowsHands(Protocol):
    """An environment that knows the positions of its robot's hands, so that videos can draw their paths."""

    def hands(self) -> np.ndarray:
        """Position of each hand's tip in metres, [n, 3]."""

    def hands_after(self, chunk: np.ndarray) -> np.ndarray:
        """Approximate positions of the hands after each action of a chunk [H, a] from the current state, [H, n, 3]."""

    def project(self, points: np.ndarray, size: int) -> tuple[str, np.ndarray]:
        """A view of `render(size)`, by name, and the pixels (x, y) in it of points [k, 3], as [k, 2]."""


class UnstableError(Exception):
    """A finite action made the simulation diverge; the episode has failed."""


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """Default settings of an evaluation; a benchmark's are those of its published rates."""

    seed: int = 0
    episodes: int = 20
    """Episodes per task."""
    execute_steps: int | None = None
    """Actions executed per chunk; None: the policy's recommendation."""
    initial_states: int | None = None
    """Number of the benchmark's initial states per task, each for one episode. If set, the environment
    `HasInitialStates`, and an evaluation runs all tasks by default."""


@dataclasses.dataclass(frozen=True)
class Simulator:
    """Description of an environment, available without its simulator."""

    instructions: Mapping[str, str]
    """Task name to instruction."""
    embodiment: Embodiment
    max_steps: int
    """Actions after which an episode has failed."""
    image_size: int
    """Default height and width of the robot's camera images in pixels."""
    make: Callable[..., Environment]
    """Makes an environment from `task` and `image_size`."""
    expert_tasks: tuple[str, ...]
    """Tasks with a scripted expert, which can be recorded."""
    package: str
    """Distribution that contains the simulator."""
    extra: str = "sim"
    """Extra of torchpi that installs it."""
    disturbance: tuple[float | int, ...] | None = None
    """Scale of a recording's noise and pushes per action dimension, in its units; both are added to the action. None:
    actions are limited to ±1, noise is added, and a push replaces the action."""
    protocol: EvalProtocol = EvalProtocol()
    memory_bytes: int = 2**30
    """Memory of a process with one environment and no policy."""
    tail: int = 5
    """Actions recorded after success, so that the last chunks before it have actions to their end."""
    success_lasts: bool = False
    """An episode is recorded only if it is still a success at the end of its tail, for example if an object stays where
    it was put."""


def environment_seed(purpose: Literal["record", "eval"], seed: int, task: str, episode: int, attempt: int = 0) -> int:
    """The seed for `Environment.reset` of a task's n-th episode, and of a recording's n-th attempt at it.

    Recordings use even seeds and evaluations odd ones, so that no policy is evaluated in an episode that it was trained
    on, whatever the seeds of the two runs.
    """
    drawn = int(generator_at(seed, f"{purpose} episodes", task, episode, attempt).integers(2**31))
    return 2 * drawn + (purpose == "eval")  # below 2³², the limit of all simulators


def episode_seed(seed: Any) -> int:
    """Check a seed for `Environment.reset`; all simulators accept seeds below 2³²."""
    return checked_seed(seed, below=2**32)


def check_action(action: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """The action as float64 [a]; a ValueError for another shape or values that are not finite."""
    array = np.asarray(action, np.float64)
    if array.shape != (embodiment.action_size,):
        raise SimulationError(
            f"{embodiment.name} takes an action [{embodiment.action_size}] "
            f"({', '.join(embodiment.action_names)}), got {list(array.shape)}."
        )
    if not np.isfinite(array).all():
        raise SimulationError(f"There is NaN or infinity in the action {array.tolist()}; the simulator would break.")
    return array
