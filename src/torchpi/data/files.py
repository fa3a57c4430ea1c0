"""The files of a dataset: opening them, and the reason that one can't be read."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require

_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get ."}
"""Beginnings of the small files that stand for large ones in a clone, and the commands that bring these."""
_WEB_PAGES = (b"<!doctype html", b"<html")


def is_hidden(path: Path) -> bool:
    """True for what systems and editors put beside a file: ._file of macOS, .ipynb_checkpoints, .~lock.…"""
    return any(part.startswith((".", "~")) for part in path.parts)


def require_file(path: Path, label: str = "file") -> None:
    """Raise a FileNotFoundError about a file of a dataset that is not there."""
    if path.is_file():
        return
    if path.is_symlink():
        raise MissingFileError(
            f"The {label} {path} is a link to {path.readlink()}, which is not there: only links were copied (of a "
            "download cache, for example). Copy the files that they point to (cp -L, rsync -L), or get it again."
        )
    raise MissingFileError(f"There is no {label} {path}; the dataset is incomplete. Get it again.")


def unreadable(path: Path, cause: object) -> DatasetError:
    """The error about a file that can't be read; `cause` is the library's word for it."""
    with path.open("rb") as file:
        start = file.read(256)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    damage = f"is truncated or damaged: {_in_line(cause)}. Get the file again."
    if command := next((command for text, command in _POINTERS.items() if start.startswith(text)), None):
        damage = (
            "is a pointer to a file, not the file itself: the dataset was cloned without its large files. Run "
            f"`{command}` in its folder, or download it again."
        )
    elif start.lstrip().lower().startswith(_WEB_PAGES):
        damage = "is a web page: its download got an error or a login. Download the file again."
    elif not start.strip(b"\0"):
        damage = (
            f"is truncated or damaged: it has {'nothing but zeros' if start else 'no contents'}, because the program "
            "that wrote it was killed or the disk was full. Get the file again."
        )
    elif (start.startswith(b"PAR1") and end != b"PAR1") or (start[4:8] == b"ftyp" and b"moov" not in start):
        damage = (
            "is truncated or damaged: its end, without which nothing can be read, is missing or not valid "
            f"({_in_line(cause)}). The recording ended before the file was complete (LeRobot completes it in "
            "dataset.finalize()), or a copy was cut off. Get the whole file, or record its episodes again."
        )
    return DatasetError(f"{path} {damage}")


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; an error of reading it names it."""
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    require_file(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file: one per line, or over several, as some editors make of it."""
    require_file(path)
    rows, end = list[Any](), 0
    try:
        text, decoder = path.read_text(encoding="utf-8-sig"), json.JSONDecoder()
        while begin := re.compile(r"\S").search(text, end):
            row, end = decoder.raw_decode(text, begin.start())
            rows.append(row)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise unreadable(path, f"it is not valid JSON: {error}") from error
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise DatasetError(f"{path} has the line {wrong!r:.80}; expected a JSON object in each.")
    return rows


def _in_line(cause: object) -> str:
    return " ".join(str(cause).split()).rstrip(".")
