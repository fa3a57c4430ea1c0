"""Tables of an evaluation, and the swap of instructions that shows whether a policy reads them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from torchpi.errors import SimulationError, UnknownKeyError
from torchpi.sim import simulator
from torchpi.ui.tables import Column, Rate, Table

if TYPE_CHECKING:
    from torchpi.sim.result import Evaluation


def success_table(
    evaluation: "Evaluation", measured: Mapping[str, Rate] | None = None, overall: Rate | None = None
) -> Table:
    """Success per task, and over several.

    Args:
        measured: rates by task from an earlier evaluation, for a column of their own.
        overall: of these, over all tasks.
    """
    columns = [
        Column("task", "name"),
        Column("instruction"),
        Column("success, 95 % interval"),
        Column("steps", "number"),
    ]
    columns += [Column("measured after training", "rate")] if measured else []
    rows = []
    for name, task in evaluation.tasks.items():
        rate = Rate(task.success_rate, task.interval, task.episodes)
        steps = "–" if task.mean_steps is None else f"{task.mean_steps:.0f}"
        rows.append([name, task.instruction, rate, steps, *([str(measured.get(name, "–"))] if measured else [])])
    if len(rows) == 1:
        return Table(columns, rows)
    rate = Rate(evaluation.success_rate, evaluation.interval, len(evaluation.episodes))
    return Table(columns, rows, ["all", "", rate, "", *([str(overall)] if measured else [])])


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print the table of a result."""
    console = Console(highlight=False)
    console.print(success_table(evaluation).to_rich())
    console.print(
        f"steps: mean of the successful episodes. {evaluation.chunk_ms:.0f} ms per chunk, "
        f"{evaluation.steps_per_second:.0f} steps/s, {evaluation.seconds:.0f} s altogether."
    )
    if unstable := sum(episode.unstable for episode in evaluation.episodes):
        console.print(f"{unstable} of the episodes failed because an action broke the simulation.")
    for video in evaluation.videos:
        console.print(f"video: {video}", soft_wrap=True)


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
