"""Mistakes of users that once ended in tracebacks: each has its sentence, its remedy and exit code 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refusal
from PIL import Image

import lowpass
from lowpass.pipeline.data.folders import FolderImages

DIGITS = ("--model", "digits_deit", "--data", "digits", "--target-macs", "0.5")


def scenes(root: Path, classes: int = 10, images: int = 6) -> Path:
    """An image folder of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory-budget", "nan"), "--memory-budget takes GiB, 0 or more, not nan"),
        (("--memory-budget", "-1"), "--memory-budget takes GiB, 0 or more, not -1"),
        (("--score-images", "2"), "2 images to score by (--score-images 2) are too few for recovery"),
        (("--image-cutoff", "nan"), "image_cutoff"),
        (("--image-cutoff", "inf"), "image_cutoff"),
        (("--lfs-weight", "nan"), "lfs_weight"),
        (("--token-share", "nan"), "token_share"),
        (("--batch-size", "0"), "batch_size"),
    ],
)
def test_values_that_are_none(
    options: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert said in refusal(capsys, "compress", *DIGITS, "--out", str(out), *options)
    assert not out.exists()


def test_two_images_are_enough_without_recovery(tmp_path: Path, tiny_source: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"score_images": 2, "measure_images": 32, "recovery": False, "target_macs": 0.6}
    run = lowpass.compress(tiny_source["model"], "digits", tmp_path / "run", weights=tiny_source["weights"], **settings)
    assert run.metrics.slim.macs < run.metrics.dense.macs


def test_an_unknown_tag_lists_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(
        capsys,
        *("compress", "--model", "vit_small_patch16_224.no_tag", "--weights", "none.pth", "--data", "digits"),
        *("--target-macs", "0.5", "--out", str(tmp_path / "run")),
    )
    assert "vit_small_patch16_224 has no tag 'no_tag'" in line and "augreg_in21k_ft_in1k" in line


def test_more_classes_than_the_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scenes(tmp_path / "images", classes=11, images=1)
    options = ("--model", "digits_deit", "--data", str(folder), "--target-macs", "0.5", "--out", str(tmp_path / "run"))
    assert "has 11 classes, but the model has 10" in refusal(capsys, "compress", *options)


def test_a_broken_image_in_the_midst_of_training_is_named(
    tmp_path: Path, slim_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not among those that are opened first, and not replaced by its neighbour."""
    folder = scenes(tmp_path / "images")
    broken = folder / "train" / "c3" / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    monkeypatch.setattr("lowpass.pipeline.data.folders.PROBED", 1)
    line = refusal(capsys, "finetune", str(slim_run), "--data", str(folder), "--epochs", "1", "--batch-size", "8")
    assert f"cannot read the image {broken}" in line
    with pytest.raises(lowpass.InputError, match=r"4\.png"):
        list(FolderImages(folder / "train", lambda image: image, "RGB"))


def test_classes_are_in_the_order_of_the_labels(tmp_path: Path) -> None:
    """timm's natural order: 2 before 10."""
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (int(name), 0, 0)).save(tmp_path / name / "a.png")
    images = FolderImages(tmp_path, lambda image: image, "RGB")
    assert images.classes == ("1", "2", "10")
    for image, label in (images[i] for i in range(3)):
        assert image.getpixel((0, 0))[0] == int(images.classes[label])
