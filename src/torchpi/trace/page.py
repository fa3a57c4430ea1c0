"""A trace as one page that needs nothing else: no script, no request."""

from html import escape

from torchpi.trace.diagram import flow_diagram
from torchpi.trace.plots import (
    RANGE_LIMIT,
    chunk_figures,
    data_uri,
    heat_figure,
    mask_figure,
    noise_to_action_css,
    range_bar,
)
from torchpi.trace.result import Modulation, Trace, Values
from torchpi.trace.steps import STEPS, Step
from torchpi.trace.summary import Row, compare_facts, compare_steps, phases, rows_of
from torchpi.ui.format import format_count, format_number, large_count
from torchpi.ui.page import html_page, page_header

_KINDS = {"0": "vision", "1": "vision", "2": "vision", "3": "vision", "4": "prefix", "5": "suffix", "6": "cache"}
_KINDS |= {"9": "suffix", "10": "suffix", "11": "suffix", "inference": "suffix"}  # the layers: "prefix"
_ROW_KINDS = {"prefix": "prefix", "suffix": "suffix", "modulation": "time", "cache": "cache"}
_PART_KINDS = {
    "SigLIP": "vision",
    "token embedding": "vision",
    "backbone": "prefix",
    "action expert": "suffix",
    "the expert's adaptive norms": "time",
    "action, state and time projections": "suffix",
}


def render_page(trace: Trace, other: Trace | None = None) -> str:
    """The page, as HTML.

    Args:
        other: a model to compare with, in a section of its own.
    """
    sections = [("way", "The way", way_section(trace))]
    if trace.values is not None:
        sections.append(("input", "What it sees", input_section(trace, trace.values)))
    sections.append(("mask", "Who sees whom", _mask(trace)))
    if trace.values is not None:
        sections.append(("denoising", "From noise to actions", _denoising(trace, trace.values)))
        if trace.values.modulation is not None:
            sections.append(("time", "Time in every layer", _time(trace.values.modulation)))
    sections.append(("steps", "Step by step", _steps(trace)))
    if trace.values is not None:
        sections.append(("agreement", "Two views, one result", _agreement(trace.values)))
    sections.append(("parameters", "Parameters", _parameters(trace)))
    if other is not None:
        sections.append(("compare", f"{trace.title} and {other.title}", _compare(trace, other)))
    title = f"{trace.variant}: from an observation to an action chunk"
    return html_page(
        title,
        header=_top(trace, title),
        sections=sections,
        footer=f"trace {trace.title} · every shape on this page is that of a tensor that existed in the run",
    )


def _top(trace: Trace, title: str) -> str:
    horizon, dim, pi05 = trace.config.action_horizon, trace.config.action_dim, trace.config.pi05
    facts = [
        (large_count(sum(trace.parameters.values())), "parameters"),
        (f"{trace.sequence_length}", f"tokens: {trace.prefix_tokens} prefix, {trace.suffix_tokens} suffix"),
        (f"{trace.layers}", "layers in each of two experts"),
        (f"{trace.cache_bytes / 1e6:.1f} MB", f"KV cache of one observation, {trace.dtype}"),
        (f"{trace.time_inputs}", "norms that the time modulates" if pi05 else "place where the time enters"),
        (f"{horizon} × {dim}", "action chunk: horizon × action_dim"),
    ]
    lede = (
        "Every step between a robot's cameras and its next actions, with the tensors of a real run of this model."
        if trace.values is not None
        else "Every step between a robot's cameras and its next actions, with the shape of every tensor. There are no "
        "weights behind this page, shapes alone."
    )
    return page_header(f"torchpi trace {trace.title}", title, lede, tiles=facts, notes=trace.notes)


def way_section(trace: Trace) -> str:
    """The whole flow as a drawing."""
    how = (
        "The time reaches every norm of the action expert as scale, shift and gate."
        if trace.config.pi05
        else "The time is mixed into every action token; the robot's state is a token in front of them."
    )
    return (
        '<p class="lede">The backbone reads images and prompt once and leaves its keys and values behind. The action '
        f"expert reads them in every Euler step. {how} Shapes are those of a batch of {trace.batch}; the action chunk "
        f'is one observation\'s.</p><div class="panel">{flow_diagram(trace, _num_steps(trace))}</div>'
    )


def _num_steps(trace: Trace) -> int:
    return next(entry.value or 0 for entry in trace.entries if entry.name == "euler_steps")


