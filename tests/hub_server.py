"""A Hugging Face Hub on loopback: repositories with branches and commits in memory, uploads through LFS, tokens."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest
from huggingface_hub import constants

PART_BYTES = 100_000


class Repository:
    def __init__(self, private=False, files=None):
        self.private, self.gated = private, False
        self.commits = {"0" * 40: dict(files or {})}
        self.branches = {"main": "0" * 40}
        self.messages = []

    def commit(self, revision):
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.commit(revision)]

    def add(self, branch, files, message=""):
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class HubServer:
    """The server; `tokens` are the accounts by their tokens, and an account writes what belongs to itself and to
    `members`' organizations."""

    def __init__(self):
        self.repositories = {}
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.members = {"org": {"alice"}}
        self.stored = {}  # by SHA-256
        self.parts = {}
        self.breaks = 0  # uploads that break
        self.writes_only = False  # tokens may write what is there, but make neither repositories nor branches
        self.requests = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                with server.lock:
                    server.handle(self, body)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        self.lock = threading.Lock()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def handle(self, handler, body):
        url = urllib.parse.urlsplit(handler.path)
        self.requests.append((handler.command, url.path))
        self.query = dict(urllib.parse.parse_qsl(url.query))
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.account = self.tokens.get(token)
        if token and self.account is None:
            return send(handler, 401, {"error": "no"}, message="Invalid credentials in Authorization header")
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{handler.command} {url.path}"):
                return method(self, handler, body, *map(urllib.parse.unquote, match.groups()))
        return send(handler, 404, {"error": "no such request"})

    # Who may do what

    def readable(self, handler, name):
        """The repository; None: the error is sent."""
        found = self.repositories.get(name)
        if found is None or (found.private and not self.owns(name)):
            send(handler, 404 if self.account else 401, {"error": "no"}, "RepoNotFound", "Repository not found")
            return None
        return found

    def owns(self, name):
        owner = name.partition("/")[0]
        return self.account is not None and (owner == self.account or self.account in self.members.get(owner, ()))

    def writable(self, handler, name):
        found = self.readable(handler, name)
        if found is not None and not self.owns(name):
            send(handler, 403 if self.account else 401, {"error": "no"}, message="You have no write access")
            return None
        return found

    # Requests

    def create(self, handler, body):
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        if self.writes_only or not self.owns(name):
            message = "You don't have the rights to create a model under this namespace"
            return send(handler, 403, {"error": "no"}, message=message)
        if name in self.repositories:
            return send(handler, 409, {"url": f"{self.url}/{name}", "error": "You already created this model repo"})
        self.repositories[name] = Repository(said.get("visibility") == "private", {".gitattributes": b"*.safetensors"})
        return send(handler, 200, {"url": f"{self.url}/{name}"})

    def info(self, handler, body, name, revision="main"):
        if (found := self.readable(handler, name)) is None:
            return None
        if (sha := found.commit(revision)) is None:
            return send(handler, 404, {"error": "no"}, "RevisionNotFound")
        return send(handler, 200, {"id": name, "sha": sha, "private": found.private, "siblings": []})

    def tree(self, handler, body, name, revision):
        if (found := self.readable(handler, name)) is None:
            return None
        if found.commit(revision) is None:
            return send(handler, 404, {"error": "no"}, "RevisionNotFound")
        return send(handler, 200, [entry(*item) for item in sorted(found.files(revision).items())])

    def branch(self, handler, body, name, branch):
        if (found := self.writable(handler, name)) is None:
            return None
        if self.writes_only:
            return send(handler, 403, {"error": "no"}, message="You don't have the rights to create a branch")
        if branch in found.branches:
            return send(handler, 409, {"error": "exists"})
        found.branches[branch] = found.branches["main"]
        return send(handler, 200, {})

    def validate(self, handler, body):
        return send(handler, 200, {"warnings": [], "errors": []})

    def preupload(self, handler, body, name, revision):
        found = (self.readable if self.query.get("create_pr") else self.writable)(handler, name)
        if found is None:
            return None
        ignored = found.files().get(".gitignore", b"").decode().split()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": file["path"] in ignored,
            }
            for file in json.loads(body)["files"]
        ]
        return send(handler, 200, {"files": files})

    def batch(self, handler, body, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload = {"href": f"{self.url}/lfs/{oid}"}
            if size > PART_BYTES:
                numbers = range(1, -(-size // PART_BYTES) + 1)
                upload["header"] = {f"{i:05}": f"{self.url}/lfs/{oid}/{i}" for i in numbers}
                upload["header"]["chunk_size"] = str(PART_BYTES)
            actions = {} if oid in self.stored else {"actions": {"upload": upload}}
            objects.append({"oid": oid, "size": size, **actions})
        return send(handler, 200, {"transfer": "multipart", "objects": objects})

    def store(self, handler, body, oid, part=None):
        if self.breaks:
            self.breaks -= 1
            handler.close_connection = True
            handler.connection.close()
            return None
        if part is None:
            assert hashlib.sha256(body).hexdigest() == oid
            self.stored[oid] = body
        else:
            self.parts[oid, int(part)] = body
        return send(handler, 200, {}, headers={"ETag": '"part"'})

    def complete(self, handler, body, oid):
        whole = b"".join(self.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"])
        assert hashlib.sha256(whole).hexdigest() == oid
        self.stored[oid] = whole
        return send(handler, 200, {})

    def commit(self, handler, body, name, revision):
        is_pr = self.query.get("create_pr")
        if (found := (self.readable if is_pr else self.writable)(handler, name)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(found.files(revision))
        if header.get("parentCommit", found.commit(revision)) != found.commit(revision):
            return send(handler, 412, {"error": "A commit has happened since"})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        branch = f"refs/pr/{len(found.branches)}" if is_pr else revision
        sha = found.add(branch, files, header["summary"])
        page = f"https://huggingface.co/{name}"
        urls = {"commitUrl": f"{page}/commit/{sha}", "pullRequestUrl": f"{page}/discussions/1"}
        return send(handler, 200, {"commitOid": sha, **urls})

    def resolve(self, handler, body, name, revision, file):
        if (found := self.readable(handler, name)) is None:
            return None
        if found.gated and not self.owns(name):
            return send(handler, 403 if self.account else 401, {"error": "no"}, "GatedRepo", "Access is restricted")
        content = found.files(revision)[file]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found.commit(revision)}
        return send(handler, 200, content, headers=headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", HubServer.create),
    (r"POST /api/validate-yaml", HubServer.validate),
    (rf"GET /api/models/{NAME}", HubServer.info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", HubServer.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", HubServer.tree),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", HubServer.branch),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", HubServer.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", HubServer.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", HubServer.batch),
    (r"PUT /lfs/([0-9a-f]+)", HubServer.store),
    (r"PUT /lfs/([0-9a-f]+)/(\d+)", HubServer.store),
    (r"POST /lfs/([0-9a-f]+)", HubServer.complete),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", HubServer.resolve),
]


def entry(path, content):
    said = {"type": "file", "oid": "0" * 40, "path": path, "size": len(content)}
    if path.endswith(".safetensors"):
        said["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return said


def send(handler, status, document, code=None, message=None, headers=None):
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    headers = {**(headers or {}), "Content-Length": len(content)}
    headers |= {key: value for key, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key, str(value))
    handler.end_headers()
    if handler.command != "HEAD":
        with contextlib.suppress(OSError):
            handler.wfile.write(content)


@contextlib.contextmanager
def running_hub(home, monkeypatch: pytest.MonkeyPatch):
    """A Hub that downloads and uploads go to, with alice's token, and a cache in `home`."""
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TORCHPI_HOME", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    try:
        yield server
    finally:
        server.stop()
