"""Downloads into a cache on disk: checkpoints from public buckets (gs://), and repositories of the Hugging Face Hub (hf://).

The cache is the folder TORCHPI_HOME, by default ~/.cache/torchpi:

    gs/<bucket>/<path>                       a file or folder of a bucket
    hf/<org>/<name>/<revision>/<path>        a model repository, or a part of it; the default revision is main
    hf-datasets/<org>/<name>/<revision>/     a dataset, possibly only some of its files
    <file or folder>.download.json           all files of the address or repository: sizes, checksums, version
    <file>.part                              a partial file; the next download continues it
    gs/<bucket>.lock, hf/<org>/<name>/<revision>.lock        held by the process that downloads there

The .download.json is written first, and later downloads into the folder use the version in it. A file gets its final
name last, once its size and checksum are right, so a listed file of the listed size is complete. A file or folder
without a .download.json was placed by hand, and is used as it is.
"""

import dataclasses
import errno
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection
from urllib.parse import quote

import filelock

from torchpi.atomic import replace_text
from torchpi.checkpoints.sources import Bucket, File, Record, Repository, add_suffix, file_size, is_safe_path
from torchpi.errors import CheckpointError, MissingFileError

_PAUSE = 1.0
"""Seconds between attempts."""
_GS = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]+)/(?P<path>.+?)/?")
# The revision is a commit, tag or branch. In a checkpoint's address a path may follow, so a slash in a branch's name
# is written %2F, except in refs/pr/1.
_HF = re.compile(
    r"hf://(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|\w[\w.+%-]*))?(/(?P<path>.+?))?/?",
    re.ASCII,
)
_HF_DATASET = re.compile(r"hf://(datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.+%/-]*?))?/?", re.ASCII)


def fetch(address: str, *, sleep: Callable[[float], None] = time.sleep) -> pathlib.Path:
    """Return the folder or file of an address in the cache, after downloading it if needed.

    From a folder only the files of a policy are downloaded: JSON, safetensors and tokenizer files, `params` and
    `assets`; never pickles, never `train_state`. Complete files in the cache are used without a request, even if the
    address has a newer version by now; to get that, delete the folder and its .download.json. Without a connection,
    files can be placed by hand at the paths in the error message.

    Args:
        address: gs://bucket/path in a public bucket, or hf://org/name[@revision][/path], where a slash in a branch's
            name is written %2F; private repositories need HF_TOKEN or `hf auth login`. STORAGE_EMULATOR_HOST and
            HF_ENDPOINT name other servers.
        sleep: waits between attempts, for this many seconds.
    """
    return _ensure_complete(source_of(address), sleep)


def fetch_newest(address: str) -> tuple[pathlib.Path, str]:
    """As `fetch`, but replace older files in the cache by the newest version; also return its commit.

    Without a connection a complete folder stays as it is, with a note on stderr. So do files placed by hand.
    """
    source = source_of(address)
    root = _ensure_complete(source, newest=True)
    record = source.record()
    if record is None or isinstance(source, Bucket):  # a bucket's files have separate versions
        return root, ""
    return root, next((file.version for file in record.files.values()), "")


def source_of(address: str) -> Bucket | Repository:
    """Parse an address, without a request to its server."""
    if (match := _GS.fullmatch(address)) and is_safe_path(match["path"]):
        return Bucket(address, match["bucket"], match["path"])
    if (match := _HF.fullmatch(address)) and (not match["path"] or is_safe_path(match["path"])):
        return Repository(address, match["name"], match["revision"], path=match["path"] or "")
    raise CheckpointError(
        f"Malformed address {address!r}; expected gs://bucket/path or hf://org/name[@revision][/path]."
    )


def fetch_dataset(address: str, names: Collection[str]) -> pathlib.Path:
    """Return the cache folder of a dataset on the Hugging Face Hub, after downloading the named files; see `fetch`.

    Args:
        address: hf://org/name[@revision].
        names: files to download; a name that ends with "/" is a folder.
    """
    return _ensure_complete(dataset_source(address, names))


def dataset_source(address: str, names: Collection[str]) -> Repository:
    """Parse the address of a dataset, without a request to its server."""
    match = _HF_DATASET.fullmatch(address)
    if match is None:
        raise CheckpointError(f"Malformed address {address!r} of a dataset; expected hf://org/name[@revision].")
    if outside := [name for name in names if not is_safe_path(name.removesuffix("/"))]:
        raise CheckpointError(f"{address}: the dataset names the file {outside[0]!r}, which would be outside of it.")
    return Repository(address, match["name"], match["revision"], names=frozenset(names))


def _ensure_complete(
    source: Bucket | Repository, sleep: Callable[[float], None] = time.sleep, *, newest: bool = False
) -> pathlib.Path:
    if source.is_complete() and not newest:
        return source.root
    source.top.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(add_suffix(source.top, ".lock"))  # for the whole repository: addresses may share files
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that is downloading into {source.top}", file=sys.stderr)
        held = lock.acquire()
    with held:
        if newest:
            _delete_outdated(source)
        if not source.is_complete():
            _download(source, sleep)
    return source.root


def _delete_outdated(source: Bucket | Repository) -> None:
    """Delete the cached files that have changed on the server, and record its newest version."""
    source.connect()
    if (old := source.record()) is None:
        return
    try:
        new = Record(source.address, source.list_files())
    except source.errors as error:
        if source.http_status(error) is None and source.is_complete():
            print(f"{source.root} is not compared with {source.address}: {type(error).__name__}", file=sys.stderr)
            return
        raise _explain(source, error) from error
    source.require_files(new)
    for name, file in source.wanted(old).items():
        current = new.files.get(name)
        if current != file and not (current and file.checksum and current.checksum == file.checksum):
            (source.top / name).unlink(missing_ok=True)
            add_suffix(source.top / name, ".part").unlink(missing_ok=True)
    _write_record(source, new)


