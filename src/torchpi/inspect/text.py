"""A trace on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from torchpi.inspect.steps import STEPS, Step
from torchpi.inspect.summary import STATS, Pair, Row, architecture, compare_facts, compare_steps, rows_of, sizes
from torchpi.inspect.trace import Trace
from torchpi.ui.format import format_count, format_number

Renderable = Table | Text
_TAGS = {"joint": "magenta", "cached": "cyan", "training": "yellow", "": ""}
_STYLES = {"same": "dim", "size": "", "architecture": "bold"}


def print_trace(trace: Trace, console: Console) -> None:
    """Header, a table per step, and the facts of the whole."""
    console.print(_header(trace))
    for step in STEPS:
        console.print()
        console.print(_title(step))
        console.print(Text(f"     {step.explanation(trace.inputs.config.pi05)}", style="dim"))
        console.print(_step_table(rows_of(trace, step.id), with_stats=trace.values is not None))
    facts = architecture(trace) | sizes(trace)
    facts |= {f"  of these {name}": format_count(count) for name, count in trace.parameters.items()}
    console.print()
    console.print(grid((), facts.items()))
    if trace.values is not None:
        rows = [(pair.what, f"{pair.max_abs:.1e}", f"{pair.scale:.3g}") for pair in trace.values.agreement]
        console.print()
        console.print(grid(("two computations of the same", "largest difference", "largest value"), rows))


def print_comparison(left: Trace, right: Trace, console: Console) -> None:
    """Two models next to each other: architecture, sizes, and every step's shapes."""
    for trace in (left, right):
        console.print(_header(trace))
    tables: list[tuple[Text, Sequence[Pair]]]
    tables = [(Text(title, style="bold"), rows) for title, rows in compare_facts(left, right).items()]
    tables += [(_title(step), rows) for step, rows in zip(STEPS, compare_steps(left, right).values(), strict=True)]
    for title, rows in tables:
        console.print()
        console.print(title)
        cells = [[Text(cell, style=_STYLES[row.kind]) for cell in (row.name, row.left, row.right)] for row in rows]
        console.print(grid(("", left.inputs.title, right.inputs.title), cells))
    console.print()
    console.print("bold: one model has it, and the other does not. normal: another size. grey: the same.")


def _header(trace: Trace) -> Panel:
    inputs = trace.inputs
    weights = "with weights" if trace.values is not None else "shapes without values (meta device)"
    lines = [f"{inputs.config.variant} · batch {len(inputs.noise)} · {trace.dtype} · {weights}"]
    if inputs.prompt is not None:
        lines.append(f"prompt: {inputs.prompt!r}")
    title = f"torchpi trace {inputs.title}"
    return Panel("\n".join([*lines, *inputs.notes]), title=title, title_align="left")


def _title(step: Step) -> Text:
    number = "" if step.id == "inference" else step.id
    return Text.assemble((f"{number:>4} ", "bold cyan"), (step.title, "bold"))


def grid(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[int] = ()) -> Table:
    """A table without lines; `right` are the columns of numbers."""
    rows = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns), header_style="dim")
    for i, column in enumerate(columns or [""] * len(rows[0])):
        table.add_column(column, overflow="fold", no_wrap=i == 0, justify="right" if i in right else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _step_table(rows: list[Row], *, with_stats: bool) -> Table:
    """One line per row: name, shape, dtype, statistics, formula."""
    columns = ["     tensor", "shape", "dtype", *(STATS if with_stats else ()), "formula", "view"]
    cells: list[tuple[str | Text, ...]] = []
    for row in rows:
        label = Text.assemble(f"     {row.name}", (f" ×{row.count}" if row.count > 1 else "", "dim"))
        shape = repr(row.entry.value) if row.entry.dtype == "str" else row.shape
        stats = [format_number(getattr(row.stats, name)) if row.stats else "" for name in STATS if with_stats]
        formula, tag = Text(row.entry.formula, style="green"), Text(row.tag, style=_TAGS[row.tag])
        cells.append((label, shape.ljust(22), row.entry.dtype, *stats, formula, tag))
    return grid(columns, cells, right=range(3, 7) if with_stats else ())
