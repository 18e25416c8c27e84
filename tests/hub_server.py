# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback interface, in memory: the endpoints by which huggingface_hub 0.34 to 2.x pushes and loads."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_" + "w" * 34


@dataclass
class Repo:
    """A repository: what is on `main`, and what pull requests propose."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    num_commits: int = 0
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.num_commits}{sorted(self.files)}".encode()).hexdigest()


@dataclass
class Hub:
    """The server's state: repositories by type and id, and the statuses with which the next commits fail."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    failing_commits: list[int] = field(default_factory=list)
    url: str = ""


@contextmanager
def run_hub():
    """Serves a [`Hub`] while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    """A status, what the body says, and headers."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        """Nothing."""

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}?{url.query}"
        self.answer_headers = {}
        try:
            for pattern, respond in _ROUTES:
                if match := re.fullmatch(rf"{pattern}\?.*", request):
                    self._answer(200, respond(self, body, **match.groupdict()))
                    return
            raise _Refused(404, "no such endpoint", {})
        except _Refused as refused:
            status, text, self.answer_headers = refused.args
            # As a proxy that echoes the request would: the client must not show the token
            self._answer(status, {"error": f"{text}, {self.headers.get('Authorization')}"})

    do_GET = do_HEAD = do_POST = _handle

    def _answer(self, status: int, value) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **self.answer_headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, kind: str | None, name: str) -> Repo:
        repo = self.hub.repos.get(((kind or "models").rstrip("s"), name))
        if repo is None or (repo.private and TOKEN not in (self.headers.get("Authorization") or "")):
            raise _Refused(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return repo

    # Endpoints

    def create(self, body: bytes) -> dict:
        request = json.loads(body)
        kind, name = request.get("type") or "model", f"{request['organization']}/{request['name']}"
        private = request.get("visibility") == "private" or request.get("private", False)  # since 1.0, before
        self.hub.repos.setdefault((kind, name), Repo(private))
        return {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"}

    def validate(self, body: bytes) -> dict:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, kind: str, repo: str) -> dict:
        about = {"uploadMode": "regular", "shouldIgnore": False}  # within the commit, whatever its size
        return {"files": [{"path": file["path"], **about} for file in json.loads(body)["files"]]}

    def commit(self, body: bytes, kind: str, repo: str, create_pr: str | None) -> dict:
        if self.hub.failing_commits:
            raise _Refused(self.hub.failing_commits.pop(), "no", {})
        found = self._repo(kind, repo)
        items = [item["value"] for item in map(json.loads, body.splitlines()) if item["key"] == "file"]
        files = {item["path"]: base64.b64decode(item["content"]) for item in items}
        address = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        answer = {"commitUrl": f"{address}/commit/{found.sha}", "commitOid": found.sha}
        if create_pr:
            found.pull_requests.append(files)
            return {**answer, "pullRequestUrl": f"{address}/discussions/{len(found.pull_requests)}"}
        found.files |= files
        found.num_commits += 1
        return answer

    def resolve(self, body: bytes, kind: str | None, repo: str, file: str) -> bytes:
        found = self._repo(kind, repo)
        if file not in found.files:
            raise _Refused(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.sha})
        etag = hashlib.sha256(found.files[file]).hexdigest()
        self.answer_headers = {"X-Repo-Commit": found.sha, "ETag": f'"{etag}"'}
        return found.files[file]

    def info(self, body: bytes, kind: str, repo: str) -> dict:
        found = self._repo(kind, repo)
        siblings = [{"rfilename": name} for name in found.files]
        about = {"id": repo, "_id": found.sha[:24], "sha": found.sha, "private": found.private, "siblings": siblings}
        return {**about, "tags": [], "downloads": 0, "likes": 0}

    def tree(self, body: bytes, kind: str, repo: str, folder: str | None) -> list:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(self._repo(kind, repo).files.items())
            if name.startswith((folder or "").strip("/"))
        ]


_NAME = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_NAME}"
_ROUTES = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (rf"POST {_API}/preupload/[^/]+", _Handler.preupload),
    (rf"POST {_API}/commit/[^/?]+(?=\?(?P<create_pr>create_pr)?)", _Handler.commit),
    (rf"GET {_API}/tree/[^/?]+(?P<folder>/[^?]*)?", _Handler.tree),
    (rf"GET {_API}(?:/revision/[^/]+)?", _Handler.info),
    (rf"(?:GET|HEAD) /(?:(?P<kind>datasets|spaces)/)?{_NAME}/resolve/[^/]+/(?P<file>.+)", _Handler.resolve),
]
