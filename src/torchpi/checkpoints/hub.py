"""Checkpoints from public buckets (gs://) and from the Hugging Face Hub (hf://), through a cache on disk.

The cache is the folder TORCHPI_HOME, by default ~/.cache/torchpi:

    gs/<bucket>/<path>                       a file or a folder of a bucket
    hf/<org>/<name>/<revision>/<path>        a model repository, or a part of it; the revision is main if none is named
    <file or folder>.download.json           beside each that was downloaded: its files, with size and version
    <file>.part                              what has arrived of a file; the next download continues it
    gs/<bucket>.lock, hf/<org>/<name>/<revision>.lock        held by the one process that downloads there

A download writes its .download.json first, and gives a file its name last, when size and checksum are right: what is
listed there and has its size is complete. What no .download.json tells of was placed by hand, and is taken as it is.
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
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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

    Raises:
        ValueError: malformed address; or the server sent another length, checksum or name than it should.
        FileNotFoundError: nothing that a policy needs is there, it is private, or the server cannot be reached.
        ModuleNotFoundError: gs:// without the extra gcs.
        OSError: no space left. What has arrived is kept, and continued the next time.
    """
    source = _parse(address)
    if not source.is_complete():
        with _only_one_process(source):
            if not source.is_complete():
                _download(source, sleep)
    return source.root


def _parse(address: str) -> "_Bucket | _Repository":
    home = pathlib.Path(os.environ.get("TORCHPI_HOME") or "~/.cache/torchpi").expanduser().absolute()
    for service in (_Bucket, _Repository):
        match = service.form.fullmatch(address)
        if match and (not match["path"] or _is_plain(match["path"])):
            return service(address, home, **match.groupdict(default=""))
    raise ValueError(f"malformed address {address!r}; expected gs://bucket/path or hf://org/name[@revision][/path]")


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
                try:
                    files = json.loads(record.read_text(encoding="utf-8"))["files"]
                    sizes = {self.top / name: int(file["size"]) for name, file in files.items()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{record} is damaged ({error!r}); delete it, and fetch again") from error
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

    def write_list(self, files: list[_File]) -> None:
        record = _beside(self.root, ".download.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(record, ".new")
        listed = {file.name: {"size": file.size, "version": file.version} for file in files}
        new.write_text(json.dumps({"address": self.address, "files": listed}, indent=1), encoding="utf-8")
        new.replace(record)


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
        try:
            import requests
            import urllib3
            from google.api_core.exceptions import GoogleAPICallError
            from google.auth.exceptions import GoogleAuthError
            from google.cloud import storage
        except ModuleNotFoundError as error:
            message = f"{self.address}: buckets need the extra 'gcs': pip install \"torchpi[gcs]\" ({error})"
            raise ModuleNotFoundError(message) from error
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

    form = re.compile(r"hf://(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*))?(/(?P<path>.+?))?/?", re.ASCII)

    def __init__(self, address: str, home: pathlib.Path, name: str, revision: str, path: str) -> None:
        self.name, self.revision = name, revision or "main"
        super().__init__(address, home / "hf" / name / self.revision, path)
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        self.tool = f"hf download {name} --revision {self.revision} --local-dir {self.top}"
        self.if_private = f"ask for access on https://huggingface.co/{name}, and set HF_TOKEN or run `hf auth login`"

    def url(self, name: str) -> str:
        return f"https://huggingface.co/{self.name}/{'resolve' if name else 'tree'}/{self.revision}/{quote(name)}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        # HTTPError is the base of what the HTTP library raises, which is another library in other versions.
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        self.errors, self._answered = (HTTPError, OfflineModeIsEnabled), HfHubHTTPError
        yield

    def status(self, error: Exception) -> int | None:
        return error.response.status_code if isinstance(error, self._answered) else None

    def files(self) -> list[_File]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        commit = api.model_info(self.name, revision=self.revision, timeout=_TIMEOUT).sha
        tree = api.list_repo_tree(self.name, recursive=True, revision=commit)
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

        url = hf_hub_url(self.name, file.name, revision=file.version, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_raw():
                write(chunk)


def _download(source: _Bucket | _Repository, sleep: Callable[[float], None]) -> None:
    with source.connected():
        try:
            listed = _wanted(source, _retried(source, source.files, sleep))
            # Without a checksum it may be another version of the same size.
            files = [file for file in listed if file.new_hash is None or not file.fits(source.top / file.name)]
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


def _wanted(source: _Source, files: list[_File]) -> list[_File]:
    """Those at the address that a policy needs."""
    if outside := [file.name for file in files if not _is_plain(file.name)]:
        raise ValueError(f"{source.address}: the server lists {outside[0]!r}, which would be outside of {source.top}")
    here = [file for file in files if (source.top / file.name).is_relative_to(source.root)]

    def matches(file: _File, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(f"/{file.name.lower()}", pattern) for pattern in patterns)

    wanted = [file for file in here if file.name == source.path or matches(file, _WANTED)]
    if wanted := [file for file in wanted if not matches(file, _NEVER)]:
        return wanted
    found = ", ".join([file.name for file in here[:5]] + ["…"] * (len(here) > 5)) or "nothing"
    raise FileNotFoundError(
        f"{source.address}: found {found}; expected a file, or a folder with {', '.join(_WANTED)}. Never downloaded "
        f"are {', '.join(_NEVER)}: pickles can run code"
    )


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
        raise ValueError(
            f"{source.url(file.name)}: got {found}; expected {file.size} bytes"
            f"{' with checksum ' + file.digest.hex() if file.digest else ''}. They are deleted; try again"
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
