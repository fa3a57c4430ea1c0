"""Output of a dataset inspection: terminal text, and a self-contained page with texts from assets/dataset.html."""

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
"""Maximum points of a curve on the page."""
_MAX_ROWS = 30
"""Maximum listed tasks and jumps."""


def render_dataset_page(inspection: Inspection) -> str:
    """Render the page of an inspection."""
    name, frames = Path(inspection.path).name, sum(inspection.lengths)
    problems = inspection.problems
    lengths = _plot("Lengths", "frames of each episode", "episode", {"prefix": inspection.lengths})
    sections: dict[str, dict[str, object]] = {
        "problems": {
            "list": definitions((problem.subject, problem.text) for problem in problems) if problems else "",
            "none": not problems,
        },
        "cameras": {
            "note": escape(_describe_cameras(inspection)),
            "cameras": "".join(map(_camera_html, inspection.cameras)),
        },
        "dimensions": {key: _dimensions_table(getattr(inspection, key)).to_html() for key in ("state", "actions")},
        "motion": {
            "figures": "".join(_motion_plots(inspection)),
            "jumps": _jumps_table(inspection).to_html() if inspection.jumps else "",
        },
        "episodes": {"lengths": lengths, "tasks": _tasks_table(inspection).to_html()},
        "next": {"path": escape(shlex.quote(inspection.path))},
    }
    tiles = [
        (format_count(len(inspection.lengths)), "episodes"),
        (format_count(frames), "frames"),
        (f"{frames / inspection.fps / 60:.1f} min", "of recording"),
        (f"{inspection.fps:g} Hz", "frames per second"),
        (format_count(len(inspection.tasks)), "tasks"),
        (format_count(len(problems)), "problems to check"),
    ]
    return html_page(
        f"{name}: a dataset",
        header=page_header(f"torchpi data inspect {inspection.path}", name, _summary(inspection), tiles=tiles),
        sections=[page_section("dataset.html", section, values) for section, values in sections.items()],
        footer="please confirm the guesses; the dataset was not changed",
    )


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print an inspection."""
    summary = f"{inspection.path}\n{_summary(inspection)}\nCameras: {_describe_cameras(inspection)}"
    console.print(Text(summary), soft_wrap=True)
    for title, dimensions in (("state", inspection.state), ("action", inspection.actions)):
        if dimensions:
            console.print(_dimensions_table(dimensions, title, reasons=False).to_rich(), crop=False)
    console.print(_tasks_table(inspection).to_rich(), crop=False)
    for problem in inspection.problems:
        console.print(Text.assemble((problem.subject, "yellow"), f": {problem.text}"), soft_wrap=True)
    if not inspection.problems:
        console.print("No problems were found.")


def _summary(inspection: Inspection) -> str:
    robot = f" of {inspection.robot_type}" if inspection.robot_type else ""
    clock = "" if inspection.clock_fps is None else f" ({inspection.clock_fps:.4g} by the timestamps)"
    lengths = np.array(inspection.lengths) / inspection.fps
    idle = "" if inspection.idle_share is None else f" {inspection.idle_share:.1%} of the frames are idle."
    return (
        f"Format {inspection.version}{robot}, {inspection.fps:g} frames per second{clock}; episodes of "
        f"{lengths.min():.1f} to {lengths.max():.1f} s, median {np.median(lengths):.1f} s.{idle}"
    )


def _describe_cameras(inspection: Inspection) -> str:
    texts = []
    for camera in inspection.cameras:
        depths = "" if camera.depths is None else f", {camera.depths[0]:.2f} to {camera.depths[1]:.2f} m"
        rate = "" if camera.video_fps is None else f", {camera.video_fps:g} frames per second"
        texts.append(f"{camera.key} {' × '.join(map(str, camera.shape))} ({camera.kind}{depths}{rate})")
    return f"{'; '.join(texts) or 'no cameras'}."


def _camera_html(camera: CameraFacts) -> str:
    images = (
        (title, data_uri(resize_with_pad(as_picture(image), 224, 224))) for title, image in camera.pictures.items()
    )
    return f'<h3 class="gap">{escape(camera.key)}</h3>{camera_images(images)}'


def _dimensions_table(dimensions: Sequence[Dimension], title: str = "dimension", *, reasons: bool = True) -> Table:
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


def _tasks_table(inspection: Inspection) -> Table:
    rows = [(format_count(count), task) for task, count in inspection.tasks.items()]
    if len(rows) > _MAX_ROWS:
        rows = [*rows[:_MAX_ROWS], ("", f"and {len(rows) - _MAX_ROWS} more")]
    return Table([Column("episodes", "number"), Column("task")], rows)


def _jumps_table(inspection: Inspection) -> Table:
    columns = [Column("dimension", "name"), *(Column(text, "number") for text in ("episode", "frame", "from", "to"))]
    rows = [
        (jump.dimension, str(jump.episode), str(jump.frame), format_number(jump.before), format_number(jump.after))
        for jump in inspection.jumps[:_MAX_ROWS]
    ]
    return Table(columns, rows)


def _motion_plots(inspection: Inspection) -> Iterator[str]:
    """Plots of state and action by dimension name, for the episode of median length."""
    dataset = inspection.dataset
    if dataset is None:
        return
    episode = int(np.argsort(dataset.episode_lengths)[len(dataset.episode_lengths) // 2])
    rows = dataset.episode_rows[episode]
    columns = {"prefix": (lerobot.STATE, inspection.state), "suffix": (lerobot.ACTION, inspection.actions)}
    curves: dict[str, dict[str, np.ndarray]] = {}  # dimension name → color → values
    for color, (column, dimensions) in columns.items():
        for dimension, values in zip(dimensions, dataset.columns[column][rows].T, strict=True):
            curves.setdefault(dimension.name, {}).setdefault(color, values)
    for name, by_color in curves.items():
        yield _plot(name, f"episode {dataset.episode_indices[episode]}", "frame", by_color)


def _plot(title: str, note: str, x: str, curves: Mapping[str, Sequence[int] | np.ndarray]) -> str:
    """Plot of values over their index, one curve per color."""

    def draw(drawing: "Figure") -> None:
        axes = drawing.add_subplot()
        for color, values in curves.items():
            shown = np.unique(np.linspace(0, len(values) - 1, _MAX_POINTS).astype(int))
            axes.plot(shown, np.asarray(values)[shown], color=COLORS[color])
        label_axes(axes, x=x)

    return figure(title, note, to_svg(draw_figure(draw, size=(5.4, 2.2)), f"{title}: {note}. x: {x}."))
