"""A trace on the terminal."""

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from torchpi.trace.record import Stats
from torchpi.trace.result import Trace
from torchpi.trace.steps import STEPS, Step
from torchpi.trace.summary import Row, compare_facts, compare_steps, facts, phases, rows_of
from torchpi.ui.format import format_count, format_number

_VIEWS = {"joint": "magenta", "cached": "cyan", "both": ""}


def print_trace(trace: Trace, console: Console) -> None:
    """Header, one table a step, and what there is to say about the whole."""
    console.print(_header(trace))
    for step in STEPS:
        console.print()
        console.print(_title(step))
        console.print(Text(f"     {step.explanation(trace.config.pi05)}", style="dim"))
        console.print(_step_table(rows_of(trace, step.id), with_stats=trace.values is not None))
    console.print()
    console.print(_facts_table(trace))
    if trace.values is not None:
        console.print()
        console.print(_agreement_table(trace))


def print_comparison(left: Trace, right: Trace, console: Console) -> None:
    """Two models side by side: the facts, every step's shapes, and what exists when."""
    for trace in (left, right):
        console.print(_header(trace))
    table = _plain_table("", left.title, right.title)
    for name, one, other in compare_facts(left, right):
        table.add_row(name, one, other, style="" if one == other else "bold")
    console.print(table)
    steps = compare_steps(left, right)
    for step in STEPS:
        console.print()
        console.print(_title(step))
        table = _plain_table("tensor", left.title, right.title)
        for name, one, other in steps[step.id]:
            table.add_row(name, one, other, style="dim" if one == other else "")
        console.print(table)
    for trace in (left, right):
        console.print()
        console.print(_phases_table(trace))


def _header(trace: Trace) -> Panel:
    weights = "with weights" if trace.values is not None else "shapes without values (meta device)"
    lines = [f"{trace.variant} · batch {trace.batch} · {trace.dtype} · {weights}"]
    if trace.prompt is not None:
        lines.append(f"prompt: {trace.prompt!r}")
    return Panel("\n".join([*lines, *trace.notes]), title=f"torchpi trace {trace.title}", title_align="left")


def _title(step: Step) -> Text:
    number = "" if step.id == "inference" else step.id
    return Text.assemble((f"{number:>4} ", "bold cyan"), (step.title, "bold"))


def _plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns), header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", min_width=36 if i == 0 else 18)
    return table


def _step_table(rows: list[Row], *, with_stats: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=with_stats)
    table.add_column("     tensor", overflow="fold", min_width=40 if not with_stats else 0)
    table.add_column("shape", overflow="fold", min_width=24 if not with_stats else 0)
    table.add_column("dtype")
    if with_stats:
        for name in ("min", "mean", "max", "std"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("view" if with_stats else "", no_wrap=True)
    for row in rows:
        label = Text.assemble(f"     {row.name}", (f" ×{row.count}" if row.count > 1 else "", "dim"))
        stats = _stats_cells(row.stats) if with_stats else []
        table.add_row(label, row.shape_text, row.dtype, *stats, _where(row))
    return table


def _stats_cells(stats: Stats | None) -> list[str]:
    if stats is None:
        return [""] * 4
    return [format_number(value) for value in (stats.min, stats.mean, stats.max, stats.std)]


def _where(row: Row) -> Text:
    if row.phase == "training":
        return Text("training", style="yellow")
    if row.view == "both" or row.phase == "inference":
        return Text("")
    return Text(row.view, style=_VIEWS[row.view])


def _facts_table(trace: Trace) -> Table:
    table = _plain_table("", "")
    for name, value in facts(trace).items():
        table.add_row(name, str(value))
    for name, count in trace.parameters.items():
        table.add_row(f"  of these {name}", format_count(count))
    return table


def _agreement_table(trace: Trace) -> Table:
    assert trace.values is not None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("two ways to compute the same", min_width=52)
    table.add_column("largest difference", justify="right")
    table.add_column("largest value", justify="right")
    for pair in trace.values.agreement:
        table.add_row(pair.what, f"{pair.max_abs:.1e}", f"{pair.scale:.3g}")
    return table


def _phases_table(trace: Trace) -> Table:
    table = Table(
        title=f"{trace.title}: what exists when", title_justify="left", box=None, pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for phase, names in phases(trace).items():
        table.add_row(phase, "all else" if phase == "both" else ", ".join(names))
    table.add_row("time", "training: one random t per sample; inference: the same values for all, one after another")
    table.add_row("cache", "training: the gradient flows through it; inference: computed once, read in every step")
    return table
