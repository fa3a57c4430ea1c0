"""Atomic writing of files and folders, with disk errors that name the file."""

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

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Full disk, exceeded quota, too large a file, broken disk."""


@contextlib.contextmanager
def atomic_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Temporary folder next to `target`, which replaces it if the context ends without an error.

    A process killed while it writes leaves a `.<name>.….tmp`. Replacing a folder takes two renames: a process killed
    between them leaves no `target`, but the complete old folder as `.<name>.….old`, and the new one as
    `.<name>.….tmp`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        with naming(target):
            yield temporary
            make_durable(temporary)
            _replace_folder(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Temporary path next to a file, which replaces the file if the context ends without an error.

    If `path` is a link, its target is replaced. A device or pipe (/dev/stdout) is written to directly.
    """
    target = pathlib.Path(os.path.realpath(path))
    with naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            yield path
            return
        # Always the same name, so that the next write replaces what a killed process left; hashed to be short.
        temporary = target.with_name(f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.tmp")
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically: a killed process leaves either the old text or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(folder: pathlib.Path) -> None:
    """Create a folder unless it exists; raise an error if that is impossible, or it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder} is a file, or below one; expected a folder to write into. Choose another one with out=."
        ) from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written to; choose another folder with out=.")


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Put the path into OSErrors that have no file name (disk errors), or the name of a temporary file."""
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in _DISK_ERRORS
        if is_unnamed or str(error.filename).endswith(".tmp"):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def make_durable(folder: pathlib.Path) -> None:
    """Flush a folder and everything in it to disk."""
    for entry in (*folder.rglob("*"), folder):
        fsync(entry)


def fsync(path: pathlib.Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(target: pathlib.Path, new: pathlib.Path) -> None:
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.rename(new, target)
    fsync(target.parent)
