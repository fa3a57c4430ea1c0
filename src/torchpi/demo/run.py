"""`torchpi demo`: the embedded policy in closed loop, with videos, a table and an HTML page."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from torchpi.atomic import make_folder, replace_text
from torchpi.demo.flow import DemoFrame, describe_flow, trace_request
from torchpi.demo.frames import demo_observation, demo_tasks
from torchpi.demo.next_steps import next_steps
from torchpi.demo.page import EMBEDDED_BYTES, Demo, render_demo
from torchpi.errors import SimulationError
from torchpi.inspect.provenance import describe_policy
from torchpi.policy import Policy, load_policy
from torchpi.sim.actors import chosen_tasks
from torchpi.sim.evaluate import evaluate
from torchpi.sim.gl import rendering_problem
from torchpi.sim.result import print_evaluation
from torchpi.sim.rollout import Rollout, episode_noise
from torchpi.ui.tables import Column, Table, grid

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
    """Run the policy, print its results, and write a page and videos; without a renderer, use packaged frames.

    Args:
        out: folder for the page and videos; an earlier demo in it is overwritten.
        episodes: episodes per task.
        tasks: names of tasks; None: those that the policy was trained on.
        instruction: another instruction for the policy, in the only task, or the first one if `tasks` is None.
        seed, workers, rollout: see `evaluate`.
        policy: "demo", or the path of a policy for Meta-World's arm.
    """
    if episodes < 1:
        raise SimulationError(f"The demo needs at least one episode per task, got {episodes}.")
    make_folder(out)
    console = Console(highlight=False)
    loaded = load_policy(policy, device="cpu")
    chosen = _chosen_tasks(loaded, tasks, instruction)
    # The first chunk of the first video is predicted from the same frames and noise.
    task = chosen[0] if chosen[0] in demo_tasks() else demo_tasks()[0]
    prompt = {} if instruction is None else {"prompt": instruction}
    flow = trace_request(loaded, demo_observation(task) | prompt, _first_noise(loaded, task, seed))
    _print_facts(console, "The policy", describe_policy(loaded))
    _print_facts(console, f"Data flow at the beginning of {task}", describe_flow(flow, loaded))
    evaluation, frames = None, dict[str, DemoFrame]()
    if (problem := rendering_problem()) is None:
        console.print(f"\n[bold]Episodes in the simulator[/bold], {episodes} of each task, with a video of the first:")
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
        print_evaluation(evaluation)
        if instruction is not None:
            console.print("Success is defined by the simulator for the task, whatever the instruction.")
    else:
        frames = {name: _packaged_frame(loaded, name, prompt, seed) for name in chosen}
    steps = next_steps(ENV, chosen_tasks(loaded.provenance, ENV, None), can_render=problem is None)
    demo = Demo(loaded, task, flow, evaluation, problem, frames, steps)
    if problem is not None:
        _print_frames(console, demo)
    _write_page(console, demo, out / PAGE)
    return demo


def _print_facts(console: Console, title: str, facts: Sequence[tuple[str, str]]) -> None:
    rows = [(Text(f"  {name}", style="cyan"), Text(text)) for name, text in facts]
    console.print(Text(f"\n{title}", style="bold"), grid((), rows), sep="\n")


def _chosen_tasks(policy: Policy, tasks: Sequence[str] | None, instruction: str | None) -> list[str]:
    chosen = chosen_tasks(policy.provenance, ENV, tasks)
    if instruction is None:
        return chosen
    if tasks is not None and len(chosen) > 1:
        raise SimulationError(
            f"An instruction is for one task, got {', '.join(chosen)}; choose one with --tasks, or leave it out for "
            f"{chosen[0]}."
        )
    return chosen[:1]


def _first_noise(policy: Policy, task: str, seed: int) -> np.ndarray:
    """Initial noise of the first chunk of a task's first episode, [H, action_dim]."""
    return episode_noise(seed, task, 0, policy.model.config.chunk_shape)(0)


def _packaged_frame(policy: Policy, task: str, prompt: dict[str, Any], seed: int) -> DemoFrame:
    observation = demo_observation(task) | prompt
    return observation, policy.infer(observation, noise=_first_noise(policy, task, seed))["actions"]


def _print_frames(console: Console, demo: Demo) -> None:
    problem = escape(str(demo.problem))
    console.print(f"\n[bold]Nothing can be rendered here[/bold], so there are no episodes and no videos: {problem}.")
    console.print("\nThe policy sees packaged camera frames instead. Means of the predicted chunks:")
    numbers = [Column(action.name, "number") for action in demo.policy.embodiment.actions]
    means = [(name, *(f"{mean:+.2f}" for mean in chunk.mean(axis=0))) for name, (_, chunk) in demo.frames.items()]
    console.print(Table([Column("task", "name"), *numbers], means).to_rich(), crop=False)
    console.print(f"The chunk for {demo.task}, action by action:")
    actions = [(str(i), *(f"{value:+.3f}" for value in action)) for i, action in enumerate(demo.flow.actions)]
    console.print(Table([Column("", "number"), *numbers], actions).to_rich(), crop=False)


def _write_page(console: Console, demo: Demo, page: pathlib.Path) -> None:
    replace_text(page, render_demo(demo, page.parent))
    content = "a page with these results and a plot of the chunk"
    if demo.evaluation is not None:
        content = "a page with these results and the videos"
        if sum(os.path.getsize(video) for video in demo.evaluation.videos) > EMBEDDED_BYTES:
            content += ", which needs the videos next to it"
    console.print(f"\n[bold]{escape(str(page))}[/bold]: {content}", soft_wrap=True)
    console.print("\n[bold]Try next[/bold]")
    for text, command in demo.commands:
        console.print(f"  {escape(text)}\n    [cyan]{escape(command)}[/cyan]", soft_wrap=True)
