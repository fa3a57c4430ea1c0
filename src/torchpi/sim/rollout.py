"""Closed-loop episodes of a policy in a simulator."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from torchpi.errors import SimulationError, counted, is_whole
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment
from torchpi.robots.keys import flatten, nest
from torchpi.samples import PickName, checked_pick
from torchpi.sim.environment import Environment, HasInitialStates, UnstableError


@runtime_checkable
class Actor(Protocol):
    """A `Policy`, or any object with its `infer` method."""

    @property
    def infer(self) -> Callable[..., Mapping[str, Any]]:
        """Method from an observation to {"actions": [H, a], …}, with the options `noise`, `num_steps`, `num_samples`
        and `pick` of `Policy.infer`."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Settings of an episode."""

    execute_steps: int | None = None
    """Actions of each chunk to execute before requesting the next; None: half of the chunk."""
    num_steps: int | None = None
    """Euler steps from noise to actions; None: the policy's default, 10."""
    max_steps: int | None = None
    """Actions after which the episode has failed; None: the environment's."""
    blank_images: bool = False
    """Replace all camera images with black ones, to measure what the policy can do without them."""
    num_samples: int | None = None
    """Chunks that the policy samples per request, one of which is executed; None: one."""
    pick: PickName | None = None
    """Rule that picks one of the samples, see `samples.Pick`."""

    def __post_init__(self) -> None:
        for name in ("execute_steps", "num_steps", "max_steps"):
            if (value := getattr(self, name)) is not None and (not is_whole(value) or value < 1):
                raise SimulationError(f"{name} must be at least 1, got {value}; expected a whole number.")
        checked_pick(self.pick, self.num_samples, self.num_steps)


@dataclasses.dataclass(frozen=True)
class RolloutStep:
    """Progress of an episode, passed to the callback for each new chunk and after each action."""

    step: int
    """Actions executed so far."""
    chunk: np.ndarray
    """The current chunk, [H, a]."""
    executed: int
    """Actions of the current chunk executed so far; 0 for a new chunk."""
    success: bool
    last: bool
    """True if the episode is over."""


Callback = Callable[[RolloutStep], None]


@dataclasses.dataclass(frozen=True)
class EpisodeOutcome:
    """Outcome of an episode."""

    success: bool
    steps: int
    """Number of executed actions."""
    chunk_ms: tuple[float, ...]
    """Inference time of each chunk in milliseconds."""
    seconds: float
    """Wall-clock duration of the episode."""
    unstable: bool = False
    """True if an action made the simulation diverge, which ended the episode."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seconds > 0 or not self.chunk_ms or not all(ms >= 0 for ms in self.chunk_ms):
            raise SimulationError(f"Expected steps, chunks and positive times, got {self!s:.200}.")


def run_episode(
    policy: Actor,
    environment: Environment,
    seed: int,
    *,
    episode: int | None = None,
    instruction: str | None = None,
    rollout: Rollout | None = None,
    noise: Callable[[int], np.ndarray] | None = None,
    callback: Callback | None = None,
) -> EpisodeOutcome:
    """Run one episode until the task is done or the steps are used up.

    Cameras are rendered only when a new chunk is requested.

    Args:
        seed: seed of the environment's reset.
        episode: index of the benchmark's initial state, for an environment that `HasInitialStates`; None: reset by the
            seed alone.
        instruction: the policy's prompt; None: the environment's instruction.
        noise: function from the index of a chunk to the initial noise for `Policy.infer`; None: the policy draws it.
        callback: called with each new chunk, and after each step.
    """
    rollout = rollout or Rollout()
    start = time.perf_counter()
    chunk_ms: list[float] = []
    if episode is None:
        environment.reset(seed)
    else:
        assert isinstance(environment, HasInitialStates)
        environment.reset_to(episode, seed)
    settings = {"num_steps": rollout.num_steps, "num_samples": rollout.num_samples, "pick": rollout.pick}
    options = {name: value for name, value in settings.items() if value is not None}
    steps, success, unstable, max_steps = 0, False, False, rollout.max_steps or environment.max_steps
    while steps < max_steps and not success and not unstable:
        observation = _observe(environment, instruction, rollout.blank_images)
        chunk_noise = {} if noise is None else {"noise": noise(len(chunk_ms))}
        request_time = time.perf_counter()
        chunk = _checked_chunk(policy.infer(observation, **chunk_noise, **options), environment.embodiment)
        chunk_ms.append(1e3 * (time.perf_counter() - request_time))
        if callback:
            callback(RolloutStep(steps, chunk, 0, success=False, last=False))
        for executed, action in enumerate(_executed_part(chunk, rollout.execute_steps), start=1):
            try:
                success = environment.step(action)
            except UnstableError:
                unstable = True
            steps += 1
            last = success or unstable or steps == max_steps
            if callback:
                callback(RolloutStep(steps, chunk, executed, success=success, last=last))
            if last:
                break
    return EpisodeOutcome(success, steps, tuple(chunk_ms), time.perf_counter() - start, unstable)


def episode_noise(seed: int, task: str, episode: int, shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    """Initial noise of each chunk of an episode, for `run_episode`; it depends on these arguments alone."""

    def draw(chunk: int) -> np.ndarray:
        return generator_at(seed, "eval noise", task, episode, chunk).standard_normal(shape, dtype=np.float32)

    return draw


def camera_keys(embodiment: Embodiment) -> list[str]:
    """Keys of the robot's cameras, nested keys joined by '.'."""
    return [camera.key for camera in embodiment.cameras if camera.key is not None]


def _observe(environment: Environment, instruction: str | None, blank_images: bool) -> dict[str, Any]:
    observation = environment.observe() | ({} if instruction is None else {"prompt": instruction})
    if blank_images:
        flat = flatten(observation)
        observation = nest(flat | {key: np.zeros_like(flat[key]) for key in camera_keys(environment.embodiment)})
    return observation


def _checked_chunk(result: Mapping[str, Any], robot: Embodiment) -> np.ndarray:
    chunk = np.asarray(result["actions"])
    if chunk.ndim != 2 or chunk.shape[1] != robot.action_size or not len(chunk):
        raise SimulationError(
            f"The policy returned actions {list(chunk.shape)}; {robot.name} takes [H, {robot.action_size}]."
        )
    if not np.isfinite(chunk).all():
        raise SimulationError("There is NaN or infinity in the actions that the policy returned.")
    return chunk


def _executed_part(chunk: np.ndarray, execute_steps: int | None) -> np.ndarray:
    if execute_steps is None:
        return chunk[: max(1, len(chunk) // 2)]
    if execute_steps > len(chunk):
        raise SimulationError(
            f"execute_steps is {execute_steps}, but the policy's chunk has only {counted(len(chunk), 'action')}."
        )
    return chunk[:execute_steps]
