"""The folder for Optimum, read by what Optimum builds on: Transformers' config and image processor, and ONNX Runtime.

Optimum itself wants an older Transformers than the one of these tests: `docs/export-and-runtimes.md` says with which it
was tried.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import answer, refusal
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

import lowpass.pipeline.run.images
from lowpass.export.onnx.file import onnx_path
from lowpass.export.onnx.optimum import INPUT, config_of, optimum_path, processor_of, write_optimum
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import transforms
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT

FILES = {"config.json", "model.onnx", "preprocessor_config.json"}
ROUNDED = 2 / 255  # Transformers resizes whole numbers


def pictures() -> list[Image.Image]:
    """Smooth ones of several shapes, and a digit."""
    draw = np.random.default_rng(0)
    small = [Image.fromarray(draw.integers(0, 256, (4, 5, 3), np.uint8)) for _ in range(3)]
    sizes = [(80, 60), (40, 90), (32, 32)]
    drawn = [one.resize(size, Image.Resampling.BICUBIC) for one, size in zip(small, sizes, strict=True)]
    return [*drawn, Image.open(Path(__file__).parent.parent / "deploy" / "digit.png").convert("RGB")]


def logits_of(file: Path, name: str, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: images})
    return np.asarray(logits)


def with_preprocessing(architecture: Architecture, **changes: object) -> Architecture:
    changed = architecture.preprocessing.model_copy(update=changes)
    return architecture.model_copy(update={"preprocessing": changed})


def test_the_folder_gives_the_logits_of_the_model(
    slim_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowpass.pipeline.run.images, "VERIFIED_IMAGES", 64)
    told = answer(capsys, "export", str(slim_run), "--format", "optimum")
    folder = optimum_path(slim_run, "fp32")
    assert told["optimum"] == str(folder) and told["opset"] == 23 and told["largest_difference"] < 1e-3
    assert folder == slim_run / "model.fp32.optimum" and {path.name for path in folder.iterdir()} == FILES
    config = AutoConfig.from_pretrained(folder)
    assert config.num_labels == 10 and config.id2label[3] == "3" and config.label2id["7"] == 7
    assert config.image_size == 32 and config.num_hidden_layers == 6
    slim = SlimViT.load(slim_run)
    _, ours = transforms(slim.architecture)
    images = AutoImageProcessor.from_pretrained(folder)(pictures(), return_tensors="np")[INPUT]
    wanted = torch.stack([ours(picture) for picture in pictures()])
    np.testing.assert_allclose(images, wanted.numpy(), atol=ROUNDED / min(slim.architecture.preprocessing.std), rtol=0)
    logits = logits_of(folder / "model.onnx", INPUT, np.asarray(images, np.float32))
    with torch.inference_mode():
        expected = slim(torch.from_numpy(np.asarray(images, np.float32))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    exported = logits_of(onnx_path(slim_run, "fp32"), "images", np.asarray(images, np.float32))
    np.testing.assert_array_equal(logits, exported)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_pct": 0.875},
        {"crop_pct": 0.8, "interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_mode": "squash", "crop_pct": 0.8},
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    ],
    ids=str,
)
def test_pictures_are_prepared_as_timm_does(digits_slim: SlimViT, tmp_path: Path, changes: dict[str, object]) -> None:
    architecture = with_preprocessing(digits_slim.architecture, **changes)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_of(architecture)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    _, ours = transforms(architecture)
    for picture in pictures():
        images = processor(picture, return_tensors="np")[INPUT][0]
        atol = ROUNDED / min(architecture.preprocessing.std)
        np.testing.assert_allclose(images, ours(picture).numpy(), atol=atol, rtol=0)


def test_what_has_no_words_there_is_refused(
    digits_slim: SlimViT, slim_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = digits_slim.architecture
    for changes, what in (
        ({"crop_mode": "border"}, "crops of mode 'border' to 32x32"),
        ({"interpolation": "random"}, "random resizing"),
    ):
        with pytest.raises(InputError, match=what):
            processor_of(with_preprocessing(architecture, **changes))
    grey = architecture.model_copy(update={"dense": architecture.dense.model_copy(update={"in_chans": 1})})
    with pytest.raises(InputError, match="pictures of 1 channel:"):
        processor_of(grey)
    wide = architecture.model_copy(update={"dense": architecture.dense.model_copy(update={"img_size": (32, 64)})})
    with pytest.raises(InputError, match="crops of mode 'center' to 32x64"):
        processor_of(wide)
    assert config_of(wide, ("a", "b"))["image_size"] == [32, 64]
    said = refusal(capsys, "export", str(slim_run), "--format", "optimum", "--input", "uint8")
    assert "--format optimum takes images that Transformers has normalised" in said
    with pytest.raises(InputError, match="run `lowpass export"):
        write_optimum(slim_run, "bf16")
