"""Checkpoints from public buckets (gs://), checkpoints and data sets from the Hugging Face Hub (hf://), through a cache
on disk.

The cache is the folder TORCHPI_HOME, by default ~/.cache/torchpi:

    gs/<bucket>/<path>                       a file or a folder of a bucket
    hf/<org>/<name>/<revision>/<path>        a model repository, or a part of it; the revision is main if none is named
    hf-datasets/<org>/<name>/<revision>/     a data set, of which only some files may be there
    <file or folder>.download.json           beside each that was downloaded: its files, with size and version
    <file>.part                              what has arrived of a file; the next download continues it
    gs/<bucket>.lock, hf/<org>/<name>/<revision>.lock        held by the one process that downloads there

A download writes its .download.json first, and gives a file its name last, when size and checksum are right: what is
listed there and has its size is complete. What no .download.json tells of was placed by hand, and is taken as it is.
A data set's lists all of its files, and the commit from which further ones come: all are of one version.
"""

import base64
import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from torchpi.errors import CheckpointError, MissingFileError
from torchpi.extras import require

T = TypeVar("T")

# What a policy needs; and what is never downloaded: pickles, which can run code, and states of optimizers.
_WANTED = ("*.json", "*.safetensors", "*tokenizer*", "*.model", "*/params/*", "*/assets/*")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*/train_state/*", "*/training_state/*")
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt in a row of failures
_TIMEOUT = 60.0  # seconds without a byte


def fetch(address: str, *, sleep: Callable[[float], None] = time.sleep) -> pathlib.Path:
    """The folder or file of an address, from the cache, or downloaded into it first.

    Of a folder comes what a policy needs: JSON, safetensors and tokenizer files, `params` and `assets`; never pickles,
    never `train_state`. What is complete in the cache is used without a request, also if the address has something
    newer by now: delete the folder and its .download.json to get that. Without a connection files can be placed by
    hand, where the error says: if nothing was ever downloaded there, they are used as they are; if a download has
    begun, as soon as all that its .download.json lists are there in their sizes.

    Args:
        address: gs://bucket/path, of a public bucket, or hf://org/name[@revision][/path]; private repositories need
            HF_TOKEN or `hf auth login`. STORAGE_EMULATOR_HOST and HF_ENDPOINT name other servers.
        sleep: waits before a failed request is repeated.
    """
    for service in (_Bucket, _Repository):
        match = service.form.fullmatch(address)
        if match and (not match["path"] or _is_plain(match["path"])):
            return _completed(service(address, _home(), **match.groupdict(default="")), sleep)
    raise CheckpointError(
        f"Malformed address {address!r}; expected gs://bucket/path or hf://org/name[@revision][/path]."
    )


def fetch_dataset(address: str, names: Collection[str], *, sleep: Callable[[float], None] = time.sleep) -> pathlib.Path:
    """The folder of a data set of the Hugging Face Hub in the cache, with some of its files; as `fetch` gets them.

    All files come from the commit that the revision had at the first download.

    Args:
        address: hf://org/name[@revision].
        names: of the files, or of folders with a '/' behind.
    """
    match = _Dataset.form.fullmatch(address)
    if match is None or match["path"]:
        raise CheckpointError(f"Malformed address {address!r} of a data set; expected hf://org/name[@revision].")
    if outside := [name for name in names if not _is_plain(name.removesuffix("/"))]:
        raise CheckpointError(f"{address}: the data set names the file {outside[0]!r}, which would be outside of it.")
    return _completed(_Dataset(address, _home(), match["name"], match["revision"] or "", names), sleep)


def _home() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TORCHPI_HOME") or "~/.cache/torchpi").expanduser().absolute()


def _completed(source: "_Bucket | _Repository", sleep: Callable[[float], None]) -> pathlib.Path:
    """The address's place in the cache, with everything there."""
    if not source.is_complete():
        with _only_one_process(source):
            if not source.is_complete():
                _download(source, sleep)
    return source.root


def _is_plain(name: str) -> bool:
    """Whether a name in a bucket or repository stays in its folder when it is a path."""
    return not {"", ".", ".."} & set(name.split("/")) and not set("\\\0") & set(name)


@contextlib.contextmanager
def _only_one_process(source: "_Source") -> Iterator[None]:
    """Of those that download from one bucket or repository: several addresses may have files in common."""
    source.top.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(_beside(source.top, ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process, which downloads into {source.top}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def _size(file: pathlib.Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


@dataclasses.dataclass(frozen=True)
class _File:
    """What a server says of a file."""

    name: str
    size: int
    version: str
    """Its generation in a bucket, or the repository's commit."""
    new_hash: Callable[[], Any] | None = None
    """None: of this file only the size is known."""
    digest: bytes = b""

    def fits(self, path: pathlib.Path) -> bool:
        """Whether what is there has the size and the checksum."""
        if _size(path) != self.size or self.new_hash is None:
            return _size(path) == self.size
        digest = self.new_hash()
        with path.open("rb") as data:
            while chunk := data.read(1 << 20):
                digest.update(chunk)
        return bool(digest.digest() == self.digest)


class _Source:
    """An address, and its place in the cache."""

    form: ClassVar[re.Pattern[str]]
    errors: tuple[type[Exception], ...]
    """What requests raise."""

    def __init__(self, address: str, top: pathlib.Path, path: str) -> None:
        self.address, self.path = address, path
        self.top, self.root = top, top / path
        """Where the bucket or repository is in the cache, and where the address."""

    def listed(self) -> dict[pathlib.Path, int] | None:
        """The files, with sizes, that a download here or of a folder above has listed; None: there was none."""
        for folder in (self.root, *self.root.parents):
            record = _beside(folder, ".download.json")
            if record.is_file():
                sizes = {self.top / file.name: file.size for file in _read_list(record)}
                if here := {file: size for file, size in sizes.items() if file.is_relative_to(self.root)}:
                    return here
            if folder == self.top:
                break
        return None

    def is_complete(self) -> bool:
        if (listed := self.listed()) is not None:
            return all(_size(file) == size for file, size in listed.items())
        if self.root.is_dir():
            return any(self.root.iterdir()) and not any(self.root.rglob("*.download.json"))
        return self.root.is_file()

    def wanted(self, files: list[_File]) -> list[_File]:
        """Of the files here, those that a policy needs."""
        wanted = [file for file in files if file.name == self.path or _matches(file, _WANTED)]
        if wanted := [file for file in wanted if not _matches(file, _NEVER)]:
            return wanted
        found = ", ".join([file.name for file in files[:5]] + ["…"] * (len(files) > 5)) or "nothing"
        raise MissingFileError(
            f"{self.address}: found {found}; expected a file, or a folder with {', '.join(_WANTED)}. Never downloaded "
            f"are {', '.join(_NEVER)}: pickles can run code."
        )

    def is_current(self, file: _File) -> bool:
        """Whether it is there. Without a checksum it may be another version of the same size."""
        return file.new_hash is not None and file.fits(self.top / file.name)

    def write_list(self, files: list[_File]) -> None:
        record = _beside(self.root, ".download.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(record, ".new")
        listed = {file.name: {"size": file.size, "version": file.version} for file in files}
        new.write_text(json.dumps({"address": self.address, "files": listed}, indent=1), encoding="utf-8")
        new.replace(record)


def _read_list(record: pathlib.Path) -> list[_File]:
    """The files that a .download.json lists."""
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
        return [_File(name, int(file["size"]), str(file["version"])) for name, file in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record} is damaged ({error!r}); delete it, and fetch again.") from error


def _matches(file: _File, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(f"/{file.name.lower()}", pattern) for pattern in patterns)


class _Bucket(_Source):
    """A bucket of Google Cloud Storage, read without an account."""

    form = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]+)/(?P<path>.+?)/?")

    def __init__(self, address: str, home: pathlib.Path, bucket: str, path: str) -> None:
        super().__init__(address, home / "gs" / bucket, path)
        self.bucket = bucket
        self.tool = f"gcloud storage cp -r gs://{bucket}/{path} {self.root.parent}"
        self.if_private = f"only public buckets are read; with an account: {self.tool}"

    def url(self, name: str) -> str:
        return f"https://storage.googleapis.com/{self.bucket}/{quote(name)}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        storage = require("google.cloud.storage", "gcs")
        import requests
        import urllib3
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError

        self.errors = (GoogleAPICallError, GoogleAuthError, requests.RequestException, urllib3.exceptions.HTTPError)
        self._no_access = GoogleAuthError  # the library answers a 401 by renewing the credentials, and there are none
        with storage.Client.create_anonymous_client() as client:
            self._bucket = client.bucket(self.bucket)
            yield

    def status(self, error: Exception) -> int | None:
        return 401 if isinstance(error, self._no_access) else getattr(error, "code", None)

    def files(self) -> list[_File]:
        blob = self._bucket.get_blob(self.path, retry=None, timeout=_TIMEOUT)
        folder = self._bucket.list_blobs(prefix=self.path + "/", retry=None, timeout=_TIMEOUT)
        return [self._file(blob) for blob in ([blob] if blob else folder) if not blob.name.endswith("/")]

    @staticmethod
    def _file(blob: Any) -> _File:
        import google_crc32c

        file = _File(blob.name, blob.size, str(blob.generation or ""))
        if blob.crc32c:
            return dataclasses.replace(file, new_hash=google_crc32c.Checksum, digest=base64.b64decode(blob.crc32c))
        if blob.md5_hash:
            return dataclasses.replace(file, new_hash=hashlib.md5, digest=base64.b64decode(blob.md5_hash))
        return file

    def read(self, file: _File, start: int, write: Callable[[bytes], object]) -> None:
        """Write the bytes from `start` on as they arrive."""
        blob = self._bucket.blob(file.name, generation=int(file.version) if file.version else None)
        out = types.SimpleNamespace(write=write)
        blob.download_to_file(out, start=start or None, raw_download=True, checksum=None, retry=None, timeout=_TIMEOUT)


class _Repository(_Source):
    """A model repository of the Hugging Face Hub, read with the user's token if there is one."""

    kind: ClassVar[str] = "model"
    place: ClassVar[str] = "hf"
    """In the cache."""
    page: ClassVar[str] = "https://huggingface.co/"
    form = re.compile(r"hf://(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*))?(/(?P<path>.+?))?/?", re.ASCII)

    def __init__(self, address: str, home: pathlib.Path, name: str, revision: str, path: str) -> None:
        self.name, self.revision = name, revision or "main"
        super().__init__(address, home / self.place / name / self.revision, path)
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        self.tool = f"hf download {name} --repo-type {self.kind} --revision {self.revision} --local-dir {self.top}"
        self.if_private = f"ask for access on {self.page}{name}, and set HF_TOKEN or run `hf auth login`"

    def url(self, name: str) -> str:
        return f"{self.page}{self.name}/{'resolve' if name else 'tree'}/{self.revision}/{quote(name)}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        # HTTPError is the base of what the HTTP library raises, which is another library in other versions.
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        self.errors, self._answered = (HTTPError, OfflineModeIsEnabled), HfHubHTTPError
        yield

    def status(self, error: Exception) -> int | None:
        return error.response.status_code if isinstance(error, self._answered) else None

    def first_revision(self) -> str:
        """From which the files come."""
        return self.revision

    def files(self) -> list[_File]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        revision = self.first_revision()
        commit = api.repo_info(self.name, repo_type=self.kind, revision=revision, timeout=_TIMEOUT).sha
        tree = api.list_repo_tree(self.name, recursive=True, revision=commit, repo_type=self.kind)
        return [
            _File(file.path, file.size, str(commit), hashlib.sha256, bytes.fromhex(file.lfs.sha256))
            if file.lfs
            else _File(file.path, file.size, str(commit))
            for file in tree
            if isinstance(file, RepoFile)
        ]

    def read(self, file: _File, start: int, write: Callable[[bytes], object]) -> None:
        """Write the bytes from `start` on as they arrive. (hf_hub_download doesn't continue what was interrupted.)"""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.name, file.name, repo_type=self.kind, revision=file.version, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_raw():
                write(chunk)


class _Dataset(_Repository):
    """Some of the files of a data set on the Hugging Face Hub."""

    kind = "dataset"
    place = "hf-datasets"
    page = "https://huggingface.co/datasets/"

    def __init__(self, address: str, home: pathlib.Path, name: str, revision: str, names: Collection[str]) -> None:
        super().__init__(address, home, name, revision, "")
        self.names = frozenset(names)

    def is_chosen(self, file: _File) -> bool:
        folders = [name for name in self.names if name.endswith("/")]
        here = file.name in self.names or any(file.name.startswith(folder) for folder in folders)
        return here and not _matches(file, _NEVER)

    def everything_listed(self) -> list[_File] | None:
        """By the first download; None: there was none."""
        record = _beside(self.root, ".download.json")
        return _read_list(record) if record.is_file() else None

    def listed(self) -> dict[pathlib.Path, int] | None:
        if (everything := self.everything_listed()) is None:
            return None
        return {self.top / file.name: file.size for file in everything if self.is_chosen(file)}

    def is_complete(self) -> bool:
        listed = self.listed()
        if listed is None:
            return all((self.top / name).exists() for name in self.names)
        return not self.absent(listed) and all(_size(file) == size for file, size in listed.items())

    def absent(self, files: Collection[pathlib.Path]) -> list[str]:
        """The names of which the data set has nothing."""
        found = {file.relative_to(self.top).as_posix() for file in files}
        folders = {f"{folder.as_posix()}/" for name in found for folder in pathlib.PurePosixPath(name).parents}
        return sorted(self.names - found - folders)

    def first_revision(self) -> str:
        everything = self.everything_listed()
        return everything[0].version if everything else self.revision

    def wanted(self, files: list[_File]) -> list[_File]:
        wanted = [file for file in files if self.is_chosen(file)]
        if absent := self.absent([self.top / file.name for file in wanted]):
            tops = ", ".join(sorted({file.name.split("/")[0] for file in files})) or "nothing"
            raise MissingFileError(
                f"{self.address} has no {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}; it has {tops}. "
                "Expected a LeRobot data set, complete."
            )
        return wanted

    def is_current(self, file: _File) -> bool:
        """What was listed of this commit is what has its size, or what was placed by hand."""
        return _size(self.top / file.name) == file.size

    def write_list(self, files: list[_File]) -> None:
        """Once, of all files."""
        if self.everything_listed() is None:
            super().write_list(self.all_files)

    def files(self) -> list[_File]:
        self.all_files = super().files()
        return self.all_files


def _download(source: _Bucket | _Repository, sleep: Callable[[float], None]) -> None:
    with source.connected():
        try:
            listed = source.wanted(_here(source, _retried(source, source.files, sleep)))
            files = [file for file in listed if not source.is_current(file)]
            for file in files:
                (source.top / file.name).unlink(missing_ok=True)
            source.write_list(listed)
            with _progress_bar(source, files) as advance:
                for file in files:
                    _download_file(source, file, advance, sleep)
        except source.errors as error:
            raise _explained(source, error) from error


def _retried(
    source: _Bucket | _Repository,
    action: Callable[[], T],
    sleep: Callable[[float], None],
    position: Callable[[], int] = lambda: 0,
) -> T:
    """`action`, again after failures that may pass, until several in a row brought `position` no further."""
    waits, reached = iter(_WAITS), position()
    while True:
        try:
            return action()
        except source.errors as error:
            if position() > reached:
                waits, reached = iter(_WAITS), position()
            wait = next(waits, None)
            if wait is None or not _may_pass(source.status(error)):
                raise
        sleep(wait)


def _may_pass(status: int | None) -> bool:
    return status is None or status in (408, 429) or status >= 500


def _here(source: _Source, files: list[_File]) -> list[_File]:
    """Those at the address."""
    if outside := [file.name for file in files if not _is_plain(file.name)]:
        raise CheckpointError(
            f"{source.address}: the server lists {outside[0]!r}, which would be outside of {source.top}."
        )
    return [file for file in files if (source.top / file.name).is_relative_to(source.root)]


@contextlib.contextmanager
def _progress_bar(source: _Source, files: list[_File]) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        arrived = sum(_size(_beside(source.top / file.name, ".part")) or 0 for file in files)
        task = progress.add_task(source.address, total=sum(file.size for file in files), completed=arrived)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _download_file(
    source: _Bucket | _Repository, file: _File, advance: Callable[[int], None], sleep: Callable[[float], None]
) -> None:
    """Into the .part, from where that ends, which gets the file's name when size and checksum are right."""
    path = source.top / file.name
    part = _beside(path, ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.new_hash is None:
        part.unlink(missing_ok=True)  # it may be of another version, and nothing would tell
    part.touch()

    def read() -> None:
        with part.open("ab") as out:

            def write(chunk: bytes) -> None:
                out.write(chunk)
                advance(len(chunk))

            source.read(file, out.tell(), write)

    def arrived() -> int:
        return part.stat().st_size

    start = -1
    while start < arrived() < file.size:
        start = arrived()
        try:
            _retried(source, read, sleep, arrived)
        except source.errors as error:
            if source.status(error) != 416:  # the file ends before `start`
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.add_note(
                    f"{part} has {arrived()} of {file.size} bytes: make room, or set TORCHPI_HOME to a folder on "
                    "another disk, and try again; what has arrived is kept, and continued"
                )
            raise
    if not file.fits(part):
        found = f"{arrived()} bytes" if arrived() != file.size else "another checksum"
        part.unlink()
        raise CheckpointError(
            f"{source.url(file.name)}: got {found}; expected {file.size} bytes"
            f"{' with checksum ' + file.digest.hex() if file.digest else ''}. They are deleted; try again."
        )
    part.replace(path)


def _explained(source: _Bucket | _Repository, error: Exception) -> Exception:
    """What the user should know of a failed request."""
    status = source.status(error)
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    if status in (401, 403):
        return FileNotFoundError(f"{source.address} is private or does not exist: {source.if_private} ({cause})")
    if status == 404:
        return FileNotFoundError(f"{source.address} does not exist; check its parts ({cause})")
    if not _may_pass(status):
        return ValueError(f"{source.address}: the server refuses the request ({cause})")
    missing = [file for file, size in (source.listed() or {}).items() if _size(file) != size]
    names = [file.relative_to(source.top).as_posix() for file in missing[:10]] or [source.path]
    by_hand = "".join(f"\n  {source.url(name)}\n    to {source.top / name}" for name in names)
    if len(missing) > len(names):
        by_hand += f"\n  and {len(missing) - len(names)} more, listed in {_beside(source.root, '.download.json')}"
    return FileNotFoundError(
        f"{source.address} is not complete in the cache, and cannot be downloaded now ({cause}). Try again when there "
        f"is a connection, or place what is missing by hand:{by_hand}\nA whole folder comes with: {source.tool}"
    )
