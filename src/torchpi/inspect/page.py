"""A trace as one page that needs nothing else: no script, no request."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from torchpi.inspect.plots import PART_COLORS, RANGE_LIMIT, flow_diagram, mask_figure, modulation_figure, range_bar
from torchpi.inspect.steps import STEPS, Step
from torchpi.inspect.summary import Pair, Row, compare_facts, compare_steps, rows_of
from torchpi.inspect.trace import Stats, Trace, Values
from torchpi.ui.format import format_count, format_number, large_count
from torchpi.ui.page import bars, camera_images, html_page, lede, page_header, panel
from torchpi.ui.plots import data_uri, denoising_figures
from torchpi.ui.tables import Column, Table, html_table

_ROW_COLORS = {"prefix": "prefix", "suffix": "suffix", "modulation": "time", "cache": "cache"}


def render_page(trace: Trace, other: Trace | None = None) -> str:
    """HTML of a trace; with `other`, of a comparison as well."""
    values = trace.values
    sections = [("flow", "Data flow", flow_section(trace))]
    if values is not None:
        sections.append(("input", "Input", input_section(trace, values)))
    sections.append(("mask", "Attention mask", _mask_section(trace)))
    if values is not None:
        sections.append(("denoising", "Denoising", _denoising_section(trace, values)))
        if values.modulation:
            sections.append(("time", "Time in every layer", _time_section(values)))
    sections.append(("steps", "Step by step", _steps_section(trace)))
    if values is not None:
        sections.append(("agreement", "Numerical agreement", _agreement_section(values)))
    sections.append(("parameters", "Parameters", _parameters_section(trace)))
    if other is not None:
        sections.append(
            ("compare", f"{trace.inputs.title} and {other.inputs.title}", _comparison_section(trace, other))
        )
    title = f"{trace.inputs.config.variant}: from an observation to an action chunk"
    footer = f"trace {trace.inputs.title} · every shape on this page is that of a tensor of the run"
    return html_page(title, header=_header(trace, title), sections=sections, footer=footer)


def _header(trace: Trace, title: str) -> str:
    horizon, dim, pi05 = trace.inputs.config.action_horizon, trace.inputs.config.action_dim, trace.inputs.config.pi05
    tiles = [
        (large_count(sum(trace.parameters.values())), "parameters"),
        (f"{trace.sequence_length}", f"tokens: {trace.prefix_tokens} prefix, {trace.suffix_tokens} suffix"),
        (f"{trace.count('layers')}", "layers in each of two experts"),
        (f"{trace.cache_bytes / 1e6:.1f} MB", f"KV cache of one observation, {trace.dtype}"),
        (f"{trace.count('time_inputs')}", "norms modulated by the time" if pi05 else "layer that the time enters"),
        (f"{horizon} × {dim}", "action chunk: horizon × action_dim"),
    ]
    summary = "Every step between a robot's cameras and its next actions, with "
    summary += "the tensors of a run of this model." if trace.values else "the shape of every tensor, without weights."
    return page_header(f"torchpi trace {trace.inputs.title}", title, summary, tiles=tiles, notes=trace.inputs.notes)


def flow_section(trace: Trace) -> str:
    """Diagram of the forward pass."""
    time = (
        "The time reaches every norm of the action expert as scale, shift and gate."
        if trace.inputs.config.pi05
        else "The time is mixed into every action token; the robot's state is a token in front of them."
    )
    return lede(
        "The backbone reads images and prompt once and leaves its keys and values behind. The action expert reads them "
        f"in every Euler step. {time} In training, one step at a random time gives v_t, and the loss compares it with "
        f"u_t. Shapes are those of a batch of {len(trace.inputs.noise)}; the action chunk is one observation's."
    ) + panel(flow_diagram(trace))


def input_section(trace: Trace, values: Values) -> str:
    """Cameras and prompt as the model reads them."""
    images = ((name, None if image is None else data_uri(image)) for name, image in values.images.items())
    prompt = ""
    if trace.inputs.prompt is not None:
        prompt = f'<div class="prompt"><small>prompt, as it is tokenized</small>{escape(trace.inputs.prompt)}</div>'
    return lede("The cameras at the size and in the order in which the model reads them.") + panel(
        camera_images(images) + prompt
    )


def _mask_section(trace: Trace) -> str:
    prefix, total = trace.prefix_tokens, trace.sequence_length
    items = [("prefix", "Prefix", "images and prompt attend to each other, and not to the suffix")]
    if trace.num_groups == 3:
        items.append(("suffix", "State", "attends to the prefix and itself, not to the actions"))
        items.append(("suffix", "Actions", "attend to prefix, state and each other"))
    else:
        items.append(("suffix", "Actions", "attend to the prefix and each other"))
    if padding := total - int(trace.mask.diagonal().sum()):
        text = f"{padding} of {total} tokens of the first sample; no token attends to them"
        items.append(("plain", "Padding", text))
    legend = "".join(
        f'<li class="{color}"><i></i><div>{name}<small>{text}</small></div></li>' for color, name, text in items
    )
    never = 1 - (prefix * prefix + trace.suffix_tokens * total) / total**2
    return lede(
        f"The attention mask over all {total} tokens. The empty block at the upper right decides the design: no token "
        "of the prefix attends to the actions, so the prefix is computed once."
    ) + panel(
        f'<div class="mask scroll">{mask_figure(trace)}</div><div><ul class="legend">{legend}</ul>'
        f"<p>The model computes {prefix} × {prefix} once and {trace.suffix_tokens} × {total} in every step. The empty "
        f"block, {never:.1%} of the square, is never computed.</p>"
        '<p class="aside">Small groups are drawn larger than they are.'
        + ("" if trace.values is not None else " Without values, every token counts as valid.")
        + "</p></div>",
        "two",
    )


def _denoising_section(trace: Trace, values: Values) -> str:
    _, horizon, dims = values.chunk.shape
    names = trace.inputs.action_names or tuple(f"dimension {i}" for i in range(dims))
    padding = f" The other {dims - len(names)} of {dims} dimensions are padding." if len(names) < dims else ""
    return lede(
        f"Each plot is one dimension of the action chunk over its {horizon} time steps, in normalized units, before "
        f"the first and after each of {values.num_steps} Euler steps.{padding}"
    ) + denoising_figures(values.chunk, names)


def _time_section(values: Values) -> str:
    texts = {
        "scale": "multiplies the normalized token: x / rms(x) · (1 + scale).",
        "shift": "is added to the scaled token.",
        "gate": "multiplies a sublayer's output before it is added to the residual stream.",
    }
    panels = []
    for part, text in texts.items():
        rms = values.modulation[part]
        rms = rms[:-1] if part == "gate" else rms  # the final norm's gate acts on nothing
        mean = f"Mean {rms[:, 0].mean():.3g} at t = 1, {rms[:, -1].mean():.3g} at t = 0."
        html = f'<h3>{part}</h3><p class="sub">{text}<br>{mean}</p>{modulation_figure(rms, part)}'
        panels.append(panel(html, PART_COLORS[part]))
    return (
        lede(
            "Root mean square over the width of scale, shift and gate of each adaptive norm, from noise to actions. "
            "Every layer has two rows, for attention and feed-forward; the last row is the final norm, whose gate acts "
            "on nothing and is left out. Below, thin lines are norms, the thick one is their mean. Gates are often "
            "said to be wide open at t = 1 and nearly closed at t = 0; these are the values of these weights."
        )
        + f'<div class="heat">{"".join(panels)}</div>'
    )


def _steps_section(trace: Trace) -> str:
    ranges = ""
    if trace.values is not None:
        ranges = (
            " Ranges: thin from min to max, thick one deviation around the mean, on one axis for all, from "
            f"−{RANGE_LIMIT} to {RANGE_LIMIT} and logarithmic away from 0."
        )
    cards = "".join(_card(trace, step) for step in STEPS)
    return (
        lede(
            '<span class="tag joint">joint</span> marks tensors of the joint forward pass of the papers, over both '
            'experts at once; <span class="tag cached">cached</span> marks the blocks of them that the model computes. '
            f"All others are the same in both.{ranges}"
        )
        + f'<div class="steps">{cards}</div>'
    )


def _card(trace: Trace, step: Step) -> str:
    number = "inference" if step.id == "inference" else f"step {step.id}"
    return (
        f'<article class="step panel {step.color}" id="step-{step.id}"><div>'
        f'<span class="no">{number}</span><h3>{escape(step.title)}</h3>'
        f"<p>{escape(step.explanation(trace.inputs.config.pi05))}</p></div>"
        f'<div class="scroll">{_table(rows_of(trace, step.id), with_stats=trace.values is not None)}</div></article>'
    )


def _table(rows: list[Row], *, with_stats: bool) -> str:
    head = [("", "tensor"), ("", "shape"), ("", "dtype")]
    if with_stats:
        head += [*(("num", name) for name in Stats._fields), ("", "range")]
    colors = [_ROW_COLORS.get(row.name.partition("/")[0], "") for row in rows]
    return html_table([*head, ("", "")], zip(colors, (_cells(row, with_stats) for row in rows), strict=True))


def _cells(row: Row, with_stats: bool) -> Iterator[tuple[str, str]]:
    """Cells of a tensor, each behind its class."""
    entry = row.entry
    count = f" <small>×{row.repeats}</small>" if row.repeats > 1 else ""
    formula = f'<span class="formula">{escape(entry.formula)}</span>' if entry.formula else ""
    yield "name", escape(row.name) + count + formula
    yield "wide" if entry.dtype == "str" else "shape", escape(row.shape)
    yield "dtype", escape(entry.dtype)
    if with_stats:
        numbers = map(format_number, row.stats) if row.stats else [""] * len(Stats._fields)
        yield from (("num", number) for number in numbers)
        drawn = row.stats and entry.dtype.startswith(("float", "bfloat"))  # ids and masks have no useful range
        yield "range", range_bar(row.stats) if row.stats and drawn else ""
    yield "where", f'<span class="tag {row.tag}">{row.tag}</span>' if row.tag else ""


def _agreement_section(values: Values) -> str:
    columns = [Column("two computations of the same", "name"), Column("largest difference", "number")]
    rows = [(pair.what, f"{pair.max_abs:.1e}", format_number(pair.scale)) for pair in values.agreement]
    return (
        lede("The joint forward pass of this page compared with the model's own, on the same batch.")
        + Table([*columns, Column("largest value", "number")], rows).to_html()
    )


def _parameters_section(trace: Trace) -> str:
    total, largest = sum(trace.parameters.values()), max(trace.parameters.values())
    rows = [(name, count / largest, format_count(count)) for name, count in trace.parameters.items()]
    return lede(f"{format_count(total)} in all.") + bars(rows, "prefix")


def _comparison_section(left: Trace, right: Trace) -> str:
    titles = (left.inputs.title, right.inputs.title)
    tables = [(title, rows) for title, rows in compare_facts(left, right).items()]
    drawn = "".join(f"<h3 class='gap'>{escape(t.inputs.title)}: data flow</h3>{flow_diagram(t)}" for t in (left, right))
    masks = (f"<div><h3>{escape(t.inputs.title)}: attention mask</h3>{mask_figure(t)}</div>" for t in (left, right))
    drawn += f'<div class="two gap">{"".join(masks)}</div>'
    steps = compare_steps(left, right)
    tables_below = [(f"{step.id} · {step.title}", steps[step.id]) for step in STEPS]
    return lede(
        "<b>Bold</b> rows exist in one of the two models: their architectures differ. Other rows differ in size, and "
        "grey rows are the same."
    ) + panel(_pairs(titles, tables) + drawn + _pairs(titles, tables_below))


def _pairs(titles: Sequence[str], tables: Iterable[tuple[str, list[Pair]]]) -> str:
    head = [("", ""), *(("", escape(title)) for title in titles)]
    css = ("name", "shape", "shape")
    return "".join(
        f"<h3 class='gap'>{escape(title)}</h3><div class='scroll'>"
        + html_table(head, ((row.kind, zip(css, map(escape, row), strict=True)) for row in rows))
        + "</div>"
        for title, rows in tables
    )
