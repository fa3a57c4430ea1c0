"""Trace as a self-contained HTML page without scripts or requests. Its texts are in assets/trace.html."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from torchpi.inspect.plots import RANGE_LIMIT, flow_diagram, mask_figure, modulation_figure, range_bar
from torchpi.inspect.steps import STEPS, Step
from torchpi.inspect.summary import Pair, Row, compare_facts, compare_steps, rows_of
from torchpi.inspect.trace import Stats, Trace, Values
from torchpi.ui.format import format_count, format_number, large_count
from torchpi.ui.page import Section, bars, camera_images, html_page, page_header, page_section
from torchpi.ui.plots import data_uri, denoising_figures
from torchpi.ui.tables import Column, Table, html_table

_ROW_COLORS = {"prefix": "prefix", "suffix": "suffix", "modulation": "time", "cache": "cache"}


def render_page(trace: Trace, other: Trace | None = None) -> str:
    """Render the page of a trace; with `other`, a comparison precedes the sections of `trace`."""
    names = ["flow", "mask", "steps", "parameters"]
    if trace.values is not None:
        time = ["time"] if trace.values.modulation else []
        names = ["flow", "input", "mask", "denoising", *time, "steps", "agreement", "parameters"]
    sections = [trace_section(name, trace) for name in names]
    if other is None:
        command = f"trace {trace.inputs.title}"
        title, header = _header(trace, command)
    else:
        command = f"trace --compare {trace.inputs.title} {other.inputs.title}"
        title, header = _comparison_header(trace, other, command)
        sections = [(name, f"{trace.inputs.title}: {text}", html) for name, text, html in sections]
        sections.insert(0, page_section("trace.html", "compare", _comparison(trace, other)))
    footer = f"{command} · every shape on this page was read from a tensor of the run"
    return html_page(title, header=header, sections=sections, footer=footer)


def trace_section(name: str, trace: Trace) -> Section:
    """Section of the page: flow, mask, steps or parameters; with values also input, denoising, time or agreement."""
    conditions = {"pi05" if trace.inputs.config.pi05 else "pi0", "state" if trace.num_groups == 3 else "no state"}
    conditions.add("shapes" if trace.values is None else "values")
    if name in _TRACE_SECTIONS:
        values: dict[str, Any] = _TRACE_SECTIONS[name](trace)
    else:
        assert trace.values is not None
        values = _VALUE_SECTIONS[name](trace, trace.values)
    return page_section("trace.html", name, values, conditions)


def _header(trace: Trace, command: str) -> tuple[str, str]:
    """Title and HTML."""
    title = f"{trace.inputs.config.variant}: from an observation to an action chunk"
    horizon, dim, pi05 = trace.inputs.config.action_horizon, trace.inputs.config.action_dim, trace.inputs.config.pi05
    tiles = [
        (large_count(sum(trace.parameters.values())), "parameters"),
        (f"{trace.sequence_length}", f"tokens: {trace.prefix_tokens} prefix, {trace.suffix_tokens} suffix"),
        (f"{trace.count('layers')}", "layers in each of two experts"),
        (f"{trace.cache_bytes / 1e6:.1f} MB", f"KV cache of one observation, {trace.dtype}"),
        (f"{trace.count('time_inputs')}", "norms modulated by the time" if pi05 else "layer that reads the time"),
        (f"{horizon} × {dim}", "action chunk: horizon × action_dim"),
    ]
    summary = "Every step from a robot's cameras to its next actions, with "
    summary += "the tensors of a run of this model." if trace.values else "the shape of every tensor, without weights."
    return title, page_header(f"torchpi {command}", title, summary, tiles=tiles, notes=trace.inputs.notes)


def _comparison_header(left: Trace, right: Trace, command: str) -> tuple[str, str]:
    """Title and HTML."""
    inputs = left.inputs, right.inputs
    variants = dict.fromkeys(side.config.variant for side in inputs)
    title = " and ".join(variants if len(variants) == 2 else (side.title for side in inputs))
    summary = "Architecture, sizes and the shapes in every step of both models side by side, then the steps of "
    summary += f"{left.inputs.title} in detail."
    notes = [f"{side.title}: {note}" for side in inputs for note in side.notes]
    return title, page_header(f"torchpi {command}", title, summary, tiles=(), notes=notes)


def _flow(trace: Trace) -> dict[str, Any]:
    return {"batch": len(trace.inputs.noise), "diagram": flow_diagram(trace)}


def _input(trace: Trace, values: Values) -> dict[str, Any]:
    images = ((name, None if image is None else data_uri(image)) for name, image in values.images.items())
    return {"cameras": camera_images(images), "prompt": escape(trace.inputs.prompt or "")}


def _mask(trace: Trace) -> dict[str, Any]:
    prefix, suffix, total = trace.prefix_tokens, trace.suffix_tokens, trace.sequence_length
    never = 1 - (prefix * prefix + suffix * total) / total**2
    padding = total - int(trace.mask.diagonal().sum())
    counts = {"prefix": prefix, "suffix": suffix, "total": total, "padding": padding}
    return counts | {"never": never, "mask": mask_figure(trace)}


def _denoising(trace: Trace, values: Values) -> dict[str, Any]:
    steps, horizon, dims = values.chunk.shape
    names = trace.inputs.action_names or tuple(f"dimension {i}" for i in range(dims))
    figures = denoising_figures(values.chunk, names)
    return {"steps": steps - 1, "horizon": horizon, "dims": dims, "padded": dims - len(names), "figures": figures}


def _time(trace: Trace, values: Values) -> dict[str, Any]:
    texts = {}
    for part, norms in values.modulation.items():
        rms = norms[:-1] if part == "gate" else norms  # the final norm's gate is not used
        texts[part] = modulation_figure(rms, part)
        texts[f"mean_{part}"] = f"Mean {rms[:, 0].mean():.3g} at t = 1, {rms[:, -1].mean():.3g} at t = 0."
    return texts


def _steps(trace: Trace) -> dict[str, Any]:
    return {"limit": RANGE_LIMIT, "cards": "".join(_card(trace, step) for step in STEPS)}


def _card(trace: Trace, step: Step) -> str:
    number = "" if step.id == "inference" else f'<span class="no">step {step.id}</span>'
    return (
        f'<article class="step panel {step.color}" id="step-{step.id}">'
        f"{number}<h3>{escape(step.title)}</h3>"
        f"<p>{escape(step.explanation(trace.inputs.config.pi05))}</p>"
        f'<div class="scroll">{_table(rows_of(trace, step.id), with_stats=trace.values is not None)}</div></article>'
    )


def _table(rows: list[Row], *, with_stats: bool) -> str:
    head = [("", "tensor"), ("", "shape"), ("", "dtype")]
    if with_stats:
        head += [*(("num", name) for name in Stats._fields), ("", "range")]
    colors = [_ROW_COLORS.get(row.name.partition("/")[0], "") for row in rows]
    return html_table([*head, ("", "")], zip(colors, (_cells(row, with_stats) for row in rows), strict=True))


def _cells(row: Row, with_stats: bool) -> Iterator[tuple[str, str]]:
    """Cells of a tensor's row, as (CSS class, HTML)."""
    entry = row.entry
    count = f" <small>×{row.repeats}</small>" if row.repeats > 1 else ""
    formula = f'<span class="formula">{escape(entry.formula)}</span>' if entry.formula else ""
    yield "name", escape(row.name) + count + formula
    yield "wide" if entry.dtype == "str" else "shape", escape(row.shape)
    yield "dtype", escape(entry.dtype)
    if with_stats:
        numbers = map(format_number, row.stats) if row.stats else [""] * len(Stats._fields)
        yield from (("num", number) for number in numbers)
        is_float = entry.dtype.startswith(("float", "bfloat"))  # IDs and masks have no useful range
        yield "range", range_bar(row.stats) if row.stats and is_float else ""
    yield "where", f'<span class="tag {row.tag}">{row.tag}</span>' if row.tag else ""


