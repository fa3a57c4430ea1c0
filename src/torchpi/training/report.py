"""The report of a training run, finished or not: RUN/report.html."""

import base64
import io
import json
import math
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from torchpi.atomic import replace_text
from torchpi.errors import first_of, listed
from torchpi.rates import Rate
from torchpi.training.config import TrainConfig
from torchpi.training.curves import (
    CHUNK_UNIT,
    TABLES,
    Panel,
    chunk_steps,
    dimension_panel,
    draw_chunk_steps,
    draw_panel,
    is_drawable,
    panels,
    robots,
)
from torchpi.training.run_folder import Run, as_number
from torchpi.training.summary import show_parameters
from torchpi.ui.format import format_count, format_gib
from torchpi.ui.page import bars, commands, definitions, figure, html_page, page_header, page_section
from torchpi.ui.plots import draw_figure, to_svg
from torchpi.ui.tables import Column, Table

REPORT = "report.html"
IMAGE_BYTES = 400 * 2**10
"""Plots with larger files are scaled down and compressed for the page."""


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Write RUN/report.html, a self-contained page, and return its path.

    Args:
        folder: the folder of a run that is finished, still running, or has crashed.
    """
    run, name = Run(folder), folder.resolve().name
    sections = {
        "curves": _curves(run),
        "success": _success(run),
        "chunks": _chunks(run),
        "plots": {"plots": "".join(_plot(*plot) for plot in run.plots())},
        "parameters": _parameters(run),
        "origin": _origin(run),
        "recipe": _recipe(run),
        "use": _commands(run),
    }
    page = html_page(
        f"{name}: a training run",
        header=page_header("torchpi train", name, _summary(run), tiles=list(_tiles(run)), notes=list(_notes(run))),
        sections=[page_section("training.html", key, texts) for key, texts in sections.items() if any(texts.values())],
        footer="this page needs nothing else; torchpi makes it from the files of the run",
    )
    replace_text(folder / REPORT, page)
    return folder / REPORT


# ---- the header ----


def _summary(run: Run) -> str:
    init, data = run.recipe.get("init") or "random weights", run.source.get("dataset")
    subject = f"From {init}, on {pathlib.Path(str(data)).name}" if data else "A policy"
    if run.finished:
        return f"{subject}: trained to the end."
    total = f" of {format_count(run.num_steps)}" if run.num_steps else ""
    progress = f"step {format_count(run.step)}{total}" if run.step else "no step is logged yet"
    status = "it was stopped before the last step" if run.info.get("finished") else "it is running, or was killed"
    return f"{subject}: {progress}; {status}."


def _tiles(run: Run) -> Iterator[tuple[str, str]]:
    yield format_count(run.step), f"steps of {format_count(run.num_steps)}" if run.num_steps else "steps"
    for key, (style, text) in TABLES["tiles"].items():
        if (value := run.end(key)) is not None:
            yield format(value, style), text
    if run.duration is not None:
        yield run.duration, "wall-clock time"


def _notes(run: Run) -> Iterator[str]:
    """Damaged files, non-finite values, interruptions and missing records."""
    yield from run.notes
    for key in (key for panel in panels(run.lines) for key in panel.curves if key in run.series):
        steps, values = run.series[key]
        not_finite = steps[~np.isfinite(values)]
        if len(not_finite):
            yield f"{key} is not finite in {len(not_finite)} of {len(steps)} lines, first at step {not_finite[0]}."
    if run.resumes:
        resumed_at = ", ".join(map(str, run.resumes[:12])) + (", …" if len(run.resumes) > 12 else "")
        yield f"The run was interrupted and resumed; the first lines after that are of step {resumed_at}."
    if missing := ", ".join(_missing(run)):
        yield f"Not recorded: {missing}."


def _missing(run: Run) -> Iterator[str]:
    if not run.recipe:
        yield "train.json"
    if not run.info:
        yield "run.json"
    else:
        yield from (f"{name} in run.json" for name in ("datasets", "parameters", "init") if name not in run.info)
    if not run.lines:
        yield "any line of metrics.jsonl"
    else:
        for key in (key for panel in panels(run.lines) for key in panel.curves):
            is_measured = run.recipe.get(TABLES["switches"].get(key, ""), True)
            if key not in run.series and is_measured:
                yield f"{key} in metrics.jsonl"
    if not run.checkpoints:
        yield "a checkpoint"


# ---- plots ----


def _curves(run: Run) -> dict[str, Any]:
    figures = "".join(_panel_figure(run, panel) for panel in panels(run.lines) if is_drawable(run.series, panel))
    return {"figures": figures, "empty": not figures}


def _panel_figure(run: Run, panel: Panel) -> str:
    ends = {label: value for key, label in panel.curves.items() if (value := run.end(key)) is not None}
    texts = {label: f"{value:.1%}" if panel.percent else f"{value:.4g}" for label, value in ends.items()}
    end = ", ".join(f"{label}: {text}" if len(panel.curves) > 1 else text for label, text in texts.items())
    description = f"x: step, to {run.step}. y: {panel.unit}. Curves: {listed(texts)}."
    return _figure(panel.title, f"{end} at the end", partial(draw_panel, curves=run.series, panel=panel), description)


def _figure(title: str, note: str, draw: Callable[[Any], object], description: str) -> str:
    drawing = draw_figure(lambda drawing: draw(drawing.add_subplot()), size=(5.4, 2.7))
    return figure(title, note, to_svg(drawing, f"{title}. {description}"))


def _chunks(run: Run) -> dict[str, Any]:
    """Errors of sampled chunks, per robot."""
    names = robots(run.lines)
    titles = {suffix: f" of {name}" if len(names) > 1 else "" for suffix, name in names.items()}
    return {"robots": "".join(_robot_chunks(run, suffix, of_robot) for suffix, of_robot in titles.items())}


def _robot_chunks(run: Run, suffix: str, of_robot: str) -> str:
    figures = ""
    dims = run.last_mapping(f"chunk_error_dims{suffix}")
    if panel := dimension_panel(run.series, suffix, f"Error per dimension{of_robot}"):
        constant = [name for name, value in dims.items() if value is None]
        num_moving = len(dims) - len(constant)
        notes = []
        if num_moving > len(panel.curves):
            notes.append(f"{len(panel.curves)} of {num_moving}, the largest")
        if constant:
            notes.append(f"never moving: {', '.join(constant)}")
        description = f"x: training step. y: {CHUNK_UNIT}. One curve per dimension."
        draw = partial(draw_panel, curves=run.series, panel=panel)
        figures += _figure(panel.title, "; ".join(notes), draw, description)
    if evaluations := chunk_steps(run.lines, suffix):
        description = f"x: step of the chunk. y: {CHUNK_UNIT}. One curve per evaluation."
        draw = partial(draw_chunk_steps, evaluations=evaluations)
        figures += _figure(
            f"Error over the chunk{of_robot}", "later evaluations have stronger lines", draw, description
        )
    html = f'<div class="multiples plots">{figures}</div>' if figures else ""
    if dims:
        html += f'<h3 class="gap">Last evaluation{escape(of_robot)}</h3>{bars(_dimension_bars(dims))}'
    return html


def _dimension_bars(dims: Mapping[str, Any]) -> Iterator[tuple[str, float | int, str]]:
    values = {name: as_number(value) for name, value in dims.items()}
    largest = max((value for value in values.values() if value is not None and math.isfinite(value)), default=0) or 1
    for name, value in values.items():
        if value is None:
            yield name, 0, "constant"
        elif math.isfinite(value):
            yield name, value / largest, f"{value:.4f}"
        else:
            yield name, 0, "not finite"


def _plot(kind: str, robot: str, path: pathlib.Path) -> str:
    caption = f"{robot}: {TABLES['plots'][kind]}" if robot else TABLES["plots"][kind]
    try:
        source = _embedded(path)
    except OSError as error:  # damaged, truncated, or not an image
        return f'<p class="aside">{escape(path.name)} cannot be shown: {escape(str(error))}</p>'
    step = int(path.name.split("_")[0])
    return (
        f'<figure class="panel image"><img src="{source}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)} After {format_count(step)} steps.</figcaption></figure>"
    )


def _embedded(path: pathlib.Path) -> str:
    """The image as a data URI; a large file is scaled down and compressed."""
    kind, data = "png", path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if len(data) > IMAGE_BYTES:
            image.thumbnail((1600, 1600))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=80, optimize=True)
            kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- tables ----


def _success(run: Run) -> dict[str, Any]:
    tasks = {task: result for task, result in run.last_mapping("success").items() if isinstance(result, Mapping)}
    if not tasks:
        return {}
    step = next(line["step"] for line in reversed(run.lines) if line.get("success") is not None)
    columns = [Column("task", "name"), Column("success, 95 % interval", "rate")]
    table = Table(columns, [(task, _rate(result)) for task, result in tasks.items()])
    return {"step": format_count(step), "table": table.to_html()}


def _rate(result: Mapping[str, Any]) -> str | Rate:
    try:
        return Rate.from_json(result)
    except (KeyError, TypeError, ValueError):  # written by another version
        return _text(result.get("success_rate"))


def _parameters(run: Run) -> dict[str, Any]:
    recorded = run.info.get("parameters")
    parts = [part for part in recorded if isinstance(part, Mapping)] if isinstance(recorded, list) else []
    text, table = show_parameters(parts)
    return {"text": text, "table": table.to_html()} if parts else {}


def _origin(run: Run) -> dict[str, Any]:
    """Rows about the data, the initial weights, the machine and the time."""
    rows = [(name, run.info[name]) for name in ("command", "started", "finished") if name in run.info]
    if isinstance(init := run.info.get("init"), Mapping):
        rows += [(text, init[name]) for name, text in TABLES["init"].items() if init.get(name)]
    rows += _data(run)
    rows += [(name, run.info[name]) for name in ("device", "world_size", "torch", "torchpi") if name in run.info]
    if (memory := run.end("memory")) is not None:
        rows.append(("memory", f"{format_gib(memory)} at most"))
    if run.checkpoints:
        rows.append(("checkpoints", [path.name.lstrip("0") or "0" for path in run.checkpoints]))
    return {"rows": definitions((name, _text(value)) for name, value in rows) if rows else "", "empty": not rows}


def _data(run: Run) -> list[tuple[str, Any]]:
    datasets = run.info.get("datasets")
    if not isinstance(datasets, list):
        return [("data", run.source["dataset"])] if run.source.get("dataset") else []
    if len(datasets) == 1 and isinstance(datasets[0], Mapping):
        return [(f"data: {name.replace('_', ' ')}", value) for name, value in datasets[0].items() if name != "weight"]
    return [(f"data {i}", dataset) for i, dataset in enumerate(datasets, start=1)]


def _recipe(run: Run) -> dict[str, Any]:
    defaults = _flat(json.loads(json.dumps(TrainConfig().options)))
    recipe = _flat(run.recipe)
    changed = {name for name, value in recipe.items() if defaults.get(name, value) != value}
    rows = [(name, _text(value), _text(defaults[name]) if name in changed else "") for name, value in recipe.items()]
    table = Table(
        [Column("field", "name"), Column("value"), Column("default", "soft")],
        rows,
        marked=[i for i, name in enumerate(recipe) if name in changed],
    )
    html = table.to_html() if rows else ""
    return {"changed": len(changed), "count": len(recipe), "table": html, "empty": not rows}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries, with names such as augmentation.crop."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _text(value: Any) -> str:
    """Format a value of a JSON document."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return first_of([f"{name}: {_text(inner)}" for name, inner in value.items()], 12, "; ")
    if isinstance(value, list):
        return first_of([_text(inner) for inner in value], 12)
    if isinstance(value, int):
        return format_count(value) if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- commands ----


