"""Views of a look at a dataset: text, and a page that needs nothing else, whose texts are in assets/dataset.html."""

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from torchpi.data import format as lerobot
from torchpi.data.guesses import Guess
from torchpi.data.inspect import CameraFacts, Dimension, Inspection, as_picture
from torchpi.transforms.images import resize_with_pad
from torchpi.ui.format import format_count, format_number
from torchpi.ui.page import camera_images, definitions, figure, html_page, page_header, page_section
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import data_uri, draw_figure, label_axes, to_svg
from torchpi.ui.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_POINTS = 240
"""Points of a curve on the page."""
_LISTED = 30
"""Rows of a list on the page and in the text, of tasks and jumps."""


def render_dataset_page(found: Inspection) -> str:
    """HTML of what was found."""
    name = Path(found.path).name
    problems = definitions((problem.subject, problem.text) for problem in found.problems)
    sections: dict[str, dict[str, object]] = {
        "problems": {"list": problems if found.problems else "", "none": not found.problems},
        "cameras": {"note": escape(_cameras_text(found)), "cameras": "".join(map(_camera, found.cameras))},
        "dimensions": {key: _dimensions(getattr(found, key)).to_html() for key in ("state", "actions")},
        "motion": {"figures": "".join(_motion(found)), "jumps": _jumps(found).to_html() if found.jumps else ""},
        "episodes": {"lengths": _lengths(found), "tasks": _tasks(found).to_html()},
        "next": {"path": escape(shlex.quote(found.path))},
    }
    return html_page(
        f"{name}: a dataset",
        header=page_header(f"torchpi data inspect {found.path}", name, _summary(found), tiles=list(_tiles(found))),
        sections=[page_section("dataset.html", name, values) for name, values in sections.items()],
        footer="guesses are for people to confirm; nothing of the dataset was changed",
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print what was found."""
    console.print(Text(f"{found.path}\n{_summary(found)}"), soft_wrap=True)
    console.print(Text(f"Cameras: {_cameras_text(found)}"), soft_wrap=True)
    for title, dimensions in (("state", found.state), ("action", found.actions)):
        if dimensions:
            console.print(_dimensions(dimensions, title, reasons=False).to_rich())
    console.print(_tasks(found).to_rich())
    for problem in found.problems:
        console.print(Text.assemble((problem.subject, "yellow"), f": {problem.text}"), soft_wrap=True)
    if not found.problems:
        console.print("Nothing to look at was found.")


def _summary(found: Inspection) -> str:
    robot = f" of {found.robot_type}" if found.robot_type else ""
    clock = "" if found.clock_fps is None else f" ({found.clock_fps:.4g} by the timestamps)"
    lengths = np.array(found.lengths) / found.fps
    idle = "" if found.idle_share is None else f" {found.idle_share:.1%} of the frames are idle."
    return (
        f"Format {found.version}{robot}, {found.fps:g} frames per second{clock}; episodes of {lengths.min():.1f} to "
        f"{lengths.max():.1f} s, median {np.median(lengths):.1f} s.{idle}"
    )


def _tiles(found: Inspection) -> Iterator[tuple[str, str]]:
    yield format_count(len(found.lengths)), "episodes"
    yield format_count(sum(found.lengths)), "frames"
    yield f"{sum(found.lengths) / found.fps / 60:.1f} min", "of recording"
    yield f"{found.fps:g} Hz", "frames per second"
    yield format_count(len(found.tasks)), "tasks"
    yield format_count(len(found.problems)), "to look at"


def _cameras_text(found: Inspection) -> str:
    return f"{'; '.join(map(_camera_text, found.cameras)) or 'no cameras'}."


def _camera_text(camera: CameraFacts) -> str:
    depths = "" if camera.depths is None else f", {camera.depths[0]:.2f} to {camera.depths[1]:.2f} m"
    rate = "" if camera.video_fps is None else f", {camera.video_fps:g} frames per second"
    return f"{camera.key} {' × '.join(map(str, camera.shape))} ({camera.kind}{depths}{rate})"


def _camera(camera: CameraFacts) -> str:
    pictures = (
        (place, data_uri(resize_with_pad(as_picture(image), 224, 224))) for place, image in camera.pictures.items()
    )
    return f'<h3 class="gap">{escape(camera.key)}</h3>{camera_images(pictures)}'


def _dimensions(dimensions: Sequence[Dimension], title: str = "dimension", *, reasons: bool = True) -> Table:
    columns = [Column(title, "name"), *(Column(text, "number") for text in ("min", "1 %", "99 %", "max"))]
    columns += [Column("unit?"), Column("command?"), Column("because", "soft")]
    rows = []
    for dim in dimensions:
        numbers = (format_number(value) for value in (dim.low, dim.q01, dim.q99, dim.high))
        command = (_guess(dim.command), dim.command.reason) if dim.command else ("", "")
        rows.append((dim.name, *numbers, _guess(dim.unit), *command))
    shown = len(columns) - (not any(dim.command for dim in dimensions)) * 2 if reasons else len(columns) - 1
    return Table(columns[:shown], [row[:shown] for row in rows])


def _guess(guess: Guess) -> str:
    return f"{guess.value or ''}{'' if guess.certain else '?'}"


def _tasks(found: Inspection) -> Table:
    rows = [(format_count(count), task) for task, count in list(found.tasks.items())[:_LISTED]]
    if len(found.tasks) > _LISTED:
        rows.append(("", f"and {len(found.tasks) - _LISTED} more"))
    return Table([Column("episodes", "number"), Column("task")], rows)


def _jumps(found: Inspection) -> Table:
    columns = [Column("dimension", "name"), *(Column(text, "number") for text in ("episode", "frame", "from", "to"))]
    rows = [
        (jump.dimension, str(jump.episode), str(jump.frame), format_number(jump.before), format_number(jump.after))
        for jump in found.jumps[:_LISTED]
    ]
    return Table(columns, rows)


def _motion(found: Inspection) -> Iterator[str]:
    """A plot per name of a dimension, of the episode of median length."""
    if found.dataset is None:
        return
    lengths = found.dataset.episode_lengths
    chosen = int(np.argsort(lengths)[len(lengths) // 2])
    end = int(np.cumsum(lengths)[chosen])
    rows = np.unique(np.linspace(end - lengths[chosen], end - 1, _MAX_POINTS).astype(int))
    columns = {"prefix": (lerobot.STATE, found.state), "suffix": (lerobot.ACTION, found.actions)}
    for name in dict.fromkeys(dim.name for _, dims in columns.values() for dim in dims):
        curves = {
            color: found.dataset.columns[column][rows, [dim.name for dim in dims].index(name)]
            for color, (column, dims) in columns.items()
            if any(dim.name == name for dim in dims)
        }
        drawing = draw_figure(partial(_draw_motion, frames=rows - rows[0], curves=curves), size=(5.4, 2.2))
        drawn = " and ".join({"prefix": "state", "suffix": "action"}[color] for color in curves)
        title = f"episode {found.dataset.episode_indices[chosen]}"
        yield figure(name, title, to_svg(drawing, f"{name} in {title}. Along: frames. Drawn: {drawn}."))


def _draw_motion(drawing: "Figure", frames: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    axes = drawing.add_subplot()
    for color, values in curves.items():
        axes.plot(frames, values, color=COLORS[color])
    label_axes(axes, x="frame")


def _lengths(found: Inspection) -> str:
    def draw(drawing: "Figure") -> None:
        axes = drawing.add_subplot()
        axes.stairs(found.lengths, fill=True, color=COLORS["prefix"])
        label_axes(axes, x="episode", y="frames")

    return figure(
        "Lengths", "frames of each episode", to_svg(draw_figure(draw, size=(5.4, 2.4)), "Frames per episode.")
    )
