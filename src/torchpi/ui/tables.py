"""Tables that can be shown on a terminal and on a page."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table as RichTable
from rich.text import Text

from torchpi.errors import printable
from torchpi.rates import Rate


class PlainConsole(Console):
    """Console that prints strings literally: names from files may contain markup or control sequences."""

    def __init__(self, **settings: Any) -> None:
        if "ipykernel" in sys.modules:  # in a notebook, Rich's own display needs ipywidgets, and lines can't be redrawn
            settings = {"force_jupyter": False, "force_terminal": False} | settings
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text, _MAX_CELL, keep="\n"), **settings)

    def status(self, status: RenderableType, **settings: Any) -> Status:
        return super().status(self.render_str(status) if isinstance(status, str) else status, **settings)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: Literal["text", "name", "number", "rate", "soft"] = "text"
    """On a narrow terminal, text and soft (less prominent text) wrap, the others do not; number is right-aligned."""


_MAX_CELL = 2000
"""Maximum characters of a cell on a terminal; names from files may be longer."""
Cell = str | Text | Rate
"""A text, a styled text for the terminal, or a rate, which a page draws as a bar with its interval."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows and columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] | None = None
    """Last row with totals."""
    marked: Sequence[int] = ()
    """Rows to highlight on a page."""

    def to_rich(self) -> RichTable:
        """Table for a terminal."""
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        all_rows = self.rows if self.total is None else [*self.rows, self.total]
        for i, column in enumerate(self.columns):
            is_edge = i in (0, len(self.columns) - 1)  # Rich pads the outer columns
            width = max(len(str(cell)) for cell in (column.title, *(row[i] for row in all_rows))) + is_edge
            table.add_column(
                column.title,
                justify="right" if column.kind == "number" else "left",
                no_wrap=column.kind in ("name", "number", "rate"),
                min_width=min(width, 12) if column.kind in ("text", "soft") else width,  # never cut -103 to -10
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(_rich_cell, row))
        if self.total is not None:
            table.add_section()
            table.add_row(*map(_rich_cell, self.total))
        return table

    def to_html(self) -> str:
        """Table for a page."""
        styles = {"text": "wide", "name": "name", "number": "num", "rate": "", "soft": "wide dtype"}
        css = [styles[column.kind] for column in self.columns]
        rows = [("marked" if i in self.marked else "", row) for i, row in enumerate(self.rows)]
        if self.total is not None:
            rows.append(("all", self.total))
        head = zip(css, (escape(column.title) for column in self.columns), strict=True)
        body = ((row_css, zip(css, map(_html_cell, row), strict=True)) for row_css, row in rows)
        return f'<div class="panel scroll">{html_table(head, body)}</div>'


def html_table(head: Iterable[tuple[str, str]], rows: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """Table of (CSS class, HTML) cells; each row also has a CSS class."""

    def html_row(css: str, cells: Iterable[tuple[str, str]], tag: str = "td") -> str:
        inner = "".join(f'<{tag} class="{name}">{html}</{tag}>' for name, html in cells)
        return f'<tr class="{css}">{inner}</tr>'

    return f"<table>{html_row('', head, 'th')}{''.join(html_row(css, cells) for css, cells in rows)}</table>"


def grid(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[int] = ()) -> RichTable:
    """Table without lines for a terminal; `right` are the right-aligned columns."""
    rows = list(rows)
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns), header_style="dim")
    for i, column in enumerate(columns or [""] * len(rows[0])):
        table.add_column(column, overflow="fold", no_wrap=i == 0, justify="right" if i in right else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _rich_cell(cell: Cell) -> str | Text:
    return cell if isinstance(cell, Text) else Text(printable(cell, _MAX_CELL, keep="\n"))


def _html_cell(cell: Cell) -> str:
    if not isinstance(cell, Rate):
        return escape(str(cell))
    low, high = cell.interval
    return (
        f'<span class="rate"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<u style="left:{100 * cell.success_rate:.1f}%"></u></span><small>{escape(str(cell))}</small>'
    )
