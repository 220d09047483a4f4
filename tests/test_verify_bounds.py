"""How near a file must come to PyTorch: whatever the scale of its logits, and however few the images."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lowpass.export.onnx.export
import lowpass.export.onnx.verify
from lowpass.export.onnx.bounds import BOUNDS, allowed_wrong, usual
from lowpass.export.onnx.compared import compared
from lowpass.export.onnx.export import export
from lowpass.export.onnx.file import onnx_path, serialise
from lowpass.export.onnx.verify import VERIFICATION_FILE, Verification
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.session import Images, Session
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import verification_batches

FP32 = ExportOptions()
Change = Callable[[Images], Images]  # of logits [B, classes]


class InPyTorch:
    """A model in the place of a file, its logits changed; `Session`."""

    def __init__(self, model: SlimViT, change: Change = lambda logits: logits) -> None:
        self.model, self.change = model, change

    def load(self, images: Images) -> None:
        self.images = torch.from_numpy(images)

    @torch.inference_mode()
    def run(self) -> None:
        self.output = self.model(self.images).numpy()

    def logits(self) -> Images:
        return self.change(self.output)


@pytest.fixture(scope="module")
def images(tuned_run: Path) -> Batches:
    return verification_batches(tuned_run, None)[0]


@pytest.fixture(scope="module")
def content(tuned_run: Path) -> bytes:
    return serialise(tuned_run, FP32)


@pytest.fixture
def run(tuned_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned_run, tmp_path / "run", ignore=shutil.ignore_patterns("model.*")))


@pytest.fixture
def verify(run: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verification]:
    """An export in which this runs in the place of the file."""

    def verified(session: Session, batches: Batches, precision: Precision = "fp32") -> Verification:
        monkeypatch.setattr(lowpass.export.onnx.export, "serialise", lambda *_: content)
        monkeypatch.setattr(lowpass.export.onnx.verify, "verifier", lambda *_: ("a stand-in", session))
        return export(run, ExportOptions(precision=precision), batches)

    return verified


def noisy(model: SlimViT, share: float) -> SlimViT:
    """Another model: noise on each weight, as a share of its tensor's spread."""
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.numel() > 1:
                parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return other


def on_first_image(change: Change) -> Change:
    """Of everything that is run, one image."""
    done = list[bool]()

    def changed(logits: Images) -> Images:
        logits = logits.copy()
        if not done:
            done.append(True)
            logits[0] = change(logits[0])
        return logits

    return changed


def test_the_scale_of_logits_does_not_matter(run: Path, images: Batches) -> None:
    slim = SlimViT.load(run)
    slim.vit.head.weight.data *= 1024
    slim.vit.head.bias.data *= 1024
    slim.save(run)
    done = export(run, FP32, images)
    assert done.same_top1 == 100 and done.outliers == 0 and done.largest_logit > 1000
    assert done.largest_difference > 1e-4  # which an absolute bound would refuse


def test_one_image_in_a_thousand_is_reported(
    run: Path, images: Batches, verify: Callable[..., Verification], caplog: pytest.LogCaptureFixture
) -> None:
    """As where two tokens tie; top-1 stays."""
    raised = on_first_image(lambda logits: logits + 0.5)
    with caplog.at_level(logging.INFO, "lowpass"):
        done = verify(InPyTorch(SlimViT.load(run), raised), images)
    assert done.images == 1000 and done.outliers == 1 and done.same_top1 == 100 and done.ties == 0
    assert done.largest_difference == pytest.approx(0.5, abs=1e-5) and done.usual_difference < 1e-5
    assert "1 of 1000 images differ from PyTorch" in caplog.text
    noted = json.loads((run / VERIFICATION_FILE).read_text())["model.fp32.onnx"]
    assert noted["outliers"] == 1 and noted["largest_difference"] == done.largest_difference


def test_fp32_has_the_same_top1_on_all(run: Path, images: Batches, verify: Callable[..., Verification]) -> None:
    """One image in 1,000 that no tie explains is one too many."""
    session = InPyTorch(SlimViT.load(run), on_first_image(lambda logits: -logits))
    with pytest.raises(RunError, match=r"top-1 agrees with PyTorch on 99\.90% of 1000 images"):
        verify(session, images)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_ties_of_logits_are_no_difference(
    run: Path, images: Batches, verify: Callable[..., Verification], precision: Precision
) -> None:
    """Two classes that score alike: either may be first, on every image, and it is said of how many."""
    slim = SlimViT.load(run)
    for parameter in (slim.vit.head.weight, slim.vit.head.bias):
        parameter.data[1] = parameter.data[0]
    slim.save(run)

    def swap(logits: Images) -> Images:
        return logits[:, [1, 0, *range(2, 10)]] + np.float32([0, 1e-5] + [0] * 8)

    with torch.inference_mode():
        first = torch.cat([slim(batch).argmax(-1) for batch, _ in images])
    done = verify(InPyTorch(slim, swap), images, precision)
    assert done.ties == int((first == 0).sum()) > 20 and done.same_top1 < 98


