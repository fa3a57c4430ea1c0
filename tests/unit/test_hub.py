"""Downloads, from servers in this process that speak the protocols of Google Cloud Storage and the Hugging Face Hub."""

import collections
import contextlib
import errno
import gzip
import hashlib
import http.server
import json
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import urllib.parse
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

import filelock
import pytest

from torchpi.checkpoints import hub, sources
from torchpi.checkpoints.hub import fetch, fetch_dataset
from torchpi.cli import main
from torchpi.cli.stats import checkpoint_stats
from torchpi.data import LeRobotDataset, select_episodes
from torchpi.data.metadata import open_metadata

BIG = random.Random(0).randbytes(300_000)
ENDLESS = object()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("feature/two_arms", "refs/pr/1")
BASE = "checkpoints/pi05_base"
POLICY = {  # in a bucket
    f"{BASE}/_CHECKPOINT_METADATA": b"m",
    f"{BASE}/assets/trossen/norm_stats.json": b'{"norm_stats": {}}',
    f"{BASE}/params/_METADATA": b"{}",
    f"{BASE}/params/d/0a1b": BIG,
    f"{BASE}/params/empty": b"",
    f"{BASE}/params/old.pkl": b"pickle",
    f"{BASE}/train_state/d/0a1b": b"optimizer",
    f"{BASE}/train_state/state.json": b"{}",
    f"{BASE}_2/params/_METADATA": b"of another one",
    "paligemma_tokenizer.model": b"spm",
}
WANTED = ["assets/trossen/norm_stats.json", "params/_METADATA", "params/d/0a1b", "params/empty"]
MODEL = {  # in a repository
    "README.md": b"# card",
    "config.json": b"{}",
    "model.safetensors": BIG,
    "optimizer.pt": b"pickle",
    "pytorch_model.bin": b"pickle",
    "sub/policy.json": b"{} ",
    "sub/training_state/optimizer.safetensors": b"optimizer",
    "tokenizer.model": b"spm",
}


