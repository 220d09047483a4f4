"""`predict`: files found, read, sent and named; what fails is said and stops nothing else."""

import csv
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from served import Running, exported, served, until
from tritonclient.http import InferenceServerClient

from lowpass.cli import main
from lowpass.export.artefacts import open_session
from lowpass.export.batch import BatchProfile
from lowpass.export.runtimes.session import logits_of
from lowpass.export.triton import client as asking
from lowpass.export.triton import predict as predicting
from lowpass.export.triton.client import Client, Guess, Protocol, Served
from lowpass.export.triton.config import ModelSettings, as_text, config_of
from lowpass.export.triton.predict import find_pictures, predict
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.model.architecture import Preprocessing
from lowpass.pipeline.run.images import verification_batches

CLASSES = 10
PREPROCESSING = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic")
# Logits by the brightness of the image: NaN for black, infinite for white. `slow` takes its time.
ODD_MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.slow = args["model_name"].startswith("slow")

    def execute(self, requests):
        time.sleep(0.8 * self.slow)
        answers = []
        for request in requests:
            images = pb_utils.get_input_tensor_by_name(request, "images").as_numpy()
            logits = np.tile(np.arange(10, dtype=np.float32), (len(images), 1))
            logits[images.mean((1, 2, 3)) < -0.9, 3] = np.nan
            logits[images.mean((1, 2, 3)) > 0.9, 3] = np.inf
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return answers
"""


def odd_model(repository: Path, name: str, **queue: int) -> None:
    """A model of the text above; `queue` as Triton's queue policy calls it."""
    parameters = {"input_size": "[3, 32, 32]", "input": "float32", "preprocessing": PREPROCESSING.model_dump_json()}
    one = ModelSettings(
        name=name,
        backend="python",
        precision="fp32",
        uint8=False,
        shape=(3, 32, 32),
        classes=CLASSES,
        profile=BatchProfile(least=1, best=1, most=1),
        preferred=(1,),
        delay_us=0,
        queue_limit=100,
        queue_timeout_ms=0,
        instances=1,
        threads=1,
        accelerator="cuda",
        parameters=parameters,
    )
    config = config_of(one, 1)
    del config.model_warmup[:]
    for key, value in queue.items():
        setattr(config.dynamic_batching.default_queue_policy, key, value)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(ODD_MODEL)
    (repository / name / "1" / "labels.txt").write_text("".join(f"class {index}\n" for index in range(CLASSES)))
    (repository / name / "config.pbtxt").write_text(as_text(config))


