"""Versions on a real Triton server: swapped and rolled back under load, with everything that belongs to them."""

import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from command_line import answer
from PIL import Image
from served import ONE, Running, exported, served, still_right, until
from tritonclient.utils import InferenceServerException

from lowpass.export.artefacts import open_session
from lowpass.export.runtimes.session import logits_of
from lowpass.export.triton.canary import abort_canary, start_canary
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, roll_back
from lowpass.export.triton.split import Split
from lowpass.export.triton.version import CONFIG_FILE, FACTS_FILE, SUMS_FILE
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.run.images import verification_batches

FAR = 0.05  # the two versions' logits differ by far more, a batch's rounding by far less


@pytest.fixture(scope="module")
def running(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    repository = tmp_path_factory.mktemp("versions") / "repository"
    exported(tuned_run, "fp32")
    exported(tuned_run, "fp32", dense=True)
    deploy(tuned_run, repository, "digits", ONE)
    images = verification_batches(tuned_run, None)[0][0][0][:16].numpy()
    with served(tuned_run, repository, images) as server:
        yield server


def serves(running: Running, model: str, version: int) -> bool:
    client = tritonclient.http.InferenceServerClient(running.url("http"))
    try:
        return bool(client.is_model_ready(model, str(version)))
    finally:
        client.close()


def labels(tmp_path: Path, word: str) -> Path:
    file = tmp_path / f"{word}.txt"
    file.write_text("".join(f"{word} {digit}\n" for digit in range(10)))
    return file


@pytest.mark.slow
def test_rolled_back_under_load(running: Running, tmp_path: Path) -> None:
    """Slim and dense take turns as what `swapped` serves, each with labels of its own. Of 2,000 answers and more none
    fails, each is of one version, and labels are of the version whose logits they come with."""
    words = ("slim", "dense")
    one = [DeployOptions(instances=1, threads=1, labels=labels(tmp_path, word)) for word in words]
    deploy(running.run, running.repository, "swapped", one[0])
    until(lambda: serves(running, "swapped", 1))
    wanted = [
        logits_of(open_session("onnxruntime", running.run, "fp32", dense), running.images[:1])[0]
        for dense in (False, True)
    ]
    failures, seen, labelled, stop = list[object](), Counter[int](), Counter[int](), threading.Event()
    given = tritonclient.grpc.InferInput("images", [1, 3, 32, 32], "FP32")
    given.set_data_from_numpy(running.images[:1])

    def which(logits: np.ndarray) -> int:
        distances = [float(np.abs(logits - one).max()) for one in wanted]
        assert min(distances) < 1e-4 < FAR < max(distances)
        return int(np.argmin(distances))

    def ask_logits(client: tritonclient.grpc.InferenceServerClient) -> None:
        seen[which(client.infer("swapped", [given]).as_numpy("logits")[0])] += 1

    def ask_labels(client: tritonclient.grpc.InferenceServerClient) -> None:
        every_class = tritonclient.grpc.InferRequestedOutput("logits", class_count=10)
        try:
            (row,) = client.infer("swapped", [given], outputs=[every_class]).as_numpy("logits")
        except InferenceServerException as error:
            # To make labels of an answer, Triton asks for its version again, which may be gone by then.
            if "is not at ready state" in str(error):
                return
            raise
        logits, said = np.empty(10, np.float32), set()
        for score, index, label in (entry.decode().split(":") for entry in row):
            logits[int(index)] = score
            assert label.endswith(f" {index}")
            said.add(label.split()[0])
        version = which(logits)
        assert said == {words[version]}
        labelled[version] += 1

    def load(ask: Callable[[tritonclient.grpc.InferenceServerClient], None]) -> None:
        client = tritonclient.grpc.InferenceServerClient(running.url("grpc"))
        while not failures and (not stop.is_set() or sum(seen.values()) < 2000):
            try:
                ask(client)
            except Exception as error:  # every kind of failure counts
                failures.append(error)
        client.close()

    workers = [threading.Thread(target=load, args=(ask,)) for ask in (ask_logits, ask_logits, ask_labels)]
    for worker in workers:
        worker.start()
    deploy(running.run, running.repository, "swapped", one[1], dense=True)
    until(lambda: serves(running, "swapped", 2))
    for version in (1, 2, 1):
        assert roll_back(running.repository, "swapped", version).version == version
        until(lambda version=version: serves(running, "swapped", version))  # type: ignore[misc]
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]
    assert sum(seen.values()) >= 2000 and min(seen[0], seen[1], labelled[0], labelled[1]) > 0


