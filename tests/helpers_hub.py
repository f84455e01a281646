"""A stand-in for a hub of models, on loopback: it takes repositories and commits as the real one does."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any

TOKEN = "hf_of_the_tests"
LARGE = (".bin", ".safetensors", ".pt2", ".onnx")
"""Endings of files that do not go into git."""


class Hub:
    """What was put there.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.repositories: dict[str, bool] = {}
        """Private or not, by name."""
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.role = "write"
        """What the token may do."""
        self.silent = False
        """Whether it keeps to itself what is there."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _known(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._body()
        self._answer({"error": "Invalid user token."}, 401)
        return False

    def do_GET(self) -> None:
        if not self._known():
            return
        path = self.path.split("?")[0]
        name, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        if path == "/api/whoami-v2":
            self._answer(self._who())
        elif rest == "main":
            files = self.hub.files.get(name, {}).items()
            self._answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])
        elif not rest and path.startswith("/api/models/"):
            self._about(name)
        else:
            self._file(path)

    def _about(self, name: str) -> None:
        if name in self.hub.repositories:
            self._answer({"id": name, "private": self.hub.repositories[name], "siblings": []})
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _who(self) -> dict[str, Any]:
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": self.hub.role}}
        return {"type": "user", "name": "me", "orgs": [{"type": "org", "name": "ours"}], "auth": auth}

    def do_HEAD(self) -> None:
        if self._known():
            self._file(self.path)

    def _file(self, path: str) -> None:
        if self.hub.silent:
            self._answer({"error": "not now"}, 403)
            return
        name, _, file = path.removeprefix("/").partition("/resolve/main/")
        content = self.hub.files.get(name, {}).get(file)
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content is not None and self.command == "GET":
            self.wfile.write(content)

    def do_PUT(self) -> None:
        # The address itself is the permission, as with the real one.
        content = self._body()
        identity = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == identity
        self.hub.large[identity] = content
        self._answer({})

    def do_POST(self) -> None:
        if not self._known():
            return
        body = self._body()
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name.startswith("others/"):
                self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            self.hub.repositories.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self._answer({"url": f"{self.hub.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":  # of a card's front matter
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer({"error": "not here"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        assert name in self.hub.repositories
        files = self.hub.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            said = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(said["summary"])
            elif line["key"] == "file":
                files[said["path"]] = base64.b64decode(said["content"])
            elif line["key"] == "deletedFile":
                del files[said["path"]]
            else:
                assert PurePosixPath(said["path"]).suffix in LARGE
                files[said["path"]] = self.hub.large[said["oid"]]
        self._answer({"commitUrl": f"{self.hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextmanager
def served() -> Iterator[Hub]:
    """Yield a hub that is served for as long as the context lasts."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
