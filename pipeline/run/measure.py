"""`--dry-run --measure`: the parts of a run timed for a while on this machine, and the hours that follow.

The search and the tests are taken for forward passes, fine-tuning for steps of a student as large as the dense model;
both are scaled by their MACs. On a GPU images are read meanwhile; on CPUs reading takes time from computing.
"""

import copy
import resource
import time
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.datasets import Data
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.train.finetune import suitable_precision
from lowpass.pipeline.train.settings import FinetuneSettings

SECONDS = 60.0  # in all
LEAST_TURNS = 2
STEP = 4  # forwards of the dense model in a measured step: its own as teacher, the student's, and back
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Rates(BaseModel):
    """Images a second on one device: forward through the dense model, trained with the dense model as student and as
    teacher, and read with augmentation (None: there are no images). `peak_bytes`: of the GPU, else of this process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    seconds: float
    forward: float
    trained: float
    read: float | None
    peak_bytes: int


class Hours(BaseModel):
    """What a run would take at these rates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rates: Rates
    search: float
    test: float
    finetune: float
    total: float


def measure(
    dense: SlimViT, data: Data | None, batch_size: int, settings: FinetuneSettings, seed: int, seconds: float = SECONDS
) -> Rates:
    """Time each part for a third of `seconds`, at the least a few batches.

    Args:
        dense: the dense model.
        data: the run's images, or None.
        batch_size: of the search.
        settings: of fine-tuning.
        seed: of what is drawn.
        seconds: about how long to measure.
    """
    began, device = time.monotonic(), best_device()
    logger.info("measuring on %s for about %.0f s", device, seconds)
    size, channels = dense.architecture.dense.img_size, dense.architecture.dense.in_chans
    model, part = copy.deepcopy(dense).to(device).eval(), seconds / 3
    images = torch.randn(batch_size, channels, *size, device=device)

    @torch.inference_mode()
    def forward() -> int:
        model(images)
        return len(images)

    forward_rate = _rate(forward, part, device)
    trained_rate = _rate(_step(model, settings, device), part, device)
    read_rate = None if data is None else _reading(data, settings.batch_size, seed, part)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _resident()
    return Rates(
        device=str(device),
        seconds=time.monotonic() - began,
        forward=forward_rate,
        trained=trained_rate,
        read=read_rate,
        peak_bytes=peak,
    )


def hours(rates: Rates, dense_macs: int, search_macs: int, test_macs: int, finetune_macs: int, images: int) -> Hours:
    """From MACs of whole steps, and how many `images` fine-tuning reads."""
    search, test = (macs / (dense_macs * rates.forward) for macs in (search_macs, test_macs))
    computing = finetune_macs / (STEP * dense_macs * rates.trained)
    reading = images / rates.read if rates.read else 0.0
    finetune = computing + reading if rates.device == "cpu" else max(computing, reading)
    return Hours(
        rates=rates,
        search=search / 3600,
        test=test / 3600,
        finetune=finetune / 3600,
        total=(search + test + finetune) / 3600,
    )


def _step(teacher: SlimViT, settings: FinetuneSettings, device: torch.device) -> Callable[[], int]:
    """A step of training, on noise."""
    student, dense = copy.deepcopy(teacher).train().requires_grad_(True), teacher.architecture.dense
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-6)
    images = torch.randn(settings.batch_size, dense.in_chans, *dense.img_size, device=device)
    precision = settings.mixed_precision or suitable_precision()
    autocast = torch.autocast(device.type, HALVES.get(precision, torch.bfloat16), enabled=precision != "no")

    def step() -> int:
        with autocast:
            with torch.no_grad():
                answer: Tensor = teacher(images).argmax(-1)
            loss = F.cross_entropy(student(images).float(), answer)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return len(images)

    return step


def _reading(data: Data, batch_size: int, seed: int, seconds: float) -> float:
    """Images a second, once the processes that read them have begun."""
    batches, seen = iter(data.train_loader(batch_size, seed)), 0
    next(batches, None)
    began = time.monotonic()
    for batch in batches:
        seen += 0 if batch is None else len(batch[1])
        if time.monotonic() - began > seconds:
            break
    return seen / (time.monotonic() - began) if seen else float("inf")


def _rate(run: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Images a second; the first turn does not count."""
    run()
    _wait(device)
    began, images, turns = time.monotonic(), 0, 0
    while turns < LEAST_TURNS or time.monotonic() - began < seconds:
        images, turns = images + run(), turns + 1
        _wait(device)
    return images / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> int:
    """KiB at the peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
