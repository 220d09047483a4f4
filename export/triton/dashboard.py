"""A page of live figures beside a running server: for this machine alone, and with nothing from elsewhere."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from lowpass.export.triton.address import LOOPBACK, Address
from lowpass.export.triton.figures import Figures

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("dashboard.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
}
DATA = "/data"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Dashboard:
    """Serves the page on a port of loopback; a context manager."""

    def __init__(self, address: Address, port: int) -> None:
        self._figures = Figures(address)
        self._server = _PageServer(port, self._figures)

    def __enter__(self) -> Self:
        self._figures.start()
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._figures.stop()
        self._server.shutdown()
        self._server.server_close()


class _PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, figures: Figures) -> None:
        self.figures = figures
        self.contents = {path: ((PAGE / file).read_bytes(), kind) for path, (file, kind) in FILES.items()}
        super().__init__((LOOPBACK, port), _Handler)
        # A page from elsewhere can let its own name point here, and read what is answered; the name gives it away.
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}
        if self.server_port == 80:
            self.hosts |= {LOOPBACK, "localhost"}


class _Handler(BaseHTTPRequestHandler):
    server: _PageServer
    server_version, sys_version = "lowpass", ""
    timeout = 10  # seconds that a connection may be silent

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or []
        path = self.path.partition("?")[0]
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            self._send(403, b"This page is for 127.0.0.1 and localhost alone.\n", "text/plain")
        elif path == DATA:
            self._send(200, json.dumps(self.server.figures.as_json()).encode(), "application/json")
        elif path in self.server.contents:
            self._send(200, *self.server.contents[path])
        else:
            self._send(404, b"There is nothing here.\n", "text/plain")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """The page asks every few seconds: nothing to note."""
