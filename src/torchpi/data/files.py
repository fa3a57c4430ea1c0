"""The files of a dataset: opening them, and the reason that one can't be read."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require
from torchpi.schema import DECODER, bounded

_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get ."}
"""Beginnings of the small files that stand for large ones in a clone, and the commands that bring these."""
ALLOW_OUTSIDE = "TORCHPI_ALLOW_OUTSIDE"
"""The variable with the folders outside of a dataset that its links may lead to, separated as in PATH."""
_WEB_PAGES = (b"<!doctype html", b"<html")


def is_hidden(path: Path) -> bool:
    """True for what systems and editors put beside a file: ._file of macOS, .ipynb_checkpoints, .~lock.…"""
    return any(part.startswith((".", "~")) for part in path.parts)


class DatasetFolder:
    """The folder of a dataset: whatever its files name, and wherever links lead, only files in it are read.

    Links may also lead into the blobs of a download cache of the Hub that the folder belongs to, and into the folders
    of the variable `ALLOW_OUTSIDE`.
    """

    def __init__(self, root: Path) -> None:
        self.root, real = root, root.resolve()
        blobs = [folder.parent / "blobs" for folder in real.parents if folder.name == "snapshots"]
        outside = [
            Path(text).expanduser().resolve() for text in os.environ.get(ALLOW_OUTSIDE, "").split(os.pathsep) if text
        ]
        self._allowed = [real, *blobs, *outside]
        self._paths: dict[str, Path] = {}
        self._links: dict[Path, set[str]] = {}

    def file(self, name: str) -> Path:
        """The file of a name, which may be missing; consecutive episodes share one, and its path."""
        if name not in self._paths:
            parts = name.replace("\\", "/").split("/")
            leaves = not parts[0] or ":" in parts[0] or ".." in parts
            if leaves or not name.isprintable() or max(len(part.encode()) for part in parts) > 255:
                raise DatasetError(
                    f"{self.root}: its metadata name the file {name!a:.200}, which can't be in the folder."
                )
            self._paths[name] = path = self.root / name
            self.check(path)
        return self._paths[name]

    def check(self, path: Path) -> None:
        """Raise an error where a path is, or leads through, a link to somewhere else."""
        folder = path.parent
        if folder not in self._links:
            self._require_inside(folder)
            entries = os.scandir(folder) if folder.is_dir() else ()
            self._links[folder] = {entry.name for entry in entries if entry.is_symlink()}
        if path.name in self._links[folder]:
            self._require_inside(path)

    def _require_inside(self, path: Path) -> None:
        real = path.resolve()
        if not any(real.is_relative_to(folder) for folder in self._allowed):
            folder = real.parent if real.is_file() else real
            raise DatasetError(
                f"{path} leads through a link to {real}, outside of the dataset's folder; nothing is read there, as "
                f"the dataset may be a stranger's. If the link is yours: --allow-outside {folder} (or the variable "
                f"{ALLOW_OUTSIDE})."
            )


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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def read_table(file: Any, path: Path, columns: list[str] | None = None) -> Any:
    """Columns of an open Parquet file, by default all; an error where they do not fit into half of the free memory: a
    few bytes of a file may stand for any number of repeated values."""
    pa, room = require("pyarrow", "data"), psutil.virtual_memory().available // 2
    row_bytes, paths = 1, [file.schema.column(i).path for i in range(len(file.schema))]
    used = [
        i for i, part in enumerate(paths) if columns is None or any(f"{part}.".startswith(f"{c}.") for c in columns)
    ]
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        parts = map(group.column, used)
        # A text may be as long as all that is stored of its column, in each row.
        sizes = (p.num_values * (p.total_uncompressed_size if p.physical_type == "BYTE_ARRAY" else 8) for p in parts)
        row_bytes = max(row_bytes, sum(sizes) // max(group.num_rows, 1))
    batches, size, count = [], 0, max(1, min(file.metadata.num_rows, room // row_bytes))
    for batch in file.iter_batches(batch_size=count, columns=columns):
        batches.append(batch)
        size += batch.nbytes
        if size > room:
            raise DatasetError(
                f"{path} has {file.metadata.num_rows} rows, which take more than {room} bytes of memory."
            )
    return pa.Table.from_batches(batches) if batches else file.read(columns=columns)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file: one per line, or over several, as some editors make of it."""
    require_file(path)
    rows, end = list[Any](), 0
    try:
        text = path.read_text(encoding="utf-8-sig")
        while begin := re.compile(r"\S").search(text, end):
            row, end = DECODER.raw_decode(text, begin.start())
            rows.append(bounded(row))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise unreadable(path, f"it is not valid JSON: {error}") from error
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise DatasetError(f"{path} has the line {wrong!r:.80}; expected a JSON object in each.")
    return rows


def _in_line(cause: object) -> str:
    return " ".join(str(cause).split()).rstrip(".")
