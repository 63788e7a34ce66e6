"""A stand-in for a hub: the few endpoints that a push calls, on this machine, in this process.

The only stand-in among the tests of pushing: the client is the real huggingface_hub, and what
arrives here is looked at as bytes. Weights come as on the real one: asked for by hash, sent apart.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    """The commit of each."""


@dataclass
class Hub:
    """What the stand-in holds, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Weights by the sha256 of their content."""
    requests: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    """Status by a part of the path that is answered with it."""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Return the status and the JSON of the answer."""
        for part, status in self.refused.items():
            if part in path:
                return status, {"error": "refused by the test"}
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        match path.split("/")[1:]:
            case ["api", "whoami-v2"]:
                return 200, {"name": "ada", "orgs": [{"name": "engines"}]}
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization', 'ada')}/{asked['name']}"
                private = asked.get("private", asked.get("visibility") == "private")
                self.repositories[name] = Repository(private)
                return 200, {"url": f"{self.url}/{name}"}
            case ["api", "models", owner, name, *rest]:
                repository = self.repositories.get(f"{owner}/{name}")
                if repository is None:
                    return 404, {"error": "RepoNotFound"}
                return self._of(repository, rest, body)
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{self.url}/objects/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return 200, {"transfer": "basic", "objects": objects}
        raise AssertionError(f"nobody asks a hub for {method} {path}")

    def _of(self, repository: Repository, rest: list[str], body: bytes) -> tuple[int, Any]:
        match rest:
            case []:
                return 200, {"id": "x", "private": repository.private, "siblings": []}
            case ["tree", branch]:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in repository.branches[branch].items()
                ]
                return 200, entries
            case ["branch", branch]:
                repository.branches.setdefault(branch, dict(repository.branches["main"]))
                return 200, {}
            case ["refs"]:
                refs = [
                    {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                    for name, commit in repository.tags.items()
                ]
                return 200, {"branches": [], "converts": [], "tags": refs}
            case ["tag", commit]:
                repository.tags[json.loads(body)["tag"]] = commit
                return 200, {}
            case ["preupload", _]:
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                return 200, {"files": files}
            case ["commit", branch]:
                lines = [json.loads(line) for line in body.splitlines()]
                for line in lines:
                    self._apply(repository, repository.branches[branch], line["key"], line["value"])
                return 200, {"commitUrl": f"{self.url}/a/b/commit/1", "commitOid": "c" * 40}
        raise AssertionError(rest)

    def _apply(self, repository: Repository, files: dict[str, bytes], key: str, value: Any) -> None:
        if key == "header":
            repository.messages.append(value["summary"])
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.objects[value["oid"]]
        else:
            assert key == "deletedFile"
            del files[value["path"]]


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a new, empty hub on a free port of localhost."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, tree = hub.answer(
                self.command, path, body, self.headers.get("Authorization", "")
            )
            content = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
