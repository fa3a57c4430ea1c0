"""How a training run goes, or went, as one page: RUN/report.html.

It is made from what lies in the run's folder, whatever of it there is:

train.json      the recipe
run.json        command, started and finished (ISO 8601), torchpi, torch, device, world_size; datasets, a list of
                mappings; parameters, a list of {part, trainable, frozen, without_gradient, dtype}; init, {source,
                loaded, fresh, left_out, adapted}
metrics.jsonl   lines as `curves.panels` and the functions below read them; "resumed": true marks the first one after
                a resume
plots           STEP_chunks.png and STEP_errors.png, of which the last ones are shown; the chunk errors and pictures of
                the other robots of a mixture end in _ROBOT
checkpoints     STEP/policy
"""

import base64
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from torchpi.errors import MissingFileError
from torchpi.sim import ENVIRONMENTS, simulator
from torchpi.training.config import TrainConfig
from torchpi.training.curves import (
    Panel,
    Series,
    as_svg,
    draw_chunk_steps,
    draw_dimension_errors,
    draw_panel,
    drawable,
    panel_series,
    panels,
    robots,
)
from torchpi.training.metrics import Line, number, parse_metrics, without_overtaken
from torchpi.training.state import checkpoints
from torchpi.ui.format import format_count, large_count
from torchpi.ui.page import html_page, page_header

REPORT = "report.html"
PICTURE_BYTES = 400 * 2**10
"""A picture whose file is larger is made smaller for the page."""
_SWITCHES = {"holdout_loss": "holdout", "chunk_error": "chunk_samples", "success_rate": "env"}
"""What is only measured if a field of the recipe asks for it."""
_PICTURES = {
    "chunks": "Sampled chunks beside recorded ones: a column per frame, a row per dimension of the action; "
    "along: the step of the chunk, up: the action in the robot's units.",
    "errors": "Errors of sampled chunks beside those of a policy that knows nothing: all dimensions, then each one; "
    "along: the step of the chunk, up: the mean absolute error.",
}


def write_report(run: pathlib.Path) -> pathlib.Path:
    """Write RUN/report.html, a page that needs nothing else; a page that is there is replaced.

    Args:
        run: the run's folder; the run may be finished, still going on, or have crashed.

    Returns:
        The page's path.
    """
    page = render_report(read_run(run))
    target, beside = run / REPORT, run / f".{REPORT}.tmp"
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    folder: pathlib.Path
    recipe: Mapping[str, Any]
    """train.json; empty: not there."""
    about: Mapping[str, Any]
    """run.json; empty: not there."""
    lines: Sequence[Line]
    """Of metrics.jsonl, those that hold."""
    curves: Mapping[str, Series]
    """What the panels draw of them, by key."""
    resumes: Sequence[int]
    """Steps from which the run went on."""
    checkpoints: Sequence[pathlib.Path]
    """Oldest first."""
    notes: Sequence[str]
    """What is wrong with the files."""

    @property
    def step(self) -> int:
        """The last one that is known of."""
        saved = int(self.checkpoints[-1].name) if self.checkpoints else 0
        return max(saved, self.lines[-1]["step"] if self.lines else 0)

    @property
    def num_steps(self) -> int | None:
        """How many the recipe asks for."""
        found = self.recipe.get("num_steps")
        return found if isinstance(found, int) else None

    @property
    def source(self) -> Mapping[str, Any]:
        """The recipe's dataset and embodiment; of a mixture, the first ones."""
        mixture = self.recipe.get("mixture")
        return mixture[0] if isinstance(mixture, list) and mixture and isinstance(mixture[0], Mapping) else self.recipe

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.num_steps is not None and self.step >= self.num_steps

    def last(self, key: str) -> Any:
        """The last value of a key in the metrics; None: there is none."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    def last_mapping(self, key: str) -> Mapping[str, Any]:
        """The last value of a key in the metrics, by name; empty: there is none."""
        found = self.last(key)
        return found if isinstance(found, Mapping) else {}


def read_run(run: pathlib.Path) -> Run:
    """Read a run's folder."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file() and not (run / "train.json").is_file():
        raise MissingFileError(f"{run} is no folder of a training run: neither train.json nor metrics.jsonl is in it.")
    notes: list[str] = []
    recipe, about = (_read_json(run / name, notes) for name in ("train.json", "run.json"))
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    lines, broken = parse_metrics(text)
    if broken:
        what = f"{len(broken)} lines" if len(broken) > 1 else "a line"
        notes.append(f"metrics.jsonl has {what} that cannot be read, first in line {broken[0]}; left out here.")
    went_back = [line["step"] for before, line in itertools.pairwise(lines) if line["step"] < before["step"]]
    lines = without_overtaken(lines)
    resumes = sorted({*went_back, *(line["step"] for line in lines if line.get("resumed"))})
    return Run(run, recipe, about, lines, panel_series(lines), resumes, checkpoints(run), notes)