def input_section(trace: Trace, values: Values) -> str:
    """The cameras and the prompt as the model reads them."""
    figures = []
    for camera, image in values.images.items():
        seen = (
            '<div class="absent">absent: masked</div>'
            if image is None
            else f'<img alt="{escape(camera)}" src="{data_uri(image)}">'
        )
        figures.append(f"<figure>{seen}<figcaption>{escape(camera)}</figcaption></figure>")
    prompt = ""
    if trace.prompt is not None:
        prompt = f'<div class="prompt"><small>prompt, as it is tokenized</small>{escape(trace.prompt)}</div>'
    return (
        '<p class="lede">The cameras at the size and in the order in which the model reads them.</p>'
        f'<div class="panel"><div class="cameras">{"".join(figures)}</div>{prompt}</div>'
    )


def _mask(trace: Trace) -> str:
    prefix, total = trace.prefix_tokens, trace.sequence_length
    items = [("prefix", "Prefix", "images and prompt see each other, and nothing of the suffix")]
    if trace.num_groups == 3:
        items.append(("suffix", "State", "sees prefix and itself, not the actions"))
        items.append(("suffix", "Actions", "see prefix, state and each other"))
    else:
        items.append(("suffix", "Actions", "see prefix and each other"))
    padding = total - int(trace.mask.diagonal().sum())
    if padding:
        items.append(("plain", "Padding", f"{padding} of {total} tokens of the first sample; neither see nor are seen"))
    legend = "".join(
        f'<li class="{kind}"><i></i><div>{name}<small>{text}</small></div></li>' for kind, name, text in items
    )
    figure = f'<div class="mask scroll">{mask_figure(trace)}</div>'
    never = 1 - (prefix * prefix + trace.suffix_tokens * total) / total**2
    return (
        f'<p class="lede">The attention mask over all {total} tokens, from the model\'s own function. The empty block '
        "at the upper right is the whole idea: nothing in the prefix looks at the actions, so it is computed once."
        f'</p><div class="panel two">{figure}<div><ul class="legend">{legend}</ul>'
        f"<p>The model computes {prefix} × {prefix} once and {trace.suffix_tokens} × {total} in every step. The empty "
        f"block, {never:.1%} of the square, is never computed.</p>"
        '<p class="aside">Small groups are drawn larger than they are.'
        + ("" if trace.values is not None else " Without values, every token is taken as real.")
        + "</p></div></div>"
    )


def _denoising(trace: Trace, values: Values) -> str:
    _, horizon, dims = values.chunk.shape
    names = trace.action_names or tuple(f"dimension {i}" for i in range(dims))
    padding = f" The other {dims - len(names)} of {dims} dimensions are padding." if len(names) < dims else ""
    return (
        f'<p class="lede">Each figure is one dimension of the action chunk over its {horizon} time steps, normalized '
        f"as the model sees it, before the first and behind every one of {len(values.times)} Euler steps.{padding}</p>"
        f'<p class="ramp">noise, t = 1 <i style="background:{noise_to_action_css()}"></i> actions, t = 0</p>'
        f"{chunk_figures(values.chunk, names)}"
    )


def _time(modulation: Modulation) -> str:
    panels = []
    parts = (
        ("scale", "prefix", "multiplies the normalized token: x / rms(x) · (1 + scale)."),
        ("shift", "vision", "is added to the scaled token."),
        ("gate", "suffix", "multiplies what a sublayer adds to the residual stream."),
    )
    for part, kind, what in parts:
        rms = modulation.rms[part][:-1] if part == "gate" else modulation.rms[part]
        noise, actions = float(rms[:, 0].mean()), float(rms[:, -1].mean())
        panels.append(
            f'<div class="panel {kind}"><h3>{part}</h3><p class="sub">{what}<br>Mean {noise:.3g} at t = 1, '
            f"{actions:.3g} at t = 0.</p>{heat_figure(modulation, part)}</div>"
        )
    return (
        '<p class="lede">How large scale, shift and gate are (root mean square over the width) in each adaptive norm, '
        "from noise to actions. Every layer has two rows, for attention and feed-forward; the last row is the final "
        "norm, whose gate acts on nothing and is left out. Below, thin lines are norms, the thick one is their mean. "
        "People say that gates are wide open at t = 1 and nearly closed at t = 0; here is what these weights do.</p>"
        f'<div class="heat">{"".join(panels)}</div>'
    )


# ---- steps ----


def _steps(trace: Trace) -> str:
    cards = "".join(_card(trace, step) for step in STEPS)
    ranges = ""
    if trace.values is not None:
        ranges = (
            " Ranges: thin from min to max, thick one deviation around the mean, on one axis for all, from "
            f"−{RANGE_LIMIT} to {RANGE_LIMIT} and logarithmic away from 0."
        )
    return (
        '<p class="lede">What is marked <span class="tag joint">joint</span> exists only in the joint forward of the '
        'papers, over both experts at once; <span class="tag cached">cached</span> is what the model computes in its '
        f'place. Everything else is the same in both.{ranges}</p><div class="steps">{cards}</div>'
    )


