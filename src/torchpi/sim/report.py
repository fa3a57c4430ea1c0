"""An evaluation for people, and the swap of instructions that shows whether a policy reads them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Column, Table

from torchpi.errors import SimulationError, UnknownKeyError
from torchpi.sim import simulator

if TYPE_CHECKING:
    from torchpi.sim.result import Evaluation


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print the table of a result."""
    table = Table(
        Column("task", no_wrap=True),
        "instruction",
        "success",
        "95 % interval",
        "episodes",
        "steps",
        box=box.SIMPLE_HEAD,
    )
    for name, task in evaluation.tasks.items():
        steps = "–" if task.mean_steps is None else f"{task.mean_steps:.0f}"
        table.add_row(
            name,
            task.instruction,
            f"{task.success_rate:.0%}",
            _interval(task.interval),
            str(task.episodes),
            steps,
        )
    if len(evaluation.tasks) > 1:
        table.add_section()
        overall = f"{evaluation.success_rate:.0%}", _interval(evaluation.interval), str(len(evaluation.episodes))
        table.add_row("all", "", *overall, "")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"steps: mean of the successful episodes. {evaluation.chunk_ms:.0f} ms per chunk, "
        f"{evaluation.steps_per_second:.0f} steps/s, {evaluation.seconds:.0f} s altogether."
    )
    if unstable := sum(episode.unstable for episode in evaluation.episodes):
        console.print(f"{unstable} of the episodes failed because an action broke the simulation.")
    for video in evaluation.videos:
        console.print(f"video: {video}", soft_wrap=True)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.0%} – {interval[1]:.0%}"


def swapped_instructions(env: str, pairs: Sequence[str]) -> dict[str, str]:
    """Two tasks of each pair, "a:b", with each other's instruction."""
    own = simulator(env).instructions
    swapped: dict[str, str] = {}
    for pair in pairs:
        first, colon, second = pair.partition(":")
        if not colon or not first or not second or ":" in second:
            raise SimulationError(f"A swap is two tasks with ':' between them, got {pair!r}.")
        if unknown := [task for task in (first, second) if task not in own]:
            raise UnknownKeyError(f"{env} has no task {', '.join(map(repr, unknown))}; its tasks are {', '.join(own)}.")
        swapped |= {first: own[second], second: own[first]}
    return swapped
