"""Mistakes of users that once ended in tracebacks: each has its sentence, its remedy and exit code 2."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refusal
from PIL import Image

import lowpass
from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.finetune import finetune
from lowpass.pipeline.train.settings import FinetuneSettings

DIGITS = ("--model", "digits_deit", "--data", "digits", "--target-macs", "0.5")


def scenes(root: Path, classes: int = 10, images: int = 6) -> Path:
    """An image folder of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory-budget", "nan"), "--memory-budget takes GiB, 0 or more, not nan"),
        (("--memory-budget", "-1"), "--memory-budget takes GiB, 0 or more, not -1"),
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


def test_two_images_are_enough_without_recovery(
    tmp_path: Path, tiny_source: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"score_images": 2, "measure_images": 32, "target_macs": 0.6, **tiny_source}
    with caplog.at_level(logging.INFO, "lowpass"):
        run = lowpass.compress(settings.pop("model"), "digits", tmp_path / "run", yes=True, **settings)
    assert "recovery is off: it is judged on every 4th of the images that score, and there are 2" in caplog.text
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


def test_a_broken_image_in_the_midst_of_training_is_passed_over(
    tmp_path: Path, tiny_source: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not among those that are opened first; nothing takes its place, and where it is measured it is refused."""
    folder = scenes(tmp_path / "images")
    monkeypatch.setattr("lowpass.pipeline.data.folders.PROBED", 1)
    slim = SlimViT.from_timm(lowpass.load_model(**tiny_source))
    broken = folder / "train" / "3" / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    data = load_data(str(folder), slim.architecture, options=DataOptions(workers=0))
    seen = [batch for batch in data.train_loader(8) if batch is not None]
    assert 54 <= sum(len(labels) for _, labels in seen) <= 56  # 60 images in batches of 8
    settings = FinetuneSettings(epochs=3, batch_size=60, distill_weight=0)
    with caplog.at_level(logging.INFO, "lowpass"):
        finetune(slim, None, data, settings, 0)
    assert "fine-tuning: passed over 3 images that cannot be read, in 3 epochs" in caplog.text
    with pytest.raises(lowpass.InputError, match=r"cannot read the image .*3/4\.png"):
        data.calibration_batches(60, 8, 0, "reading")