def _write_record(source: Bucket | Repository, record: Record) -> None:
    source.record_file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(source.record_file, json.dumps(dataclasses.asdict(record), indent=1))


def _download(source: Bucket | Repository, sleep: Callable[[float], None]) -> None:
    source.connect()
    try:
        record = source.record()
        if record is None or source.unavailable(record):
            record = Record(source.address, source.list_files())
            source.require_files(record)
            _write_record(source, record)
        else:
            source.require_files(record)
        missing = source.missing(record)
        _require_space(source, missing)
        for name, file in missing.items():
            _download_file(source, name, file, sleep)
    except source.errors as error:
        raise _explain(source, error) from error


def _require_space(source: Bucket | Repository, missing: dict[str, File]) -> None:
    """Raise an error if the disk has no space for the missing files."""
    needed = sum(
        file.size - max(0, file_size(add_suffix(source.top / name, ".part"))) for name, file in missing.items()
    )
    if needed > (free := shutil.disk_usage(source.top.parent).free):
        raise CheckpointError(
            f"{source.address}: {needed} bytes of the files that the server lists are missing here, and {source.top} "
            f"has only {free} bytes free: free some space, or set TORCHPI_HOME to a folder on another disk."
        )


def _download_file(source: Bucket | Repository, name: str, file: File, sleep: Callable[[float], None]) -> None:
    path = source.top / name
    part = add_suffix(path, ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file.checksum or file_size(part) > file.size:
        part.unlink(missing_ok=True)  # without a checksum, bytes of another version would stay unnoticed
    part.touch()
    try:
        if part.stat().st_size < file.size:
            _append_missing(source, name, file, part, sleep)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(
                f"{part} has {part.stat().st_size} of {file.size} bytes: free some space, or set TORCHPI_HOME to a "
                "folder on another disk, and try again; the download continues from these bytes"
            )
        raise
    if not file.matches(part):
        size = file_size(part)
        found = f"{size} bytes" if size < file.size else "another checksum"
        if size > file.size:
            found = f"more than {file.size} bytes"
        part.unlink()
        expected = f"{file.size} bytes with {file.checksum}" if file.checksum else f"{file.size} bytes"
        raise CheckpointError(
            f"{source.files_url}{quote(name)}: got {found}; expected {expected}. They are deleted; try again, or "
            f"delete {source.record_file} if the address has a newer version."
        )
    part.replace(path)


def _append_missing(
    source: Bucket | Repository, name: str, file: File, part: pathlib.Path, sleep: Callable[[float], None]
) -> None:
    """Append the missing bytes to a partial file, and at most one byte beyond its listed size, to detect a longer one.

    If the server ignores a range request, restart the file, and request no more ranges. Attempts that bring nothing
    new are limited to `source.retries` in a row.
    """
    from huggingface_hub.utils import tqdm

    largest = size = part.stat().st_size
    failures, last_error, use_ranges = 0, None, True
    with part.open("ab") as out, tqdm(total=file.size, initial=size, desc=name, unit="B", unit_scale=True) as bar:
        while size < file.size and failures <= source.retries:
            start, used_ranges, last_error = size if use_ranges else 0, use_ranges, None
            try:
                with source.open_stream(name, file, start) as (begin, chunks):
                    use_ranges = use_ranges and begin == start
                    if begin != size:
                        out.truncate(begin)
                        bar.n = size = begin
                    for chunk in chunks:
                        bar.update(len(chunk))
                        size += out.write(chunk[: file.size + 1 - size])
                        if size > file.size:
                            return
            except source.errors[0] as error:
                last_error, status = error, source.http_status(error)
                if status == 416 and start:  # the file on the server ends before `start`
                    return
                if status is not None and size <= largest:
                    raise
            failures = 0 if size > largest or use_ranges != used_ranges else failures + 1
            largest = max(largest, size)
            if 0 < failures <= source.retries:
                sleep(_PAUSE)
    if last_error is not None and size < file.size:
        raise last_error


def _explain(source: Bucket | Repository, error: Exception) -> Exception:
    """Error for the user after a failed request, with advice."""
    status = source.http_status(error)
    cause = " ".join(f"{type(error).__name__}: {error}".partition("\n\nDebug source")[0].split())
    if status in (401, 403, 404):
        return MissingFileError(f"{source.address} {source.explain_refusal(error)} ({cause}).")
    if status is not None and status not in (408, 429) and status < 500:
        return CheckpointError(f"{source.address}: the server refuses the request ({cause}).")
    record = source.record()
    missing = [] if record is None else list(source.missing(record))
    targets = [(f"{source.files_url}{quote(name)}", source.top / name) for name in missing[:10]]
    by_hand = "".join(f"\n  {url}\n    to {path}" for url, path in targets or [(source.page, source.root)])
    if len(missing) > 10:
        by_hand += f"\n  and {len(missing) - 10} more, listed in {source.record_file}"
    return MissingFileError(
        f"{source.address} is not complete in the cache, and cannot be downloaded now ({cause}). Try again when there "
        f"is a connection, or download the missing files by hand:{by_hand}\n"
        f"To download all of it, run: {source.download_command}"
    )
