"""File servers (Google Cloud Storage and the Hugging Face Hub) and the cache paths of their files; see hub.py."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote

from torchpi.errors import CheckpointError, MissingFileError
from torchpi.extras import require
from torchpi.schema import parse, read_json

# Files to download for a policy. Pickles are never downloaded (unpickling can run code), nor are optimizer states.
_POLICY_FILES = ("*.json", "*.safetensors", "*tokenizer*", "*.model", "*/params/*", "*/assets/*")
_NEVER_DOWNLOADED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*/train_state/*", "*/training_state/*")
_RETRIES = 5
_CHUNK_BYTES = 1 << 20
_MAX_FILES = 1_000_000

ByteStream = tuple[int, Iterable[bytes]]
"""Position of the first byte that the server sends, and the chunks from there to the end of the file."""


def is_safe_path(name: str) -> bool:
    """True if a name in a bucket or repository, used as a relative path, stays inside its folder."""
    return not {"", ".", ".."} & set(name.split("/")) and not set("\\\0") & set(name)


def add_suffix(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def file_size(path: pathlib.Path) -> int:
    """Size in bytes; -1 if there is no such file."""
    return path.stat().st_size if path.is_file() else -1


@dataclasses.dataclass(frozen=True)
class File:
    """A file on the server."""

    size: int
    version: str
    """ETag in a bucket, commit in a repository."""
    checksum: str = ""
    """"md5:…" or "sha256:…"; empty if only the size is known."""

    def matches(self, path: pathlib.Path) -> bool:
        """True if a local file has the size and the checksum."""
        if file_size(path) != self.size or not self.checksum:
            return file_size(path) == self.size
        algorithm, _, expected = self.checksum.partition(":")
        with path.open("rb") as content:
            return hashlib.file_digest(content, algorithm).hexdigest() == expected


@dataclasses.dataclass(frozen=True)
class Record:
    """Contents of a .download.json: all files that the server lists for an address."""

    address: str
    files: dict[str, File]


class Source:
    """An address on a server, and its path in the cache."""

    def __init__(self, address: str, folder: str, path: str, names: frozenset[str] = frozenset()) -> None:
        """`folder` is the bucket or repository, relative to the cache; `path` is relative to `folder`; `names` limits
        the download to these files, and to folders that end with "/"."""
        home = pathlib.Path(os.environ.get("TORCHPI_HOME") or "~/.cache/torchpi").expanduser().absolute()
        self.address, self.path, self.names = address, path, names
        self.top = home / folder
        """Cache folder of the bucket or repository."""
        self.root = self.top / path
        """Cache path of the address: a file or folder."""
        self.record_file = add_suffix(self.root, ".download.json")

    def record(self) -> Record | None:
        """The record of this address or of a folder above it, if it lists files to download for this address."""
        for folder in (self.root, *self.root.parents):
            file = add_suffix(folder, ".download.json")
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
        """The files to download: those in `names`, or else those of a policy under `path`."""
        return {name: file for name, file in record.files.items() if self._is_wanted(name)}

    def _is_wanted(self, name: str) -> bool:
        if _matches(name, _NEVER_DOWNLOADED):
            return False
        if self.names:
            return name in self.names or any(name.startswith(known) for known in self.names if known.endswith("/"))
        return name == self.path or ((self.top / name).is_relative_to(self.root) and _matches(name, _POLICY_FILES))

    def missing(self, record: Record) -> dict[str, File]:
        """The wanted files that are not in the cache."""
        return {name: file for name, file in self.wanted(record).items() if file_size(self.top / name) != file.size}

    def is_complete(self) -> bool:
        """True if all wanted files are in the cache."""
        if (record := self.record()) is not None:
            return not self.missing(record) and not self.unavailable(record)
        if self.names:
            return all((self.top / name).exists() for name in self.names)
        if self.root.is_dir():
            has_files = any(not entry.name.startswith(".") for entry in self.root.iterdir())
            return has_files and not any(self.root.rglob("*.download.json"))
        return self.root.is_file()

    def unavailable(self, record: Record) -> list[str]:
        """The requested names that the server does not have."""
        files = self.wanted(record)
        folders = {f"{folder.as_posix()}/" for name in files for folder in pathlib.PurePosixPath(name).parents}
        return sorted(self.names - set(files) - folders)

    def list_files(self) -> dict[str, File]:
        """All files of the address, from the server; a damaged or endless list is an error."""
        files: dict[str, File] = {}
        seen: set[str] = set()
        for name, size, version, checksum in self._entries():
            problem = ""
            if not isinstance(name, str) or type(size) is not int or size < 0:
                problem = f"{name!a:.200} with a size of {size!a:.40}; expected a name and a number of bytes"
            elif name in seen:
                problem = f"{name!a:.200} twice"
            elif len(seen) == _MAX_FILES:
                problem = f"more than {_MAX_FILES} files"
            if problem:
                raise CheckpointError(
                    f"{self.address}: the server lists {problem}; the list is damaged, or this is another kind of "
                    "server."
                )
            seen.add(name)
            if version is not None:
                files[name] = File(size, version, checksum)
        return files

    def _entries(self) -> Iterator[tuple[Any, Any, str | None, str]]:
        """Name, size, version and checksum of each file, unchecked; for folders, size 0 and no version."""
        raise NotImplementedError

    def require_files(self, record: Record) -> None:
        """Raise an error if the server lacks requested files, or lists a path outside the cache folder."""
        if outside := [name for name in record.files if not is_safe_path(name)]:
            raise CheckpointError(
                f"{self.address}: the server lists {outside[0]!r:.200}, which would be outside of {self.top}."
            )
        if unavailable := self.unavailable(record):
            top_level = ", ".join(sorted({name.split("/")[0] for name in record.files})) or "nothing"
            raise MissingFileError(
                f"{self.address} has no {', '.join(unavailable[:3])}{' …' if len(unavailable) > 3 else ''}; it has "
                f"{top_level}. Expected a complete LeRobot dataset."
            )
        if not self.names and not self.wanted(record):
            listed = [name for name in record.files if (self.top / name).is_relative_to(self.root)]
            found = ", ".join(listed[:5] + ["…"] * (len(listed) > 5)) or "nothing"
            raise MissingFileError(
                f"{self.address}: found {found}; expected a file, or a folder with {', '.join(_POLICY_FILES)}. Never "
                f"downloaded are {', '.join(_NEVER_DOWNLOADED)}: pickles can run code."
            )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(f"/{name.lower()}", pattern) for pattern in patterns)


class Bucket(Source):
    """A bucket of Google Cloud Storage, read without an account."""

    retries = 0
    """Retries without progress in hub.py; obstore already retries each request."""

    def __init__(self, address: str, bucket: str, path: str) -> None:
        super().__init__(address, f"gs/{bucket}", path)
        self.bucket = bucket
        self.files_url = f"https://storage.googleapis.com/{bucket}/"
        self.page = f"{self.files_url}{quote(path)}"
        self.download_command = f"gcloud storage cp -r gs://{bucket}/{path} {self.root.parent}"

    def connect(self) -> None:
        obstore = require("obstore", "gcs")
        from obstore.store import GCSStore

        server = os.environ.get("STORAGE_EMULATOR_HOST")
        self.errors: tuple[type[Exception], ...] = (obstore.exceptions.BaseError, FileNotFoundError)
        self.store = GCSStore(
            self.bucket,
            config={"skip_signature": True, **({"base_url": server} if server else {})},
            # obstore's default timeout of 30 s covers a whole file.
            client_options={"allow_http": bool(server), "timeout": timedelta(days=1), "read_timeout": "60s"},
            retry_config={"max_retries": _RETRIES},
        )

    def http_status(self, error: Exception) -> int | None:
        """HTTP status of a failed request, which obstore has only in its message; None without a response."""
        match = re.search(r"status code: (\d{3})", str(error))
        return int(match[1]) if match else None

    def explain_refusal(self, error: Exception) -> str:
        """Finish the sentence "ADDRESS …" for a request that was refused with 401, 403 or 404."""
        if self.http_status(error) == 404:
            return "does not exist; check its parts"
        return (
            f"is private or does not exist: only public buckets are read; with an account, run: {self.download_command}"
        )

    def _entries(self) -> Iterator[tuple[Any, Any, str | None, str]]:
        import obstore

        try:
            try:
                entries: Iterable[Any] = [obstore.head(self.store, self.path)]
            except FileNotFoundError:  # a folder
                entries = (entry for page in self.store.list(self.path) for entry in page)
            for entry in entries:
                tag = (entry["e_tag"] or "").strip('"')
                # The ETag of an object is its MD5, unless the object was composed from parts.
                checksum = f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag) else ""
                yield entry["path"], entry["size"], tag, checksum
        except obstore.exceptions.InvalidPathError as error:
            raise CheckpointError(
                f"{self.address}: the server lists a name which would be outside of {self.top} ({error})."
            ) from error

    @contextlib.contextmanager
    def open_stream(self, name: str, file: File, start: int) -> Iterator[ByteStream]:
        """Request the bytes of a file from `start` on."""
        import obstore

        try:
            response = obstore.get(self.store, name, options={"range": {"offset": start}} if start else {})
        except obstore.exceptions.BaseError as error:
            if start and re.search("non-partial|Content-Range|CONTENT_RANGE|Requested [0-9]", str(error)):
                yield 0, ()  # the server ignores the range
                return
            raise
        yield start, response.stream(_CHUNK_BYTES)


def token_hint(error: Any, *, permission: str = "read it") -> str:
    """Explain how to get a token with the needed permission, after the Hub refused a request."""
    advice = (
        f"set HF_TOKEN or run `hf auth login` with a token that can {permission} "
        "(https://huggingface.co/settings/tokens)"
    )
    if "authorization" not in error.response.request.headers:
        return f"no token was sent: {advice}"
    message = str(error).lower()
    is_invalid = any(text in message for text in ("invalid credentials", "invalid user", "expired"))
    return f"the token that was sent {'is not valid' if is_invalid else 'lacks the permission'}: {advice}"


class Repository(Source):
    """A model or dataset on the Hugging Face Hub, read with the user's token if there is one."""

    retries = _RETRIES

    def __init__(
        self, address: str, name: str, revision: str | None, *, path: str = "", names: frozenset[str] = frozenset()
    ) -> None:
        """`names` makes it a dataset, of which only these files are downloaded."""
        self.name, self.revision = name, unquote(revision or "main")
        quoted_revision = quote(self.revision, safe="")
        self.kind, folder, url_prefix = ("dataset", "hf-datasets", "datasets/") if names else ("model", "hf", "")
        super().__init__(address, f"{folder}/{name}/{quoted_revision}", path, names)
        self.record_file = add_suffix(self.top, ".download.json")  # lists the whole repository
        self.endpoint = os.environ.get("HF_ENDPOINT") or None
        self.repo_url = f"https://huggingface.co/{url_prefix}{name}"
        self.files_url = f"{self.repo_url}/resolve/{quoted_revision}/"
        self.page = f"{self.repo_url}/tree/{quoted_revision}/{quote(path)}"
        self.download_command = (
            f"hf download {name} --repo-type {self.kind} --revision {self.revision} --local-dir {self.top}"
        )

    def connect(self) -> None:
        # HTTPError is the base class for both of the HTTP libraries that versions of huggingface_hub use.
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        self.errors = (HTTPError, OfflineModeIsEnabled)

    def http_status(self, error: Exception) -> int | None:
        """HTTP status of a failed request; None without a response."""
        return getattr(getattr(error, "response", None), "status_code", None)

    def explain_refusal(self, error: Exception) -> str:
        """Finish the sentence "ADDRESS …" for a request that was refused with 401, 403 or 404.

        The Hub does not always distinguish a private repository from one that does not exist.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        access = f"{self.repo_url}, and {token_hint(error)}"
        if isinstance(error, GatedRepoError):
            return f"is gated: accept its terms on {access}"
        if self.http_status(error) != 404:
            return f"is private or does not exist: ask for access on {access}"
        if isinstance(error, RepositoryNotFoundError):
            return f"does not exist; check its parts. If it is private, ask for access on {access}"
        return "does not exist; check its parts"

    def _entries(self) -> Iterator[tuple[Any, Any, str | None, str]]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint)
        try:
            commit = api.repo_info(self.name, repo_type=self.kind, revision=self.revision, timeout=60).sha or ""
            for entry in api.list_repo_tree(self.name, recursive=True, revision=commit, repo_type=self.kind):
                if isinstance(entry, RepoFile):
                    yield entry.path, entry.size, commit, f"sha256:{entry.lfs.sha256}" if entry.lfs else ""
                else:
                    yield entry.path, 0, None, ""
        except self.errors:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # huggingface_hub validates no response
            raise CheckpointError(
                f"{self.address}: the server's answer is not that of a Hub ({type(error).__name__}: {error!s:.200}); "
                "check HF_ENDPOINT."
            ) from error

    @contextlib.contextmanager
    def open_stream(self, name: str, file: File, start: int) -> Iterator[ByteStream]:
        """Request the bytes of a file from `start` on.

        `hf_hub_download` would start over in each process, and has no limit on the size.
        """
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
                    "expected identity, as requested, or gzip. Set HF_ENDPOINT to another server."
                )
            if response.status_code != 206:
                yield 0, response.iter_bytes(_CHUNK_BYTES)
            elif encoding == "identity" and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                yield start, response.iter_raw(_CHUNK_BYTES)
            else:
                yield 0, ()  # the server ignores the range
