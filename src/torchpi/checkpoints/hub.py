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
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Collection
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote

import filelock

from torchpi.atomic import replace_text
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.extras import require
from torchpi.schema import parse, read_json

# The files of a policy; and what is never downloaded: pickles, which can run code, and states of optimizers.
_WANTED = ("*.json", "*.safetensors", "*tokenizer*", "*.model", "*/params/*", "*/assets/*")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*/train_state/*", "*/training_state/*")
_RETRIES = 5
_CHUNK_BYTES = 1 << 20
_GS = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]+)/(?P<path>.+?)/?")
# A commit, tag or branch; of a checkpoint, whose path follows, one with a slash is written %2F, but for refs/pr/1.
_HF = re.compile(
    r"hf://(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|\w[\w.+%-]*))?(/(?P<path>.+?))?/?",
    re.ASCII,
)
_HF_DATASET = re.compile(r"hf://(datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.+%/-]*?))?/?", re.ASCII)


def fetch(address: str) -> pathlib.Path:
    """The folder or file of an address, from the cache, or downloaded into it first.

    Of a folder, the files of a policy are downloaded: JSON, safetensors and tokenizer files, `params` and `assets`;
    never pickles, never `train_state`. What is complete in the cache is used without a request, also if the address has
    something newer by now: delete the folder and its .download.json to get that. Without a connection files can be
    placed by hand, where the error says.

    Args:
        address: gs://bucket/path, of a public bucket, or hf://org/name[@revision][/path], where a slash in a branch's
            name is written %2F; private repositories need HF_TOKEN or `hf auth login`. STORAGE_EMULATOR_HOST and
            HF_ENDPOINT name other servers.
    """
    if (match := _GS.fullmatch(address)) and _stays_inside(match["path"]):
        return _complete(_Bucket(address, match["bucket"], match["path"]))
    if (match := _HF.fullmatch(address)) and (not match["path"] or _stays_inside(match["path"])):
        return _complete(_Repository(address, match["name"], match["revision"], path=match["path"] or ""))
    raise CheckpointError(
        f"Malformed address {address!r}; expected gs://bucket/path or hf://org/name[@revision][/path]."
    )


def fetch_dataset(address: str, names: Collection[str]) -> pathlib.Path:
    """The folder of a dataset of the Hugging Face Hub in the cache, with some of its files; see `fetch`.

    Args:
        address: hf://org/name[@revision].
        names: of the files, or of folders with a '/' at the end.
    """
    match = _HF_DATASET.fullmatch(address)
    if match is None:
        raise CheckpointError(f"Malformed address {address!r} of a dataset; expected hf://org/name[@revision].")
    if outside := [name for name in names if not _stays_inside(name.removesuffix("/"))]:
        raise CheckpointError(f"{address}: the dataset names the file {outside[0]!r}, which would be outside of it.")
    return _complete(_Repository(address, match["name"], match["revision"], names=frozenset(names)))


def _stays_inside(name: str) -> bool:
    """A name in a bucket or repository stays in its folder when it is a path."""
    return not {"", ".", ".."} & set(name.split("/")) and not set("\\\0") & set(name)


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size if file.is_file() else -1


@dataclasses.dataclass(frozen=True)
class _File:
    size: int
    version: str
    """ETag of an object, commit of a repository."""
    checksum: str = ""
    """"md5:…" or "sha256:…"; "": only the size is known."""

    def fits(self, path: pathlib.Path) -> bool:
        """True if a local file has the size and the checksum."""
        if _size(path) != self.size or not self.checksum:
            return _size(path) == self.size
        algorithm, _, expected = self.checksum.partition(":")
        with path.open("rb") as content:
            return hashlib.file_digest(content, algorithm).hexdigest() == expected


@dataclasses.dataclass(frozen=True)
class _Record:
    """A .download.json."""

    address: str
    files: dict[str, _File]


class _Source:
    """An address, and its place in the cache."""

    def __init__(self, address: str, top: str, path: str, names: frozenset[str] = frozenset()) -> None:
        home = pathlib.Path(os.environ.get("TORCHPI_HOME") or "~/.cache/torchpi").expanduser().absolute()
        self.address, self.path, self.names = address, path, names
        self._folders = tuple(name for name in names if name.endswith("/"))
        self.top, self.root = home / top, home / top / path
        """Places of the bucket or repository, and of the address."""
        self.listing = self.root
        """The file or folder that a record of this address lists."""

    def record(self) -> _Record | None:
        """The record of a download here or of a folder above, that has files of this address."""
        for folder in (self.root, *self.root.parents):
            file = _beside(folder, ".download.json")
            if file.is_file():
                try:
                    record = parse(_Record, read_json(file, error=CheckpointError), "The file", error=CheckpointError)
                except CheckpointError as error:
                    raise CheckpointError(f"{file} is damaged ({error}); delete it, and fetch again.") from error
                if self.wanted(record):
                    return record
            if folder == self.top:
                break
        return None

    def wanted(self, record: _Record) -> dict[str, _File]:
        """The files of the address that are needed: those of a policy, or the named ones."""
        return {name: file for name, file in record.files.items() if self._is_wanted(name)}

    def _is_wanted(self, name: str) -> bool:
        if _matches(name, _NEVER):
            return False
        if self.names:
            return name in self.names or name.startswith(self._folders)
        return name == self.path or ((self.top / name).is_relative_to(self.root) and _matches(name, _WANTED))

    def missing(self, record: _Record) -> dict[str, _File]:
        """The wanted files that are not in the cache."""
        return {name: file for name, file in self.wanted(record).items() if _size(self.top / name) != file.size}

    def is_complete(self) -> bool:
        if (record := self.record()) is not None:
            return not self.missing(record) and not self.absent(record)
        if self.names:
            return all((self.top / name).exists() for name in self.names)
        if self.root.is_dir():
            is_filled = any(not entry.name.startswith(".") for entry in self.root.iterdir())
            return is_filled and not any(self.root.rglob("*.download.json"))
        return self.root.is_file()

    def absent(self, record: _Record) -> list[str]:
        """The names that are not on the server."""
        files = self.wanted(record)
        folders = {f"{folder.as_posix()}/" for name in files for folder in pathlib.PurePosixPath(name).parents}
        return sorted(self.names - set(files) - folders)

    def require_files(self, record: _Record) -> None:
        """Raise an error where the server lacks what is needed, or names a place outside of the cache."""
        if outside := [name for name in record.files if not _stays_inside(name)]:
            raise CheckpointError(
                f"{self.address}: the server lists {outside[0]!r}, which would be outside of {self.top}."
            )
        if absent := self.absent(record):
            tops = ", ".join(sorted({name.split("/")[0] for name in record.files})) or "nothing"
            raise MissingFileError(
                f"{self.address} has no {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}; it has {tops}. "
                "Expected a complete LeRobot dataset."
            )
        if not self.names and not self.wanted(record):
            here = [name for name in record.files if (self.top / name).is_relative_to(self.root)]
            found = ", ".join(here[:5] + ["…"] * (len(here) > 5)) or "nothing"
            raise MissingFileError(
                f"{self.address}: found {found}; expected a file, or a folder with {', '.join(_WANTED)}. Never "
                f"downloaded are {', '.join(_NEVER)}: pickles can run code."
            )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(f"/{name.lower()}", pattern) for pattern in patterns)


class _Bucket(_Source):
    """A bucket of Google Cloud Storage, read without an account."""

    def __init__(self, address: str, bucket: str, path: str) -> None:
        super().__init__(address, f"gs/{bucket}", path)
        self.bucket = bucket
        self.files_url = f"https://storage.googleapis.com/{bucket}/"
        self.page = f"{self.files_url}{quote(path)}"
        self.tool = f"gcloud storage cp -r gs://{bucket}/{path} {self.root.parent}"
        self.if_private = f"only public buckets are read; with an account: {self.tool}"

    def connect(self) -> None:
        obstore = require("obstore", "gcs")
        from obstore.store import GCSStore

        server = os.environ.get("STORAGE_EMULATOR_HOST")
        self.errors: tuple[type[Exception], ...] = (obstore.exceptions.BaseError, FileNotFoundError)
        self.store = GCSStore(
            self.bucket,
            config={"skip_signature": True, **({"base_url": server} if server else {})},
            # The library's limit of 30 s is for a whole file.
            client_options={"allow_http": bool(server), "timeout": timedelta(days=1), "read_timeout": "60s"},
            retry_config={"max_retries": _RETRIES},
        )

    def status(self, error: Exception) -> int | None:
        """The HTTP status of a failed request, which obstore has in its message only; None: no answer."""
        found = re.search(r"status code: (\d{3})", str(error))
        return int(found[1]) if found else None

    def files(self) -> dict[str, _File]:
        import obstore

        try:
            try:
                entries: Any = [obstore.head(self.store, self.path)]
            except FileNotFoundError:
                entries = self.store.list(self.path).collect()
        except obstore.exceptions.InvalidPathError as error:
            raise CheckpointError(
                f"{self.address}: the server lists a name which would be outside of {self.top} ({error})."
            ) from error
        found = {}
        for entry in entries:
            tag = (entry["e_tag"] or "").strip('"')
            # The ETag of an object is its MD5, unless it was put together from parts.
            checksum = f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag) else ""
            found[entry["path"]] = _File(entry["size"], tag, checksum)
        return found

    def read(self, name: str, file: _File, part: pathlib.Path) -> None:
        """Append what is missing of a file."""
        import obstore
        from huggingface_hub.utils import tqdm

        arrived, before = part.stat().st_size, -1
        with tqdm(total=file.size, initial=arrived, desc=name, unit="B", unit_scale=True) as bar:
            while before < arrived < file.size:
                try:
                    with part.open("ab") as out:
                        found = obstore.get(self.store, name, options={"range": {"offset": arrived}})
                        for chunk in found.stream(_CHUNK_BYTES):
                            out.write(chunk)
                            bar.update(len(chunk))
                except obstore.exceptions.BaseError as error:
                    if self.status(error) == 416:  # the file ends before
                        return
                    if part.stat().st_size == arrived:  # else ask again: obstore's own retries end after some minutes
                        raise
                before, arrived = arrived, part.stat().st_size


class _Repository(_Source):
    """A model or dataset on the Hugging Face Hub, read with the user's token if there is one."""

    def __init__(
        self, address: str, name: str, revision: str | None, *, path: str = "", names: frozenset[str] = frozenset()
    ) -> None:
        self.name, self.revision = name, unquote(revision or "main")
        in_url = quote(self.revision, safe="")
        self.kind, folder, pages = ("dataset", "hf-datasets", "datasets/") if names else ("model", "hf", "")
        super().__init__(address, f"{folder}/{name}/{in_url}", path, names)
        self.listing = self.top
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        page = f"https://huggingface.co/{pages}{name}"
        self.files_url = f"{page}/resolve/{in_url}/"
        self.page = f"{page}/tree/{in_url}/{quote(path)}"
        self.tool = f"hf download {name} --repo-type {self.kind} --revision {self.revision} --local-dir {self.top}"
        self.if_private = f"ask for access on {page}, and set HF_TOKEN or run `hf auth login`"

    def connect(self) -> None:
        # HTTPError is the base of what the HTTP library raises, which is another library in other versions.
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        self.errors = (HTTPError, OfflineModeIsEnabled)

    def status(self, error: Exception) -> int | None:
        """The HTTP status of a failed request; None: no answer."""
        return getattr(getattr(error, "response", None), "status_code", None)

    def files(self) -> dict[str, _File]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        commit = api.repo_info(self.name, repo_type=self.kind, revision=self.revision, timeout=60).sha or ""
        tree = api.list_repo_tree(self.name, recursive=True, revision=commit, repo_type=self.kind)
        return {
            file.path: _File(file.size, commit, f"sha256:{file.lfs.sha256}" if file.lfs else "")
            for file in tree
            if isinstance(file, RepoFile)
        }

    def read(self, name: str, file: _File, part: pathlib.Path) -> None:
        """Append what is missing of a file. (`hf_hub_download` starts over in each process.)"""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name, name, repo_type=self.kind, revision=file.version, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with part.open("ab") as out:
            start = out.tell()
            http_get(url, out, resume_size=start, headers=headers, expected_size=file.size, displayed_filename=name)


def _complete(source: _Bucket | _Repository) -> pathlib.Path:
    """The address's place in the cache, with everything there."""
    if source.is_complete():
        return source.root
    source.top.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(_beside(source.top, ".lock"))  # several addresses may have files in common
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process, which downloads into {source.top}", file=sys.stderr)
        held = lock.acquire()
    with held:
        if not source.is_complete():
            _download(source)
    return source.root


def _download(source: _Bucket | _Repository) -> None:
    source.connect()
    try:
        record = source.record()
        is_new = record is None or bool(source.absent(record))
        if record is None or is_new:
            record = _Record(source.address, source.files())
        source.require_files(record)
        if is_new:
            note = _beside(source.listing, ".download.json")
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_text(note, json.dumps(dataclasses.asdict(record), indent=1))
        for name, file in source.missing(record).items():
            _download_file(source, name, file)
    except source.errors as error:
        raise _explained(source, error) from error


def _download_file(source: _Bucket | _Repository, name: str, file: _File) -> None:
    path = source.top / name
    part = _beside(path, ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file.checksum or _size(part) > file.size:
        part.unlink(missing_ok=True)  # it may be of another version, and nothing would tell
    part.touch()
    try:
        if part.stat().st_size < file.size:
            source.read(name, file, part)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(
                f"{part} has {part.stat().st_size} of {file.size} bytes: make room, or set TORCHPI_HOME to a folder on "
                "another disk, and try again; what has arrived is kept, and continued"
            )
        if error.errno is not None or isinstance(error, source.errors):
            raise  # else the library found another size than expected, as is found here
    if not file.fits(part):
        found = f"{_size(part)} bytes" if _size(part) != file.size else "another checksum"
        part.unlink()
        raise CheckpointError(
            f"{source.files_url}{quote(name)}: got {found}; expected {file.size} bytes"
            f"{' with ' + file.checksum if file.checksum else ''}. They are deleted; try again, or delete "
            f"{_beside(source.listing, '.download.json')} if the address has a newer version."
        )
    part.replace(path)


def _explained(source: _Bucket | _Repository, error: Exception) -> Exception:
    """The error that tells a user what to do after a failed request."""
    status = source.status(error)
    cause = " ".join(f"{type(error).__name__}: {error}".partition("\n\nDebug source")[0].split())
    if status in (401, 403):
        return MissingFileError(f"{source.address} is private or does not exist: {source.if_private} ({cause}).")
    if status == 404:
        return MissingFileError(f"{source.address} does not exist; check its parts ({cause}).")
    if status is not None and status not in (408, 429) and status < 500:
        return CheckpointError(f"{source.address}: the server refuses the request ({cause}).")
    missing = list(source.missing(record)) if (record := source.record()) else []
    places = [(f"{source.files_url}{quote(name)}", source.top / name) for name in missing[:10]]
    by_hand = "".join(f"\n  {url}\n    to {place}" for url, place in places or [(source.page, source.root)])
    if len(missing) > 10:
        by_hand += f"\n  and {len(missing) - 10} more, listed in {_beside(source.listing, '.download.json')}"
    return MissingFileError(
        f"{source.address} is not complete in the cache, and cannot be downloaded now ({cause}). Try again when there "
        f"is a connection, or place what is missing by hand:{by_hand}\nAll of it comes with: {source.tool}"
    )
