"""The demo as one page: videos, success, the policy and its data flow."""

import base64
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

import numpy as np

from torchpi.demo.flow import DataFlow, DemoFrame
from torchpi.inspect.page import flow_section, input_section
from torchpi.inspect.provenance import describe_policy, measured, overall
from torchpi.policy import Policy
from torchpi.sim.result import Episode, Evaluation, success_table
from torchpi.training.curves import PANELS, draw_panel
from torchpi.training.run_folder import series
from torchpi.ui.format import large_count
from torchpi.ui.page import Section, commands, definitions, html_page, lede, page_header
from torchpi.ui.plots import data_uri, denoising_figures, draw_figure, to_svg

EMBEDDED_BYTES = 16 * 2**20
"""Videos that are larger altogether stay next to the page instead of being in it."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Results of the demo."""

    policy: Policy
    task: str
    """The task of the traced request's camera frames."""
    flow: DataFlow
    evaluation: Evaluation | None
    """The episodes; None: nothing could be rendered."""
    problem: str | None
    """The reason why nothing could be rendered."""
    frames: Mapping[str, DemoFrame]
    """In place of episodes: per task, the packaged camera frames with a chunk."""
    commands: Sequence[tuple[str, str]]
    """Commands to try next: a description, and the command."""


def render_demo(demo: Demo, folder: pathlib.Path) -> str:
    """Render the page as HTML.

    Args:
        folder: of the page, for links to the videos.
    """
    variant = demo.flow.trace.inputs.config.variant
    title = f"{variant} in closed loop" if demo.evaluation else f"{variant} on packaged camera frames"
    return html_page(
        title,
        header=_header(demo, title),
        sections=[
            *(_episode_sections(demo, demo.evaluation, folder) if demo.evaluation else [_frames_section(demo)]),
            ("policy", "The policy", _policy(demo.policy)),
            ("flow", "Data flow", flow_section(demo.flow.trace)),
            ("input", "Model inputs", input_section(demo.flow.trace, demo.flow.values)),
            ("denoising", "Denoising", _denoising(demo)),
            ("next", "Try next", commands(demo.commands)),
        ],
        footer="this page needs nothing else; the policy ran on this machine's CPU",
    )


def _header(demo: Demo, title: str) -> str:
    robot, (horizon, size), trace = demo.policy.embodiment, demo.flow.actions.shape, demo.flow.trace
    tiles = [(large_count(sum(trace.parameters.values())), "parameters")]
    if demo.evaluation is not None:
        episodes = demo.evaluation.episodes
        tiles.append((f"{sum(e.success for e in episodes)} of {len(episodes)}", "episodes succeeded here"))
    if rates := measured(demo.policy):
        rate = overall(rates)
        tiles.append((f"{rate.success_rate:.0%}", f"measured in {rate.episodes} episodes after training"))
    tiles.append((f"{horizon} × {size}", "action chunk: actions × dimensions"))
    if demo.evaluation is not None:
        tiles.append((f"{demo.evaluation.chunk_ms:.0f} ms", "for one chunk on one core of the CPU"))
    tiles.append((f"{trace.prefix_tokens}", "tokens of images and text"))
    summary = (
        f"From {len(trace.inputs.cameras)} small camera images, the state of an arm and an instruction in words, a "
        f"vision-language-action model predicts the next {horizon} actions; the arm executes "
        f"{robot.execute_steps or horizon} of them, and the model observes again. "
    )
    summary += (
        "Here it acts in a simulator, in episodes that it was not trained on."
        if demo.evaluation is not None
        else "Here it observes the beginning of each task once, because nothing could be rendered."
    )
    notes = [f"Nothing can be rendered here: {demo.problem}."] if demo.problem else []
    return page_header("torchpi demo", title, summary, tiles=tiles, notes=notes)


# ---- episodes, or the packaged frames ----


