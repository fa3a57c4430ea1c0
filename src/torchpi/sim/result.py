"""What comes out of an evaluation."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.ui.tables import wilson_interval


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of an evaluation."""

    task: str
    index: int
    """Its number within the task."""
    seed: int
    """That of the environment's reset."""
    success: bool
    steps: int
    """Actions executed, until success or the end."""
    num_chunks: int
    unstable: bool = False
    """An action has broken the simulation, which ended the episode."""
    video: str | None = None
    """Path of its video, where there is one."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What came out for one task."""

    instruction: str
    """What the policy was told."""
    success_rate: float
    """0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of the rate."""
    episodes: int
    mean_steps: float | None
    """Of the successful episodes; None: there are none."""
    median_steps: float | None
    """As mean_steps."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    env: str
    policy: str
    """Its path or address."""
    seed: int
    success_rate: float
    """Of all episodes, 0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of it."""
    tasks: Mapping[str, TaskResult]
    num_steps: int | None
    """Euler steps; None: the policy's default."""
    execute_steps: int | None
    """Actions executed of each chunk; None: half of it."""
    max_steps: int
    blank_images: bool
    steps_per_second: float
    """Actions executed per second on the clock, policy and rendering included, in all processes together."""
    chunk_ms: float
    """Median time that the policy took for one chunk, in milliseconds."""
    seconds: float
    """The whole evaluation on the clock."""
    episodes: tuple[Episode, ...]
    """In the order of the tasks."""
    videos: tuple[str, ...]
    """Paths."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def task_result(instruction: str, episodes: Sequence[Episode]) -> TaskResult:
    """The result of one task's episodes."""
    steps = [episode.steps for episode in episodes if episode.success]
    rate, interval = success_rate(episodes)
    return TaskResult(
        instruction,
        rate,
        interval,
        episodes=len(episodes),
        mean_steps=float(statistics.mean(steps)) if steps else None,
        median_steps=float(statistics.median(steps)) if steps else None,
    )


def success_rate(episodes: Sequence[Episode]) -> tuple[float, tuple[float, float]]:
    """The part of the episodes that succeeded, with its interval."""
    successes = sum(episode.success for episode in episodes)
    return successes / len(episodes), wilson_interval(successes, len(episodes))
