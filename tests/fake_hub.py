"""A hub on this machine, with the few addresses that huggingface_hub asks for models: download, create, commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

MAX_BODY = 8 << 20


class FakeHub:
    """Repositories by name, each a list of commits, of files by name. ``requests`` are those that it got."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.status = 0
        """If not 0, the error that every request is answered with."""

    def put(self, name: str, **files: bytes) -> None:
        """A commit of ``files``, on top of the last one."""
        commits = self.repositories.setdefault(name, [])
        commits.append({**(commits[-1] if commits else {}), **files})

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name][-1]

    def commit_of(self, name: str, number: int) -> str:
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a revision: main or a commit."""
        commits = self.repositories[name]
        found = [i for i in range(len(commits)) if revision == self.commit_of(name, i)]
        number = len(commits) - 1 if revision == "main" else found[0] if found else None
        return None if number is None else (self.commit_of(name, number), commits[number])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def plain(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def handle_any(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        assert length <= MAX_BODY
        body = self.rfile.read(length)
        if self.hub.status:
            return self.answer(self.hub.status)
        path = unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            self.hub.repositories.setdefault(name, [])
            return self.plain({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self.plain({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            asked = [each["path"] for each in json.loads(body)["files"]]
            files = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            return self.plain({"files": files, "commitOid": "0" * 40})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1], body)
        return self.answer(404, b"", X_Error_Code="RepoNotFound")

    def file(self, name: str, revision: str, file: str) -> None:
        if not self.hub.repositories.get(name):
            return self.answer(404, X_Error_Code="RepoNotFound")
        if (found := self.hub.at(name, revision)) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(files[file]).hexdigest()
        return self.answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=commit)

    def commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.put(name, **files)
        commit = self.hub.commit_of(name, len(self.hub.repositories[name]) - 1)
        self.plain(
            {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )

    do_GET = do_HEAD = do_POST = handle_any


@contextmanager
def served(cache: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub uses in the block, with its ``cache`` in a folder of its own."""
    from huggingface_hub import constants

    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setenv("HF_TOKEN", "hf_of_the_tests")
            patch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "harnesses.json"))
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
