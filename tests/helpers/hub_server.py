"""A small Hub on loopback: enough of the HTTP interface for the real `huggingface_hub` client to push and load models.

It keeps repositories in memory, takes one token, and can be told to refuse requests, to be silent, to lose its answers
and to answer in unexpected ways. What passes here proves what the client sends, not that the real Hub accepts it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_right"
USER = "user"


@dataclass
class Repository:
    """Files of each branch, and how many commits there were."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        """A commit id that changes with the content."""
        digest = hashlib.sha1(branch.encode())
        for path, content in sorted(self.branches[branch].items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()

    def branch_of(self, revision: str) -> str | None:
        """The branch of that name, or with that commit."""
        if revision in self.branches:
            return revision
        return next((branch for branch in self.branches if self.sha(branch) == revision), None)


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by name.
        lfs_suffixes: files that go through LFS.
        large: LFS objects by SHA-256.
        refuse: {part of a path: status to answer with}.
        answers: {part of a path: status, headers and content to answer with}, whatever was asked.
        silent: parts of paths to which no answer ever comes.
        lost: parts of paths whose answer is lost after the request was carried out.
        before: called with the path of each request before it is carried out.
        requests: method and path of each request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lfs_suffixes: tuple[str, ...] = ()
        self.large: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.silent: set[str] = set()
        self.lost: set[str] = set()
        self.before: Callable[[str], None] = lambda path: None
        self.closing = threading.Event()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub():
    """A hub that listens until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        self.server.before(path)
        if any(part in path for part in self.server.silent):
            self.server.closing.wait()
        try:
            for part, status in self.server.refuse.items():
                if part in path:
                    raise Refused(status, "refused on request of the test")
            content = self._route(path, body, headers)
            status = 200
        except Refused as refusal:
            status, content = refusal.status, {"error": str(refusal), **refusal.content}
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        for part, answer in self.server.answers.items():
            if part in path:
                status, headers, data = answer
        if any(part in path for part in (*self.server.silent, *self.server.lost)):
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self) -> None:
        if not self._authorized:
            raise Refused(401, "Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        """A repository that the token may see."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._authorized):
            raise Refused(404 if self._authorized else 401, "Repository not found", "RepoNotFound")
        return repository

    def _branch(self, repository: Repository, revision: str) -> str:
        branch = repository.branch_of(revision)
        if branch is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return branch

    def _route(self, path: str, body: bytes, headers: dict[str, str]) -> Any:
        for pattern, handle in ROUTES:
            match = re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}")
            if match:
                return handle(self, body, headers, *match.groups())
        raise Refused(404, f"no such route: {self.command} {path}")

    def whoami(self, body: bytes, headers: dict[str, str]) -> Any:
        """Name the owner of the token."""
        self._require_token()
        return {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, body: bytes, headers: dict[str, str]) -> Any:
        """Make a repository."""
        self._require_token()
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{name}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(private)
        return {"url": f"{self.server.url}/{name}", "name": name}

    def validate(self, body: bytes, headers: dict[str, str]) -> Any:
        """Check that a card opens with YAML."""
        text = json.loads(body)["content"]
        try:
            valid = isinstance(yaml.safe_load(text.split("---\n")[1]), dict)
        except (IndexError, yaml.YAMLError):
            valid = False
        if not valid:
            raise Refused(400, "Invalid metadata in README.md")
        return {"errors": [], "warnings": []}

    def branch(self, body: bytes, headers: dict[str, str], name: str, branch: str) -> Any:
        """Make a branch."""
        self._require_token()
        repository = self._repository(name)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[branch] = dict(repository.branches["main"])
        return {}

    def preupload(self, body: bytes, headers: dict[str, str], name: str, revision: str) -> Any:
        """Say how each file is to be sent."""
        self._require_token()
        self._branch(self._repository(name), revision)
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(self.server.lfs_suffixes or ("\0",))],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, headers: dict[str, str], name: str) -> Any:
        """Say where each large object goes."""
        self._require_token()
        self._repository(name)
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, headers: dict[str, str], oid: str) -> Any:
        """Take a large object."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "checksum mismatch")
        self.server.large[oid] = body
        return b""

    def commit(self, body: bytes, headers: dict[str, str], name: str, revision: str) -> Any:
        """Apply all operations, or none."""
        self._require_token()
        repository = self._repository(name)
        branch = self._branch(repository, revision)
        files = dict(repository.branches[branch])
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"unknown operation {key}")
        repository.branches[branch] = files
        repository.commits.append(message)
        sha = repository.sha(branch)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}

    def info(self, body: bytes, headers: dict[str, str], name: str, revision: str | None) -> Any:
        """Describe a repository."""
        repository = self._repository(name)
        branch = self._branch(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.branches[branch]]
        facts = {"id": name, "modelId": name, "private": repository.private, "sha": repository.sha(branch)}
        return {**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def tree(self, body: bytes, headers: dict[str, str], name: str, revision: str) -> Any:
        """List the files."""
        repository = self._repository(name)
        files = repository.branches[self._branch(repository, revision)]
        return [self._entry(path, content) for path, content in files.items()]

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        """One file in the list of files, with git's hash of it and, of a large one, that of its content."""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        large = hashlib.sha256(content).hexdigest()
        if large in self.server.large:
            entry["lfs"] = {"oid": large, "size": len(content), "pointerSize": 134}
            entry["oid"] = hashlib.sha1(large.encode()).hexdigest()  # of the pointer
        return entry

    def resolve(self, body: bytes, headers: dict[str, str], name: str, revision: str, path: str) -> Any:
        """Send a file."""
        repository = self._repository(name)
        branch = self._branch(repository, revision)
        content = repository.branches[branch].get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.sha(branch)}
        return content


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models/{NAME}(?:/revision/([^/]+))?", Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (rf"GET /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