def test_ties_of_tokens_are_no_difference(run: Path, images: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image has one token twice: the file may keep either, and its top-1 may be either's."""
    slim, batch = SlimViT.load(run), images[0][0][:8].numpy()
    bound = BOUNDS["fp32"]
    other = InPyTorch(slim, lambda logits: -logits)
    assert not compared(other, slim, [batch], bound, in_doubt=True).tied.any()
    for block in slim.blocks:
        block.lowpass.zero_()  # every token scores zero
    tied = compared(other, slim, [batch], bound, in_doubt=True)
    assert tied.tied.all() and not tied.same.any() and (tied.differences > 0.1).all()
    assert not compared(other, slim, [batch], bound).tied.any()  # looked for in FP32 alone


class WrongInFP32(SlimViT):
    """Off by one, but not in FP64."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + (images.dtype == torch.float32)


def test_pytorch_in_doubt_is_asked_in_fp64(tuned_run: Path, images: Batches) -> None:
    """What agrees with FP64 is right, whatever FP32 says."""
    session, batch = InPyTorch(SlimViT.load(tuned_run)), images[0][0][:8].numpy()
    slim, bound = SlimViT.load(tuned_run), BOUNDS["fp32"]
    slim.__class__ = WrongInFP32
    assert compared(session, slim, [batch], bound, in_doubt=True).differences.max() < 1e-5
    assert compared(session, slim, [batch], bound).differences.min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.002), ("fp16", 0.02), ("bf16", 0.1), ("int8", 0.1)])
def test_a_slightly_different_model_is_refused(
    run: Path, images: Batches, verify: Callable[..., Verification], precision: Precision, share: float, count: int
) -> None:
    few = [(batch[:count], labels[:count]) for batch, labels in images[: None if count == 1000 else 1]]
    slim = SlimViT.load(run)
    path = onnx_path(run, precision)
    with pytest.raises(RunError, match="not written"):
        verify(InPyTorch(noisy(slim, share)), few, precision)
    assert not path.exists()
    assert verify(InPyTorch(slim), few, precision).images == count and path.exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(
    run: Path, images: Batches, verify: Callable[..., Verification], precision: Precision, value: float
) -> None:
    """On one image of 1,000."""
    session = InPyTorch(SlimViT.load(run), on_first_image(lambda logits: np.full_like(logits, value)))
    with pytest.raises(RunError, match="logits are not finite"):
        verify(session, images, precision)


def test_twenty_images_with_a_near_tie_pass(run: Path, images: Batches, verify: Callable[..., Verification]) -> None:
    """One of 20 is 5%, and says nothing about 99.5%; two of them do."""
    slim = SlimViT.load(run)
    few = [(batch[:20], labels[:20]) for batch, labels in images[:1]]

    def flipped(count: int) -> Change:
        def change(logits: Images) -> Images:
            changed = logits.copy()
            changed[:count] *= -1
            return changed

        return change

    done = verify(InPyTorch(slim, flipped(1)), few, "fp16")
    assert done.same_top1 == 95 and done.ties == 0 and done.outliers == 1
    with pytest.raises(RunError, match=r"90\.00% of 20 images"):
        verify(InPyTorch(slim, flipped(2)), few, "fp16")


def test_bounds_of_few_images() -> None:
    fp32, fp16 = BOUNDS["fp32"], BOUNDS["fp16"]
    ramp = np.arange(1000.0)
    assert usual(ramp, fp32) == 989 and usual(ramp[:20], fp32) == 19 and usual(ramp[:1], fp32) == 0
    assert usual(ramp, fp16) == 499 and usual(ramp[:3], fp16) == 1 and usual(ramp[:1], fp16) == 0
    assert [allowed_wrong(n, fp16) for n in (1, 20, 200, 201, 1000)] == [1, 1, 1, 2, 5]
    assert [allowed_wrong(n, fp32) for n in (1, 1000)] == [0, 0]
