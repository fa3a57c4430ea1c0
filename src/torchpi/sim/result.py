"""The result of an evaluation, and its table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.rates import Rate, wilson_interval
from torchpi.ui.tables import Cell, Column, PlainConsole, Table


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
class TaskResult(Rate):
    """The result of one task."""

    instruction: str
    """The policy's."""
    mean_steps: float | None
    """Mean number of steps of the successful episodes; None: no episode succeeded."""
    median_steps: float | None
    """Median number of steps of the successful episodes; None: no episode succeeded."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    env: str
    policy: str
    """Its path or address."""
    seed: int
    success_rate: float
    """Fraction of all episodes that succeeded, 0 to 1."""
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
    """Actions executed per second on the clock, policy and rendering included, in all processes together; where all
    episodes had been kept, in one."""
    chunk_ms: float
    """Median time that the policy took for one chunk, in milliseconds."""
    seconds: float
    """This call on the clock, without the episodes that had been kept."""
    episodes: tuple[Episode, ...]
    """In the order of the tasks."""
    videos: tuple[str, ...]
    """Paths."""
    num_samples: int | None = None
    """Chunks that were sampled each time, one of which was executed; None: one."""
    pick: str | None = None
    """The choice among them."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def task_result(instruction: str, episodes: Sequence[Episode]) -> TaskResult:
    steps = [episode.steps for episode in episodes if episode.success]
    mean, median = (float(of(steps)) if steps else None for of in (statistics.mean, statistics.median))
    return TaskResult(*success_rate(episodes), len(episodes), instruction, mean, median)


def success_rate(episodes: Sequence[Episode]) -> tuple[float, tuple[float, float]]:
    successes = sum(episode.success for episode in episodes)
    return successes / len(episodes), wilson_interval(successes, len(episodes))


def success_table(
    evaluation: Evaluation, measured: Mapping[str, Rate] | None = None, overall: Rate | None = None
) -> Table:
    """Success per task, and over several.

    Args:
        measured: rates by task from an earlier evaluation, for a column of their own.
        overall: of these, over all tasks.
    """
    columns = [Column("task", "name"), Column("instruction"), Column("success, 95 % interval", "rate")]
    columns += [Column("steps", "number"), *([Column("measured after training", "rate")] if measured else [])]
    rows: list[list[Cell]] = []
    for name, task in evaluation.tasks.items():
        steps = "–" if task.mean_steps is None else f"{task.mean_steps:.0f}"
        rows.append([name, task.instruction, task, steps, *([str(measured.get(name, "–"))] if measured else [])])
    if len(rows) == 1:
        return Table(columns, rows)
    rate = Rate(evaluation.success_rate, evaluation.interval, len(evaluation.episodes))
    return Table(columns, rows, ["all", "", rate, "", *([str(overall)] if measured else [])])


def print_evaluation(evaluation: Evaluation) -> None:
    console = PlainConsole()
    console.print(success_table(evaluation).to_rich(), crop=False)
    console.print(
        f"steps: mean of the successful episodes. {evaluation.chunk_ms:.0f} ms per chunk, "
        f"{evaluation.steps_per_second:.0f} steps/s, {evaluation.seconds:.0f} s altogether."
    )
    if unstable := sum(episode.unstable for episode in evaluation.episodes):
        console.print(f"{unstable} of the episodes failed because an action broke the simulation.")
    for video in evaluation.videos:
        console.print(f"video: {video}", soft_wrap=True)