def _read_json(path: pathlib.Path, notes: list[str]) -> Mapping[str, Any]:
    """The document; empty, with a note, where it cannot be read, for example because the process was just writing."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, Mapping):
        notes.append(f"{path.name} is no JSON object.")
        return {}
    return found


def render_report(run: Run) -> str:
    """The page, as HTML."""
    pictures = _last_pictures(run)
    optional = [
        ("success", "Success in simulation", _success(run)),
        ("chunks", "Sampled chunks", _chunks(run)),
        ("pictures", "Pictures", "".join(_picture(path, kind, robot) for kind, robot, path in pictures)),
        ("parameters", "Parameters", _parameters(run)),
    ]
    sections = [
        ("curves", "Curves", _curves(run)),
        *((name, title, html) for name, title, html in optional if html),
        ("origin", "What was trained", _origin(run)),
        ("recipe", "Recipe", _recipe(run)),
        ("use", "Use it", _commands(run)),
    ]
    return html_page(
        f"{run.folder.resolve().name}: a training run",
        header=_top(run),
        sections=sections,
        footer="this page needs nothing else; torchpi makes it from the files of the run",
    )


# ---- the top ----


def _top(run: Run) -> str:
    of = f" of {format_count(run.num_steps)}" if run.num_steps else ""
    tiles = [(format_count(run.step), f"steps{of}")]
    if isinstance(epoch := run.last("epoch"), int | float):
        tiles.append((f"{epoch:.3g}", "passes through the data"))
    for key, text in (
        ("loss", "training loss at the end"),
        ("holdout_loss", "loss of held-out episodes"),
        ("chunk_error", "error of sampled chunks, in parts of the data's range"),
    ):
        if (value := number(run.last(key))) is not None:
            tiles.append((f"{value:.3g}", text))
    if (rate := number(run.last("success_rate"))) is not None:
        tiles.append((f"{rate:.0%}", "success in simulation"))
    if (duration := _duration(run)) is not None:
        tiles.append((duration, "on the clock"))
    name = run.folder.resolve().name
    return page_header("torchpi train", name, _lede(run), tiles=tiles, notes=_notes(run))


def _lede(run: Run) -> str:
    init, data = run.recipe.get("init") or "random weights", run.source.get("dataset")
    what = f"From {init}, on {pathlib.Path(str(data)).name}" if data else "A policy"
    if run.finished:
        return f"{what}: trained to the end."
    of = f" of {format_count(run.num_steps)}" if run.num_steps else ""
    state = f"step {format_count(run.step)}{of}" if run.step else "no step is logged yet"
    how = "it was stopped before the last step" if run.about.get("finished") else "it goes on, or was killed"
    return f"{what}: {state}; {how}."


def _notes(run: Run) -> list[str]:
    """What the reader has to know: damage, values that are no numbers, interruptions, and what is missing."""
    notes = list(run.notes)
    for key, (steps, values) in run.curves.items():
        if len(wrong := steps[~np.isfinite(values)]):
            notes.append(f"{key} is not finite in {len(wrong)} of {len(steps)} lines, first at step {wrong[0]}.")
    if run.resumes:
        at = ", ".join(map(str, run.resumes[:12])) + (", …" if len(run.resumes) > 12 else "")
        notes.append(f"The run was interrupted and went on; the first lines after that are of step {at}.")
    if missing := list(_missing(run)):
        notes.append(f"Not recorded: {', '.join(missing)}.")
    return notes


def _missing(run: Run) -> Iterator[str]:
    yield from (name for name, found in (("train.json", run.recipe), ("run.json", run.about)) if not found)
    if run.about:
        yield from (f"{name} in run.json" for name in ("datasets", "parameters", "init") if name not in run.about)
    if not run.lines:
        yield "any line of metrics.jsonl"
    else:
        for key, (steps, _) in run.curves.items():
            if not len(steps) and run.recipe.get(_SWITCHES.get(key, ""), True):
                yield f"{key} in metrics.jsonl"
    if not run.checkpoints:
        yield "a checkpoint"


def _duration(run: Run) -> str | None:
    """From start to end in hours and minutes; None: one of them is not known."""
    times = [_moment(run.about.get(name)) for name in ("started", "finished")]
    if times[0] is None or times[1] is None or (times[0].tzinfo is None) != (times[1].tzinfo is None):
        return None
    minutes = round((times[1] - times[0]).total_seconds() / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _moment(value: Any) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):  # it is shown as it is
        return None


# ---- curves and errors ----


def _curves(run: Run) -> str:
    drawn = [panel for panel in panels(run.lines) if drawable(run.curves, panel)]
    if not drawn:
        return '<p class="lede">There is nothing to draw: metrics.jsonl has no finite values yet.</p>'
    figures = "".join(_panel_figure(run, panel) for panel in drawn)
    return (
        '<p class="lede">Each point of the training loss is the mean since the line before. Where there are more lines '
        "than fit, a curve is the mean of neighbours, on the range that they span.</p>"
        f'<div class="multiples plots">{figures}</div>'
    )


def _panel_figure(run: Run, panel: Panel) -> str:
    ends = []
    for key in panel.keys:
        steps, values = run.curves[key]
        if len(steps):
            shown = f"{values[-1]:.1%}" if panel.percent else f"{values[-1]:.4g}"
            ends.append((f"{panel.keys[key][0]}: {shown}" if len(panel.keys) > 1 else shown, int(steps[-1])))
    text = ", ".join(end for end, _ in ends)
    curves = " and ".join(label for key, (label, _) in panel.keys.items() if len(run.curves[key][0]))
    description = f"{panel.title}. Along: step, to {max(step for _, step in ends)}. Up: {panel.unit}. Drawn: {curves}."
    return _figure(panel.title, f"{text} at the end", lambda axes: draw_panel(axes, run.curves, panel), description)


def _figure(title: str, text: str, draw: Callable[[Any], None], description: str) -> str:
    caption = f"{escape(title)}<small>{escape(text)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{as_svg(draw, description)}</figure>"


def _chunks(run: Run) -> str:
    names = robots(run.lines)
    parts = {ending: _robot_chunks(run, ending, name if len(names) > 1 else "") for ending, name in names.items()}
    if not any(parts.values()):
        return ""
    return (
        '<p class="lede">Chunks that the policy with the averaged weights samples, beside those that were recorded: '
        "the mean absolute error, divided by what lies between the 1 % and the 99 % quantile of the data.</p>"
        f"{''.join(parts.values())}"
    )


def _robot_chunks(run: Run, ending: str, name: str) -> str:
    """The errors of one robot; empty: there are none."""
    figures, of = "", f" of {name}" if name else ""
    dims = run.last_mapping(f"chunk_error_dims{ending}")
    if dims:
        shown = "" if len(dims) <= 10 else f"the ten largest of {len(dims)}"
        figures += _figure(
            f"Error per dimension{of}",
            shown,
            lambda axes: draw_dimension_errors(axes, run.lines, ending),
            f"Error of sampled chunks per dimension of the action{of}. Along: step of the training. "
            "Up: mean absolute error in parts of the data's range. Drawn: a curve per dimension.",
        )
    if isinstance(run.last(f"chunk_error_steps{ending}"), list):
        figures += _figure(
            f"Error over the chunk{of}",
            "the later the evaluation, the stronger",
            lambda axes: draw_chunk_steps(axes, run.lines, ending),
            f"Error of sampled chunks over their steps{of}. Along: step of the chunk. "
            "Up: mean absolute error in parts of the data's range. Drawn: a curve per evaluation.",
        )
    return f'<div class="multiples plots">{figures}</div>{_dimension_bars(dims, of)}' if figures else ""


def _dimension_bars(dims: Mapping[str, Any], of: str) -> str:
    """The last errors, dimension by dimension."""
    values = {name: found for name, value in dims.items() if (found := number(value)) is not None}
    largest = max((value for value in values.values() if math.isfinite(value)), default=0.0) or 1.0
    rows = "".join(
        f'<span class="mono">{escape(name)}</span><i class="suffix" style="width:{100 * value / largest:.1f}%"></i>'
        f"<span>{value:.4f}</span>"
        if math.isfinite(value)
        else f'<span class="mono">{escape(name)}</span><i class="plain"></i><span>no number</span>'
        for name, value in values.items()
    )
    return (
        f'<h3 class="gap">At the last evaluation{escape(of)}</h3><div class="panel bars dimensions">{rows}</div>'
        if rows
        else ""
    )


# ---- pictures ----


def _last_pictures(run: Run) -> list[tuple[str, str, pathlib.Path]]:
    """Kind and robot (empty: the first one) of each picture, and that of the largest step."""
    last: dict[tuple[str, str], tuple[int, pathlib.Path]] = {}
    for path in (*run.folder.glob("plots/*.png"), *run.folder.glob("pictures/*.png")):  # the folder's earlier name
        if found := re.fullmatch(rf"(\d+)_({'|'.join(_PICTURES)})(?:_(.+))?\.png", path.name):
            key = (found[3] or "", found[2])
            last[key] = max(last.get(key, (-1, path)), (int(found[1]), path))
    return [(kind, robot, path) for (robot, kind), (_, path) in sorted(last.items())]


def _picture(path: pathlib.Path, kind: str, robot: str) -> str:
    step = int(path.name.split("_")[0])
    caption = f"{robot}: {_PICTURES[kind]}" if robot else _PICTURES[kind]
    try:
        source = _embedded(path)
    except OSError as error:  # damaged, cut short, or no image
        return f'<p class="aside">{escape(path.name)} cannot be shown: {escape(str(error))}</p>'
    return (
        f'<figure class="panel image"><img src="{source}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)} After {format_count(step)} steps.</figcaption></figure>"
    )


def _embedded(path: pathlib.Path) -> str:
    """The picture as a data URI, made smaller where its file is large."""
    kind, data = "png", path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if len(data) > PICTURE_BYTES:
            image.thumbnail((1600, 1600))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=80, optimize=True)
            kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- success ----


def _success(run: Run) -> str:
    tasks = run.last_mapping("success")
    if not tasks:
        return ""
    rows = "".join(_success_row(name, result) for name, result in tasks.items() if isinstance(result, Mapping))
    heads = "".join(f"<th>{text}</th>" for text in ("task", "success", "", "95 % interval", "episodes"))
    step = next((line["step"] for line in reversed(run.lines) if line.get("success") is not None), None)
    table = f'<div class="panel scroll"><table><tr>{heads}</tr>{rows}</table></div>'
    told = f" The table is of step {format_count(step)}." if step is not None else ""
    return (
        '<p class="lede">What the simulator calls success, in episodes with the averaged weights.'
        f"{told} The interval is where the true rate is likely to be.</p>{table}"
    )


def _success_row(task: str, result: Mapping[str, Any]) -> str:
    rate = number(result.get("success_rate"))
    shown = "–" if rate is None else f"{rate:.0%}"
    interval, bar, between = result.get("interval"), "", "–"
    if isinstance(interval, list) and len(interval) == 2 and None not in map(number, interval) and rate is not None:
        low, high = (float(end) for end in interval)
        between = f"{low:.0%} – {high:.0%}"
        bar = (
            f'<span class="rate"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
            f'<u style="left:{100 * rate:.1f}%"></u></span>'
        )
    return (
        f'<tr><td class="name">{escape(task)}</td><td>{shown}</td><td>{bar}</td><td>{between}</td>'
        f"<td>{escape(_text(result.get('episodes', '–')))}</td></tr>"
    )


# ---- what was trained ----


def _parameters(run: Run) -> str:
    found = run.about.get("parameters")
    parts = [part for part in found if isinstance(part, Mapping)] if isinstance(found, list) else []
    if not parts:
        return ""
    names = {"trainable": "trained", "frozen": "frozen", "without_gradient": "without gradient"}
    counts = [{name: int(number(part.get(name)) or 0) for name in names} for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in names}
    shown = [name for name in names if name != "without_gradient" or totals[name]]
    rows = "".join(
        _parameter_row(str(part.get("part", "–")), [count[name] for name in shown], str(part.get("dtype", "–")))
        for part, count in zip(parts, counts, strict=True)
    )
    rows += _parameter_row("all", [totals[name] for name in shown], "", css="all")
    heads = "<th>part</th>" + "".join(f'<th class="num">{names[name]}</th>' for name in shown) + "<th>dtype</th>"
    unused = " Those without gradient are not frozen, but the loss does not depend on them."
    return (
        f'<p class="lede">{large_count(totals["trainable"])} of {large_count(sum(totals.values()))} parameters are '
        f"trained.{unused if 'without_gradient' in shown else ''}</p>"
        f'<div class="panel scroll"><table><tr>{heads}</tr>{rows}</table></div>'
    )


def _parameter_row(part: str, counts: Sequence[int], dtype: str, *, css: str = "") -> str:
    numbers = "".join(f'<td class="num">{format_count(count)}</td>' for count in counts)
    return f'<tr class="{css}"><td class="name">{escape(part)}</td>{numbers}<td class="dtype">{escape(dtype)}</td></tr>'


def _origin(run: Run) -> str:
    """Data, first weights, machine and time."""
    rows = [(name, run.about[name]) for name in ("command", "started", "finished") if name in run.about]
    init = run.about.get("init")
    rows += [("weights from", init.get("source"))] if isinstance(init, Mapping) and "source" in init else []
    if isinstance(init, Mapping):
        names = {
            "loaded": "parameters taken over",
            "fresh": "begun at random",
            "left_out": "left out of the source",
            "adapted": "adapted",
        }
        rows += [(text, init[name]) for name, text in names.items() if init.get(name)]
    rows += _data(run)
    rows += [(name, run.about[name]) for name in ("device", "world_size", "torch", "torchpi") if name in run.about]
    if isinstance(memory := run.last("memory"), int | float):
        rows.append(("memory", f"{memory / 2**30:.2f} GiB at most"))
    if run.checkpoints:
        rows.append(("checkpoints", [path.name.lstrip("0") or "0" for path in run.checkpoints]))
    if not rows:
        return '<p class="lede">The run does not say.</p>'
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>" for name, value in rows)
    return f'<div class="panel"><dl>{items}</dl></div>'


def _data(run: Run) -> list[tuple[str, Any]]:
    """What is known of the datasets."""
    found = run.about.get("datasets")
    if not isinstance(found, list):
        return [("data", run.source["dataset"])] if run.source.get("dataset") else []
    if len(found) == 1 and isinstance(found[0], Mapping):
        return [(f"data: {name.replace('_', ' ')}", value) for name, value in found[0].items() if name != "weight"]
    return [(f"data {i}", part) for i, part in enumerate(found, start=1)]


def _recipe(run: Run) -> str:
    if not run.recipe:
        return '<p class="lede">The run has no train.json.</p>'
    defaults = _flat(json.loads(json.dumps(dataclasses.asdict(TrainConfig()))))
    recipe = _flat(run.recipe)
    changed = {name for name, value in recipe.items() if name in defaults and defaults[name] != value}
    rows = "".join(
        f'<tr class="{"marked" if name in changed else ""}"><td class="name">{escape(name)}</td>'
        f'<td class="wide">{escape(_text(value))}</td>'
        f'<td class="wide dtype">{escape(_text(defaults[name])) if name in changed else ""}</td></tr>'
        for name, value in recipe.items()
    )
    return (
        f'<p class="lede">{len(changed)} of {len(recipe)} fields differ from the defaults; they are marked. Another '
        "run can take the whole recipe: torchpi train --recipe train.json.</p>"
        f'<div class="panel scroll"><table><tr><th>field</th><th>value</th><th>default</th></tr>{rows}</table></div>'
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of fields as one level: augmentation.crop."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _listed(texts: Sequence[str], separator: str) -> str:
    more = f" and {len(texts) - 12} more" if len(texts) > 12 else ""
    return f"{separator.join(texts[:12])}{more}"


def _text(value: Any) -> str:
    """A value of a JSON document, for people."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return _listed([f"{name}: {_text(inner)}" for name, inner in value.items()], "; ")
    if isinstance(value, list):
        return _listed([_text(inner) for inner in value], ", ")
    if isinstance(value, int):
        return format_count(value) if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- how to use it ----