class Server:
    """HTTP server for files, with a log of requests and injected failures."""

    def __init__(self, files):
        self.files = dict(files)
        self.requests = []  # path, file, range
        self.headers = []
        self.status = {}  # status of all requests whose path contains the key
        self.drops = collections.defaultdict(list)  # file: number of bytes after which each connection breaks
        self.sends = {}  # file: content to send instead, with its Content-Length
        self.lists = {}  # file: fields to change in the server's list
        self.no_ranges = False  # ignore ranges, and send whole files with status 200
        self.wrong_ranges = False  # send every range from the first byte on, with status 206
        self.encoding = None  # Content-Encoding of all files
        self.sent = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()

    def reads(self):
        """Requested ranges of each file."""
        found = collections.defaultdict(list)
        for _, name, range_ in self.requests:
            if name:
                found[name].append(range_)
        return found

    def answer(self, handler):
        url = urllib.parse.urlsplit(handler.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        name = self.file_of(path)
        self.requests.append((path, name if handler.command == "GET" else None, handler.headers.get("Range")))
        self.headers.append(dict(handler.headers))
        for part, status in self.status.items():
            if part in path and status:
                status = status.pop(0) if isinstance(status, list) else status
                return self.send(handler, json.dumps({"error": {"message": "no", "code": status}}).encode(), status)
        if name is None:
            document, headers = self.document(path, query)
            if document is None:
                return self.send(handler, b'{"error": {"message": "Not Found"}}', 404, headers)
            text = document if isinstance(document, str) else json.dumps(document)
            return self.send(handler, text.encode(), 200, headers)
        return self.send_file(handler, name)

    def send(self, handler, body, status=200, headers=None, drop_after=None):
        handler.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(body)}.items():
            handler.send_header(key, str(value))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[:drop_after])
        if drop_after is not None:
            handler.close_connection = True

    def send_file(self, handler, name):
        if name not in self.files:
            return self.send(handler, b"{}", 404)
        body, range_ = self.sends.get(name, self.files[name]), handler.headers.get("Range")
        if body is ENDLESS:
            return self.send_endless(handler)
        if handler.command == "HEAD":
            return self.send(handler, body, headers=self.headers_of(name))
        drop_after = self.drops[name].pop(0) if self.drops[name] else None
        if not range_ or self.no_ranges:
            headers = self.headers_of(name) | ({"Content-Encoding": self.encoding} if self.encoding else {})
            return self.send(handler, body, headers=headers, drop_after=drop_after)
        start = int(range_.removeprefix("bytes=").partition("-")[0])
        if start >= len(body):
            return self.send(handler, b"", 416)
        start = 0 if self.wrong_ranges else start
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} | self.headers_of(name)
        return self.send(handler, body[start:], 206, headers, drop_after)

    def send_endless(self, handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for _ in range(64):
                handler.wfile.write(b"100000\r\n" + bytes(0x100000) + b"\r\n")
                self.sent += 0x100000

    def headers_of(self, name):
        return {}


class Bucket(Server):
    """The XML API of Google Cloud Storage, with two objects per page."""

    def file_of(self, path):
        name = path.removeprefix("/bucket/")
        return name if path.startswith("/bucket/") and name else None

    def document(self, path, query):
        if path != "/bucket":
            return None, {}
        names = sorted(name for name in self.files if name.startswith(query.get("prefix", "")))
        start = int(query.get("continuation-token", 0))
        items = "".join(self.entry(name) for name in names[start : start + 2])
        more = len(names) > start + 2
        token = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if more else ""
        return f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>", {}

    def entry(self, name):
        said = {"Key": escape(name), "Size": len(self.files[name]), "LastModified": "2025-01-01T00:00:00.000Z"}
        said |= {"ETag": self.etag(name)} | self.lists.get(name, {})
        return f"<Contents>{''.join(f'<{key}>{value}</{key}>' for key, value in said.items())}</Contents>"

    def etag(self, name):
        return f'"{hashlib.md5(self.files[name]).hexdigest()}"'

    def headers_of(self, name):
        return {"ETag": self.etag(name), "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}


class Hub(Server):
    """The API of the Hugging Face Hub; files over 1 kB are in LFS."""

    api, files_at, commit = "/api/models/org/name", "/org/name", COMMIT

    def file_of(self, path):
        _, is_file, name = path.partition(f"{self.files_at}/resolve/{COMMIT}/")
        return name if is_file else None

    def document(self, path, query):
        if path in [f"{self.api}/revision/{name}" for name in ("main", *BRANCHES)]:
            return {"id": "org/name", "sha": self.commit, "siblings": []}, {}
        if path == f"{self.api}/revision/{COMMIT}":
            return {"id": "org/name", "sha": COMMIT, "siblings": []}, {}
        if path == f"{self.api}/tree/{COMMIT}":
            folders = [{"type": "directory", "oid": "0", "path": "sub", "size": 0}]
            return folders + [self.entry(name) for name in sorted(self.files)], {}
        code = "RevisionNotFound" if path.startswith(f"{self.api}/revision/") else "RepoNotFound"
        return None, {"X-Error-Code": code}

    def entry(self, name):
        data = self.files[name]
        said = {"type": "file", "oid": "0" * 40, "path": name, "size": len(data)}
        if len(data) > 1000:
            said["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return said | self.lists.get(name, {})


class DatasetHub(Hub):
    """The Hub's API for datasets."""

    api, files_at = "/api/datasets/org/name", "/datasets/org/name"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 1000)
    monkeypatch.setenv("TORCHPI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "home"


@pytest.fixture
def bucket(monkeypatch, home):
    with Bucket(POLICY) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.address, server.big = f"gs://bucket/{BASE}", f"{BASE}/params/d/0a1b"
        server.top, server.root = home / "gs/bucket", home / "gs/bucket" / BASE
        server.big_url = f"https://storage.googleapis.com/bucket/{server.big}"
        yield server


@pytest.fixture
def repository(monkeypatch, home):
    with Hub(MODEL) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.address, server.big = "hf://org/name", "model.safetensors"
        server.top = server.root = home / "hf/org/name/main"
        server.big_url = "https://huggingface.co/org/name/resolve/main/model.safetensors"
        yield server


@pytest.fixture(params=["bucket", "repository"])
def server(request):
    """A bucket, and a repository."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def waits(monkeypatch):
    """Retry less often, and without waiting."""
    monkeypatch.setattr(sources, "_RETRIES", 2)
    monkeypatch.setattr(sources.Repository, "retries", 2)
    monkeypatch.setattr(hub, "_PAUSE", 0)


def interrupt(server, monkeypatch, arrived=100_000):
    """Fail a download after this many bytes of the large file."""
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_RETRIES", 0)
        patch.setattr(sources.Repository, "retries", 0)
        patch.setattr(hub, "_PAUSE", 0)
        server.drops[server.big] = [arrived, *[0] * 7]
        with pytest.raises(FileNotFoundError, match="cannot be downloaded now"):
            fetch(server.address)
    server.drops.clear()


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def complete(server):
    """Expected contents of a complete folder."""
    if isinstance(server, Hub):
        return {
            name: MODEL[name] for name in ("config.json", "model.safetensors", "sub/policy.json", "tokenizer.model")
        }
    return {name: POLICY[f"{BASE}/{name}"] for name in WANTED}


def write_record(server):
    """Write a .download.json as a download does."""
    is_hub = isinstance(server, Hub)
    note = (server.top if is_hub else server.root).with_name(f"{'main' if is_hub else server.root.name}.download.json")
    checksum = f"sha256:{hashlib.sha256(BIG).hexdigest()}" if is_hub else f"md5:{hashlib.md5(BIG).hexdigest()}"
    files = {server.big: {"size": len(BIG), "version": COMMIT, "checksum": checksum}}
    note.write_text(json.dumps({"address": server.address, "files": files}))


# Downloaded files and their paths


def test_folder_downloads_only_policy_files(server):
    assert fetch(server.address) == server.root
    assert contents(server.root) == complete(server)
    assert sorted(server.reads()) == sorted(
        path.relative_to(server.top).as_posix()
        for path in server.root.rglob("*")
        if path.is_file() and path.stat().st_size
    )


def test_complete_download_needs_no_request(server):
    fetch(server.address)
    server.stop()
    assert contents(fetch(server.address)) == complete(server)
    assert contents(fetch(server.address + "/")) == complete(server)


def test_one_file_of_a_bucket(bucket, home):
    path = fetch("gs://bucket/paligemma_tokenizer.model")
    assert path == home / "gs/bucket/paligemma_tokenizer.model"
    assert path.read_bytes() == b"spm"
    bucket.stop()
    assert fetch("gs://bucket/paligemma_tokenizer.model") == path


def test_one_file_and_one_folder_of_a_repository(repository, home):
    path = fetch("hf://org/name/tokenizer.model")
    assert (path, path.read_bytes()) == (home / "hf/org/name/main/tokenizer.model", b"spm")
    assert contents(fetch("hf://org/name/sub")) == {"policy.json": b"{} "}
    assert fetch("hf://org/name/README.md").read_bytes() == MODEL["README.md"]
    assert sorted(repository.reads()) == ["README.md", "sub/policy.json", "tokenizer.model"]


def test_revision_has_its_own_folder_and_recorded_commit(repository, home):
    assert fetch(f"hf://org/name@{COMMIT}/config.json") == home / f"hf/org/name/{COMMIT}/config.json"
    fetch("hf://org/name")
    note = json.loads((home / "hf/org/name/main.download.json").read_text())
    assert note["address"] == "hf://org/name"
    checksum = f"sha256:{hashlib.sha256(BIG).hexdigest()}"
    assert note["files"]["model.safetensors"] == {"size": len(BIG), "version": COMMIT, "checksum": checksum}


@pytest.mark.parametrize("revision", [quote(BRANCHES[0], safe=""), BRANCHES[1]])
def test_branch_of_a_checkpoint_may_have_a_slash(revision, repository, home):
    path = fetch(f"hf://org/name@{revision}/sub")
    assert path == home / "hf/org/name" / quote(unquote(revision), safe="") / "sub"
    assert contents(path) == {"policy.json": b"{} "}


def test_complete_folder_serves_a_part_without_request(bucket):
    assert contents(fetch(f"gs://bucket/{BASE}/assets")) == {"trossen/norm_stats.json": b'{"norm_stats": {}}'}
    assert complete(bucket).items() <= contents(fetch(bucket.address)).items()
    assert len(bucket.reads()[f"{BASE}/assets/trossen/norm_stats.json"]) == 1
    bucket.stop()
    assert fetch(f"gs://bucket/{BASE}/params") == bucket.root / "params"
    assert fetch(f"gs://bucket/{bucket.big}").read_bytes() == BIG


def test_params_folder_only(bucket):
    assert contents(fetch(f"gs://bucket/{BASE}/params")) == {"_METADATA": b"{}", "d/0a1b": BIG, "empty": b""}


def test_default_cache_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHPI_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    path = fetch("gs://bucket/paligemma_tokenizer.model")
    assert path == tmp_path / "user/.cache/torchpi/gs/bucket/paligemma_tokenizer.model"


def test_cache_folder_may_be_relative_or_begin_with_tilde(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHPI_HOME", "here")
    assert fetch("gs://bucket/paligemma_tokenizer.model").is_relative_to(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("TORCHPI_HOME", "~/there")
    assert fetch("gs://bucket/paligemma_tokenizer.model").is_relative_to(tmp_path / "user/there")


def test_progress_is_on_stderr(bucket, capfd):
    fetch(bucket.address)
    out, err = capfd.readouterr()
    assert out == ""
    assert "300k/300k" in err


def test_buckets_are_read_anonymously(bucket):
    fetch(bucket.address)
    assert not any("Authorization" in headers for headers in bucket.headers)


# Interruptions


def test_dropped_connection_resumes(server, waits):
    server.drops[server.big] = [100_000]
    fetch(server.address)
    first, second = server.reads()[server.big]
    assert first in (None, "bytes=0-")
    assert second.startswith("bytes=100000-")
    assert contents(server.root) == complete(server)


def test_interrupted_download_resumes_on_next_fetch(server, monkeypatch):
    interrupt(server, monkeypatch)
    part = server.top / f"{server.big}.part"
    assert part.read_bytes() == BIG[:100_000]
    assert not part.with_suffix("").exists()
    server.requests.clear()
    fetch(server.address)
    assert server.reads()[server.big] == ["bytes=100000-"]
    assert contents(server.root) == complete(server)


def test_progress_resets_the_failure_count(server, waits):
    server.drops[server.big] = [10_000, 0, 10_000, 0, 10_000, 0, 10_000, 0, 10_000, 0]
    fetch(server.address)
    assert contents(server.root) == complete(server)


def test_too_many_failures_in_a_row_are_an_error(server, waits):
    server.drops[server.big] = [100_000, *[0] * 20]
    with pytest.raises(FileNotFoundError) as caught:
        fetch(server.address)
    path = server.top / server.big
    assert f"{server.big_url}\n    to {path}" in str(caught.value)
    assert path.with_name(path.name + ".part").read_bytes() == BIG[:100_000]


@pytest.mark.parametrize("status", [429, 503])
def test_busy_server_is_retried(bucket, waits, status):
    bucket.status = {"/bucket": [status]}
    fetch(bucket.address)
    assert contents(bucket.root) == complete(bucket)


def test_two_threads_download_once(server):
    begun = threading.Barrier(3)

    def run():
        begun.wait()
        fetch(server.address)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    for thread in threads:
        thread.join()
    assert contents(server.root) == complete(server)
    assert {len(ranges) for ranges in server.reads().values()} == {1}


@pytest.mark.slow
def test_two_processes_download_once(server):
    program = f"from torchpi.checkpoints.hub import fetch; print(fetch({server.address!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].decode().strip() for process in processes] == [str(server.root)] * 2
    assert contents(server.root) == complete(server)
    assert {len(ranges) for ranges in server.reads().values()} == {1}


def test_waiting_for_another_process_prints_a_message(bucket, home, capfd):
    (home / "gs").mkdir(parents=True)
    thread = threading.Thread(target=fetch, args=(bucket.address,))
    with filelock.FileLock(home / "gs/bucket.lock"):
        thread.start()
        thread.join(0.3)
        assert not bucket.requests
    thread.join()
    assert f"waiting for another process that is downloading into {home / 'gs/bucket'}" in capfd.readouterr().err
    assert contents(bucket.root) == complete(bucket)


# Wrong contents and metadata


@pytest.mark.parametrize(
    ("sent", "found"),
    [(BIG[:-1], "299999 bytes"), (BIG + b"x", "more than 300000 bytes"), (BIG[:-1] + b"x", "another checksum")],
    ids=["short", "long", "other"],
)
def test_wrong_size_or_checksum_is_an_error_and_deletes_the_file(server, waits, sent, found):
    server.sends[server.big] = sent
    with pytest.raises(
        ValueError, match=rf"{found}; expected 300000 bytes with (md5|sha256):\w+\. They are deleted; try"
    ) as e:
        fetch(server.address)
    assert str(e.value).startswith(server.big_url)
    assert f"{server.big}".split("/")[-1] not in {path.name.removesuffix(".part") for path in server.top.rglob("*")}
    del server.sends[server.big]
    assert contents(fetch(server.address)) == complete(server)


def test_small_file_is_checked_by_size(repository, waits):
    repository.sends["config.json"] = b"{}}"
    with pytest.raises(ValueError, match=r"resolve/main/config\.json: got more than 2 bytes; expected 2 bytes\."):
        fetch(repository.address)
    assert "config.json" not in contents(repository.root)


def test_endless_response_is_cut_off(repository):
    repository.sends["config.json"] = ENDLESS
    with pytest.raises(ValueError, match=r"config\.json: got more than 2 bytes; expected 2 bytes\. They are deleted"):
        fetch(repository.address)
    assert repository.sent < 10_000_000
    assert not list(repository.top.rglob("config.json*"))


@pytest.mark.parametrize("fault", ["no_ranges", "wrong_ranges"])
def test_ignored_range_requests_restart_the_file(server, waits, fault):
    setattr(server, fault, True)
    server.drops[server.big] = [100_000]
    fetch(server.address)
    first, second = server.reads()[server.big][:2]
    assert first is None
    assert second.startswith("bytes=100000-")
    assert contents(server.root) == complete(server)


def test_attempts_without_progress_are_limited(server, waits):
    server.no_ranges = True
    server.drops[server.big] = [100_000] * 50
    with pytest.raises(FileNotFoundError, match="cannot be downloaded now"):
        fetch(server.address)
    assert len(server.reads()[server.big]) < 10


def test_pauses_between_attempts_are_an_argument(repository):
    pauses = []
    repository.drops[repository.big] = [0, 0]
    fetch(repository.address, sleep=pauses.append)
    assert pauses == [1, 1]


def test_compressed_answers_are_bounded_by_the_listed_size(repository, waits):
    repository.files = {"model.safetensors": BIG}
    repository.encoding, repository.sends["model.safetensors"] = "gzip", gzip.compress(BIG)
    assert contents(fetch(repository.address)) == {"model.safetensors": BIG}
    shutil.rmtree(repository.top)
    repository.sends["model.safetensors"] = gzip.compress(bytes(20_000_000))
    with pytest.raises(ValueError, match="got more than 300000 bytes; expected 300000 bytes"):
        fetch(repository.address)
    repository.encoding = "zstd"
    with pytest.raises(ValueError, match="Content-Encoding 'zstd'; expected identity"):
        fetch(repository.address)


@pytest.mark.parametrize("size", [-5, "2", 2.5, None, [2], True])
def test_listed_sizes_are_numbers_of_bytes(repository, size):
    repository.lists["config.json"] = {"size": size}
    with pytest.raises(ValueError, match=r"'config\.json' with a size of .*; expected a name and a number of bytes"):
        fetch(repository.address)
    assert not repository.reads()


def test_download_larger_than_free_space_does_not_start(server):
    server.lists[server.big] = {
        "size": 10**18,
        "Size": 10**18,
        "lfs": {"oid": "0" * 64, "size": 10**18, "pointerSize": 9},
    }
    if isinstance(server, Bucket):
        server.lists[server.big] = {"Size": 10**18}
    with pytest.raises(
        ValueError, match=r": 10{12,}\d* bytes of the files that the server lists are missing here, and .* bytes free"
    ):
        fetch(server.address)
    assert not server.reads()


def test_endless_or_duplicate_file_list_is_an_error(repository, bucket, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_FILES", 3)
    for server in (repository, bucket):
        with pytest.raises(ValueError, match="the server lists more than 3 files; the list is damaged"):
            fetch(server.address)
    monkeypatch.setattr(sources, "_MAX_FILES", 1000)
    monkeypatch.setattr(repository, "entry", lambda _: {"type": "file", "oid": "0", "path": "config.json", "size": 2})
    with pytest.raises(ValueError, match=r"the server lists 'config\.json' twice"):
        fetch(repository.address)


@pytest.mark.parametrize("entry", [{}, {"type": "file"}, {"type": "file", "path": 3, "oid": "0", "size": 2}, 3])
def test_responses_of_another_kind_of_server_are_errors(repository, monkeypatch, entry):
    monkeypatch.setattr(repository, "entry", lambda _: entry)
    with pytest.raises(ValueError, match=r"the server's answer is not that of a Hub|lists 3 with a size of 2"):
        fetch(repository.address)


def test_circular_redirects_are_an_error(repository, waits, monkeypatch):
    monkeypatch.setattr(
        repository,
        "send_file",
        lambda handler, name: repository.send(handler, b"", 302, {"Location": handler.path}),
    )
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded now .*TooManyRedirects"):
        fetch(repository.address)


def test_composed_object_is_checked_by_size(bucket, waits):
    bucket.lists[bucket.big] = {"ETag": '"CJiUqbqX_IIDEAE="'}
    assert contents(fetch(bucket.address)) == complete(bucket)


def test_file_with_unrecorded_size_is_downloaded_again(server):
    fetch(server.address)
    (server.top / server.big).write_bytes(BIG[:1000])
    server.requests.clear()
    assert contents(fetch(server.address)) == complete(server)
    assert server.big in server.reads()
    assert not [name for name in server.reads() if "params/_METADATA" in name]


def test_partial_file_of_another_version_is_an_error_once(server):
    part = server.top / f"{server.big}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"another version")
    write_record(server)
    with pytest.raises(ValueError, match="another checksum; expected"):
        fetch(server.address)
    assert fetch(server.address) == server.root
    assert (server.top / server.big).read_bytes() == BIG


def test_resumed_download_does_not_mix_versions(server, monkeypatch):
    interrupt(server, monkeypatch)
    server.files[server.big] = BIG[::-1]
    with pytest.raises(ValueError, match=r"another checksum; .*or delete .*\.download\.json"):
        fetch(server.address)
    next(server.top.parent.rglob("*.download.json")).unlink()
    shutil.rmtree(server.root)
    fetch(server.address)
    assert (server.top / server.big).read_bytes() == BIG[::-1]


def test_damaged_record_is_an_error(server):
    fetch(server.address)
    note = server.root.with_name(server.root.name + ".download.json")
    note.write_text("{")
    with pytest.raises(ValueError, match=r"\.download\.json is damaged .*; delete it, and fetch again"):
        fetch(server.address)


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "a//x.json", "a\\..\\x.json", "./x.json"]
)
def test_names_outside_the_folder_are_an_error(server, home, name):
    prefix = f"{BASE}/" if isinstance(server, Bucket) else ""
    server.files[prefix + name] = b"{}"
    with pytest.raises(ValueError, match="which would be outside of"):
        fetch(server.address)
    assert not list(home.parent.rglob("*.json"))
    assert not server.reads()


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_an_error_with_advice(server):
    part = server.top / f"{server.big}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    write_record(server)
    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch(server.address)
    assert caught.value.errno == errno.ENOSPC
    assert "of 300000 bytes: free some space, or set TORCHPI_HOME" in caught.value.__notes__[0]
    part.unlink()
    fetch(server.address)
    assert (server.top / server.big).read_bytes() == BIG


# Without a connection


def test_error_without_connection_names_the_cache_folder(server, waits):
    server.stop()
    with pytest.raises(FileNotFoundError, match="is not complete in the cache, and cannot be downloaded now") as caught:
        fetch(server.address)
    url = (
        "https://huggingface.co/org/name/tree/main"
        if isinstance(server, Hub)
        else server.big_url.removesuffix("/params/d/0a1b")
    )
    assert url in str(caught.value)
    assert f"to {server.root}\n" in str(caught.value)
    for name, data in complete(server).items():
        (server.root / name).parent.mkdir(parents=True, exist_ok=True)
        (server.root / name).write_bytes(data)
    assert fetch(server.address) == server.root


def test_file_can_be_placed_by_hand(bucket, home, waits):
    bucket.stop()
    path = home / "gs/bucket/paligemma_tokenizer.model"
    url = "https://storage.googleapis.com/bucket/paligemma_tokenizer.model"
    with pytest.raises(FileNotFoundError) as caught:
        fetch("gs://bucket/paligemma_tokenizer.model")
    assert f"{url}\n    to {path}\n" in str(caught.value)
    path.parent.mkdir()
    path.write_bytes(b"spm")
    assert fetch("gs://bucket/paligemma_tokenizer.model") == path


def test_missing_files_of_an_interrupted_download_may_be_placed_by_hand(server, waits, monkeypatch):
    interrupt(server, monkeypatch)
    server.stop()
    with pytest.raises(FileNotFoundError) as caught:
        fetch(server.address)
    path = server.top / server.big
    assert f"{server.big_url}\n    to {path}" in str(caught.value)
    for name, data in complete(server).items():
        (server.root / name).parent.mkdir(parents=True, exist_ok=True)
        (server.root / name).write_bytes(data)
    path.write_bytes(BIG[:-1])
    with pytest.raises(FileNotFoundError):
        fetch(server.address)
    path.write_bytes(BIG)
    assert fetch(server.address) == server.root


@pytest.mark.parametrize("rest", [(), (".DS_Store",)])
def test_empty_folder_does_not_count_as_placed_by_hand(rest, bucket):
    bucket.root.mkdir(parents=True)
    for name in rest:
        (bucket.root / name).touch()
    fetched = contents(fetch(bucket.address))
    assert {name: data for name, data in fetched.items() if name not in rest} == complete(bucket)


def test_many_missing_files_are_counted(bucket, waits):
    bucket.files |= {f"{BASE}/params/d/{i:02}": b"x" for i in range(20)}
    bucket.status = {"/params/": 503}
    with pytest.raises(FileNotFoundError) as caught:
        fetch(bucket.address)
    assert str(caught.value).count("\n    to ") == 10
    assert f"and 13 more, listed in {bucket.root}.download.json" in str(caught.value)


# Missing files and refused requests


@pytest.mark.parametrize("status", [401, 403])
def test_private_repository_error_explains_access(server, status, waits):
    server.status = {"/bucket": status, "/api/models": status}
    hint = (
        "set HF_TOKEN or run"
        if isinstance(server, Hub)
        else "only public buckets are read; with an account, run: gcloud"
    )
    with pytest.raises(FileNotFoundError, match=rf"is private or does not exist: .*{hint}"):
        fetch(server.address)


@pytest.mark.parametrize(
    "address", ["gs://other-bucket/folder", "hf://org/other", "hf://org/name@other", "hf://other/name/sub"]
)
def test_missing_buckets_repositories_and_revisions_are_errors(bucket, repository, address):
    with pytest.raises(FileNotFoundError, match=rf"{address} does not exist; check its parts"):
        fetch(address)


@pytest.mark.parametrize("address", [f"gs://bucket/{BASE[:-1]}", "gs://bucket/nowhere", "hf://org/name/nowhere"])
def test_missing_folders_are_an_error(bucket, repository, address):
    with pytest.raises(FileNotFoundError, match=rf"{address}: found nothing; expected a file, or a folder with"):
        fetch(address)


@pytest.mark.parametrize(
    "address",
    [f"gs://bucket/{BASE}/train_state", "hf://org/name/pytorch_model.bin", f"gs://bucket/{BASE}/params/old.pkl"],
)
def test_pickles_and_train_states_are_never_downloaded(bucket, repository, address):
    with pytest.raises(FileNotFoundError, match=r"found \S+.* Never downloaded are \*\.bin, \*\.pt"):
        fetch(address)
    assert not bucket.reads()
    assert not repository.reads()


def test_other_refused_requests_are_a_separate_error(server, waits):
    server.status = {"/bucket": 400, "/api/models": 400}
    with pytest.raises(ValueError, match="the server refuses the request"):
        fetch(server.address)


@pytest.mark.parametrize(
    "address",
    [
        "", "folder", "/folder", "s3://bucket/path", "GS://bucket/path", "gs:/bucket/path", "gs://", "gs://bucket",
        "gs://bucket/", "gs:///path", "gs://bucket//path", "gs://bucket/a//b", "gs://bucket/../x", "gs://bucket/a/..",
        "gs://bucket/a/./b", "gs://bucket/a\\b", "gs://../path", "gs://bucket/.", "hf://org/name/.",
        "hf://", "hf://name", "hf://org/", "hf:///name",
        "hf://org/name@", "hf://org/name@main/../x", "hf://org/..", "hf://../name", "hf://org/name@..", "hf://org//name",
        "hf://org/name//sub", "hf://or g/name",
    ],
)  # fmt: skip
def test_malformed_addresses_are_errors(address):
    with pytest.raises(ValueError, match=r"Malformed address '.*'; expected gs://bucket/path or hf://org/name"):
        fetch(address)


def test_missing_extra_names_the_install_command(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the extra 'gcs': pip install 'torchpi\[gcs\]'"):
        fetch("gs://bucket/path")
    (home / "gs/bucket").mkdir(parents=True, exist_ok=True)
    (home / "gs/bucket/path").write_text("by hand")
    assert fetch("gs://bucket/path").read_text() == "by hand"


def test_reading_statistics_downloads_only_norm_stats(bucket):
    assert checkpoint_stats(f"{bucket.address}/") == {"trossen": {}}
    assert list(bucket.reads()) == [f"{BASE}/assets/trossen/norm_stats.json"]


def test_reading_statistics_without_assets_downloads_the_checkpoint(repository):
    repository.files["norm_stats.json"] = b'{"norm_stats": {"state": {"mean": [0], "std": [1]}}}'
    assert set(checkpoint_stats(repository.address)["main"]) == {"state"}


# Datasets


@pytest.fixture
def datasets(monkeypatch, home, golden_root):
    """A dataset in format v2.1, with a file per episode and camera."""
    root = golden_root / "datasets/lerobot_v21"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with DatasetHub(files | {"README.md": b"# card", "meta/old.pkl": b"pickle"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.top, server.root_of_originals = home / "hf-datasets/org/name/main", root
        yield server


def of_episode(number):
    cameras = ("observation.images.base", "observation.images.wrist")
    return {
        f"data/chunk-000/episode_{number:06}.parquet",
        *(f"videos/chunk-000/{camera}/episode_{number:06}.mp4" for camera in cameras),
    }


META = {f"meta/{name}" for name in ("info.json", "tasks.jsonl", "episodes.jsonl", "episodes_stats.jsonl")}


def test_dataset_downloads_the_files_of_its_episodes(datasets):
    dataset = LeRobotDataset("hf://org/name", action_horizon=4, episodes=[1])
    assert set(contents(datasets.top)) == META | of_episode(1)
    original = LeRobotDataset(datasets.root_of_originals, action_horizon=4, episodes=[1])
    for key, value in original[7].items():
        assert (dataset[7][key] == value).all() if hasattr(value, "all") else dataset[7][key] == value
    datasets.requests.clear()
    LeRobotDataset("hf://org/name", action_horizon=4)
    assert set(datasets.reads()) == of_episode(0)  # no file is downloaded twice
    datasets.stop()
    assert len(LeRobotDataset("hf://org/name@main", action_horizon=4)) == len(
        LeRobotDataset(datasets.root_of_originals, action_horizon=4)
    )


def test_dataset_without_cameras_downloads_no_videos(datasets):
    LeRobotDataset("hf://org/name", action_horizon=4, cameras=["observation.images.wrist"], episodes=[0])
    assert [name for name in datasets.reads() if "images.base" in name] == []
    datasets.requests.clear()
    LeRobotDataset("hf://org/name", action_horizon=4, cameras=[])
    assert set(datasets.reads()) == {"data/chunk-000/episode_000001.parquet"}


def test_statistics_of_a_dataset_need_no_video(datasets, capsys):
    main(["stats", "hf://org/name", "--embodiment", "metaworld", "--episodes", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["frames"] == 106
    assert set(datasets.reads()) == META | {"data/chunk-000/episode_000001.parquet"}


def test_selecting_episodes_downloads_only_metadata(datasets):
    assert select_episodes("hf://org/name", "task:reach*") == [0, 1]
    assert set(contents(datasets.top)) == META


def test_files_of_a_dataset_are_from_one_commit(datasets):
    fetch_dataset("hf://org/name", ["meta/"])
    datasets.commit = "f" * 40  # a new commit on the server
    name = "data/chunk-000/episode_000000.parquet"
    fetch_dataset("hf://org/name", [name])
    assert contents(datasets.top)[name] == datasets.files[name]
    assert all(f"/{COMMIT}" in path for path, _, _ in datasets.requests[2:])


def test_download_of_a_dataset_resumes(datasets, waits):
    name = "data/chunk-000/episode_000000.parquet"
    datasets.drops[name] = [1000, *[0] * 3]
    with pytest.raises(FileNotFoundError, match="cannot be downloaded now"):
        fetch_dataset("hf://org/name", ["meta/", name])
    fetch_dataset("hf://org/name", ["meta/", name])
    assert datasets.reads()[name][-1] == "bytes=1000-"
    assert contents(datasets.top)[name] == datasets.files[name]


def test_damaged_file_of_a_dataset_is_an_error_and_deleted(datasets, waits):
    name = "data/chunk-000/episode_000000.parquet"
    datasets.sends[name] = datasets.files[name][:-1] + b"x"
    with pytest.raises(ValueError, match=rf"datasets/org/name/resolve/main/{name}: got another checksum"):
        fetch_dataset("hf://org/name", [name])
    assert name not in contents(datasets.top)


def test_dataset_without_connection(datasets, waits, monkeypatch):
    fetch_dataset("hf://org/name", ["meta/"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    datasets.requests.clear()
    assert open_metadata("hf://org/name").info.fps == 80
    assert not datasets.requests
    name = "data/chunk-000/episode_000000.parquet"
    with pytest.raises(FileNotFoundError, match="is not complete in the cache") as caught:
        fetch_dataset("hf://org/name", [name])
    assert f"https://huggingface.co/datasets/org/name/resolve/main/{name}\n    to {datasets.top / name}" in str(
        caught.value
    )
    assert "hf download org/name --repo-type dataset" in str(caught.value)
    (datasets.top / name).write_bytes(datasets.files[name])
    assert fetch_dataset("hf://org/name", [name]) == datasets.top


def test_dataset_may_be_placed_by_hand(datasets):
    datasets.stop()
    for name, data in datasets.files.items():
        (datasets.top / name).parent.mkdir(parents=True, exist_ok=True)
        (datasets.top / name).write_bytes(data)
    assert len(LeRobotDataset("hf://org/name", action_horizon=1).episode_lengths) == 2


def test_missing_files_of_a_dataset_are_named(datasets, waits):
    with pytest.raises(FileNotFoundError, match=r"has no data/nope\.parquet; it has README\.md, data, meta, videos"):
        fetch_dataset("hf://org/name", ["data/nope.parquet"])
    del datasets.files["data/chunk-000/episode_000001.parquet"]
    with pytest.raises(FileNotFoundError, match=r"has no data/chunk-000/episode_000001\.parquet"):
        LeRobotDataset("hf://org/name", action_horizon=1)
    with pytest.raises(FileNotFoundError, match="hf://org/other does not exist"):
        open_metadata("hf://org/other")
    with pytest.raises(ValueError, match="would be outside of it"):
        fetch_dataset("hf://org/name", ["../x.json"])


@pytest.mark.parametrize("address", [f"hf://org/name@{BRANCHES[0]}", f"hf://datasets/org/name@{BRANCHES[1]}/"])
def test_branch_of_a_dataset_may_have_a_slash(address, datasets, home):
    dataset = LeRobotDataset(address, action_horizon=1, cameras=())
    folder = quote(address.partition("@")[2].rstrip("/"), safe="")
    assert dataset.path == home / "hf-datasets/org/name" / folder
    assert len(dataset) == len(LeRobotDataset(datasets.root_of_originals, action_horizon=1))


@pytest.mark.parametrize("address", ["hf://name", "hf://org/name/sub", "hf://org/name@", "hf://models/org/name"])
def test_malformed_addresses_of_datasets_are_errors(address):
    with pytest.raises(ValueError, match=r"Malformed address .* of a dataset; expected hf://org/name\[@revision\]"):
        LeRobotDataset(address, action_horizon=1)


@pytest.mark.parametrize("path", [pathlib.Path("hf://org/name"), "gs://bucket/set"])
def test_other_addresses_of_a_dataset_are_errors(path):
    with pytest.raises(ValueError, match=r"string hf://org/name\[@revision\]; found"):
        LeRobotDataset(path, action_horizon=1)
