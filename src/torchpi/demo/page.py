"""The demo as one page: the videos, the table, and how the policy comes to its actions."""

import base64
import os
import pathlib
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

import numpy as np

from torchpi.demo.figures import loss_figure
from torchpi.demo.result import Demo, Glance
from torchpi.inspect.page import flow_section, input_section
from torchpi.inspect.provenance import Rate, describe_policy, losses, measured, overall
from torchpi.sim.result import Episode, Evaluation
from torchpi.ui.format import large_count
from torchpi.ui.page import html_page, page_header
from torchpi.ui.plots import data_uri, denoising_figures

EMBEDDED_BYTES = 16 * 2**20
"""Videos that are larger altogether stay beside the page instead of being in it."""


def render_demo(demo: Demo, folder: pathlib.Path) -> str:
    """The page, as HTML.

    Args:
        folder: where the page will be, for links to the videos.
    """
    evaluation = demo.evaluation
    if evaluation is not None:
        sections = [
            ("episodes", "Episodes", _films(demo, evaluation, folder)),
            ("success", "Success", _success(demo, evaluation)),
        ]
    else:
        sections = [("frames", "Camera frames", _frames(demo))]
    sections += [
        ("policy", "The policy", _policy(demo)),
        ("way", "The way", flow_section(demo.way.trace)),
        ("input", "What it sees", _input(demo)),
        ("chunk", "From noise to actions", _chunk(demo)),
        ("next", "Try next", _commands(demo.commands)),
    ]
    title = f"{demo.variant} in closed loop" if evaluation else f"{demo.variant} on packaged camera frames"
    return html_page(
        title,
        header=_top(demo, title),
        sections=sections,
        footer="this page needs nothing else; the policy ran on this machine's CPU",
    )


def _top(demo: Demo, title: str) -> str:
    robot, (horizon, size) = demo.policy.embodiment, demo.way.actions.shape
    tiles = [(large_count(sum(demo.way.trace.parameters.values())), "parameters")]
    if demo.evaluation is not None:
        episodes = demo.evaluation.episodes
        done = sum(episode.success for episode in episodes)
        tiles.append((f"{done} of {len(episodes)}", "episodes succeeded here"))
    if rates := measured(demo.policy):
        rate = overall(rates)
        tiles.append((f"{rate.success_rate:.0%}", f"measured in {rate.episodes} episodes after training"))
    tiles.append((f"{horizon} × {size}", "action chunk: actions × dimensions"))
    if demo.evaluation is not None:
        tiles.append((f"{demo.evaluation.chunk_ms:.0f} ms", "for one chunk on one core of the CPU"))
    tiles.append((f"{demo.way.trace.prefix_tokens}", "tokens of images and text"))
    executed = robot.execute_steps or horizon
    lede = (
        f"From {len(demo.way.trace.cameras)} small camera images, the state of an arm and an instruction in words, a "
        f"vision-language-action model decides the next {horizon} actions; the arm executes {executed} of them, and "
        "the model looks again. "
    )
    lede += (
        "Here it acts in a simulator, in episodes that it was not trained on."
        if demo.evaluation is not None
        else "Here it looks once at the beginning of each task, because nothing could be rendered."
    )
    notes = [f"Nothing can be rendered here: {demo.problem}."] if demo.problem else []
    return page_header("torchpi demo", title, lede, tiles=tiles, notes=notes)


# ---- episodes ----


def _films(demo: Demo, evaluation: Evaluation, folder: pathlib.Path) -> str:
    filmed = [(episode, pathlib.Path(episode.video)) for episode in evaluation.episodes if episode.video]
    embedded = sum(path.stat().st_size for _, path in filmed) <= EMBEDDED_BYTES
    figures = "".join(
        _film(episode, path, evaluation.tasks[episode.task].instruction, folder, embedded=embedded)
        for episode, path in filmed
    )
    size = demo.policy.model.config.image_size
    return (
        '<p class="lede">The first episode of each task, as its cameras see it; the policy itself gets these views '
        f"with {size} × {size} pixels. "
        'The line <i class="swatch executed"></i> is where the hand has been, the dots '
        '<i class="swatch predicted"></i> are where the current action chunk wants it to go. Below are the actions, '
        f'executed and predicted.</p><div class="videos">{figures}</div>'
    )


def _film(episode: Episode, path: pathlib.Path, instruction: str, folder: pathlib.Path, *, embedded: bool) -> str:
    link = quote(pathlib.Path(os.path.relpath(path, folder)).as_posix())
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}" if embedded else link
    outcome = '<span class="outcome good">✓ done</span>' if episode.success else (
        '<span class="outcome bad">✗ not done</span>'
    )  # fmt: skip
    return (
        f'<figure><video src="{source}" controls autoplay muted loop playsinline '
        f'aria-label="{escape(episode.task)}"></video><figcaption><b>“{escape(instruction)}”</b>{outcome}'
        f'<span class="mono">{escape(episode.task)} · <a href="{link}">{escape(path.name)}</a></span>'
        f'<span class="right">{episode.steps} steps</span></figcaption></figure>'
    )


