"""A real Triton server on a real slim model: answers as the bare session's, swaps, kills and refusals."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from children import ended
from PIL import Image
from served import (
    ROOT,
    TRITON,
    Running,
    exported,
    free_address,
    post,
    raw,
    request_body,
    serve_damaged,
    served,
    still_right,
    until,
)
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from lowpass.benchmarks.serving.load import closed_loop, open_loop
from lowpass.cli import main
from lowpass.export.artefacts import open_session
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.plan import build, manifest_path
from lowpass.export.triton.client import Client, Protocol
from lowpass.export.triton.predict import predict
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, roll_back
from lowpass.export.triton.server import Supervisor, find_server
from lowpass.export.triton.state import is_ready
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.run.images import verification_batches


@pytest.fixture(scope="module")
def running(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the whole file: `digits` and `digits-dense` in FP32, `int8`, `pixels` (uint8)."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    one = DeployOptions(instances=2, threads=1)
    exported(tuned_run, "fp32", input="uint8")
    deploy(tuned_run, repository, "pixels", one)
    exported(tuned_run, "fp32")
    exported(tuned_run, "fp32", dense=True)
    exported(tuned_run, "int8")
    deploy(tuned_run, repository, "digits", one)
    deploy(tuned_run, repository, "digits-dense", one, dense=True)
    deploy(tuned_run, repository, "int8", DeployOptions(precision="int8", instances=1, threads=1))
    images = verification_batches(tuned_run, None)[0][0][0][:16].numpy()
    with served(tuned_run, repository, images) as server:
        yield server


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_same_logits_as_the_bare_session(running: Running, protocol: Protocol) -> None:
    for name, precision, dense in (("digits", "fp32", False), ("digits-dense", "fp32", True), ("int8", "int8", False)):
        session = open_session("onnxruntime", running.run, precision, dense)  # type: ignore[arg-type]
        with running.client(name, protocol) as client:
            for batch in (1, 3, 8):
                images = running.images[:batch]
                np.testing.assert_allclose(client.logits(images), logits_of(session, images), atol=1e-5, rtol=0)


def save_images(folder: Path, images: np.ndarray) -> list[Path]:
    files = []
    for index, image in enumerate(images):
        files.append(folder / f"{index}.png")
        pixels = np.clip(np.rint((image.transpose(1, 2, 0) * 0.5 + 0.5) * 255), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


@pytest.mark.parametrize("model", ["digits", "pixels"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_labels_of_image_files(running: Running, tmp_path: Path, model: str, protocol: Protocol) -> None:
    files = save_images(tmp_path, running.images[:11])  # more than one batch
    wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:11])
    with running.client(model, protocol) as client:
        found = {each.file: each.guesses for each in predict(client, files, 3, logits=True)}
    assert list(found) == files
    for file, logits in zip(files, wanted, strict=True):
        assert [guess.index for guess in found[file]] == list(np.argsort(-logits)[:3])
        assert [guess.label for guess in found[file]] == [str(guess.index) for guess in found[file]]
        # The files hold 256 levels; the images behind `wanted` were never rounded to them.
        assert [guess.score for guess in found[file]] == pytest.approx(sorted(logits)[:-4:-1], abs=0.2)


def test_predict_from_the_command_line(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[1] / "deploy" / "digit.png"  # the README's example, a three
    asked = ["predict", str(file), "--model", "digits", "--url", running.url("grpc"), "--protocol", "grpc", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(asked)
    assert stop.value.code == 0
    (best,) = json.loads(capsys.readouterr().out)["predictions"].values()
    assert len(best) == 5 and best[0]["label"] == "3" and best[0]["index"] == 3


def test_predict_refuses(running: Running, tmp_path: Path) -> None:
    text = tmp_path / "note.txt"
    text.write_text("not an image")
    with running.client("digits") as client:
        for found in predict(client, [text, tmp_path / "missing.png"], 1):
            assert found.unreadable and not found.guesses
    protocols: tuple[Protocol, Protocol] = ("http", "grpc")
    for protocol, other in zip(protocols, reversed(protocols), strict=True):
        with pytest.raises(InputError, match="does not serve nothing"):
            Client(running.url(protocol), "nothing", protocol)
        for nobody in ("127.0.0.1:9", "nowhere.invalid:80", running.url(other)):  # the last speaks, but otherwise
            with pytest.raises(RunError, match=r"does not answer.*lowpass serve"):
                Client(nobody, "digits", protocol)
        for nonsense in ("", "127.0.0.1", "127.0.0.1:port", "http://:8000", ":::"):
            with pytest.raises(InputError, match="is not HOST:PORT"):
                Client(nonsense, "digits", protocol)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        ("images", (1, 3, 32, 31), "FP32", "shape"),
        ("images", (1, 3, 32), "FP32", "shape"),
        ("images", (9, 3, 32, 32), "FP32", "batch-size"),
        ("images", (1, 3, 32, 32), "FP64", "data-type|dtype|datatype"),
        ("pictures", (1, 3, 32, 32), "FP32", "input"),
    ],
)
def test_wrong_requests_are_refused(
    running: Running, name: str, shape: tuple[int, ...], kind: str, message: str
) -> None:
    for library, port in ((tritonclient.http, running.address.http), (tritonclient.grpc, running.address.grpc)):
        client = library.InferenceServerClient(f"127.0.0.1:{port}")
        given = library.InferInput(name, list(shape), kind)
        given.set_data_from_numpy(np.zeros(shape, np.float64 if kind == "FP64" else np.float32))
        with pytest.raises(InferenceServerException, match=message):
            client.infer("digits", [given])
        assert client.is_server_ready()
        client.close()


def test_truncated_and_oversized_bodies(running: Running) -> None:
    body, headers = request_body(running.images[:1])
    assert b" 200 " in raw(running.address, post(body, headers))
    assert b" 200 " not in raw(running.address, post(body[:-100], headers, len(body)), 1)  # never completed
    assert b" 400 " in raw(running.address, post(body[:-100], headers))
    assert b" 400 " in raw(running.address, post(body + bytes(100_000), headers))
    assert b" 200 " not in raw(running.address, post(body + bytes(65 * 2**20), headers))  # over the server's 64 MiB
    assert b" 200 " not in raw(running.address, post(body, headers, 2**40), 1)  # announced, not sent
    still_right(running)


def test_five_thousand_malformed_requests(running: Running) -> None:
    draw = random.Random(0)
    good, headers = request_body(running.images[:1])
    accepted = refused = 0
    for index in range(5000):
        body = bytearray(good)
        match index % 5:
            case 0:  # the JSON part is damaged
                for _ in range(draw.randint(1, 8)):
                    body[draw.randrange(len(body) - running.images[:1].nbytes)] = draw.randrange(256)
            case 1:
                del body[draw.randrange(len(body)) :]
            case 2:
                body = bytearray(draw.randbytes(draw.randint(0, 400)))
            case 3:
                headers = f"Inference-Header-Content-Length: {draw.choice([-1, 0, 1, 10**9, 2**63, 'x'])}\r\n"
            case _:
                body += draw.randbytes(draw.randint(1, 5000))
        content = post(bytes(body), headers) if draw.random() < 0.95 else draw.randbytes(draw.randint(1, 200))
        answer = raw(running.address, content, 1)
        accepted += b" 200 " in answer
        refused += bool(re.match(rb"HTTP/1.1 [45]\d\d", answer))
        headers = request_body(running.images[:1])[1] if index % 5 == 3 else headers
    assert accepted < 500  # damage may leave a request sound: a changed id, say
    assert refused > 3000  # the rest is not HTTP, or ends too soon to be answered
    assert is_ready(running.address)
    still_right(running)


def test_load_is_counted_by_client_and_server_alike(running: Running) -> None:
    url = running.url("grpc")
    points = (
        closed_loop(url, "digits", running.images[:2], 2, 0.5),
        open_loop(url, "digits", running.images[:2], 20, 1, 4),
    )
    for point in points:
        assert point.requests > 1 and point.request_images == 2
        assert sum(size * runs for size, runs in point.batches.items()) == 2 * point.requests
        assert 0 < point.p50_ms <= point.p95_ms <= point.p99_ms
        assert 2 <= point.mean_batch <= 8
    assert any(point.compute_ms for point in points)  # one may be None, see `Point`
    with pytest.raises(RunError, match="closed load of 1"):
        closed_loop(url, "digits", running.images[:1, :2], 1, 0.1)


def test_a_thousand_malformed_messages_over_grpc(running: Running) -> None:
    draw = random.Random(1)
    message = service_pb2.ModelInferRequest(model_name="digits")
    message.inputs.add(name="images", datatype="FP32", shape=[1, 3, 32, 32])
    head = message.SerializeToString()
    message.raw_input_contents.append(running.images[:1].tobytes())
    good = message.SerializeToString()
    codes: Counter[grpc.StatusCode] = Counter()
    with grpc.insecure_channel(running.url("grpc")) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert ask(good)
        for index in range(1000):
            body = bytearray(good)
            match index % 4:
                case 0:
                    for _ in range(draw.randint(1, 8)):
                        body[draw.randrange(len(head))] = draw.randrange(256)
                case 1:
                    del body[draw.randrange(len(body)) :]
                case 2:
                    body = bytearray(draw.randbytes(draw.randint(0, 400)))
                case _:  # more or fewer bytes than the shape asks for
                    tensor = draw.randbytes(
                        draw.choice([0, 1, running.images[0].nbytes - 4, draw.randint(20_000, 50_000)])
                    )
                    body = bytearray(
                        head + service_pb2.ModelInferRequest(raw_input_contents=[tensor]).SerializeToString()
                    )
            try:
                ask(bytes(body), timeout=5)
                codes[grpc.StatusCode.OK] += 1
            except grpc.RpcError as error:
                codes[error.code()] += 1
    assert codes[grpc.StatusCode.OK] < 100 and sum(codes.values()) == 1000
    assert not codes[grpc.StatusCode.UNAVAILABLE] and not codes[grpc.StatusCode.DEADLINE_EXCEEDED], codes
    still_right(running)


def test_a_corrupt_version_leaves_the_old_one_serving(running: Running, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(running.run, repository, "corrupt", DeployOptions(instances=1, threads=1))
    model = repository / "corrupt"
    with served(running.run, repository, running.images) as server:
        assert serve_damaged(model) == 2
        until(lambda: "failed to load 'corrupt'" in server.log.read_text())
        with server.client("corrupt") as client:
            wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:1])
            np.testing.assert_allclose(client.logits(running.images[:1]), wanted, atol=1e-5, rtol=0)
    # A server that starts now has no old one: it says which model and what to do, and that helps.
    address, log = free_address(), tmp_path / "alone.log"
    with (
        pytest.raises(RunError, match=r"cannot load corrupt: .*--name corrupt --rollback"),
        Supervisor(find_server(TRITON), repository, address, log),
    ):
        pass
    assert not is_ready(address)
    roll_back(repository, "corrupt")
    with Supervisor(find_server(TRITON), repository, address, log):
        assert is_ready(address)


@pytest.mark.slow
def test_a_tensorrt_model_lacks_the_backend_alone(running: Running, tmp_path: Path) -> None:
    """The plan of the GPU-less compiler under a manifest of TensorRT's: its configuration is read by the server."""
    exported(running.run, "fp16")
    plan = build(running.run, "fp16", "tensorrt-rtx")
    repository = tmp_path / "repository"
    deploy(running.run, repository, "digits", DeployOptions(instances=1, threads=1))
    tensorrt = DeployOptions(backend="tensorrt")
    with pytest.raises(InputError, match="no backend"):
        deploy(running.run, repository, "engine", tensorrt)
    manifest = json.loads(manifest_path(plan).read_text()) | {"runtime": "tensorrt"}
    manifest_path(plan).write_text(json.dumps(manifest))
    with served(running.run, repository, running.images) as server:
        deploy(running.run, repository, "engine", tensorrt)
        until(lambda: "failed to load 'engine'" in server.log.read_text())
        (said,) = {
            line.split("failed to load 'engine'")[1]
            for line in server.log.read_text().splitlines()
            if "failed to load 'engine'" in line and "version" in line
        }
        assert "unable to find backend library for backend 'tensorrt'" in said.lower(), said
        shutil.rmtree(repository / "engine")
        still_right(server)


