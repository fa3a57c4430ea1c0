"""Files and folders that appear complete under their name, or not at all; an error of the disk has the name."""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator

from torchpi.errors import UsageError

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing: a full disk or quota, too large a file, a broken disk."""


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
        with naming(target):
            yield beside
            make_durable(beside)
            _move_into_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside a file to write to, which takes the file's place when the context ends without an error.

    Of a link, the file that it leads to is replaced. A device or pipe (/dev/stdout) is written to directly.
    """
    target = pathlib.Path(os.path.realpath(path))
    with naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            yield path
            return
        # Always the same name, so that the next writing replaces what a killed process has left; short for any name.
        part = target.with_name(f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.tmp")
        try:
            yield part
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file; a process that is killed leaves the old text or the new one."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder to write into, unless there is one; an error where there can't be, or nobody may write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        found = f"{folder} is a file, or below one; expected a folder to write into."
        raise UsageError(f"{found} Choose another one with out=.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written to; choose another folder with out=.")


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Name the file or folder that is being written in the errors of a disk, which have no name, and in those that have
    a temporary file's."""
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in _OF_DISKS
        if not is_unnamed and not str(error.filename).endswith(".tmp"):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