def _success(demo: Demo, evaluation: Evaluation) -> str:
    rates = measured(demo.policy)
    here = {
        task: (result.instruction, Rate(result.success_rate, result.interval, result.episodes), result.mean_steps)
        for task, result in evaluation.tasks.items()
    }
    rows = "".join(
        _row(task, instruction, rate, steps, rates.get(task) if rates else None, with_measured=bool(rates))
        for task, (instruction, rate, steps) in here.items()
    )
    if len(here) > 1:
        total = Rate(evaluation.success_rate, evaluation.interval, len(evaluation.episodes))
        rows += _row("all", "", total, None, overall(rates) if rates else None, with_measured=bool(rates), css="all")
    heads = "".join(f"<th>{text}</th>" for text in ("task", "instruction", "done", "", "95 % interval"))
    heads += '<th class="num">steps</th>' + ("<th>measured after training</th>" if rates else "")
    few = (
        "So few episodes say little: the interval is where the true rate is likely to be. "
        if max(rate.episodes for _, rate, _ in here.values()) < 20
        else ""
    )
    return (
        '<p class="lede">Success is what the simulator defines for the task, whatever the policy was told; an episode '
        f"has failed after {evaluation.max_steps} steps. {few}Steps are the mean of the successful episodes.</p>"
        f'<div class="panel scroll"><table><tr>{heads}</tr>{rows}</table></div>'
    )


def _row(
    task: str,
    instruction: str,
    rate: Rate,
    steps: float | None,
    measured: Rate | None,
    *,
    with_measured: bool,
    css: str = "",
) -> str:
    low, high = rate.interval
    bar = (
        f'<span class="rate"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<u style="left:{100 * rate.success_rate:.1f}%"></u></span>'
    )
    cells = [
        f'<td class="name">{escape(task)}</td>',
        f'<td class="wide">{escape(instruction)}</td>',
        f"<td>{round(rate.success_rate * rate.episodes)} of {rate.episodes}</td>",
        f"<td>{bar}</td>",
        f"<td>{low:.0%} – {high:.0%}</td>",
        f'<td class="num">{"–" if steps is None else f"{steps:.0f}"}</td>',
    ]
    if with_measured:
        cells.append(f"<td>{'–' if measured is None else escape(str(measured))}</td>")
    return f'<tr class="{css}">{"".join(cells)}</tr>'


def _frames(demo: Demo) -> str:
    figures = "".join(_frame(demo, task, glance) for task, glance in demo.glances.items())
    return (
        '<p class="lede">The packaged frames of each task\'s first moment, and what the policy wants to do there. '
        f'Videos and a table of successes need a renderer.</p><div class="videos">{figures}</div>'
    )


def _frame(demo: Demo, task: str, glance: Glance) -> str:
    keys = [
        camera.key for camera in demo.policy.embodiment.read_cameras if camera.key and camera.key in glance.observation
    ]
    images = "".join(f'<img alt="{escape(key)}" src="{data_uri(np.asarray(glance.observation[key]))}">' for key in keys)
    return (
        f'<figure><div class="frames">{images}</div><figcaption><b>“{escape(str(glance.observation["prompt"]))}”</b>'
        f'<span class="right">{escape(task)}</span><span class="mono">{escape(_mean_actions(demo, glance))}</span>'
        "<span></span></figcaption></figure>"
    )


def _mean_actions(demo: Demo, glance: Glance) -> str:
    """The chunk of a glance in one line: the mean of each dimension."""
    names = [action.name for action in demo.policy.embodiment.actions]
    return ", ".join(f"{name} {mean:+.2f}" for name, mean in zip(names, glance.actions.mean(axis=0), strict=True))


# ---- the policy ----


def _policy(demo: Demo) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in describe_policy(demo.policy))
    curves = losses(demo.policy)
    names = {"loss": "flow-matching loss", "holdout_loss": "on held-out episodes"}
    figure = loss_figure({names[name]: points for name, points in curves.items()}) if curves else ""
    return (
        '<p class="lede">A small model that comes with torchpi; the code is the same as for the published ones.</p>'
        f'<div class="panel"><dl>{rows}</dl>{f"<div class=curves>{figure}</div>" if figure else ""}</div>'
    )


def _input(demo: Demo) -> str:
    assert demo.way.trace.values is not None
    return input_section(demo.way.trace, demo.way.trace.values)


def _chunk(demo: Demo) -> str:
    robot, way = demo.policy.embodiment, demo.way
    executed = robot.execute_steps
    ground = (
        f" The {executed} actions on coloured ground are executed, then the policy looks again." if executed else ""
    )
    figures = denoising_figures(way.chunk, [action.name for action in robot.actions], executed=executed)
    return (
        f'<p class="lede">The chunk for those images, the first moment of {escape(demo.task)}: each figure is one '
        f"dimension over the {len(way.actions)} actions, in the robot's units, before the first and behind every one "
        f"of {len(way.chunk) - 1} Euler steps.{ground}</p>{figures}"
    )


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div>{escape(what)}<code>{escape(command)}</code></div>" for what, command in commands)
    return f'<div class="panel commands">{rows}</div>'
