"""The page of live figures: what it says of a real Triton server, who may ask, and what hostile names can do."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from chromium import CHROMIUM, Browser
from served import Running, exported, free_address, served, until

from lowpass.export.triton.address import LOOPBACK, Address
from lowpass.export.triton.dashboard import Dashboard
from lowpass.export.triton.figures import Figures, Moment, Sample, parse
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.state import VersionState, ask

EVIL = '<img src=x onerror=alert(1)>"\\&'
TEXT = r"""# HELP nv_inference_count Number
nv_inference_count{model="a",version="1"} 7
nv_inference_count{model="q\"\\\n}{",version="2"} 1.5e3 1700000000
nv_inference_request_summary_us{model="a",version="1",quantile="0.5"} Nan
nv_plain 3
nv_broken{model="a"} many
{}
nv_unfinished{model="a
"""


def test_prometheus_text_is_read() -> None:
    found = list(parse(TEXT))
    assert found[0] == Sample("nv_inference_count", {"model": "a", "version": "1"}, 7)
    assert found[1] == Sample("nv_inference_count", {"model": 'q"\\\n}{', "version": "2"}, 1500)
    assert [sample.name for sample in found[2:]] == ["nv_inference_request_summary_us", "nv_plain"]
    assert np.isnan(found[2].value)


def counted(**models: tuple[int, int]) -> str:
    """A server's text: of each MODEL_VERSION requests and rejections."""
    lines = []
    for name, (requests, rejected) in models.items():
        model, version = name.split("_")
        labels = f'model="{model}",version="{version}"'
        lines.append(f"nv_inference_request_success{{{labels}}} {requests}")
        lines.append(f'nv_inference_request_failure{{{labels},reason="REJECTED"}} {rejected}')
        lines.append(f'nv_inference_request_failure{{{labels},reason="OTHER"}} 1')
        lines.append(f"nv_inference_pending_request_count{{{labels}}} 2")
        lines.append(f'nv_inference_request_summary_us{{{labels},quantile="0.5"}} {1000 * int(version)}')
        lines.append(f'nv_inference_request_summary_us{{{labels},quantile="0.99"}} Nan')
    return "\n".join(lines)


def test_counts_outlive_versions_and_servers() -> None:
    figures = Figures(free_address())
    first, second = VersionState("a", 1, "READY"), VersionState("a", 2, "READY")

    def look(text: str, *states: VersionState) -> Moment:
        return figures.take(text, 0, states)

    assert not look(counted(a_1=(5, 0)), first).totals["a"]["requests"]  # warm-ups, or before anybody looked
    assert look(counted(a_1=(9, 2)), first).totals["a"]["requests"] == 4
    both = look(counted(a_1=(10, 2), a_2=(41, 0)), first, second)
    assert both.totals["a"]["requests"] == 5 and both.totals["a"]["rejections"] == 2
    assert both.totals["a"]["failures"] == 0
    assert both.gauges["a"] == {"pending": 4, "p50_ms": 2.0}  # the percentiles of the version that serves
    assert look(counted(a_2=(44, 0)), second).totals["a"]["requests"] == 8
    assert look(counted(a_2=(3, 0)), second).totals["a"]["requests"] == 8  # it counts anew
    assert look(counted(a_2=(4, 0)), second).totals["a"]["requests"] == 9


@pytest.fixture(scope="module")
def running(slim_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`digits` and `digits-dense`."""
    repository = tmp_path_factory.mktemp("shown") / "repository"
    exported(slim_run, "fp32")
    exported(slim_run, "fp32", dense=True)
    deploy(slim_run, repository, "digits", DeployOptions(instances=1, threads=1))
    deploy(slim_run, repository, "digits-dense", DeployOptions(instances=1, threads=1), dense=True)
    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32), np.float32)
    with served(slim_run, repository, images) as server:
        yield server


@pytest.fixture
def page(running: Running) -> Iterator[Address]:
    """The address of the page beside the running server."""
    at = replace(free_address(), http=free_address().http)
    with Dashboard(running.address, at.http):
        yield at


def data(at: Address) -> Any:
    return json.loads(ask(f"{at.url}/data"))


def test_figures_are_what_was_sent(running: Running, page: Address) -> None:
    ((slim, dense),) = data(page)["pairs"]
    assert (slim["name"], dense["name"]) == ("digits", "digits-dense")
    assert slim["version"] == dense["version"] == 1 and slim["failed"] == []

    def send(model: str, requests: int, size: int) -> None:
        with running.client(model) as client:
            for _ in range(requests):
                client.logits(running.images[:size])

    loads = [threading.Thread(target=send, args=given) for given in (("digits", 60, 2), ("digits-dense", 25, 4))]
    for load in loads:
        load.start()
    for load in loads:
        load.join()

    def counted() -> list[list[int]]:  # the server answers first, then counts requests, images and batches one by one
        totals = [model["total"] for model in data(page)["pairs"][0]]
        return [[total[name] for name in ("requests", "images", "batches")] for total in totals]

    until(lambda: counted() == [[60, 120, 60], [25, 100, 25]])
    ((slim, dense),) = data(page)["pairs"]
    for model, requests, size in ((slim, 60, 2), (dense, 25, 4)):
        total, now = model["total"], model["now"]
        assert (total["requests"], total["images"]) == (requests, requests * size)
        assert total["failures"] == total["rejections"] == now["failures_per_s"] == now["rejections_per_s"] == 0
        assert 0 < now["p50_ms"] <= now["p95_ms"] <= now["p99_ms"]
        assert now["images_per_s"] == pytest.approx(size * now["requests_per_s"]) and now["requests_per_s"] > 0
        assert now["mean_batch"] == total["images"] / total["batches"] == size  # one client at a time
        assert now["queue_ms"] >= 0 and now["pending"] == 0
        assert max(rate for rate in model["series"]["images_per_s"] if rate is not None) > 0
        assert len({len(series) for series in model["series"].values()}) == 1
    client = tritonclient.http.InferenceServerClient(running.url("http"))
    stats = client.get_inference_statistics("digits")["model_stats"][0]["inference_stats"]
    client.close()
    assert slim["now"]["p50_ms"] < stats["success"]["ns"] / 1e6


def status(at: Address, *hosts: str, method: str = "GET", path: str = "/data") -> int:
    connection = HTTPConnection(LOOPBACK, at.http, timeout=5)
    connection.putrequest(method, path, skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    policy = answer.getheader("Content-Security-Policy", "")
    assert answer.status >= 500 or ("default-src 'none'" in policy and "unsafe" not in policy)
    connection.close()
    return answer.status


def test_it_is_for_this_machine_alone(page: Address) -> None:
    own = f"127.0.0.1:{page.http}"
    assert status(page, own) == status(page, f"LocalHost:{page.http}") == status(page, own, path="/") == 200
    # Who lets a name of his own point here (DNS rebinding) sends that name.
    for strangers in (["evil.example"], [f"evil.example:{page.http}"], ["127.0.0.1"], [], [own, "evil.example"]):
        assert status(page, *strangers) == 403, strangers
        assert status(page, *strangers, path="/") == 403
    assert status(page, own, path="/../server.py") == status(page, own, path="/data/x") == 404
    assert status(page, own, method="POST") == 501
    for elsewhere in ("127.0.0.2", socket.gethostbyname(socket.gethostname())):
        if elsewhere != LOOPBACK:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((elsewhere, page.http), timeout=5)


@contextmanager
def made_up(index: list[dict[str, str]], metrics: str) -> Iterator[Address]:
    """A server that answers as Triton does, with names that Triton would not take."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(metrics.encode())

        def do_POST(self) -> None:
            self._answer(json.dumps(index).encode())

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield Address(LOOPBACK, server.server_port, server.server_port, server.server_port)
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    escaped = EVIL.replace("\\", r"\\").replace('"', r"\"")
    labels = f'model="{escaped}",version="7"'
    metrics = f"nv_inference_count{{{labels}}} 5\nnv_inference_pending_request_count{{{labels}}} 1234"
    index = [
        {"name": EVIL, "version": "7", "state": "READY"},
        {"name": EVIL, "version": "8", "state": "UNAVAILABLE", "reason": f"it {EVIL}\nand more"},
        {"name": "silent", "version": "1", "state": "UNAVAILABLE", "reason": "broken"},
        {"name": "lost+found"},
    ]
    port = free_address().http
    with Browser(tmp_path / "profile") as browser:
        with made_up(index, metrics) as address, Dashboard(address, port):
            for width, theme in ((320, "light"), (1200, "dark")):
                browser.visit(f"http://127.0.0.1:{port}/", width, theme)  # type: ignore[arg-type]
                until(lambda: browser.evaluate("document.querySelectorAll('article').length") == 2)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                assert browser.evaluate("document.querySelector('h2').firstChild.data") == EVIL
                assert browser.evaluate("document.querySelectorAll('img').length") == 0
                words = browser.evaluate("document.body.innerText")
                assert "serves version 7" in words and f"Does not load: version 8: it {EVIL}" in words
                assert "1 of 2 models serve no version" in words and "1,234" in words and "lost+found" not in words
                # Dark ink in light, and the other way round.
                ink = browser.evaluate("getComputedStyle(document.body).color")
                assert (int(ink.strip("rgb()").split(",")[0]) < 128) == (theme == "light")
            browser.evaluate("document.getElementById('hold').click()")
            assert browser.evaluate("document.getElementById('hold').getAttribute('aria-pressed')") == "true"
            browser.evaluate("document.getElementById('hold').click()")
            until(lambda: browser.evaluate("document.querySelectorAll('path[d^=M]').length") > 0)
            assert not browser.complaints
            assert {url.split("/")[2] for url in browser.requests} == {f"127.0.0.1:{port}"}
        until(lambda: "server has ended" in browser.evaluate("document.getElementById('state').textContent"))


def test_a_server_that_is_down_is_said(tmp_path: Path) -> None:
    at = free_address()
    figures = Figures(at)
    figures.look()
    assert figures.as_json()["up"] is False and figures.as_json()["pairs"] == []
    with made_up([{"name": "a", "version": "1", "state": "READY"}], counted(a_1=(5, 0))) as address:
        figures.address = address
        figures.look()
        assert figures.as_json()["up"] is True
    figures.look()
    ((model,),) = figures.as_json()["pairs"]
    assert figures.as_json()["up"] is False and model["name"] == "a" and model["version"] is None
    assert model["now"] == {} and model["series"]["pending"] == [2, None]