def _commands(run: Run) -> dict[str, Any]:
    if not run.checkpoints:
        return {"commands": "", "empty": True}
    policy = (run.checkpoints[-1] / "policy").relative_to(run.folder).as_posix()
    arguments = {"policy": policy, "environment": _environment(run), "dataset": _dataset(run)}
    values = {name: shlex.quote(value) for name, value in arguments.items() if value}
    if not run.finished:
        values["steps_left"] = ""
    entries = [entry for entry in TABLES["commands"] if entry["needs"] in values]
    texts = ((entry["text"], entry["command"].format_map(values)) for entry in entries)
    return {"policy": policy, "commands": commands(texts)}


def _environment(run: Run) -> str | None:
    """The simulator of the recipe, or the only one for its robot; None if there is none."""
    from torchpi.sim import ENVIRONMENTS, simulator  # training itself does not need it

    if run.recipe.get("env"):
        return str(run.recipe["env"])
    robot = run.source.get("embodiment")
    matching = [name for name in ENVIRONMENTS if robot in (name, simulator(name).embodiment.name)]
    return matching[0] if len(matching) == 1 else None


def _dataset(run: Run) -> str | None:
    """The dataset's address, or its path relative to the run folder; None if it does not exist any more."""
    dataset = str(run.source.get("dataset") or "")
    if "://" in dataset:
        return dataset
    exists = (pathlib.Path(dataset) / "meta").is_dir()
    return pathlib.Path(os.path.relpath(dataset, run.folder)).as_posix() if exists else None
