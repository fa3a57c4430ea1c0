"""Downloads into a cache on disk: checkpoints from public buckets (gs://), and repositories of the Hugging Face Hub (hf://).

The cache is the folder TORCHPI_HOME, by default ~/.cache/torchpi:

    gs/<bucket>/<path>                       a file or a folder of a bucket
    hf/<org>/<name>/<revision>/<path>        a model repository, or a part of it; by default the revision main
    hf-datasets/<org>/<name>/<revision>/     a dataset, of which only some files may be there
    <file or folder>.download.json           all files of the address or repository: sizes, checksums, version
    <file>.part                              what has arrived of a file; the next download continues it
    gs/<bucket>.lock, hf/<org>/<name>/<revision>.lock        held by the one process that downloads there

The .download.json comes first, and all later downloads there are of its version. A file gets its name last, when size
and checksum are right: a listed file of the listed size is complete. A file or folder without a .download.json was
placed by hand, and is used as it is.
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
from torchpi.checkpoints.sources import Bucket, File, Record, Repository, beside, size_of, stays_inside
from torchpi.errors import CheckpointError, MissingFileError

_PAUSE = 1.0
_GS = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]+)/(?P<path>.+?)/?")
# A commit, tag or branch; of a checkpoint, whose path follows, one with a slash is written %2F, but for refs/pr/1.
_HF = re.compile(
    r"hf://(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|\w[\w.+%-]*))?(/(?P<path>.+?))?/?",
    re.ASCII,
)
_HF_DATASET = re.compile(r"hf://(datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.+%/-]*?))?/?", re.ASCII)


def fetch(address: str, *, sleep: Callable[[float], None] = time.sleep) -> pathlib.Path:
    """The folder or file of an address, from the cache, or downloaded into it first.

    Of a folder, the files of a policy are downloaded: JSON, safetensors and tokenizer files, `params` and `assets`;
    never pickles, never `train_state`. What is complete in the cache is used without a request, also if the address has
    something newer by now: delete the folder and its .download.json to get that. Without a connection files can be
    placed by hand, where the error says.

    Args:
        address: gs://bucket/path, of a public bucket, or hf://org/name[@revision][/path], where a slash in a branch's
            name is written %2F; private repositories need HF_TOKEN or `hf auth login`. STORAGE_EMULATOR_HOST and
            HF_ENDPOINT name other servers.
        sleep: waits between attempts.
    """
    return _complete(source_of(address), sleep)


def fetch_newest(address: str) -> tuple[pathlib.Path, str]:
    """The same with what the address has by now, in place of what it had when it was downloaded; and its commit.

    Without a connection, a complete folder stays as it is, with a note on stderr. Files placed by hand stay, too.
    """
    source = source_of(address)
    root = _complete(source, newest=True)
    record = source.record()
    if record is None or isinstance(source, Bucket):  # whose files have a version each
        return root, ""
    return root, next((file.version for file in record.files.values()), "")


def source_of(address: str) -> Bucket | Repository:
    """The bucket or repository of an address, of which nothing is asked yet."""
    if (match := _GS.fullmatch(address)) and stays_inside(match["path"]):
        return Bucket(address, match["bucket"], match["path"])
    if (match := _HF.fullmatch(address)) and (not match["path"] or stays_inside(match["path"])):
        return Repository(address, match["name"], match["revision"], path=match["path"] or "")
    raise CheckpointError(
        f"Malformed address {address!r}; expected gs://bucket/path or hf://org/name[@revision][/path]."
    )


def fetch_dataset(address: str, names: Collection[str]) -> pathlib.Path:
    """The folder of a dataset of the Hugging Face Hub in the cache, with some of its files; see `fetch`.

    Args:
        address: hf://org/name[@revision].
        names: of the files, or of folders with a '/' at the end.
    """
    return _complete(dataset_source(address, names))


def dataset_source(address: str, names: Collection[str]) -> Repository:
    """The repository of a dataset's address, of which nothing is asked yet."""
    match = _HF_DATASET.fullmatch(address)
    if match is None:
        raise CheckpointError(f"Malformed address {address!r} of a dataset; expected hf://org/name[@revision].")
    if outside := [name for name in names if not stays_inside(name.removesuffix("/"))]:
        raise CheckpointError(f"{address}: the dataset names the file {outside[0]!r}, which would be outside of it.")
    return Repository(address, match["name"], match["revision"], names=frozenset(names))


def _read(
    source: Bucket | Repository, name: str, file: File, part: pathlib.Path, sleep: Callable[[float], None]
) -> None:
    """Append what is missing of a file, and at most one byte beyond its listed size, which tells that there is more.

    `source.body` answers a request for the bytes from `start` on: the place of the first byte that comes, and all that
    come. A server that does not honour the range is not asked for one again; the file begins anew.
    """
    from huggingface_hub.utils import tqdm

    furthest = size = part.stat().st_size
    failures, failure, ranges = 0, None, True
    with part.open("ab") as out, tqdm(total=file.size, initial=size, desc=name, unit="B", unit_scale=True) as bar:
        while size < file.size and failures <= source.retries:
            start, honoured, failure = size if ranges else 0, ranges, None
            try:
                with source.body(name, file, start) as (begin, chunks):
                    ranges = ranges and begin == start
                    if begin != size:
                        out.truncate(begin)
                        bar.n = size = begin
                    for chunk in chunks:
                        bar.update(len(chunk))
                        size += out.write(chunk[: file.size + 1 - size])
                        if size > file.size:
                            return
            except source.errors[0] as error:
                failure, status = error, source.status(error)
                if status == 416 and start:  # the file ends before
                    return
                if status is not None and size <= furthest:
                    raise
            failures = 0 if size > furthest or ranges != honoured else failures + 1
            furthest = max(furthest, size)
            if 0 < failures <= source.retries:
                sleep(_PAUSE)
    if failure is not None and size < file.size:
        raise failure