@pytest.mark.slow
def test_versions_with_another_interface(running: Running) -> None:
    """FP32 images in batches of 8, then pixels: each kind of request is answered rightly or refused, never mistaken."""
    deploy(running.run, running.repository, "either", ONE)
    until(lambda: serves(running, "either", 1))
    wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:4])
    pixels = np.clip(np.rint((running.images[:4].transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8)
    exported(running.run, "fp32", input="uint8")
    wanted_of_pixels = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:4])
    answers, wrong, stop = Counter[str](), list[object](), threading.Event()

    def load() -> None:
        client = tritonclient.grpc.InferenceServerClient(running.url("grpc"))
        while not stop.is_set():
            for kind, array, right in (("FP32", running.images[:4], wanted), ("UINT8", pixels, wanted_of_pixels)):
                given = tritonclient.grpc.InferInput("images", list(array.shape), kind)
                given.set_data_from_numpy(array)
                try:
                    got = client.infer("either", [given]).as_numpy("logits")
                except InferenceServerException as error:
                    answers[f"{kind} refused"] += 1
                    if "expects" not in str(error) and "unexpected shape" not in str(error):
                        wrong.append(error)
                else:
                    answers[f"{kind} answered"] += 1
                    if np.abs(got - right).max() > 1e-4:
                        wrong.append(got - right)
        client.close()

    worker = threading.Thread(target=load)
    worker.start()
    try:
        deploy(running.run, running.repository, "either", ONE)
    finally:
        exported(running.run, "fp32")
    until(lambda: serves(running, "either", 2))
    until(lambda: answers["UINT8 answered"] > 20)
    roll_back(running.repository, "either")
    until(lambda: serves(running, "either", 1))
    until(lambda: serves_alone(running, "either", 1))
    before = answers["FP32 answered"]
    until(lambda: answers["FP32 answered"] > before + 20)
    stop.set()
    worker.join()
    assert not wrong, wrong[0]
    assert min(answers[f"{kind} {what}"] for kind in ("FP32", "UINT8") for what in ("answered", "refused")) > 0


def serves_alone(running: Running, model: str, version: int) -> bool:
    """Neither of those beside it."""
    return serves(running, model, version) and not any(serves(running, model, version + one) for one in (-1, 1))


