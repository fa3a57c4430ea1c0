"""`torchpi demo`: the embedded policy in closed loop, with videos, a table and a page."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchpi.demo.frames import demo_observation, demo_tasks
from torchpi.demo.next_steps import next_steps
from torchpi.demo.page import EMBEDDED_BYTES, render_demo
from torchpi.demo.rendering import rendering_problem
from torchpi.demo.result import Demo, Glance
from torchpi.demo.way import describe, follow
from torchpi.errors import SimulationError
from torchpi.inspect.provenance import describe_policy
from torchpi.policy import Policy, load_policy
from torchpi.sim.actors import chosen_tasks, noise_shape
from torchpi.sim.evaluate import evaluate
from torchpi.sim.report import print_evaluation
from torchpi.sim.rollout import Rollout, episode_noise

ENV = "metaworld"
PAGE = "index.html"


def run_demo(
    out: pathlib.Path,
    *,
    episodes: int = 3,
    tasks: Sequence[str] | None = None,
    instruction: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    policy: str | pathlib.Path = "demo",
    rollout: Rollout | None = None,
) -> Demo:
    """Show the policy at work, on the terminal and in a folder: videos, and a page with everything.

    Where nothing can be rendered, it says why, and the policy sees the packaged camera frames instead.

    Args:
        out: the folder, made where it is missing; what an earlier demo left there is overwritten.
        episodes: per task.
        tasks: by name; None: those that the policy was trained on.
        instruction: what the policy is told instead of the task's own instruction, in one task, by default the first.
        seed: of episodes and noise.
        workers: processes; None: as many as the CPU's cores and the memory allow.
        policy: a path or "demo"; of a policy for Meta-World's arm.
        rollout: how the episodes are run.
    """
    if episodes < 1:
        raise SimulationError(f"The demo needs at least one episode per task, got {episodes}.")
    _make_folder(out)
    console = Console(highlight=False)
    loaded = load_policy(policy, device="cpu")
    chosen = _tasks(loaded, tasks, instruction)
    # The first chunk of the first film begins from the same frames and the same noise.
    task = chosen[0] if chosen[0] in demo_tasks() else demo_tasks()[0]
    way = follow(loaded, _observation(task, instruction), _first_noise(loaded, task, seed))
    _print_rows(console, "The policy", describe_policy(loaded))
    _print_rows(console, f"The way from images to actions, at the first moment of {task}", describe(way, loaded))
    evaluation, glances, problem = None, {}, rendering_problem()
    if problem is None:
        console.print(f"\n[bold]Episodes in the simulator[/bold], {episodes} of each task, the first of them filmed:")
        evaluation = evaluate(
            policy,
            ENV,
            tasks=chosen,
            episodes=episodes,
            seed=seed,
            rollout=rollout,
            instructions={} if instruction is None else {chosen[0]: instruction},
            workers=workers,
            videos=1,
            out=out,
            load={"device": "cpu"},
        )
    else:
        glances = {name: _glance(loaded, name, instruction, seed) for name in chosen}
    steps = next_steps(ENV, chosen_tasks(loaded, ENV, None), can_render=problem is None)
    demo = Demo(loaded, task, way, evaluation, problem, glances, steps)
    (out / PAGE).write_text(render_demo(demo, out), encoding="utf-8")
    _print_outcome(console, demo, instruction)
    _print_end(console, demo, out / PAGE)
    return demo


def _make_folder(out: pathlib.Path) -> None:
    """Before anything takes time."""
    if out.exists() and not out.is_dir():
        raise SimulationError(f"{out} is a file; the demo writes a folder, choose another one with --out.")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} can't be written to; choose another folder with --out.")


def _tasks(policy: Policy, tasks: Sequence[str] | None, instruction: str | None) -> list[str]:
    chosen = chosen_tasks(policy, ENV, tasks)
    if instruction is None:
        return chosen
    if tasks is not None and len(chosen) > 1:
        raise SimulationError(
            f"One instruction is for one task, got {', '.join(chosen)}; name one of them with --tasks, or none for "
            f"{chosen[0]}."
        )
    return chosen[:1]


def _observation(task: str, instruction: str | None) -> dict[str, Any]:
    """The packaged frames of a task, with another instruction if there is one."""
    return demo_observation(task) | ({} if instruction is None else {"prompt": instruction})


def _first_noise(policy: Policy, task: str, seed: int) -> np.ndarray:
    """[H, action_dim]: that of the first chunk of the task's first episode."""
    shape = noise_shape(policy)
    assert shape is not None
    return episode_noise(seed, task, 0, shape)(0)


def _glance(policy: Policy, task: str, instruction: str | None, seed: int) -> Glance:
    observation = _observation(task, instruction)
    return Glance(observation, policy.infer(observation, noise=_first_noise(policy, task, seed))["actions"])


# ---- the terminal ----


def _print_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"  {name}", escape(text))
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def _print_outcome(console: Console, demo: Demo, instruction: str | None) -> None:
    if demo.evaluation is None:
        _print_glances(console, demo)
        return
    print_evaluation(demo.evaluation)
    if instruction is not None:
        console.print("Success is what the simulator defines for the task, whatever the policy was told.")


def _print_glances(console: Console, demo: Demo) -> None:
    why = escape(demo.problem or "")
    console.print(f"\n[bold]Nothing can be rendered here[/bold], so there are no episodes and no videos: {why}.")
    console.print("\nThe policy sees packaged camera frames instead. What it wants to do, as the means of its chunks:")
    names = [action.name for action in demo.policy.embodiment.actions]
    means = Table("task", *names, box=box.SIMPLE_HEAD)
    for task, glance in demo.glances.items():
        means.add_row(task, *(f"{mean:+.2f}" for mean in glance.actions.mean(axis=0)))
    console.print(means)
    console.print(f"The chunk for {demo.task}, action by action:")
    chunk = Table("", *names, box=box.SIMPLE_HEAD)
    for i, action in enumerate(demo.way.actions):
        chunk.add_row(str(i), *(f"{value:+.3f}" for value in action))
    console.print(chunk)


def _print_end(console: Console, demo: Demo, page: pathlib.Path) -> None:
    what = "the plot of a chunk, and all of this, as a page"
    if demo.evaluation is not None:
        what = "the videos and all of this as one page"
        size = sum(os.path.getsize(video) for video in demo.evaluation.videos)
        if size > EMBEDDED_BYTES:
            what += ", which needs the videos beside it"
    console.print(f"\n[bold]{escape(str(page))}[/bold]: {what}", soft_wrap=True)
    console.print("\n[bold]Try next[/bold]")
    for text, command in demo.commands:
        console.print(f"  {escape(text)}\n    [cyan]{escape(command)}[/cyan]", soft_wrap=True)