def _commands(run: Run) -> str:
    commands = []
    if run.checkpoints:
        policy = shlex.quote((run.checkpoints[-1] / "policy").relative_to(run.folder).as_posix())
        commands += [("Look for what would make a robot misbehave.", f"torchpi doctor {policy}")]
        if environment := _environment(run):
            commands += [("Measure it in simulation.", f"torchpi eval {policy} --env {environment} --episodes 20")]
        if dataset := _dataset(run):
            what = "Compare its action chunks with the recorded ones."
            commands += [(what, f"torchpi eval {policy} --dataset {shlex.quote(dataset)}")]
        commands += [("Serve it to a robot.", f"torchpi serve {policy}")]
    if not run.finished and run.checkpoints:
        commands += [("Go on with the training.", "torchpi train --resume .")]
    if not commands:
        return '<p class="lede">There is no checkpoint yet, so there is nothing to use or to go on from.</p>'
    rows = "".join(f"<div>{escape(what)}<code>{escape(command)}</code></div>" for what, command in commands)
    return f'<p class="lede">In the folder of the run:</p><div class="panel commands">{rows}</div>'


def _environment(run: Run) -> str | None:
    """The simulator of the robot that was trained for; None: there is none."""
    robot = run.source.get("embodiment")
    found = [name for name in ENVIRONMENTS if robot in (name, simulator(name).embodiment.name)]
    return str(run.recipe.get("env") or (found[0] if found else "")) or None


def _dataset(run: Run) -> str | None:
    """The way from the run's folder to its dataset, or its address; None: it is not there any more."""
    dataset = str(run.source.get("dataset") or "")
    if "://" in dataset:
        return dataset
    here = (pathlib.Path(dataset) / "meta").is_dir()
    return pathlib.Path(os.path.relpath(dataset, run.folder)).as_posix() if here else None