@pytest.fixture(scope="module")
def running(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`digits`; `odd`, whose logits are none at times; `slow`, which has place for one in its queue; and `slow-hasty`,
    where nobody may wait long."""
    repository = tmp_path_factory.mktemp("predicted") / "repository"
    for dense in (False, True):
        exported(tuned_run, "fp32", dense)
    deploy(tuned_run, repository, "digits", DeployOptions(instances=1, threads=1))
    odd_model(repository, "odd")
    odd_model(repository, "slow", max_queue_size=1)
    odd_model(repository, "slow-hasty", default_timeout_microseconds=50_000)
    images = verification_batches(tuned_run, None)[0][0][0][:16].numpy()
    with served(tuned_run, repository, images) as server:
        yield server


def pixels_of(images: np.ndarray) -> list[Image.Image]:
    pixels = np.clip(np.rint((images.transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8)
    return [Image.fromarray(each) for each in pixels]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, arguments)])
    said = capsys.readouterr()
    return cast(int, stop.value.code), said.out, " ".join(said.err.split())


@pytest.fixture
def folder(running: Running, tmp_path: Path) -> Path:
    """Fourteen entries, two of which are no pictures."""
    for index, image in enumerate(pixels_of(running.images[:12])):
        file = tmp_path / "pictures" / f"{index % 3}" / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    (tmp_path / "pictures" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "pictures" / "2" / "note.png").write_text("no picture")
    return tmp_path / "pictures"


def test_the_rest_is_answered(running: Running, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder.parent / "table.csv"
    asked = (folder, "--model", "digits", "--url", running.url("http"), "--top", 2, "--csv", table)
    code, out, error = run(capsys, *asked)
    assert code == 1 and "2 of 14 pictures could not be read: " in error
    for name in ("0/damaged.jpg", "2/note.png"):
        assert (
            f"{folder / name} cannot be read as an image: " in error
            and f"{folder / name}: " in error.split(" of 14 ")[1]
        )
    wanted = [str(file) for file in sorted(folder.rglob("??.png"))]
    assert [line.partition(": ")[0] for line in out.splitlines()] == wanted and "%" in out
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == ["path", "rank", "index", "label", "score"]
    assert [(row["path"], row["rank"]) for row in rows] == [(file, rank) for file in wanted for rank in "12"]
    code, out, error = run(capsys, *asked, "--json", "--logits")
    answer = json.loads(out)
    assert code == 1 and "2 of 14" in error and answer["scores"] == "logits" and answer["model"] == "digits"
    assert list(answer["predictions"]) == wanted and len(answer["unreadable"]) == 2
    logits = {file: guesses[0]["score"] for file, guesses in answer["predictions"].items()}
    assert [float(row["score"]) for row in csv.DictReader(table.open()) if row["rank"] == "1"] == list(logits.values())


def test_a_table_takes_the_place_of_a_file_alone(
    running: Running, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of a link, a pipe or a device: those stay what they are."""
    picture = next(iter(sorted(folder.rglob("??.png"))))
    asked = (picture, "--model", "digits", "--url", running.url("http"), "--csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert run(capsys, *asked, tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and len((tmp_path / "real.csv").read_text().splitlines()) == 6
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", "/dev/null", folder):
        code, out, error = run(capsys, *asked, other)
        assert code == 2 and out == "" and "is no regular file" in error
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


def test_one_bad_file_alone(running: Running, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")  # of Pillow's own limit
    for name, reason in (
        ("0/damaged.jpg", "cannot identify"),
        ("missing.png", "No such file"),
        ("bomb.png", "decompression bomb"),
    ):
        file = folder / name
        code, out, error = run(capsys, file, "--model", "digits", "--url", running.url("http"))
        assert code == 1 and not out and f"1 of 1 pictures could not be read: {file}: " in error and reason in error


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_probabilities_are_the_softmax_of_the_logits(running: Running, folder: Path, protocol: Protocol) -> None:
    files = sorted(folder.rglob("??.png"))
    with running.client("digits", protocol) as client:
        shares = list(predict(client, files, CLASSES))
        logits = list(predict(client, files, CLASSES, logits=True))
        assert [found.file for found in shares] == files
        for share, logit in zip(shares, logits, strict=True):
            assert [guess.index for guess in share.guesses] == [guess.index for guess in logit.guesses]
            raised = np.exp([guess.score for guess in logit.guesses])
            assert [guess.score for guess in share.guesses] == pytest.approx(list(raised / raised.sum()), abs=1e-6)
            assert sum(guess.score for guess in share.guesses) == pytest.approx(1)
    session = open_session("onnxruntime", running.run, "fp32")
    prepare = predicting.preparing(client.served)
    bare = logits_of(session, np.stack([prepare(file) for file in files]))
    for row, found in zip(bare, logits, strict=True):
        assert [guess.score for guess in found.guesses] == pytest.approx(sorted(row, reverse=True), abs=2e-5)


def test_pictures_are_turned_as_the_camera_was_held(running: Running, tmp_path: Path) -> None:
    (straight,) = pixels_of(running.images[:1])
    straight.save(tmp_path / "straight.png")
    note = Image.Exif()
    note[0x0112] = 6  # to be turned by a quarter to the right
    straight.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "held.png", exif=note)
    files = [tmp_path / "straight.png", tmp_path / "held.png"]
    with running.client("digits") as client:
        upright, turned = (found.guesses for found in predict(client, files, exif=True))
        assert upright == turned
        upright, lying = (found.guesses for found in predict(client, files))
        assert upright == turned and lying != turned


def test_what_is_no_number_is_an_error(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, level in (("grey", 128), ("black", 0), ("white", 255)):
        Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / f"{name}.png")
    table = tmp_path / "table.csv"
    for protocol in ("http", "grpc"):
        asked = ("--model", "odd", "--url", running.url(protocol), "--protocol", protocol, "--csv", table)  # type: ignore[arg-type]
        assert run(capsys, tmp_path / "grey.png", *asked)[0] == 0
        table.unlink()
        for name in ("black", "white"):
            code, _, error = run(capsys, tmp_path / "grey.png", tmp_path / f"{name}.png", *asked)
            assert code == 1 and "odd answers with logits that are not finite" in error and f"{name}.png" in error
            assert not table.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_overloaded_server_is_asked_again(
    running: Running, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((1, 3, 32, 32), np.float32)

    def ask(client: Client) -> str:
        try:
            return client.classify(image, 1)[0][0].label
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        for model in ("slow", "slow-hasty"):  # whose queue is full; where a request waits too long in it
            clients = [Client(running.url(protocol), model, protocol) for _ in range(4)]
            with monkeypatch.context() as once:
                once.setattr(asking, "PAUSES_S", ())
                said = Counter(pool.map(ask, clients))
            assert "class 9" in said and [each for each in said if f"overloaded with requests for {model}: " in each]
            assert list(pool.map(ask, clients)) == ["class 9"] * 4
        hasty = [Client(running.url(protocol), "slow", protocol, timeout_s=3.0) for _ in range(8)]
        said = Counter(pool.map(ask, hasty))
    assert 0 < said.pop("class 9") < 8
    late = [each for each in said if each.endswith("did not answer within 3 s")]  # came into the queue at last
    full = [each for each in said if re.search("is overloaded with requests for slow: .*--instances", each)]
    assert full and len(full) + len(late) == len(said), said


def test_labels_and_scores_are_of_one_version(running: Running, tmp_path: Path) -> None:
    """Slim and dense take turns under other labels, and no answer mixes them."""
    options, wanted = [], {}
    for kind in ("slim", "dense"):
        (tmp_path / kind).write_text("".join(f"{kind} {index}\n" for index in range(CLASSES)))
        options.append(DeployOptions(instances=1, threads=1, labels=tmp_path / kind))
        wanted[kind] = logits_of(open_session("onnxruntime", running.run, "fp32", kind == "dense"), running.images[:1])[
            0
        ]
    deploy(running.run, running.repository, "turns", options[0])
    until(lambda: ready(running, 1))
    seen, done = set[str](), threading.Event()

    def load(protocol: Protocol) -> None:
        with running.client("turns", protocol) as client:
            while not done.is_set():
                (guesses,) = client.classify(running.images[:1], CLASSES, logits=True)
                (kind,) = {guess.label.split()[0] for guess in guesses}
                assert all(guess.label == f"{kind} {guess.index}" for guess in guesses)
                assert [guess.score for guess in guesses] == pytest.approx(sorted(wanted[kind], reverse=True), abs=2e-5)
                seen.add(kind)

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(load, cast(Protocol, protocol)) for protocol in ("http", "grpc")]
        deploy(running.run, running.repository, "turns", options[1], dense=True)
        until(lambda: ready(running, 2))
        until(lambda: seen == {"slim", "dense"} or any(worker.done() for worker in workers))
        done.set()
    for worker in workers:
        worker.result()


def ready(running: Running, version: int) -> bool:
    client = InferenceServerClient(running.url("http"))
    try:
        return bool(client.is_model_ready("turns", str(version)))
    finally:
        client.close()


class Counting:
    """Stands for a client: counts what is under way, and takes a while."""

    served = Served("model", 4, (3, 8, 8), CLASSES, False, PREPROCESSING)

    def __init__(self) -> None:
        self.sent = 0
        self.lock = threading.Lock()

    def classify(self, images: np.ndarray, top: int, logits: bool, names: list[Path]) -> list[list[Guess]]:
        time.sleep(0.001 * (names[0].name[-5] == "0"))  # some are slower, and yet come in order
        with self.lock:
            self.sent += len(images)
        return [[Guess(0, name.name, 1.0)] for name in names]


def test_many_files_are_streamed(tmp_path: Path) -> None:
    """Those ahead of what was taken are bounded, the order is kept, and who stops is not asked for more."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    files = [tmp_path / "0.png"]
    for index in range(1, 2000):
        files.append(tmp_path / f"{index}.png")
        files[-1].symlink_to(files[0])
    client = Counting()
    threads = len(os.sched_getaffinity(0)) + predicting.WAITING_FOR_ANSWERS
    taken, most = 0, 0
    for found in predict(cast(Client, client), files):
        assert found.file == files[taken] and found.guesses[0].label == found.file.name
        taken += 1
        most = max(most, client.sent - taken)
    assert taken == 2000 and most <= 4 * (2 * threads + 1)
    stopped = Counting()
    answers = cast(Any, predict(cast(Client, stopped), files))
    next(answers)
    answers.close()
    assert stopped.sent <= 4 * (2 * threads + 1)


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "sub/deep/c.webp", "sub/note.txt", ".hidden/d.png", "odd[1].png", "x/e.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("empty").mkdir()
    Path("loop").symlink_to(tmp_path, target_is_directory=True)

    def found(*named: str) -> list[str]:
        return [str(path) for path in find_pictures(named)]

    assert found("sub/note.txt", "missing.png") == ["sub/note.txt", "missing.png"]  # as they are named
    assert found("sub") == ["sub/deep/c.webp"]
    assert found("odd[1].png") == ["odd[1].png"]  # a file before a pattern
    assert found("*.jpg", "a.jpg", "[ab].*") == ["a.jpg", "b.PNG"]  # each once
    assert found("s*/**") == ["sub/deep/c.webp"] and found("**/*.webp")[-1] == "sub/deep/c.webp"
    assert found(f"{tmp_path}/x/*") == [f"{tmp_path}/x/e.png"]
    assert set(found(".")) >= {"a.jpg", "b.PNG", "odd[1].png", "sub/deep/c.webp", "x/e.png"}
    assert not [name for name in found(".") if "hidden" in name or name.count("loop") > 1]
    for nothing, why in (("empty", "holds no picture"), ("*.gif", "matches no picture"), ("sub/*.txt", "matches no")):
        with pytest.raises(InputError, match=f"^{re.escape(nothing)} {why}"):
            found("a.jpg", nothing)


def test_a_picture_of_one_row_is_refused(tmp_path: Path) -> None:
    """Resized until its shorter side fits it would have billions of pixels."""
    Image.new("RGB", (100_000, 1)).save(tmp_path / "row.png")
    client = Counting()
    client.served = Served("model", 4, (3, 224, 224), CLASSES, False, PREPROCESSING)
    (found,) = predict(cast(Client, client), [tmp_path / "row.png"])
    assert not found.guesses and "too long for its other side" in str(found.unreadable)


def test_an_answer_stays_where_it_was_sent() -> None:
    """Progress is drawn on a terminal; what is printed elsewhere meanwhile is not drawn into it."""
    program = "from lowpass.pipeline.base.exits import exit_codes\nwith exit_codes():\n    print('answer')"
    ours, terminal = pty.openpty()
    command = [sys.executable, "-c", program]
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    os.close(ours)
    assert done.stdout == b"answer\n"
