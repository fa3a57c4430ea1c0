"""HTML page of the demo: videos, success, the policy and its data flow. The texts are in assets/demo.html."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from torchpi.demo.flow import DataFlow, DemoFrame
from torchpi.inspect.page import trace_section
from torchpi.inspect.provenance import describe_policy, measured, overall
from torchpi.policy import Policy
from torchpi.robots import Embodiment
from torchpi.sim.page import video_figure
from torchpi.sim.result import Evaluation, success_table
from torchpi.training.curves import PANELS, draw_panel
from torchpi.training.run_folder import series
from torchpi.ui.format import large_count
from torchpi.ui.page import commands, definitions, html_page, page_header, page_section
from torchpi.ui.plots import data_uri, denoising_figures, draw_figure, to_svg

EMBEDDED_BYTES = 16 * 2**20
"""Total size of the videos up to which they are embedded in the page instead of linked."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Results of the demo."""

    policy: Policy
    task: str
    """Task of the traced request's camera frames."""
    flow: DataFlow
    evaluation: Evaluation | None
    """The episodes; None if nothing can be rendered."""
    problem: str | None
    """The reason why nothing can be rendered."""
    frames: Mapping[str, DemoFrame]
    """Without a renderer: the packaged camera frames of each task, with the policy's chunk."""
    commands: Sequence[tuple[str, str]]
    """Commands to try next, each a description and a command line."""


def render_demo(demo: Demo, folder: pathlib.Path) -> str:
    """Render the page as HTML, with links to the videos relative to the page's folder."""
    variant = demo.flow.trace.inputs.config.variant
    title = f"{variant} in closed loop" if demo.evaluation else f"{variant} on packaged camera frames"
    values = {"policy": _policy(demo.policy), "denoising": _denoising(demo)}
    if demo.evaluation is None:
        values["frames"] = {"frames": "".join(_frame(demo.policy.embodiment, *frame) for frame in demo.frames.items())}
    else:
        values |= {"episodes": _episodes(demo, demo.evaluation, folder), "success": _success(demo, demo.evaluation)}
    sections = {name: page_section("demo.html", name, section_values) for name, section_values in values.items()}
    sections |= {name: trace_section(name, demo.flow.trace) for name in ("flow", "input")}
    sections["next"] = "next", "Try next", commands(demo.commands)
    order = ("episodes", "success", "frames", "policy", "flow", "input", "denoising", "next")
    return html_page(
        title,
        header=_header(demo, title),
        sections=[sections[name] for name in order if name in sections],
        footer="this page needs nothing else; the policy ran on this machine's CPU",
    )


def _header(demo: Demo, title: str) -> str:
    robot, (horizon, size), trace = demo.policy.embodiment, demo.flow.actions.shape, demo.flow.trace
    tiles = [(large_count(sum(trace.parameters.values())), "parameters")]
    summary = (
        f"From {len(trace.inputs.cameras)} small camera images, the state of an arm and an instruction in words, a "
        f"vision-language-action model predicts the next {horizon} actions; the arm executes "
        f"{robot.execute_steps or horizon} of them, and the model observes again. "
    )
    if demo.evaluation is not None:
        episodes = demo.evaluation.episodes
        tiles.append((f"{sum(e.success for e in episodes)} of {len(episodes)}", "episodes succeeded here"))
        summary += "Here it acts in a simulator, in episodes that it was not trained on."
    else:
        summary += "Here it observes the beginning of each task once, because nothing could be rendered."
    if rates := measured(demo.policy):
        rate = overall(rates)
        tiles.append((f"{rate.success_rate:.0%}", f"measured in {rate.episodes} episodes after training"))
    tiles.append((f"{horizon} × {size}", "action chunk: actions × dimensions"))
    if demo.evaluation is not None:
        tiles.append((f"{demo.evaluation.chunk_ms:.0f} ms", "for one chunk on one core of the CPU"))
    tiles.append((f"{trace.prefix_tokens}", "tokens of images and text"))
    notes = [f"Nothing can be rendered here: {demo.problem}."] if demo.problem else []
    return page_header("torchpi demo", title, summary, tiles=tiles, notes=notes)


# ---- episodes, or the packaged frames ----


def _episodes(demo: Demo, evaluation: Evaluation, folder: pathlib.Path) -> dict[str, Any]:
    embedded = sum(pathlib.Path(video).stat().st_size for video in evaluation.videos) <= EMBEDDED_BYTES
    videos = (
        video_figure(episode, evaluation.tasks[episode.task].instruction, folder, embedded=embedded)
        for episode in evaluation.episodes
        if episode.video
    )
    return {"size": demo.policy.model.config.image_size, "videos": "".join(videos)}


def _success(demo: Demo, evaluation: Evaluation) -> dict[str, Any]:
    rates = measured(demo.policy)
    table = success_table(evaluation, rates, overall(rates) if rates else None)
    few = max(task.episodes for task in evaluation.tasks.values()) < 20
    return {"max_steps": evaluation.max_steps, "few": few, "table": table.to_html()}


def _frame(robot: Embodiment, task: str, frame: DemoFrame) -> str:
    observation, chunk = frame
    keys = [camera.key for camera in robot.read_cameras if camera.key and camera.key in observation]
    images = (f'<img alt="{escape(key)}" src="{data_uri(np.asarray(observation[key]))}">' for key in keys)
    means = zip(robot.actions, chunk.mean(axis=0), strict=True)
    text = ", ".join(f"{action.name} {mean:+.2f}" for action, mean in means)
    return (
        f'<figure><div class="frames">{"".join(images)}</div>'
        f"<figcaption><b>“{escape(str(observation['prompt']))}”</b>"
        f'<span class="right">{escape(task)}</span><span class="mono">{escape(text)}</span><span></span>'
        "</figcaption></figure>"
    )


# ---- the policy ----


def _policy(policy: Policy) -> dict[str, Any]:
    """The policy's origin and, if its provenance has them, its loss curves."""
    curves, loss = series(policy.provenance.get("metrics") or ()), PANELS[0]
    losses = {label: curves[key][1] for key, label in loss.curves.items() if key in curves}
    ends = ", ".join(f"{label}: {values[-1]:.3g}" for label, values in losses.items() if len(values) > 1)
    curve = ""
    if ends:
        drawing = draw_figure(lambda figure: draw_panel(figure.add_subplot(), curves, loss), size=(6.2, 2.7))
        text = f"{loss.title} during training. x: step. y: {loss.unit}. At the end: {ends}."
        curve = to_svg(drawing, text)
    facts = definitions(describe_policy(policy))
    return {"facts": facts, "title": escape(loss.title), "ends": escape(ends), "curve": curve}


def _denoising(demo: Demo) -> dict[str, Any]:
    chunks, executed = demo.flow.chunks, demo.policy.embodiment.execute_steps
    figures = denoising_figures(chunks, demo.policy.embodiment.action_names, executed=executed)
    counts = {"steps": len(chunks) - 1, "horizon": chunks.shape[1], "executed": executed}
    return counts | {"task": escape(demo.task), "figures": figures}