def _episode_sections(demo: Demo, evaluation: Evaluation, folder: pathlib.Path) -> list[Section]:
    shown = [(episode, pathlib.Path(episode.video)) for episode in evaluation.episodes if episode.video]
    embedded = sum(path.stat().st_size for _, path in shown) <= EMBEDDED_BYTES
    figures = "".join(
        _video(episode, path, evaluation.tasks[episode.task].instruction, folder, embedded=embedded)
        for episode, path in shown
    )
    size = demo.policy.model.config.image_size
    videos = lede(
        "The first episode of each task, as its cameras see it; the policy itself gets these views with "
        f'{size} × {size} pixels. The line <i class="swatch executed"></i> is the path of the hand, the dots '
        '<i class="swatch predicted"></i> are the path that the current action chunk predicts. Below are the actions, '
        "executed and predicted."
    )
    few = "So few episodes say little: the interval is where the true rate is likely to be. "
    is_few = max(task.episodes for task in evaluation.tasks.values()) < 20
    success = lede(
        "Success is defined by the simulator for the task, whatever the instruction; an episode has failed after "
        f"{evaluation.max_steps} steps. {few if is_few else ''}Steps are the mean of the successful episodes."
    )
    rates = measured(demo.policy)
    table = success_table(evaluation, rates, overall(rates) if rates else None)
    return [
        ("episodes", "Episodes", f'{videos}<div class="videos">{figures}</div>'),
        ("success", "Success", success + table.to_html()),
    ]


def _video(episode: Episode, path: pathlib.Path, instruction: str, folder: pathlib.Path, *, embedded: bool) -> str:
    link = quote(pathlib.Path(os.path.relpath(path, folder)).as_posix())
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}" if embedded else link
    css, outcome = ("good", "✓ done") if episode.success else ("bad", "✗ not done")
    return (
        f'<figure><video src="{source}" controls autoplay muted loop playsinline '
        f'aria-label="{escape(episode.task)}"></video><figcaption><b>“{escape(instruction)}”</b>'
        f'<span class="outcome {css}">{outcome}</span>'
        f'<span class="mono">{escape(episode.task)} · <a href="{link}">{escape(path.name)}</a></span>'
        f'<span class="right">{episode.steps} steps</span></figcaption></figure>'
    )


def _frames_section(demo: Demo) -> Section:
    figures = "".join(_frame(demo.policy, task, frame) for task, frame in demo.frames.items())
    text = (
        "The packaged frames of each task's beginning, and the mean of the chunk that the policy predicts there. "
        "Videos and a table of success need a renderer."
    )
    return "frames", "Camera frames", f'{lede(text)}<div class="videos">{figures}</div>'


def _frame(policy: Policy, task: str, frame: DemoFrame) -> str:
    robot = policy.embodiment
    keys = [camera.key for camera in robot.read_cameras if camera.key and camera.key in frame.observation]
    images = (f'<img alt="{escape(key)}" src="{data_uri(np.asarray(frame.observation[key]))}">' for key in keys)
    means = zip(robot.actions, frame.actions.mean(axis=0), strict=True)
    text = ", ".join(f"{action.name} {mean:+.2f}" for action, mean in means)
    return (
        f'<figure><div class="frames">{"".join(images)}</div>'
        f"<figcaption><b>“{escape(str(frame.observation['prompt']))}”</b>"
        f'<span class="right">{escape(task)}</span><span class="mono">{escape(text)}</span><span></span>'
        "</figcaption></figure>"
    )


# ---- the policy ----


def _policy(policy: Policy) -> str:
    curves, loss = series(policy.provenance.get("metrics") or ()), PANELS[0]
    ends = ", ".join(
        f"{label}: {curves[key][1][-1]:.3g}"
        for key, label in loss.curves.items()
        if key in curves and len(curves[key][1]) > 1
    )
    if not ends:
        return definitions(describe_policy(policy))
    drawing = draw_figure(lambda figure: draw_panel(figure.add_subplot(), curves, loss), size=(6.2, 2.7))
    svg = to_svg(drawing, f"{loss.title} of the training. Along: step. Up: {loss.unit}. Drawn: {ends} at the end.")
    caption = f"{loss.title} of the training: {ends} at the end"
    return (
        f'{definitions(describe_policy(policy))}<figure class="panel curves">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _denoising(demo: Demo) -> str:
    robot, flow = demo.policy.embodiment, demo.flow
    executed = robot.execute_steps
    ground = f" The {executed} actions on colored ground are executed, then the policy observes again."
    text = (
        f"The chunk for those images, the beginning of {escape(demo.task)}: each figure is one dimension over the "
        f"{len(flow.actions)} actions, in the robot's units, before the first Euler step and after each of "
        f"{len(flow.chunks) - 1}.{ground if executed else ''}"
    )
    return lede(text) + denoising_figures(flow.chunks, [action.name for action in robot.actions], executed=executed)
