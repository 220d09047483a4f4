"""Pictures to a server, labels back: prepared as timm does, bounded, and refused one by one."""

import importlib
import io
import json
import os
import re
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served import Running, exported, served, until
from tritonclient.utils import InferenceServerException

from lowpass.benchmarks.serving.pictures import make_pictures, measure, rows
from lowpass.export.batch import BatchProfile
from lowpass.export.options import Input
from lowpass.export.triton.client import Protocol, Served
from lowpass.export.triton.config import ModelSettings, as_text
from lowpass.export.triton.decode import DecodeLimits, picture_models
from lowpass.export.triton.predict import predict, preparing
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.server import is_ready
from lowpass.export.triton.version import ModelVersion
from lowpass.pipeline.model.architecture import Preprocessing
from lowpass.pipeline.run.images import verification_batches

MODES_OF = {"PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}
LABELS = [f"digit: {index}" for index in range(10)]
KINDS_AND_MODES = [(kind, mode) for kind, modes in MODES_OF.items() for mode in modes]


@pytest.fixture(scope="module")
def backend() -> Iterator[Callable[[str], ModuleType]]:
    """A backend's file as a module, outside a server."""

    @dataclass
    class Tensor:
        name: str
        values: np.ndarray

        def as_numpy(self) -> np.ndarray:
            return self.values

    def tensor_of(request: dict[str, np.ndarray], name: str) -> Tensor:
        return Tensor(name, request[name])

    stub: Any = ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.get_input_tensor_by_name, stub.TritonError = Tensor, tensor_of, str
    stub.InferenceResponse = lambda tensors, error=None: SimpleNamespace(
        error=error, **{tensor.name: tensor.values for tensor in tensors}
    )
    limit = Image.MAX_IMAGE_PIXELS  # which the backend sets for a process of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        yield lambda name: importlib.import_module(f"lowpass.export.triton.backend.{name}")
    Image.MAX_IMAGE_PIXELS = limit


def picture_of(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Random colours in large patches and small ones."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (3, 4, 4), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = draw.integers(-40, 40, (height, width, 4))
    pixels = np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257 // 2)
    image = Image.fromarray(pixels)
    return image if mode == "RGBA" else image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def settings_of(served: Served) -> ModelSettings:
    channels, height, width = served.size
    return ModelSettings(
        name=served.name,
        backend="python",
        precision="fp32",
        uint8=served.uint8,
        shape=(height, width, channels) if served.uint8 else served.size,
        classes=served.classes,
        profile=BatchProfile(least=1, best=served.max_batch, most=served.max_batch),
        preferred=(served.max_batch,),
        delay_us=100,
        queue_limit=10,
        queue_timeout_ms=0,
        instances=1,
        threads=1,
        accelerator="cuda",
        parameters={
            "preprocessing": served.preprocessing.model_dump_json(),
            "input_size": json.dumps(served.size),
            "input": "uint8" if served.uint8 else "float32",
        },
    )


def served_of(
    size: tuple[int, int, int] = (3, 32, 32),
    uint8: bool = False,
    mode: Any = "center",
    crop: float = 0.9,
    how: str = "bicubic",
) -> Served:
    mean, std = (0.485, 0.456, 0.406)[: size[0]], (0.229, 0.224, 0.225)[: size[0]]
    prep = Preprocessing(mean=mean, std=std, crop_pct=crop, interpolation=how, crop_mode=mode)
    return Served("model", 8, size, 10, uint8, prep)


def model_of(module: ModuleType, version: ModelVersion, folder: Path | None = None) -> Any:
    """A backend as the server opens it."""
    parameters = {key: {"string_value": value.string_value} for key, value in version.config.parameters.items()}
    dims = [{"dims": list(each.dims)} for each in version.config.input]
    model = module.TritonPythonModel()
    config = json.dumps({"parameters": parameters, "input": dims})
    model.initialize({"model_config": config, "model_repository": str(folder), "model_version": "1"})
    return model


@settings(max_examples=150)
@given(
    size=st.tuples(st.sampled_from([1, 3]), st.sampled_from([32, 17, 24]), st.sampled_from([32, 17, 40])),
    uint8=st.booleans(),
    mode=st.sampled_from(["center", "squash", "border"]),
    crop=st.sampled_from([0.875, 0.9, 0.95, 1.0, 1.2]),
    how=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    kind_and_mode=st.sampled_from(KINDS_AND_MODES),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_pictures_are_prepared_as_by_timm(
    backend: Callable[[str], ModuleType],
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int, int],
    uint8: bool,
    mode: str,
    crop: float,
    how: str,
    kind_and_mode: tuple[str, str],
    width: int,
    height: int,
    seed: int,
) -> None:
    kind, colours = kind_and_mode
    asked = served_of(size, uint8, mode, crop, how)
    content = encoded(picture_of(colours, width, height, seed), kind)
    file = tmp_path_factory.getbasetemp() / "picture"
    file.write_bytes(content)
    prepare, *_ = picture_models(settings_of(asked), LABELS)
    model = model_of(backend("prepare"), prepare)
    try:
        wanted = preparing(asked)(file)
    except ValueError as error:  # timm makes no picture of one that would be less than a pixel wide
        assert "must be > 0" in str(error)
        (answer,) = model.execute([{"picture": np.array([[content]], dtype=np.object_)}])
        assert "must be > 0" in answer.error
        return
    (answer,) = model.execute([{"picture": np.array([[content]] * 2, dtype=np.object_)}])
    assert answer.error is None
    assert answer.images.dtype == wanted.dtype and answer.images.shape == (2, *wanted.shape)
    for image in answer.images:
        np.testing.assert_allclose(image, wanted, atol=0 if uint8 else 1e-5, rtol=0)


def refusal(model: Any, *contents: bytes) -> str:
    (answer,) = model.execute([{"picture": np.array([[content] for content in contents], dtype=np.object_)}])
    return str(answer.error)


def test_a_picture_beyond_the_limits_is_refused(backend: Callable[[str], ModuleType]) -> None:
    limits = DecodeLimits(bytes=20_000, pixels=10_000)
    prepare, *_ = picture_models(settings_of(served_of((3, 224, 224))), LABELS, limits)
    model = model_of(backend("prepare"), prepare)
    sound = encoded(picture_of("RGB", 40, 30, 0))
    assert refusal(model, sound) == "None"
    large, flat = encoded(picture_of("RGB", 90, 90, 0)), Image.new("RGB", (101, 100))
    assert refusal(model, sound, large) == (
        f"picture 1 of the request: it has {len(large)} bytes, and at most 20000 are taken"
    )
    for kind in MODES_OF:
        assert "it has 101 x 100 pixels, and at most 10000 are taken" in refusal(model, encoded(flat, kind))
    for kind in ("GIF", "BMP", "TIFF"):
        assert "it is no picture of JPEG, PNG, WEBP" in refusal(model, encoded(Image.new("RGB", (9, 9)), kind))
    for damaged in (sound[:-200], sound[:60], b"", b"nothing of the kind"):
        assert re.search("cannot be read|no picture of", refusal(model, damaged))
    assert "too long for its other side" in refusal(model, encoded(Image.new("RGB", (10_000, 1))))
    requests = [{"picture": np.array([[content]], dtype=np.object_)} for content in (sound, large, sound)]
    first, second, third = model.execute(requests)
    assert first.error is None and third.error is None and "bytes" in second.error
    np.testing.assert_array_equal(first.images, third.images)


def test_a_picture_too_large_is_not_decoded(backend: Callable[[str], ModuleType]) -> None:
    """268 million pixels in a few kilobytes, of each kind: refused within little memory."""
    prepare, *_ = picture_models(settings_of(served_of()), LABELS)
    model = model_of(backend("prepare"), prepare)
    png = encoded(Image.new("1", (16_383, 16_383)), "PNG")
    jpeg = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 16_383, 16_383)
    webp = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP"))
    start = webp.index(b"\x9d\x01\x2a")
    webp[start + 3 : start + 7] = struct.pack("<HH", 16_383, 16_383)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in (png, bytes(jpeg), bytes(webp)):
        assert "it has 16383 x 16383 pixels, and at most 50000000 are taken" in refusal(model, bomb)
    if "MALLOC_PERTURB_" not in os.environ:  # which writes to all that is reserved, as WebP's canvas is and no more
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_the_best_classes_are_named(backend: Callable[[str], ModuleType], tmp_path: Path) -> None:
    names = [f"class {index}, 名前: {index}" for index in range(10)]
    *_, ensemble = models = picture_models(settings_of(served_of()), names, top=12)  # of ten
    assert [model.name for model in models] == ["model-prepare", "model-labels", "model-pictures"]
    assert [list(output.dims) for output in ensemble.config.output] == [[10]] * 3
    _, version, _ = picture_models(settings_of(served_of()), names, top=3)
    written(version, tmp_path)
    model = model_of(backend("labels"), version, tmp_path / version.name)
    logits = np.random.default_rng(0).normal(0, 3, (4, 10)).astype(np.float32)
    (answer,) = model.execute([{"logits": logits}])
    best = np.argsort(-logits, axis=1)[:, :3]
    np.testing.assert_array_equal(answer.indices, best)
    assert answer.labels.tolist() == [[names[index].encode() for index in row] for row in best]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(answer.probabilities, np.take_along_axis(shares, best, 1), rtol=1e-5)
    for broken in (np.nan, np.inf, -np.inf):
        logits[1, 2] = broken
        (answer,) = model.execute([{"logits": logits}])
        assert answer.error == "the model's logits are not finite"
    (tmp_path / version.name / "1" / "labels.txt").write_text("too\nfew\n")
    with pytest.raises(ValueError, match="holds 2 names"):
        model_of(backend("labels"), version, tmp_path / version.name)


def written(version: ModelVersion, repository: Path) -> None:
    """A model of one version."""
    folder = repository / version.name / "1"
    folder.mkdir(parents=True)
    for name, content in version.files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
    (repository / version.name / "config.pbtxt").write_text(as_text(version.config))


@pytest.fixture(scope="module")
def running(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`digits` (FP32) and `pixels` (uint8), each with what takes pictures."""
    repository = tmp_path_factory.mktemp("pictures") / "repository"
    labels = tmp_path_factory.mktemp("labels") / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    options = DeployOptions(instances=1, threads=1, labels=labels, decode=DecodeLimits(pixels=1_000_000))
    kinds: tuple[tuple[str, Input], ...] = (("pixels", "uint8"), ("digits", "float32"))
    for name, input in kinds:
        exported(tuned_run, "fp32", input=input)
        deploy(tuned_run, repository, name, options)
    images = verification_batches(tuned_run, None)[0][0][0][:16].numpy()
    with served(tuned_run, repository, images) as server:
        yield server


def asked(running: Running, model: str, protocol: Protocol, pictures: list[bytes]) -> dict[str, np.ndarray]:
    library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
    with closing(library.InferenceServerClient(running.url(protocol))) as client:
        given = library.InferInput("picture", [len(pictures), 1], "BYTES")
        given.set_data_from_numpy(np.array([[content] for content in pictures], dtype=np.object_))
        answer = client.infer(f"{model}-pictures", [given])
        return {name: answer.as_numpy(name) for name in ("probabilities", "labels", "indices")}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_takes_pictures(running: Running, tmp_path: Path, protocol: Protocol) -> None:
    """The same classes and probabilities as `predict` finds, for files of every kind and mode."""
    contents = [encoded(picture_of(mode, 50, 37, seed), kind) for seed, (kind, mode) in enumerate(KINDS_AND_MODES)]
    files = [tmp_path / str(index) for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    for model in ("digits", "pixels"):
        with running.client(model, protocol) as client:
            wanted = [found.guesses for found in predict(client, files, 5)]
        for start in range(0, len(files), 8):
            answer = asked(running, model, protocol, contents[start : start + 8])
            for row, guesses in enumerate(wanted[start : start + 8]):
                assert answer["indices"][row].tolist() == [guess.index for guess in guesses]
                assert [label.decode() for label in answer["labels"][row]] == [LABELS[g.index] for g in guesses]
                assert answer["probabilities"][row] == pytest.approx([guess.score for guess in guesses], abs=1e-5)


def test_who_prepares_is_measured_in_turns(running: Running, tmp_path: Path) -> None:
    files = make_pictures(tmp_path)
    assert {Image.open(file).size for file in files} == {(500, 375)}
    done = measure(running.url("grpc"), "digits", files, turns=2, seconds=0.3)
    found = {(row.of["prepared_by"], row.of["request_images"], row.figure): row for row in rows("digits", done)}
    assert len(found) == 6 and {row.of["model"] for row in found.values()} == {"digits"}
    for row in found.values():
        assert row.low is not None and row.high is not None and row.low <= float(row.value) <= row.high
        assert row.figure == "cost_percent" or row.low > 1
    assert all(cost > -100 for turn in done for cost in turn.cost())


def test_a_bad_picture_spoils_no_other_request(running: Running) -> None:
    sound = encoded(picture_of("RGB", 50, 37, 0), "JPEG")
    bad = (sound[:-300], b"", b"text", encoded(Image.new("1", (2000, 2000))), encoded(Image.new("1", (9, 9)), "GIF"))
    wanted = asked(running, "digits", "grpc", [sound])

    def ask(index: int) -> str:
        try:
            answer = asked(running, "digits", "grpc", [bad[index // 2 % len(bad)] if index % 2 else sound])
            np.testing.assert_allclose(answer["probabilities"], wanted["probabilities"], atol=1e-6)
        except InferenceServerException as error:
            return error.message()
        return "answered"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ask, range(80)))
    assert said[::2] == ["answered"] * 40
    assert all("picture 0 of the request: it " in message for message in said[1::2]), said[1::2]
    assert is_ready(running.address)


def test_more_pictures_than_there_is_place_for_are_refused(running: Running, tuned_run: Path) -> None:
    """Else they would wait in memory, as large as they were sent."""
    exported(tuned_run, "fp32")
    deploy(
        tuned_run,
        running.repository,
        "narrow",
        DeployOptions(instances=1, threads=1, queue_limit=2, decode=DecodeLimits()),
    )
    large = encoded(picture_of("RGB", 2000, 2000, 0), "PNG")
    outcomes = Counter[str]()

    def ready() -> bool:
        with closing(tritonclient.http.InferenceServerClient(running.url("http"))) as client:
            return bool(client.is_model_ready("narrow-pictures"))

    def ask(_: int) -> None:
        try:
            outcomes["right" if asked(running, "narrow", "grpc", [large])["labels"].shape == (1, 5) else "wrong"] += 1
        except InferenceServerException as error:
            outcomes["refused" if error.status() == "StatusCode.UNAVAILABLE" else str(error)] += 1

    until(ready)
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, range(48)))
    assert outcomes["right"] and outcomes["refused"] and set(outcomes) == {"right", "refused"}, outcomes
    assert asked(running, "narrow", "grpc", [large])["labels"].shape == (1, 5)
