"""What tests of a real Triton server share: where it is, what it serves, and bytes sent to it by hand."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tritonclient.http

from lowpass.export.artefacts import open_session
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.export import export
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.options import ExportOptions, Input, Precision
from lowpass.export.runtimes.session import logits_of
from lowpass.export.triton.address import Address
from lowpass.export.triton.client import Client, Protocol
from lowpass.export.triton.config import as_text, parse_config
from lowpass.export.triton.decode import DecodeLimits
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.server import POLL_S, Supervisor, find_server
from lowpass.export.triton.state import is_ready
from lowpass.export.triton.version import CONFIG_FILE, serve_version, versions_of
from lowpass.pipeline.run.images import quantization_batches, verification_batches

PROFILE = BatchProfile.parse("1:4:8")
ROOT = Path(__file__).parent.parent
TRITON = Path(os.environ.get("LOWPASS_TRITON", ROOT / ".venv-triton"))
ONE = DeployOptions(instances=1, threads=1)
PICTURES = replace(ONE, decode=DecodeLimits())


def free_address() -> Address:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return Address("127.0.0.1", *ports)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@dataclass(frozen=True)
class Running:
    run: Path
    repository: Path
    address: Address
    log: Path
    images: np.ndarray  # [16, 3, 32, 32]

    def url(self, protocol: Protocol) -> str:
        return f"127.0.0.1:{self.address.http if protocol == 'http' else self.address.grpc}"

    @contextmanager
    def client(self, model: str, protocol: Protocol = "http") -> Iterator[Client]:
        client = Client(self.url(protocol), model, protocol)
        yield client
        client.close()


@contextmanager
def served(run: Path, repository: Path, images: np.ndarray) -> Iterator[Running]:
    """A server on a repository of a run's models, stopped in the end. What breaks a model needs a server of its own."""
    address, log = free_address(), repository.with_name("triton.log")
    with Supervisor(find_server(TRITON), repository, address, log, lambda _: None) as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        time.sleep(2 * POLL_S)  # at its first poll the server loads everything once more, and counts anew
        until(lambda: loading(log) == 0)
        yield Running(run, repository, address, log, images)
    assert not is_ready(address)  # it has stopped


def loading(log: Path) -> int:
    """How many models the server is still loading, by its log."""
    text = log.read_text()
    return text.count('"loading: ') - text.count("successfully loaded") - text.count('"failed to load ')


def exported(run: Path, precision: Precision, dense: bool = False, input: Input = "float32") -> None:
    """An export that is served, not judged: few images stand for many."""
    batches = verification_batches(run, None)[0][:2]
    options = ExportOptions(precision=precision, profile=PROFILE, input=input)
    ranges = Quantization(quantization_batches(run, None)[0][:1]) if precision == "int8" else None
    export(run, options, batches, made_images=True, dense=dense, calibration=ranges)


def serve_damaged(model: Path) -> int:
    """Make a version that cannot be loaded the one that is served; its number."""
    present = versions_of(model)
    version = present[-1] + 1
    shutil.copytree(model / str(present[-1]), model / str(version))
    (model / str(version) / "model.onnx").write_bytes(b"damaged" * 100)
    path = model / str(version) / CONFIG_FILE
    config = parse_config(path.read_text(), str(path))
    config.version_policy.specific.versions[:] = [version]
    path.write_text(as_text(config))
    serve_version(model, version)
    return version


def raw(address: Address, content: bytes, patience: float = 5) -> bytes:
    """What the server says to bytes on its HTTP port, if anything."""
    with socket.create_connection(("127.0.0.1", address.http), timeout=patience) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(4096)
        except (ConnectionError, TimeoutError):
            return b""


def post(body: bytes, headers: str = "", length: int | None = None) -> bytes:
    head = (
        "POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n{headers}\r\n"
    )
    return head.encode() + body


def request_body(images: np.ndarray) -> tuple[bytes, str]:
    given = tritonclient.http.InferInput("images", list(images.shape), "FP32")
    given.set_data_from_numpy(images)
    body, length = tritonclient.http.InferenceServerClient.generate_request_body([given])
    return body, f"Inference-Header-Content-Length: {length}\r\n"


def still_right(running: Running) -> None:
    wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:2])
    with running.client("digits") as client:
        np.testing.assert_allclose(client.logits(running.images[:2]), wanted, atol=1e-5, rtol=0)
