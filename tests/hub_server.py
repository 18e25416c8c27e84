# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback interface: the endpoints that huggingface_hub 2.x calls to push and to load, in memory.

It keeps what is committed, checks tokens, takes each LFS object once, as the Hub does, and fails where a test wants.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


WRITE_TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
# The Hub decides by content; tests only need that weights and figures go one way, and text the other
_LFS_SUFFIXES = (".safetensors", ".bin", ".png")
_NAME = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Fault:
    """
    Answers requests that match with an error.

    Args:
        method, path: What to match; `path` is a regular expression that is searched.
        status: The answer, or 0 to read half of the body and cut the connection.
        times: How many requests to fail.
    """

    method: str
    path: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    seen: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    """A repository: what is on `main`, and what pull requests propose."""

    private: bool
    sdk: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    num_commits: int = 0
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.num_commits}{sorted(self.files)}".encode()).hexdigest()


class Hub:
    """The state of the server: `repos` by `(type, id)`, `objects` by hash, `requests` as they came."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.uploads: dict[str, int] = defaultdict(int)  # how often each object was sent whole
        self.lock = threading.Lock()
        self.url = ""

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> Fault:
        fault = Fault(method, path, status, headers, times)
        self.faults.append(fault)
        return fault


@contextmanager
def run_hub():
    """Serves a [`Hub`] while the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def validate_metadata(content: str, repo_type: str) -> list[str]:
    """What the Hub's validator finds wrong with the fields that this package writes."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if match is None:
        return ["There is no metadata block."]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"The metadata is no YAML: {error}"]
    errors = []
    is_id = re.compile(r"[\w.-]+(/[\w.-]+)?").fullmatch
    for name in ("license", "pipeline_tag", "library_name", "base_model_relation"):
        if name in data and not re.fullmatch(r"[a-z0-9.+-]+", str(data[name])):
            errors.append(f'"{name}" is invalid: {data[name]!r}')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        errors += [
            f'"{name}" is no id: {v!r}' for v in ([values] if isinstance(values, str) else values) if not is_id(v)
        ]
    for result in (r for entry in data.get("model-index", []) for r in entry["results"]):
        if not {"task", "dataset", "metrics"} <= result.keys() or "type" not in result["dataset"]:
            errors.append('"model-index" is incomplete')
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        """Nothing: tests read `Hub.requests`."""

    def _handle(self):
        hub, url = self.hub, urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        with hub.lock:
            fault = next(
                (f for f in hub.faults if f.times and f.method == self.command and re.search(f.path, self.path)), None
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == 0:
            self.rfile.read(length // 2)
            fault.seen.set()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(length)
        if fault is not None:
            # As a proxy that echoes the request would: the client must not show it
            echo = {"error": f"no, {self.headers.get('Authorization')}"}
            self._json(fault.status, echo, fault.headers)
            fault.seen.set()
            return
        path = unquote(url.path)
        for method, pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                respond(self, body, url.query, **match.groupdict())
                return
        self._json(404, {"error": "no such endpoint"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # Answers

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, status: int, value, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _may(self, action: str, repo: Repo | None = None) -> bool:
        """Whether the token allows it; answers 401 or 403 if not."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if (
            token == WRITE_TOKEN
            or (token == READ_TOKEN and action == "read")
            or (action == "read" and not repo.private)
        ):
            return True
        self._json(403 if token == READ_TOKEN else 401, {"error": "Invalid username or password."})
        return False

    def _repo(self, type: str, repo: str) -> Repo | None:
        found = self.hub.repos.get((type.rstrip("s"), repo))
        if found is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    # Endpoints

    def create(self, body: bytes, query: str) -> None:
        if not self._may("write"):
            return
        request = json.loads(body)
        key = request.get("type") or "model", f"{request['organization']}/{request['name']}"
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[key[0]]
        status = 409 if key in self.hub.repos else 200
        self.hub.repos.setdefault(key, Repo(request.get("visibility") == "private", request.get("sdk")))
        self._json(status, {"url": f"{self.hub.url}/{prefix}{key[1]}"})

    def validate(self, body: bytes, query: str) -> None:
        request = json.loads(body)
        errors = validate_metadata(request["content"], request["repoType"])
        self._json(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def preupload(self, body: bytes, query: str, type: str, repo: str) -> None:
        found = self._repo(type, repo)
        if found is None or not self._may("read" if "create_pr" in query else "write", found):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def lfs_batch(self, body: bytes, query: str, type: str, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            known = item["oid"] in self.hub.objects
            objects.append({**item} if known else {**item, "actions": actions})
        self._json(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, query: str, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json(400, {"error": "wrong hash"})
            return
        with self.hub.lock:
            self.hub.objects[oid] = body
            self.hub.uploads[oid] += 1
        self._json(200, {})

    def commit(self, body: bytes, query: str, type: str, repo: str) -> None:
        found, is_proposal = self._repo(type, repo), "create_pr" in query
        if found is None or not self._may("read" if is_proposal else "write", found):
            return
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        if is_proposal:
            found.pull_requests.append(files)
        else:
            found.files |= files
            found.num_commits += 1
        prefix = "" if type == "models" else f"{type}/"
        answer = {"commitUrl": f"{self.hub.url}/{prefix}{repo}/commit/{found.sha}", "commitOid": found.sha}
        if is_proposal:
            answer["pullRequestUrl"] = f"{self.hub.url}/{prefix}{repo}/discussions/{len(found.pull_requests)}"
        self._json(200, answer)

    def resolve(self, body: bytes, query: str, repo: str, revision: str, file: str, type: str | None = None) -> None:
        found = self._repo(type or "models", repo)
        if found is None or not self._may("read", found):
            return
        if revision not in ("main", found.sha):
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif file not in found.files:
            self._json(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.sha}
            )
        else:
            content = found.files[file]
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found.sha}
            self._send(200, content, {"Content-Type": "application/octet-stream", **etag})

    def info(self, body: bytes, query: str, type: str, repo: str, revision: str | None = None) -> None:
        found = self._repo(type, repo)
        if found is None or not self._may("read", found):
            return
        siblings = [{"rfilename": name} for name in found.files]
        about = {"id": repo, "sha": found.sha, "private": found.private, "siblings": siblings, "tags": []}
        self._json(200, {**about, "downloads": 0, "likes": 0, "_id": found.sha[:24]})

    def tree(self, body: bytes, query: str, type: str, repo: str, revision: str, folder: str | None) -> None:
        found = self._repo(type, repo)
        if found is None or not self._may("read", found):
            return
        self._json(
            200,
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(found.files.items())
                if name.startswith((folder or "").strip("/"))
            ],
        )

    def whoami(self, body: bytes, query: str) -> None:
        if self._may("write"):
            self._json(200, {"type": "user", "name": "alice", "auth": {"accessToken": {"role": "write"}}})


_API = rf"/api/(?P<type>models|datasets|spaces)/{_NAME}"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), rf"{_API}/preupload/[^/]+", _Handler.preupload),
    (("POST",), rf"{_API}/commit/[^/]+", _Handler.commit),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    (("GET",), rf"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("POST",), rf"/((?P<type>datasets|spaces)/)?{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (
        ("GET", "HEAD"),
        rf"/((?P<type>datasets|spaces)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
]
