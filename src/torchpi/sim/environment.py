"""The interface of a simulator, so that policies can be run in it and episodes recorded from it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from torchpi.errors import SimulationError
from torchpi.randomness import checked_seed, generator_at
from torchpi.robots import Embodiment


@runtime_checkable
class Environment(Protocol):
    """One task of a simulator, in one process. Rendering happens in `observe` and `render` only, never in `step`."""

    task: str
    """Its name, as `make_environment` takes it."""
    instruction: str
    """The text that tells a policy what to do; part of every observation."""
    embodiment: Embodiment
    """The simulated robot: the keys of `observe`, the dimensions of an action, the rate."""
    max_steps: int
    """Actions after which an episode has failed."""

    def reset(self, seed: int) -> None:
        """Begin an episode. The same seed gives the same episode, whatever happened before.

        Raises:
            ValueError: the seed is not a whole number from 0 to 2³² - 1.
        """

    def observe(self) -> dict[str, Any]:
        """The robot's observation now, in the embodiment's keys; renders its cameras."""

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [a]; whether the task is done, as the simulator defines success.

        Raises:
            ValueError: the action is not [a], or not finite.
            UnstableError: the simulation cannot continue from this state.
        """

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action now, [a]; NotImplementedError where there is none."""

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Each camera's view, uint8 [h, w, 3] with a height of `size`, for people to look at."""

    def close(self) -> None:
        """Free what the simulator holds."""


@runtime_checkable
class HasInitialStates(Protocol):
    """An environment of a benchmark, whose evaluations begin in states that it comes with."""

    def reset_to(self, episode: int, seed: int) -> None:
        """Begin the n-th episode of an evaluation with a seed; a ValueError where there is none."""


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """The settings of an evaluation that is asked for no others: those of a benchmark's published rates."""

    seed: int = 0
    episodes: int = 20
    """Per task."""
    execute_steps: int | None = None
    """Actions of each chunk that are executed; None: what the policy recommends."""
    initial_states: int | None = None
    """Of each task, for one episode each: the environment `HasInitialStates`, and an evaluation is of all tasks."""


@dataclasses.dataclass(frozen=True)
class Simulator:
    """An environment before anything is simulated."""

    instructions: Mapping[str, str]
    """Its tasks by name."""
    embodiment: Embodiment
    """Its robot."""
    max_steps: int
    """Actions after which an episode has failed."""
    image_size: int
    """Height and width of the robot's cameras, unless another is asked for."""
    make: Callable[..., Environment]
    """Its class: task and image_size to an environment."""
    expert_tasks: tuple[str, ...]
    """Those with a scripted expert, which can be recorded."""
    package: str
    """The distribution that simulates it."""
    extra: str = "sim"
    """That of torchpi which installs it."""
    disturbance: tuple[float | int, ...] | None = None
    """A disturbance of 1 in each dimension of an action, added to it in its units; None: actions are from -1 to 1, and
    a push takes the place of one."""
    protocol: EvalProtocol = EvalProtocol()
    memory_bytes: int = 2**30
    """Of a process with one of its environments, without a policy."""
    tail: int = 5
    """Recorded actions after success, so that the last chunks before it have actions to the end."""
    success_lasts: bool = False
    """An episode is recorded only if it is a success at the end of its tail, too: what was put down stays there."""


@runtime_checkable
class RendersLater(Protocol):
    """An environment whose images cost far more than its physics: a recording renders successes only, and of them the
    frames that it needs."""

    def moment(self) -> Any:
        """The state that `observe` would show."""

    def observe_moment(self, moment: Any, *, images: bool = True) -> dict[str, Any]:
        """The observation of a moment of the present episode; without the images far cheaper."""


class UnstableError(Exception):
    """An action, though finite, has broken the simulation: the episode has failed."""


@runtime_checkable
class ShowsHands(Protocol):
    """An environment that knows where its robot's hands are and would go: videos then draw their paths."""

    def hands(self) -> np.ndarray:
        """The tip of each hand, [n, 3], in metres."""

    def hands_after(self, chunk: np.ndarray) -> np.ndarray:
        """The hands' positions after each action of a chunk [H, a] from here, [H, n, 3]; for the eye, not exact."""

    def project(self, points: np.ndarray, size: int) -> tuple[str, np.ndarray]:
        """The view of `render(size)` to draw in, and the points [k, 3] as its pixels (x, y), [k, 2]."""


def environment_seed(purpose: Literal["record", "eval"], seed: int, task: str, episode: int, attempt: int = 0) -> int:
    """The seed of the `reset` of a task's n-th episode, from that of the whole run; of a recording also of the attempt.

    Recording has the even numbers and evaluation the odd ones, so that no policy is evaluated in an episode that it was
    trained on, whatever the seeds of the two runs.
    """
    drawn = int(generator_at(seed, f"{purpose} episodes", task, episode, attempt).integers(2**31))
    return 2 * drawn + (purpose == "eval")  # below 2³², the largest that all simulators take


def episode_seed(seed: Any) -> int:
    """The seed of a `reset`, up to the largest that all simulators take."""
    return checked_seed(seed, below=2**32)


def check_action(action: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """The action as float64 [a]."""
    array = np.asarray(action, np.float64)
    if array.shape != (embodiment.action_size,):
        raise SimulationError(
            f"{embodiment.name} takes an action [{embodiment.action_size}] "
            f"({', '.join(embodiment.action_names)}), got {list(array.shape)}."
        )
    if not np.isfinite(array).all():
        raise SimulationError(f"There is NaN or infinity in the action {array.tolist()}; the simulator would break.")
    return array
