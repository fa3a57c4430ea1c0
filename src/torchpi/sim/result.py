"""The result of an evaluation, and its table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.rates import Rate
from torchpi.ui.tables import Cell, Column, PlainConsole, Table


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of an evaluation."""

    task: str
    index: int
    """Index within the task."""
    seed: int
    """Seed of the environment's reset."""
    success: bool
    steps: int
    """Number of executed actions."""
    num_chunks: int
    unstable: bool = False
    """True if an action made the simulation diverge, which ended the episode."""
    video: str | None = None
    """Path of its video."""


@dataclasses.dataclass(frozen=True)
class TaskResult(Rate):
    """The result of one task."""

    instruction: str
    """The policy's prompt."""
    mean_steps: float | None
    """Mean number of steps of the successful episodes; None: no episode succeeded."""
    median_steps: float | None
    """Median number of steps of the successful episodes; None: no episode succeeded."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    env: str
    policy: str
    """Path or address."""
    seed: int
    success_rate: float
    """Fraction of all episodes that succeeded, 0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of the success rate."""
    tasks: Mapping[str, TaskResult]
    num_steps: int | None
    """Euler steps; None: the policy's default."""
    execute_steps: int | None
    """Actions executed per chunk; None: half of the chunk."""
    max_steps: int
    blank_images: bool
    steps_per_second: float
    """Actions executed per second of wall-clock time, inference and rendering included, by all processes together; by
    one process if all episodes had been saved before."""
    chunk_ms: float
    """Median inference time per chunk in milliseconds."""
    seconds: float
    """Wall-clock duration of the call, without episodes saved before."""
    episodes: tuple[Episode, ...]
    """In the order of the tasks."""
    videos: tuple[str, ...]
    """Paths of the videos."""
    num_samples: int | None = None
    """Chunks sampled per request, one of which was executed; None: one."""
    pick: str | None = None
    """Rule that picked one of the samples."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def task_result(instruction: str, episodes: Sequence[Episode]) -> TaskResult:
    steps = [episode.steps for episode in episodes if episode.success]
    mean = float(statistics.mean(steps)) if steps else None
    median = float(statistics.median(steps)) if steps else None
    rate = Rate.of(len(steps), len(episodes))
    return TaskResult(**vars(rate), instruction=instruction, mean_steps=mean, median_steps=median)


def success_table(
    evaluation: Evaluation, measured: Mapping[str, Rate] | None = None, overall: Rate | None = None
) -> Table:
    """Table of the success per task and, of several tasks, over all.

    Args:
        measured: rates by task from an evaluation after training, shown in another column.
        overall: the rate over all tasks in that evaluation.
    """
    columns = [Column("task", "name"), Column("instruction"), Column("success, 95 % interval", "rate")]
    columns.append(Column("steps", "number"))
    rows: list[list[Cell]] = []
    for name, task in evaluation.tasks.items():
        steps = "–" if task.mean_steps is None else f"{task.mean_steps:.0f}"
        rows.append([name, task.instruction, task, steps])
    total: list[Cell] = ["all", "", Rate(evaluation.success_rate, evaluation.interval, len(evaluation.episodes)), ""]
    if measured:
        columns.append(Column("measured after training", "rate"))
        for row, name in zip(rows, evaluation.tasks, strict=True):
            row.append(str(measured.get(name, "–")))
        total.append(str(overall))
    return Table(columns, rows, total) if len(rows) > 1 else Table(columns, rows)


def print_evaluation(evaluation: Evaluation) -> None:
    console = PlainConsole()
    console.print(success_table(evaluation).to_rich(), crop=False)
    console.print(
        f"steps: mean of the successful episodes. {evaluation.chunk_ms:.0f} ms per chunk, "
        f"{evaluation.steps_per_second:.0f} steps/s, {evaluation.seconds:.0f} s in total."
    )
    if unstable := sum(episode.unstable for episode in evaluation.episodes):
        console.print(f"{unstable} of the episodes failed because an action broke the simulation.")
    for video in evaluation.videos:
        console.print(f"video: {video}", soft_wrap=True)
