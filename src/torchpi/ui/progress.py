"""Progress bars on stderr; if stderr is not a terminal, one log line per minute."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from torchpi.errors import printable
from torchpi.ui.format import format_duration
from torchpi.ui.tables import PlainConsole

LOG_SECONDS = 60.0
"""Time between two log lines."""
_MIN_BAR_WIDTH = 72
"""Minimum width of a terminal, in columns, to show a bar and times."""


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, completed: int = 0, shown: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show a progress bar, and yield the function that advances it: `advance(note="", by=1)`."""
    console = PlainConsole(stderr=True, soft_wrap=True)
    if shown and not console.is_terminal:
        yield _log_lines(console, title, total, completed, clock)
        return
    columns: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False)]
    if console.width >= _MIN_BAR_WIDTH:
        columns = [BarColumn(), *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    title_column = TextColumn("{task.description}", markup=False)
    with Progress(title_column, *columns, console=console, disable=not shown) as progress:
        task = progress.add_task(printable(title), total=total, completed=completed, note="")

        def advance(note: str = "", by: int = 1) -> None:
            progress.update(task, advance=by, note=printable(note))

        yield advance


def _log_lines(
    console: Console, title: str, total: int, completed: int, clock: Callable[[], float]
) -> Callable[..., None]:
    """`advance` function for a log, which prints a line every LOG_SECONDS and at the end."""
    start = printed = clock()
    done = completed

    def advance(note: str = "", by: int = 1) -> None:
        nonlocal done, printed
        done, now = done + by, clock()
        if done < total and now - printed < LOG_SECONDS:
            return
        printed = now
        parts = [f"{title} {done}/{total}".strip(), note, format_duration(now - start)]
        if done < total:
            parts.append(f"{format_duration((now - start) / (done - completed) * (total - done))} left")
        console.print(", ".join(filter(None, parts)))

    return advance