@pytest.mark.slow
def test_engines_for_other_hardware_are_refused(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(running.run, "fp16")
    plan = build(running.run, "fp16", "tensorrt-rtx")
    manifest = json.loads(manifest_path(plan).read_text()) | {"runtime": "tensorrt", "gpu": "another GPU"}
    manifest_path(plan).write_text(json.dumps(manifest))
    monkeypatch.setattr("lowpass.export.triton.prepared.current_gpu", lambda: "this GPU")
    with pytest.raises(InputError, match=r"built for another GPU, this machine has this GPU.*lowpass build"):
        deploy(running.run, running.repository, "engine", DeployOptions(backend="tensorrt"))
    plan.write_bytes(b"other")
    with pytest.raises(InputError, match="damaged"):
        deploy(running.run, running.repository, "engine", DeployOptions(backend="tensorrt"))
    assert not (running.repository / "engine").exists()


@pytest.mark.slow
def test_serve_comes_back_after_a_kill(running: Running, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    deploy(running.run, repository, "digits", DeployOptions(instances=1, threads=1))
    address = free_address()
    command = [sys.executable, "-m", "lowpass.cli", "serve", str(repository), "--triton", str(TRITON), "--json"]
    for kind, port in (("http", address.http), ("grpc", address.grpc), ("metrics", address.metrics)):
        command += [f"--{kind}-port", str(port)]
    wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:1])
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process,
        ended(process),
    ):
        assert process.stdout is not None
        ready: dict[str, Any] = json.loads(process.stdout.readline())
        assert ready["ready"] and is_ready(address)
        answered, stop = [0, 0], threading.Event()  # before and after the kill
        wrong: list[float] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    client = Client(f"127.0.0.1:{address.grpc}", "digits", "grpc")
                    logits = client.logits(running.images[:1])
                    client.close()
                except (RunError, InputError):
                    continue  # it is down
                difference = float(np.abs(logits - wanted).max())
                if not difference < 1e-5:
                    wrong.append(difference)
                answered[killed.is_set()] += 1

        killed = threading.Event()
        worker = threading.Thread(target=load)
        worker.start()
        until(lambda: answered[0] > 20)
        os.kill(ready["pid"], signal.SIGKILL)
        until(lambda: not is_ready(address))
        killed.set()
        until(lambda: answered[1] > 20)
        stop.set()
        worker.join()
        assert not wrong
        process.terminate()
        assert process.wait(60) == 0
    assert not is_ready(address)
