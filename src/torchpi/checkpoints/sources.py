"""Servers of files, Google Cloud Storage and the Hugging Face Hub, and their places in the cache (hub.py)."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote

from torchpi.errors import CheckpointError, MissingFileError
from torchpi.extras import require
from torchpi.schema import parse, read_json

# The files of a policy; and what is never downloaded: pickles, which can run code, and states of optimizers.
_WANTED = ("*.json", "*.safetensors", "*tokenizer*", "*.model", "*/params/*", "*/assets/*")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*/train_state/*", "*/training_state/*")
_RETRIES = 5
_CHUNK_BYTES = 1 << 20
_MAX_FILES = 1_000_000


def stays_inside(name: str) -> bool:
    """A name in a bucket or repository stays in its folder when it is a path."""
    return not {"", ".", ".."} & set(name.split("/")) and not set("\\\0") & set(name)


def beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def size_of(file: pathlib.Path) -> int:
    return file.stat().st_size if file.is_file() else -1


@dataclasses.dataclass(frozen=True)
class File:
    size: int
    version: str
    """ETag of an object, commit of a repository."""
    checksum: str = ""
    """"md5:…" or "sha256:…"; "": only the size is known."""

    def fits(self, path: pathlib.Path) -> bool:
        """True if a local file has the size and the checksum."""
        if size_of(path) != self.size or not self.checksum:
            return size_of(path) == self.size
        algorithm, _, expected = self.checksum.partition(":")
        with path.open("rb") as content:
            return hashlib.file_digest(content, algorithm).hexdigest() == expected


@dataclasses.dataclass(frozen=True)
class Record:
    """A .download.json."""

    address: str
    files: dict[str, File]


class Source:
    """An address, and its place in the cache."""

    def __init__(self, address: str, top: str, path: str, names: frozenset[str] = frozenset()) -> None:
        home = pathlib.Path(os.environ.get("TORCHPI_HOME") or "~/.cache/torchpi").expanduser().absolute()
        self.address, self.path, self.names = address, path, names
        self._folders = tuple(name for name in names if name.endswith("/"))
        self.top, self.root = home / top, home / top / path
        """Places of the bucket or repository, and of the address."""
        self.listing = self.root
        """The file or folder that a record of this address lists."""

    def record(self) -> Record | None:
        """The record of a download here or of a folder above, that has files of this address."""
        for folder in (self.root, *self.root.parents):
            file = beside(folder, ".download.json")
            if file.is_file():
                try:
                    record = parse(Record, read_json(file, error=CheckpointError), "The file", error=CheckpointError)
                except CheckpointError as error:
                    raise CheckpointError(f"{file} is damaged ({error}); delete it, and fetch again.") from error
                if self.wanted(record):
                    return record
            if folder == self.top:
                break
        return None

    def wanted(self, record: Record) -> dict[str, File]:
        """The files of the address that are needed: those of a policy, or the named ones."""
        return {name: file for name, file in record.files.items() if self._is_wanted(name)}

    def _is_wanted(self, name: str) -> bool:
        if _matches(name, _NEVER):
            return False
        if self.names:
            return name in self.names or name.startswith(self._folders)
        return name == self.path or ((self.top / name).is_relative_to(self.root) and _matches(name, _WANTED))

    def missing(self, record: Record) -> dict[str, File]:
        """The wanted files that are not in the cache."""
        return {name: file for name, file in self.wanted(record).items() if size_of(self.top / name) != file.size}

    def is_complete(self) -> bool:
        if (record := self.record()) is not None:
            return not self.missing(record) and not self.absent(record)
        if self.names:
            return all((self.top / name).exists() for name in self.names)
        if self.root.is_dir():
            is_filled = any(not entry.name.startswith(".") for entry in self.root.iterdir())
            return is_filled and not any(self.root.rglob("*.download.json"))
        return self.root.is_file()

    def absent(self, record: Record) -> list[str]:
        """The names that are not on the server."""
        files = self.wanted(record)
        folders = {f"{folder.as_posix()}/" for name in files for folder in pathlib.PurePosixPath(name).parents}
        return sorted(self.names - set(files) - folders)

    def require_files(self, record: Record) -> None:
        """Raise an error where the server lacks what is needed, or names a place outside of the cache."""
        if outside := [name for name in record.files if not stays_inside(name)]:
            raise CheckpointError(
                f"{self.address}: the server lists {outside[0]!r:.200}, which would be outside of {self.top}."
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


def _checked(address: str, entries: Iterable[Any], facts: Callable[[Any], tuple[str, int]]) -> Iterator[Any]:
    """The entries of a server's list, if each has a name and a size, and they end; `facts` tells name and size."""
    seen: set[str] = set()
    for entry in entries:
        name, size = facts(entry)
        fault = ""
        if not isinstance(name, str) or type(size) is not int or size < 0:
            fault = f"{name!a:.200} with a size of {size!a:.40}; expected a name and a number of bytes"
        elif name in seen or len(seen) == _MAX_FILES:
            fault = f"{name!a:.200} twice" if name in seen else f"more than {_MAX_FILES} files"
        if fault:
            raise CheckpointError(f"{address}: the server lists {fault}; it is damaged, or no server of this kind.")
        seen.add(name)
        yield entry


