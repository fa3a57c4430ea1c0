"""Progress bars of long runs, on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(title: str, total: int, *, completed: int = 0, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar; calling what is yielded advances it: `advance(note="", by=1)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(title, total=total, completed=completed, note="")

        def advance(note: str = "", by: int = 1) -> None:
            progress.update(task, advance=by, note=note)

        yield advance