def _complete(
    source: Bucket | Repository, sleep: Callable[[float], None] = time.sleep, *, newest: bool = False
) -> pathlib.Path:
    if source.is_complete() and not newest:
        return source.root
    source.top.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(beside(source.top, ".lock"))  # several addresses may have files in common
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process, which downloads into {source.top}", file=sys.stderr)
        held = lock.acquire()
    with held:
        if newest:
            _forget_older(source)
        if not source.is_complete():
            _download(source, sleep)
    return source.root


def _forget_older(source: Bucket | Repository) -> None:
    """Remove from the cache the files of which the address has another version, or none, by now."""
    source.connect()
    if (old := source.record()) is None:
        return
    try:
        new = Record(source.address, source.files())
    except source.errors as error:
        if source.status(error) is None and source.is_complete():
            print(f"{source.root} is not compared with {source.address}: {type(error).__name__}", file=sys.stderr)
            return
        raise _explained(source, error) from error
    source.require_files(new)
    for name, file in source.wanted(old).items():
        found = new.files.get(name)
        if found != file and not (found and file.checksum and found.checksum == file.checksum):
            (source.top / name).unlink(missing_ok=True)
            beside(source.top / name, ".part").unlink(missing_ok=True)
    replace_text(beside(source.listing, ".download.json"), json.dumps(dataclasses.asdict(new), indent=1))


def _download(source: Bucket | Repository, sleep: Callable[[float], None]) -> None:
    source.connect()
    try:
        record = source.record()
        is_new = record is None or bool(source.absent(record))
        if record is None or is_new:
            record = Record(source.address, source.files())
        source.require_files(record)
        if is_new:
            note = beside(source.listing, ".download.json")
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_text(note, json.dumps(dataclasses.asdict(record), indent=1))
        _require_space(source, source.missing(record))
        for name, file in source.missing(record).items():
            _download_file(source, name, file, sleep)
    except source.errors as error:
        raise _explained(source, error) from error


def _require_space(source: Bucket | Repository, missing: dict[str, File]) -> None:
    """Raise an error where the disk has no room for the missing files."""
    needed = sum(file.size - max(0, size_of(beside(source.top / name, ".part"))) for name, file in missing.items())
    if needed > (free := shutil.disk_usage(source.top.parent).free):
        raise CheckpointError(
            f"{source.address}: the server lists {needed} bytes that are missing here, and {source.top} has room for "
            f"{free}: make room, or set TORCHPI_HOME to a folder on another disk."
        )


def _download_file(source: Bucket | Repository, name: str, file: File, sleep: Callable[[float], None]) -> None:
    path = source.top / name
    part = beside(path, ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file.checksum or size_of(part) > file.size:
        part.unlink(missing_ok=True)  # it may be of another version, and nothing would tell
    part.touch()
    try:
        if part.stat().st_size < file.size:
            _read(source, name, file, part, sleep)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(
                f"{part} has {part.stat().st_size} of {file.size} bytes: make room, or set TORCHPI_HOME to a folder on "
                "another disk, and try again; what has arrived is kept, and continued"
            )
        raise
    if not file.fits(part):
        found = f"{size_of(part)} bytes" if size_of(part) < file.size else "another checksum"
        found = f"more than {file.size} bytes" if size_of(part) > file.size else found
        part.unlink()
        raise CheckpointError(
            f"{source.files_url}{quote(name)}: got {found}; expected {file.size} bytes"
            f"{' with ' + file.checksum if file.checksum else ''}. They are deleted; try again, or delete "
            f"{beside(source.listing, '.download.json')} if the address has a newer version."
        )
    part.replace(path)


def _explained(source: Bucket | Repository, error: Exception) -> Exception:
    """The error that tells a user what to do after a failed request."""
    status = source.status(error)
    cause = " ".join(f"{type(error).__name__}: {error}".partition("\n\nDebug source")[0].split())
    if status in (401, 403, 404):
        return MissingFileError(f"{source.address} {source.refused(error)} ({cause}).")
    if status is not None and status not in (408, 429) and status < 500:
        return CheckpointError(f"{source.address}: the server refuses the request ({cause}).")
    missing = list(source.missing(record)) if (record := source.record()) else []
    places = [(f"{source.files_url}{quote(name)}", source.top / name) for name in missing[:10]]
    by_hand = "".join(f"\n  {url}\n    to {place}" for url, place in places or [(source.page, source.root)])
    if len(missing) > 10:
        by_hand += f"\n  and {len(missing) - 10} more, listed in {beside(source.listing, '.download.json')}"
    return MissingFileError(
        f"{source.address} is not complete in the cache, and cannot be downloaded now ({cause}). Try again when there "
        f"is a connection, or place what is missing by hand:{by_hand}\nAll of it comes with: {source.tool}"
    )
