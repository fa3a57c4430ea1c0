"""Files and folders that appear complete under their name, or not at all."""

import contextlib
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `target` to write into, which takes its place when the context ends without an error.

    A process that is killed while it writes leaves a `.<name>.….tmp` behind. A folder cannot be exchanged in one step:
    a process killed between the two renames leaves nothing under the name, the old folder as `.<name>.….old` and the
    new one as `.<name>.….tmp`, both whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    beside.mkdir()
    try:
        yield beside
        make_durable(beside)
        _move_into_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file; a process that is killed leaves the old text or the new one."""
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def make_durable(folder: pathlib.Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for entry in (*folder.rglob("*"), folder):
        fsync(entry)


def fsync(path: pathlib.Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(beside: pathlib.Path, target: pathlib.Path) -> None:
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
        os.rename(target, old)
        try:
            os.rename(beside, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.rename(beside, target)
    fsync(target.parent)
