"""Progress bars of long runs, on stderr; where that is no terminal but a log, a line per minute."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchpi.errors import printable
from torchpi.ui.format import format_duration
from torchpi.ui.tables import PlainConsole

LOG_SECONDS = 60.0
"""Time between two lines of a log."""
_WIDE = 72
"""Columns of a terminal that has room for a bar and times."""


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, completed: int = 0, shown: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show a progress bar; calling what is yielded advances it: `advance(note="", by=1)`."""
    console = PlainConsole(stderr=True, soft_wrap=True)
    if shown and not console.is_terminal:
        yield _log_lines(console, title, total, completed, clock)
        return
    is_wide = console.width >= _WIDE
    bar, times = [BarColumn()] * is_wide, [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()] * is_wide
    name, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    with Progress(name, *bar, MofNCompleteColumn(), note, *times, console=console, disable=not shown) as progress:
        task = progress.add_task(printable(title), total=total, completed=completed, note="")

        def advance(note: str = "", by: int = 1) -> None:
            progress.update(task, advance=by, note=printable(note))

        yield advance


def _log_lines(
    console: Console, title: str, total: int, completed: int, clock: Callable[[], float]
) -> Callable[..., None]:
    """`advance` of a progress bar, for a log: prints a line after each LOG_SECONDS, and the last."""
    start = printed = clock()
    done = completed

    def advance(note: str = "", by: int = 1) -> None:
        nonlocal done, printed
        done, now = done + by, clock()
        if done < total and now - printed < LOG_SECONDS:
            return
        printed, left = now, (now - start) / (done - completed) * (total - done)
        times = format_duration(now - start), f"{format_duration(left)} left" if done < total else ""
        console.print(", ".join(filter(None, (f"{title} {done}/{total}".strip(), note, *times))))

    return advance
