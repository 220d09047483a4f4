"""A stand-in of the hub's API on this machine: as much of it as uploads and downloads of small files ask for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories in memory: by name, files by name. `asked`: every request, in order; `private`: of what was made."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []

    def post(self, path: str, body: bytes) -> dict[str, Any] | None:
        """The answer to a POST; None: there is none."""
        if path == "/api/repos/create":
            told = json.loads(body)
            name = "/".join(filter(None, (told.get("organization"), told["name"])))
            self.files.setdefault(name, {})
            self.private.setdefault(name, told.get("visibility") == "private")
            return {"url": f"https://huggingface.co/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            return {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            }
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action and name in self.files:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitOid": COMMIT, "commitUrl": f"https://huggingface.co/{name}/commit/{COMMIT}", "success": True}
        return None

    def info(self, path: str) -> Any:
        """What the API says of a repository; None: there is none."""
        name = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
        if name not in self.files:
            return None
        if "/tree/" in path:
            return [
                {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                for file, content in self.files[name].items()
            ]
        return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in self.files[name]]}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else _chunks(self.rfile)
        )
        self._answer(self.hub.post(self._path(), body))

    def do_GET(self) -> None:
        path = self._path()
        if path.startswith("/api/models/"):
            self._answer(self.hub.info(path))
            return
        name, _, rest = path[1:].partition("/resolve/")
        content = self.hub.files.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            missing = "EntryNotFound" if name in self.hub.files else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": missing, "X-Repo-Commit": COMMIT})
        else:
            self._send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _answer(self, value: Any) -> None:
        if value is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _chunks(stream: Any) -> bytes:
    whole = b""
    while size := int(stream.readline(), 16):
        whole += stream.read(size)
        stream.readline()
    stream.readline()
    return whole


@contextmanager
def stand_in(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Within it, huggingface_hub talks to a server on this machine and to nothing else."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    patch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