@pytest.mark.slow
def test_overload_is_refused_and_passes(running: Running) -> None:
    """With four places in the queue: a flood of 64 clients gets answers or 503, and a second later all is as before."""
    deploy(running.run, running.repository, "narrow", DeployOptions(instances=1, threads=1, queue_limit=4))
    until(lambda: serves(running, "narrow", 1))
    wanted = logits_of(open_session("onnxruntime", running.run, "fp32"), running.images[:8])
    answered, wrong, end = Counter[str](), list[object](), time.monotonic() + 120

    def flooded() -> bool:
        return min(answered["right"], answered["refused"]) > 20

    def flood(library: object, url: str) -> None:
        client = library.InferenceServerClient(url)  # type: ignore[attr-defined]
        given = library.InferInput("images", [8, 3, 32, 32], "FP32")  # type: ignore[attr-defined]
        given.set_data_from_numpy(running.images[:8])
        while not flooded() and not wrong and time.monotonic() < end:
            try:
                logits = client.infer("narrow", [given]).as_numpy("logits")
            except InferenceServerException as error:
                answered["refused"] += 1
                if "queue" not in str(error) or error.status() not in ("503", "StatusCode.UNAVAILABLE"):
                    wrong.append(error)
            else:
                answered["right"] += 1
                if np.abs(logits - wanted).max() > 1e-4:
                    wrong.append(logits)
        client.close()

    both = ((tritonclient.http, running.url("http")), (tritonclient.grpc, running.url("grpc")))
    workers = [threading.Thread(target=flood, args=both[index % 2]) for index in range(64)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    assert flooded(), answered
    with running.client("narrow") as client:
        np.testing.assert_allclose(client.logits(running.images[:8]), wanted, atol=1e-5, rtol=0)
    still_right(running)


@pytest.mark.slow
def test_a_canary_gets_its_share_and_is_compared(
    running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quarter of the requests: the canary's answers, beside the model's own."""
    deploy(running.run, running.repository, "tried", ONE)
    until(lambda: serves(running, "tried", 1))
    with running.client("tried") as client:
        assert Split.find(client) is None
    exported(running.run, "int8")
    int8 = DeployOptions(precision="int8", instances=1, threads=1, labels=labels(tmp_path, "new"))
    assert start_canary(running.run, running.repository, "tried", int8, 25).version == 2
    until(lambda: serves(running, "tried-canary", 2))
    assert serves_alone(running, "tried", 1)
    wanted = [logits_of(open_session("onnxruntime", running.run, kind), running.images) for kind in ("fp32", "int8")]  # type: ignore[arg-type]
    with running.client("tried") as client:
        split = Split.find(client)
        assert split is not None and split.comparison().agreement is None
        said = [split.classify(running.images[:8], 10, logits=True) for _ in range(40)]
        for turn, guesses in enumerate(said):
            new = turn % 4 == 3
            for guess in guesses[0]:
                assert guess.score == pytest.approx(wanted[new][0, guess.index], abs=1e-4)
                assert guess.label == (f"new {guess.index}" if new else str(guess.index))
        compared = split.comparison()
        same = 100 * float((wanted[0][:8].argmax(1) == wanted[1][:8].argmax(1)).mean())
        assert (compared.version, compared.requests, compared.images, compared.failures) == (2, 10, 80, 0)
        assert compared.agreement == pytest.approx(same)
        assert compared.stable_ms is not None and compared.stable_ms > 0 and compared.canary_ms is not None
    files = []
    for index in range(12):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(np.full((32, 32, 3), 20 * index, np.uint8)).save(files[-1])
    told = answer(capsys, "predict", *map(str, files), "--model", "tried", "--url", running.url("http"))
    assert told["canary"]["version"] == 2 and told["canary"]["share"] == 25
    abort_canary(running.repository, "tried")
    until(lambda: not serves(running, "tried-canary", 2))
    assert serves(running, "tried", 1)
    with pytest.raises(InputError, match="does not serve tried-canary"), running.client("tried-canary"):
        pass


@pytest.mark.slow
def test_a_client_that_prepared_for_another_version_is_told(running: Running) -> None:
    """The same input, other preprocessing: what is said to images that were prepared for the old version is wrong."""
    deploy(running.run, running.repository, "moving", ONE)
    until(lambda: serves(running, "moving", 1))
    with running.client("moving") as client:
        client.logits(running.images[:1])
        deploy(running.run, running.repository, "moving", ONE)  # the same once more: nothing to tell
        until(lambda: serves_alone(running, "moving", 2))
        client.logits(running.images[:1])
        assert client.version == 2
        model = running.repository / "moving"
        config = (model / "2" / CONFIG_FILE).read_text().replace("versions: 2", "versions: 3")
        assert '\\"crop_pct\\":' in config
        config = re.sub(r'(\\"crop_pct\\":)[0-9.]+', r"\g<1>0.5", config).replace("2/labels.txt", "3/labels.txt")
        shutil.copytree(model / "2", model / "3")
        (model / "3" / CONFIG_FILE).write_text(config)
        for name in (SUMS_FILE, FACTS_FILE):  # as somebody else deploys
            (model / "3" / name).unlink()
        roll_back(running.repository, "moving", 3)
        until(lambda: serves_alone(running, "moving", 3))
        with pytest.raises(RunError, match="version 3 of moving took the place of version 2 meanwhile"):
            client.logits(running.images[:1])
    with running.client("moving") as client:
        assert client.served.preprocessing.crop_pct == 0.5
        client.logits(running.images[:1])
