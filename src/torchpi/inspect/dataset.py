"""Views of a look at a dataset: text, and a page that needs nothing else, whose texts are in assets/dataset.html."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from torchpi.data import format as lerobot
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
    name, frames = Path(found.path).name, sum(found.lengths)
    problems = definitions((problem.subject, problem.text) for problem in found.problems) if found.problems else ""
    lengths = _plot("Lengths", "frames of each episode", "episode", {"prefix": found.lengths})
    sections: dict[str, dict[str, object]] = {
        "problems": {"list": problems, "none": not found.problems},
        "cameras": {"note": escape(_cameras(found)), "cameras": "".join(map(_pictures, found.cameras))},
        "dimensions": {key: _dimensions(getattr(found, key)).to_html() for key in ("state", "actions")},
        "motion": {"figures": "".join(_motion(found)), "jumps": _jumps(found).to_html() if found.jumps else ""},
        "episodes": {"lengths": lengths, "tasks": _tasks(found).to_html()},
        "next": {"path": escape(shlex.quote(found.path))},
    }
    tiles = [
        (format_count(len(found.lengths)), "episodes"),
        (format_count(frames), "frames"),
        (f"{frames / found.fps / 60:.1f} min", "of recording"),
        (f"{found.fps:g} Hz", "frames per second"),
        (format_count(len(found.tasks)), "tasks"),
        (format_count(len(found.problems)), "to look at"),
    ]
    return html_page(
        f"{name}: a dataset",
        header=page_header(f"torchpi data inspect {found.path}", name, _summary(found), tiles=tiles),
        sections=[page_section("dataset.html", section, values) for section, values in sections.items()],
        footer="guesses are for people to confirm; nothing of the dataset was changed",
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print what was found."""
    console.print(Text(f"{found.path}\n{_summary(found)}\nCameras: {_cameras(found)}"), soft_wrap=True)
    for title, dimensions in (("state", found.state), ("action", found.actions)):
        if dimensions:
            console.print(_dimensions(dimensions, title, reasons=False).to_rich(), crop=False)
    console.print(_tasks(found).to_rich(), crop=False)
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


def _cameras(found: Inspection) -> str:
    texts = []
    for camera in found.cameras:
        depths = "" if camera.depths is None else f", {camera.depths[0]:.2f} to {camera.depths[1]:.2f} m"
        rate = "" if camera.video_fps is None else f", {camera.video_fps:g} frames per second"
        texts.append(f"{camera.key} {' × '.join(map(str, camera.shape))} ({camera.kind}{depths}{rate})")
    return f"{'; '.join(texts) or 'no cameras'}."


def _pictures(camera: CameraFacts) -> str:
    small = ((place, resize_with_pad(as_picture(image), 224, 224)) for place, image in camera.pictures.items())
    return (
        f'<h3 class="gap">{escape(camera.key)}</h3>{camera_images((place, data_uri(image)) for place, image in small)}'
    )


def _dimensions(dimensions: Sequence[Dimension], title: str = "dimension", *, reasons: bool = True) -> Table:
    guesses = ["unit?", "command?"] if any(dim.command for dim in dimensions) else ["unit?"]
    columns = [Column(title, "name"), *(Column(text, "number") for text in ("min", "1 %", "99 %", "max"))]
    columns += [*map(Column, guesses), *([Column("because", "soft")] if reasons else [])]
    rows = []
    for dim in dimensions:
        numbers = map(format_number, (dim.low, dim.q01, dim.q99, dim.high))
        guessed = [guess for guess in (dim.unit, dim.command) if guess is not None]
        values = (f"{guess.value}{'' if guess.certain else '?'}" for guess in guessed)
        rows.append((dim.name, *numbers, *values, *([guessed[-1].reason] if reasons else [])))
    return Table(columns, rows)


def _tasks(found: Inspection) -> Table:
    rows = [(format_count(count), task) for task, count in found.tasks.items()]
    more = [("", f"and {len(rows) - _LISTED} more")] if len(rows) > _LISTED else []
    return Table([Column("episodes", "number"), Column("task")], rows[:_LISTED] + more)


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
    rows = found.dataset.episode_rows[chosen]
    columns = {"prefix": (lerobot.STATE, found.state), "suffix": (lerobot.ACTION, found.actions)}
    curves: dict[str, dict[str, np.ndarray]] = {}
    for color, (column, dimensions) in columns.items():
        for dimension, values in zip(dimensions, found.dataset.columns[column][rows].T, strict=True):
            curves.setdefault(dimension.name, {}).setdefault(color, values)
    for name, of_name in curves.items():
        yield _plot(name, f"episode {found.dataset.episode_indices[chosen]}", "frame", of_name)


def _plot(title: str, note: str, x: str, curves: Mapping[str, Sequence[int] | np.ndarray]) -> str:
    """A plot of values by their number, one curve per colour."""

    def draw(drawing: "Figure") -> None:
        axes = drawing.add_subplot()
        for color, values in curves.items():
            shown = np.unique(np.linspace(0, len(values) - 1, _MAX_POINTS).astype(int))
            axes.plot(shown, np.asarray(values)[shown], color=COLORS[color])
        label_axes(axes, x=x)

    return figure(title, note, to_svg(draw_figure(draw, size=(5.4, 2.2)), f"{title}: {note}. Along: {x}."))
