"""Opening the files of a dataset, with errors that explain why one can't be read."""

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
"""Prefixes of pointer files in a clone without its large files, and the commands that fetch these."""
ALLOW_OUTSIDE = "TORCHPI_ALLOW_OUTSIDE"
"""Environment variable with folders outside a dataset that its links may lead to, separated as in PATH."""
_WEB_PAGES = (b"<!doctype html", b"<html")


def is_hidden(path: Path) -> bool:
    """True for files left by systems and editors: ._file (macOS), .ipynb_checkpoints, .~lock.…"""
    return any(part.startswith((".", "~")) for part in path.parts)


class DatasetFolder:
    """Folder of a dataset. Only files inside it are read, whatever paths its metadata name and wherever its links lead.

    Links may also lead to the blobs of the Hub's download cache that contains the folder, and to the folders listed in
    the environment variable `ALLOW_OUTSIDE`.
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
        """The path of a file named by the metadata, which may not exist. Cached: episodes share files."""
        if name not in self._paths:
            parts = name.replace("\\", "/").split("/")
            is_outside = not parts[0] or ":" in parts[0] or ".." in parts
            if is_outside or not name.isprintable() or max(len(part.encode()) for part in parts) > 255:
                raise DatasetError(
                    f"{self.root}: its metadata name the file {name!a:.200}, which can't be inside the folder."
                )
            self._paths[name] = path = self.root / name
            self.check(path)
        return self._paths[name]

    def check(self, path: Path) -> None:
        """Raise an error if a path is, or leads through, a link to another folder."""
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
                f"{path} leads through a link to {real}, outside the dataset's folder. Such files are not read, "
                f"because the dataset may not be trustworthy. If the link is yours: --allow-outside {folder} (or the "
                f"environment variable {ALLOW_OUTSIDE})."
            )


def require_file(path: Path, label: str = "file") -> None:
    """Raise a FileNotFoundError if a file of a dataset is missing."""
    if path.is_file():
        return
    if path.is_symlink():
        raise MissingFileError(
            f"The {label} {path} is a link to {path.readlink()}, which does not exist: only links were copied (from a "
            "download cache, for example). Copy the files that they point to (cp -L, rsync -L), or get it again."
        )
    raise MissingFileError(f"There is no {label} {path}; the dataset is incomplete. Get it again.")


def unreadable(path: Path, cause: object) -> DatasetError:
    """The error about a file that can't be read; `cause` is the library's error."""
    with path.open("rb") as file:
        start = file.read(256)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    cause_text = " ".join(str(cause).split()).rstrip(".")
    fetch_command = next((command for prefix, command in _POINTERS.items() if start.startswith(prefix)), None)
    if fetch_command is not None:
        problem = (
            "is a pointer to a file, not the file itself: the dataset was cloned without its large files. Run "
            f"`{fetch_command}` in its folder, or download it again."
        )
    elif start.lstrip().lower().startswith(_WEB_PAGES):
        problem = "is a web page: its download got an error or a login page. Download the file again."
    elif not start.strip(b"\0"):
        problem = (
            f"is truncated or damaged: it {'contains only zeros' if start else 'is empty'}, because the program that "
            "wrote it was killed or the disk was full. Get the file again."
        )
    elif (start.startswith(b"PAR1") and end != b"PAR1") or (start[4:8] == b"ftyp" and b"moov" not in start):
        problem = (
            "is truncated or damaged: its end, without which nothing can be read, is missing or invalid "
            f"({cause_text}). The recording ended before the file was complete (LeRobot completes it in "
            "dataset.finalize()), or a copy was cut off. Get the whole file, or record its episodes again."
        )
    else:
        problem = f"is truncated or damaged: {cause_text}. Get the file again."
    return DatasetError(f"{path} {problem}")


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file. Errors while reading it are raised as `unreadable`."""
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    require_file(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def read_table(file: Any, path: Path, columns: list[str] | None = None) -> Any:
    """Read columns of an open Parquet file, by default all.

    Raises:
        ValueError: they don't fit into half of the free memory. A few bytes of a file can encode any number of repeated
            values.
    """
    pa, max_bytes = require("pyarrow", "data"), psutil.virtual_memory().available // 2
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    used = [i for i, p in enumerate(paths) if columns is None or any(f"{p}.".startswith(f"{c}.") for c in columns)]
    row_bytes = 1
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        size = 0
        for chunk in map(group.column, used):
            # In the worst case, each row repeats all text that is stored in the column.
            size += chunk.num_values * (chunk.total_uncompressed_size if chunk.physical_type == "BYTE_ARRAY" else 8)
        row_bytes = max(row_bytes, size // max(group.num_rows, 1))
    batches, num_bytes = [], 0
    batch_size = max(1, min(file.metadata.num_rows, max_bytes // row_bytes))
    for batch in file.iter_batches(batch_size=batch_size, columns=columns):
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > max_bytes:
            raise DatasetError(
                f"{path} has {file.metadata.num_rows} rows, which take more than {max_bytes} bytes of memory."
            )
    return pa.Table.from_batches(batches) if batches else file.read(columns=columns)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file: one per line, or spread over several lines by an editor."""
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
        raise DatasetError(f"{path} has the line {wrong!r:.80}; expected a JSON object per line.")
    return rows