def _card(trace: Trace, step: Step) -> str:
    pi05 = trace.config.pi05
    number = "inference" if step.id == "inference" else f"step {step.id}"
    formula = step.formula_of(pi05)
    shown = "<br>".join(escape(part.strip()) for part in formula.split("      "))
    return (
        f'<article class="step panel {_KINDS.get(step.id, "prefix")}" id="step-{step.id}"><div>'
        f'<span class="no">{number}</span><h3>{escape(step.title)}</h3><p>{escape(step.explanation(pi05))}</p>'
        + (f'<div class="formula">{shown}</div>' if formula else "")
        + f'</div><div class="scroll">{_table(rows_of(trace, step.id), with_stats=trace.values is not None)}</div>'
        "</article>"
    )


def _table(rows: list[Row], *, with_stats: bool) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("tensor", "shape", "dtype"))
    if with_stats:
        head += "".join(f'<th class="num">{name}</th>' for name in ("min", "mean", "max", "std")) + "<th>range</th>"
    body = "".join(_table_row(row, with_stats=with_stats) for row in rows)
    return f"<table><tr>{head}<th></th></tr>{body}</table>"


def _table_row(row: Row, *, with_stats: bool) -> str:
    count = f" <small>×{row.count}</small>" if row.count > 1 else ""
    cells = [
        _cell("name", escape(row.name) + count),
        _cell("shape", escape(row.shape_text)),
        _cell("dtype", escape(row.dtype) if row.value is None else "count"),
    ]
    if with_stats:
        stats = row.stats
        numbers = [""] * 4 if stats is None else map(format_number, (stats.min, stats.mean, stats.max, stats.std))
        cells += [_cell("num", number) for number in numbers]
        drawn = stats is not None and row.dtype.startswith(("float", "bfloat"))  # ids and masks say nothing as a range
        cells.append(_cell("range", range_bar(stats) if stats is not None and drawn else ""))
    tag = "training" if row.phase == "training" else row.view
    shown = tag != "both" and row.phase != "inference"
    cells.append(_cell("where", f'<span class="tag {tag}">{tag}</span>' if shown else ""))
    return f'<tr class="{_ROW_KINDS.get(row.name.partition("/")[0], "")}">{"".join(cells)}</tr>'


def _cell(css: str, html: str) -> str:
    return f'<td class="{css}">{html}</td>'


# ---- the rest ----


def _agreement(values: Values) -> str:
    rows = "".join(
        f"<tr>{_cell('what', escape(pair.what))}{_cell('num', f'{pair.max_abs:.1e}')}"
        f"{_cell('num', format_number(pair.scale))}</tr>"
        for pair in values.agreement
    )
    return (
        '<p class="lede">The joint forward against the model\'s own path, and explicit attention against the kernel, '
        'on the batch of this page.</p><div class="panel scroll"><table><tr><th>two ways to compute the same</th>'
        f'<th class="num">largest difference</th><th class="num">largest value</th></tr>{rows}</table></div>'
    )


def _parameters(trace: Trace) -> str:
    largest = max(trace.parameters.values())
    rows = "".join(
        f'<span>{escape(name)}</span><i class="{_PART_KINDS[name]}" style="width:{100 * count / largest:.2f}%"></i>'
        f"<span>{format_count(count)}</span>"
        for name, count in trace.parameters.items()
    )
    total = format_count(sum(trace.parameters.values()))
    return f'<p class="lede">{total} in all.</p><div class="panel"><div class="bars">{rows}</div></div>'


def _compare(trace: Trace, other: Trace) -> str:
    titles = f"<th>{escape(trace.title)}</th><th>{escape(other.title)}</th></tr>"
    facts = "".join(_pair(name, one, two) for name, one, two in compare_facts(trace, other))
    steps = compare_steps(trace, other)
    tables = "".join(
        f"<h3 class='gap'>{escape(step.id)} · {escape(step.title)}</h3><div class='scroll'><table>"
        f"<tr><th>tensor</th>{titles}{''.join(_pair(*row) for row in steps[step.id])}</table></div>"
        for step in STEPS
    )
    when = "".join(
        f"<h3 class='gap'>{escape(each.title)}: {escape(phase)}</h3><p class='mono'>{escape(', '.join(names))}</p>"
        for each in (trace, other)
        for phase, names in phases(each).items()
        if phase != "both"
    )
    return (
        '<p class="lede">Side by side; rows that are the same in both are grey.</p><div class="panel">'
        f"<div class='scroll'><table><tr><th></th>{titles}{facts}</table></div>{tables}{when}</div>"
    )


def _pair(name: str, one: str, other: str) -> str:
    css = ' class="same"' if one == other else ""
    return f"<tr{css}>{_cell('name', escape(name))}{_cell('shape', escape(one))}{_cell('shape', escape(other))}</tr>"
