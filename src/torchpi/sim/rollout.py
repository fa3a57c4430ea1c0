"""Closed-loop episodes: a policy acts in a simulator, a part of each chunk at a time."""

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
    """A `Policy`, or anything else that infers like one."""

    @property
    def infer(self) -> Callable[..., Mapping[str, Any]]:
        """A method: one observation to {"actions": [H, a], …}; `noise`, `num_steps`, `num_samples` and `pick` as in
        `Policy.infer`."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The settings of an episode."""

    execute_steps: int | None = None
    """Actions of each chunk that are executed before the next is asked for; None: half of the chunk."""
    num_steps: int | None = None
    """Euler steps from noise to actions; None: the policy's default, 10."""
    max_steps: int | None = None
    """Actions after which the episode has failed; None: the environment's."""
    blank_images: bool = False
    """Every camera is black: what remains possible without seeing."""
    num_samples: int | None = None
    """Chunks that the policy samples each time, to choose one of them; None: one."""
    pick: PickName | None = None
    """The choice among them, see `samples.Pick`."""

    def __post_init__(self) -> None:
        for name in ("execute_steps", "num_steps", "max_steps"):
            if (value := getattr(self, name)) is not None and (not is_whole(value) or value < 1):
                raise SimulationError(f"{name} must be at least 1, got {value}; expected a whole number.")
        checked_pick(self.pick, self.num_samples, self.num_steps)


@dataclasses.dataclass(frozen=True)
class RolloutStep:
    """The state of an episode for its callback: each chunk before its first action, and after each action."""

    step: int
    """Actions executed so far."""
    chunk: np.ndarray
    """[H, a], the chunk under execution."""
    executed: int
    """Actions of this chunk that have been executed; 0: it is new."""
    success: bool
    """The task is done."""
    last: bool
    """The episode is over."""


Callback = Callable[[RolloutStep], None]


@dataclasses.dataclass(frozen=True)
class EpisodeOutcome:
    """The outcome of an episode."""

    success: bool
    steps: int
    """Actions executed, until success or the end."""
    chunk_ms: tuple[float, ...]
    """For each chunk, the time that the policy took, in milliseconds."""
    seconds: float
    """Wall-clock duration of the episode."""
    unstable: bool = False
    """An action has broken the simulation, which ended the episode."""

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
    """One episode, until the task is done or the steps are used up.

    The cameras are rendered when a new chunk is asked for, not between.

    Args:
        seed: of the environment's reset.
        episode: begin in this one of the initial states of an environment that `HasInitialStates`; None: as the seed
            alone says.
        instruction: the policy's prompt; None: the environment's instruction.
        noise: the number of a chunk to the noise that it begins from, as `Policy.infer` takes it; None: the policy
            draws its own.
        callback: called with each new chunk, and after each step.
    """
    rollout = rollout or Rollout()
    start = time.perf_counter()
    times: list[float] = []
    if episode is None:
        environment.reset(seed)
    else:
        assert isinstance(environment, HasInitialStates)
        environment.reset_to(episode, seed)
    steps, success, unstable, limit = 0, False, False, rollout.max_steps or environment.max_steps
    while steps < limit and not success and not unstable:
        observation = _observe(environment, instruction, rollout.blank_images)
        options: dict[str, Any] = {} if noise is None else {"noise": noise(len(times))}
        for name in ("num_steps", "num_samples", "pick"):
            if (value := getattr(rollout, name)) is not None:
                options[name] = value
        asked = time.perf_counter()
        chunk = _checked_chunk(policy.infer(observation, **options), environment.embodiment)
        times.append(1e3 * (time.perf_counter() - asked))
        if callback:
            callback(RolloutStep(steps, chunk, 0, success=False, last=False))
        for executed, action in enumerate(_executed_part(chunk, rollout.execute_steps), start=1):
            try:
                success = environment.step(action)
            except UnstableError:
                unstable = True
            steps += 1
            last = success or unstable or steps == limit
            if callback:
                callback(RolloutStep(steps, chunk, executed, success=success, last=last))
            if last:
                break
    return EpisodeOutcome(success, steps, tuple(times), time.perf_counter() - start, unstable)


def episode_noise(seed: int, task: str, episode: int, shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    """The noise of each chunk of one episode, for `run_episode`: it depends on these arguments alone."""

    def draw(chunk: int) -> np.ndarray:
        return generator_at(seed, "eval noise", task, episode, chunk).standard_normal(shape, dtype=np.float32)

    return draw


def camera_keys(embodiment: Embodiment) -> list[str]:
    """The cameras that a robot sends, nested keys joined by '.'."""
    return [camera.key for camera in embodiment.cameras if camera.key is not None]


def _observe(environment: Environment, instruction: str | None, blank_images: bool) -> dict[str, Any]:
    observation = environment.observe() | ({} if instruction is None else {"prompt": instruction})
    if blank_images:
        flat = flatten(observation)
        observation = nest(flat | {key: np.zeros_like(flat[key]) for key in camera_keys(environment.embodiment)})
    return observation


def _checked_chunk(answer: Mapping[str, Any], robot: Embodiment) -> np.ndarray:
    chunk = np.asarray(answer["actions"])
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