class Bucket(Source):
    """A bucket of Google Cloud Storage, read without an account."""

    retries = 0
    """Attempts of ours without progress: obstore makes its own."""

    def __init__(self, address: str, bucket: str, path: str) -> None:
        super().__init__(address, f"gs/{bucket}", path)
        self.bucket = bucket
        self.files_url = f"https://storage.googleapis.com/{bucket}/"
        self.page = f"{self.files_url}{quote(path)}"
        self.tool = f"gcloud storage cp -r gs://{bucket}/{path} {self.root.parent}"

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

    def refused(self, error: Exception) -> str:
        """The rest of the sentence about a bucket that is not there, or may not be read."""
        if self.status(error) == 404:
            return "does not exist; check its parts"
        return f"is private or does not exist: only public buckets are read; with an account: {self.tool}"

    def files(self) -> dict[str, File]:
        import obstore

        try:
            try:
                entries: Any = [obstore.head(self.store, self.path)]
            except FileNotFoundError:
                pages = self.store.list(self.path)
                listed = (entry for page in pages for entry in page)
                entries = list(_checked(self.address, listed, lambda entry: (entry["path"], entry["size"])))
        except obstore.exceptions.InvalidPathError as error:
            raise CheckpointError(
                f"{self.address}: the server lists a name which would be outside of {self.top} ({error})."
            ) from error
        found = {}
        for entry in entries:
            tag = (entry["e_tag"] or "").strip('"')
            # The ETag of an object is its MD5, unless it was put together from parts.
            checksum = f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag) else ""
            found[entry["path"]] = File(entry["size"], tag, checksum)
        return found

    @contextlib.contextmanager
    def body(self, name: str, file: File, start: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """See `_read`."""
        import obstore

        try:
            found = obstore.get(self.store, name, options={"range": {"offset": start}} if start else {})
        except obstore.exceptions.BaseError as error:
            if start and re.search("non-partial|Content-Range|CONTENT_RANGE|Requested [0-9]", str(error)):
                yield 0, ()  # the range is not honoured
                return
            raise
        yield start, found.stream(_CHUNK_BYTES)


def token_hint(error: Any, *, right: str = "read") -> str:
    """The way to a token that has a right on the Hub, after a request that was refused."""
    request, said = error.response.request, str(error).lower()
    new = f"set HF_TOKEN or run `hf auth login` with one that may {right} (https://huggingface.co/settings/tokens)"
    if "authorization" not in request.headers:
        return f"no token was sent: {new}"
    known = "invalid credentials" not in said and "invalid user" not in said and "expired" not in said
    return f"the token that was sent {'has no right to it' if known else 'is not valid'}: {new}"


class Repository(Source):
    """A model or dataset on the Hugging Face Hub, read with the user's token if there is one."""

    retries = _RETRIES

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
        self.hub_page = page

    def connect(self) -> None:
        # HTTPError is the base of what the HTTP library raises, which is another library in other versions.
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        self.errors = (HTTPError, OfflineModeIsEnabled)

    def status(self, error: Exception) -> int | None:
        """The HTTP status of a failed request; None: no answer."""
        return getattr(getattr(error, "response", None), "status_code", None)

    def refused(self, error: Exception) -> str:
        """The rest of the sentence about a repository that is not there, or may not be read, which the Hub does not
        always tell apart."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        way_in = f"{self.hub_page}, and {token_hint(error)}"
        if isinstance(error, GatedRepoError):
            return f"is gated: accept its terms on {way_in}"
        if self.status(error) != 404:
            return f"is private or does not exist: ask for access on {way_in}"
        is_hidden = isinstance(error, RepositoryNotFoundError)
        return f"does not exist; check its parts{f'. If it is private, ask for access on {way_in}' * is_hidden}"

    def files(self) -> dict[str, File]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        try:
            commit = api.repo_info(self.name, repo_type=self.kind, revision=self.revision, timeout=60).sha or ""
            tree = api.list_repo_tree(self.name, recursive=True, revision=commit, repo_type=self.kind)
            return {
                file.path: File(file.size, commit, f"sha256:{file.lfs.sha256}" if file.lfs else "")
                for file in _checked(self.address, tree, lambda entry: (entry.path, getattr(entry, "size", 0)))
                if isinstance(file, RepoFile)
            }
        except (*self.errors, CheckpointError):
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # the library looks at nothing
            raise CheckpointError(
                f"{self.address}: the server's answer is not that of a Hub ({type(error).__name__}: {error!s:.200}); "
                "look at HF_ENDPOINT."
            ) from error

    @contextlib.contextmanager
    def body(self, name: str, file: File, start: int) -> Iterator[tuple[int, Iterable[bytes]]]:
        """See `_read`. (`hf_hub_download` starts over in each process, and takes whatever a server sends.)"""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.name, name, repo_type=self.kind, revision=file.version, endpoint=self.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        options: dict[str, Any] = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        options |= {"retry_on_exceptions": (), "retry_on_status_codes": (408, 429)}
        with http_stream_backoff("GET", url, **options) as response:
            hf_raise_for_status(response)
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding not in ("identity", "gzip"):
                raise CheckpointError(
                    f"{self.files_url}{quote(name)}: the server sends it with Content-Encoding {encoding!r:.40}; "
                    "expected identity, as was asked for, or gzip. Set HF_ENDPOINT to another server."
                )
            if response.status_code == 206:
                here = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                yield (start, response.iter_raw(_CHUNK_BYTES)) if here and encoding == "identity" else (0, ())
            else:
                yield 0, response.iter_bytes(_CHUNK_BYTES)