def _agreement(trace: Trace, values: Values) -> dict[str, Any]:
    columns = [
        Column("value, computed in two ways", "name"),
        Column("largest difference", "number"),
        Column("largest value", "number"),
    ]
    rows = [(pair.what, f"{pair.max_abs:.1e}", format_number(pair.scale)) for pair in values.agreement]
    return {"table": Table(columns, rows).to_html()}


def _parameters(trace: Trace) -> dict[str, Any]:
    total, largest = sum(trace.parameters.values()), max(trace.parameters.values())
    rows = [(name, count / largest, format_count(count)) for name, count in trace.parameters.items()]
    return {"total": format_count(total), "bars": bars(rows, "prefix")}


_TRACE_SECTIONS = {"flow": _flow, "mask": _mask, "steps": _steps, "parameters": _parameters}
_VALUE_SECTIONS = {"input": _input, "denoising": _denoising, "time": _time, "agreement": _agreement}


def _comparison(left: Trace, right: Trace) -> Mapping[str, Any]:
    names = left.inputs.title, right.inputs.title
    titled = [(escape(trace.inputs.title), trace) for trace in (left, right)]
    steps = compare_steps(left, right)
    return {
        "facts": _pair_tables(names, compare_facts(left, right).items()),
        "diagrams": "".join(f"<h3 class='gap'>{title}: data flow</h3>{flow_diagram(trace)}" for title, trace in titled),
        "masks": "".join(f"<div><h3>{title}: attention mask</h3>{mask_figure(trace)}</div>" for title, trace in titled),
        "steps": _pair_tables(names, ((f"{step.id} · {step.title}", steps[step.id]) for step in STEPS)),
    }


def _pair_tables(titles: Sequence[str], tables: Iterable[tuple[str, list[Pair]]]) -> str:
    head = [("", ""), *(("", escape(title)) for title in titles)]
    css = ("name", "shape", "shape")
    return "".join(
        f"<h3 class='gap'>{escape(title)}</h3><div class='scroll'>"
        + html_table(head, ((row.kind, zip(css, map(escape, row), strict=True)) for row in rows))
        + "</div>"
        for title, rows in tables
    )
