"""The dense models to prune: DINOv2 fitted to a data set, as a checkpoint that `lowpass compress` takes."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.real.convert import convert
from lowpass.benchmarks.real.dinov2 import NAME, dinov2_small
from lowpass.benchmarks.real.head import fit_head, head_top1
from lowpass.benchmarks.real.last_blocks import Training, train_last_blocks
from lowpass.benchmarks.real.pictures import image_folder
from lowpass.benchmarks.real.steps import begin, finish
from lowpass.benchmarks.real.tokens import Frozen, frozen_tokens
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256, write_bytes, write_json
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.files import read_checkpoint
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Data, len_of, load_data
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.evaluate import top1

CHECKPOINT, META = "dense.safetensors", "meta.json"
TEST_BATCH = 50


@dataclass(frozen=True)
class Setting:
    """A data set at an image size, and how the model is fitted to it.

    `train_images` are drawn from the training split; None: all of it. `block` is the first that is trained, `c` the
    inverse penalty of the linear head.
    """

    data: str
    img_size: int
    train_images: int | None
    training: Training
    block: int = 8
    c: float = 0.01


SETTINGS = {
    "fashion-112": Setting("fashion", 112, 20_000, Training(epochs=6)),
    "fashion-224": Setting("fashion-small", 224, 6_000, Training(epochs=6)),
    "clipart-112": Setting("clipart", 112, None, Training(epochs=8)),
}


def make_dense(name: str, cache: Path, seed: int = 0) -> Path:
    """Fit a linear head, then the last blocks, and measure top-1 on every test image; what is done is not done again.

    Args:
        name: of a setting.
        cache: where everything is kept; the setting's own files are in `cache`/`name`.
        seed: of the images that are drawn and of training.

    Returns:
        `cache`/`name`/dense.safetensors, beside it `meta.json` with top-1 and where it comes from.

    Raises:
        InputError: the setting is unknown, or its packages cannot be had.
        RunError: training diverged.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise InputError(f"there is no setting {name!r}; known are {', '.join(SETTINGS)}")
    pictures, said = image_folder(cache, setting.data)
    backbone, folder = convert(cache), cache / name
    made_from = {"seed": seed, "backbone": sha256(backbone), "pictures": said}
    to_block = made_from | {key: asdict(setting)[key] for key in ("data", "img_size", "train_images", "block")}
    finished = begin(folder / "dense", to_block | asdict(setting))
    checkpoint = folder / CHECKPOINT
    if finished is None or not checkpoint.exists():
        num_classes = sum(entry.is_dir() for entry in (pictures / "train").iterdir())
        model = dinov2_small(setting.img_size, num_classes, read_checkpoint(backbone))
        data = load_data(str(pictures), SlimViT.from_timm(model).architecture, seed, DataOptions(workers=0))
        train, test = _frozen(model, data, setting, folder / "tokens", to_block, seed)
        start = time.perf_counter()
        model.head = fit_head(train.features, train.labels, num_classes, setting.c)
        linear, fitting = head_top1(model.head, test.features, test.labels), time.perf_counter() - start
        logger.info("%s: linear head %.2f %% on %d test images", name, linear, len(test.labels))
        training = train_last_blocks(model, setting.block, train, setting.training, folder / "dense", seed)
        write_bytes(checkpoint, save({key: tensor.contiguous() for key, tensor in model.state_dict().items()}))
        start = time.perf_counter()
        measured = _measured(checkpoint, data)
        seconds = {"tokens": train.seconds + test.seconds, "head": fitting, "training": training}
        seconds["testing"] = time.perf_counter() - start
        counts = {"train_images": len(train.labels), "test_images": len(test.labels)}
        finished = finish(
            folder / "dense",
            {"model": NAME, "img_size": setting.img_size, "top1": measured, "linear_top1": linear, **counts}
            | {"seed": seed, "seconds": seconds, "sha256": sha256(checkpoint), "pictures": said}
            | {"setting": asdict(setting), **_machine()},
        )
        logger.info("%s: dense %.2f %% after %.0f s", name, measured, sum(seconds.values()))
    write_json(folder / META, {"data": str(pictures), **finished})
    return checkpoint


def _frozen(
    model: Any, data: Data, setting: Setting, folder: Path, inputs: dict[str, Any], seed: int
) -> tuple[Frozen, Frozen]:
    """Training images with the tokens that enter the first trained block, and all test images without."""
    begin(folder, inputs)
    order = torch.randperm(len_of(data.calibration), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: setting.train_images]
    train = frozen_tokens(model, data, data.calibration, chosen, setting.block, folder, "train")
    test = frozen_tokens(model, data, data.test, list(range(len_of(data.test))), None, folder, "test")
    return train, test


def _measured(checkpoint: Path, data: Data) -> float:
    """Top-1 in percent on all test images, of the file as `lowpass compress` reads it."""
    model = SlimViT.from_timm(load_model(NAME, checkpoint))
    return top1(model, data.loader(data.test, TEST_BATCH), "testing")


def _machine() -> dict[str, object]:
    machine = describe()
    return {
        "cpu": machine.cpu,
        "threads": machine.threads["torch"],
        "versions": {"python": machine.python, **machine.packages},
    }
