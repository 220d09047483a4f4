"""The teacher of a training: the run's dense model, or another that is named."""

import math
from pathlib import Path

import timm
import torch
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.load import load_model, local_files
from lowpass.pipeline.checkpoints.origin import origin_of
from lowpass.pipeline.data.datasets import Data, len_of, subset
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.run.readings import CHECKED_IMAGES, DEVIATIONS
from lowpass.pipeline.train.evaluate import top1
from lowpass.pipeline.train.settings import FinetuneSettings
from lowpass.pipeline.train.teacher import ForeignTeacher


def teacher_files(directory: Path, settings: FinetuneSettings) -> dict[str, str]:
    """SHA-256 of the files that a training's teacher is read from, by their names. What a hub or a package brings is
    not among them.

    Args:
        directory: the run; its own dense model goes by its name alone, for runs may be moved.
        settings: of the training.
    """
    if not settings.distils:
        return {}
    if settings.teacher is not None:
        return {str(file): sha256(file) for file in local_files(settings.teacher, settings.teacher_weights)}
    return {DENSE_WEIGHTS_FILE: sha256(directory / DENSE_WEIGHTS_FILE)} if has_dense(directory) else {}


def foreign_teacher(
    name: str, weights: Path | None, student: Architecture, images: Data, batch_size: int, seed: int
) -> nn.Module:
    """A model that `load_model` knows, as a teacher of a student; its top-1 on some test images is said.

    Args:
        name: timm's, of a folder, or on a hub.
        weights: its checkpoint, where the name brings none.
        student: what it is to teach.
        images: of the training.
        batch_size: of the check.
        seed: of the images that are checked.

    Raises:
        InputError: it has no weights, other classes or channels than the student, or does no better than a guess.
    """
    if weights is None and timm.is_model(name) and name != "digits_deit":
        raise InputError(f"--teacher {name} needs its trained weights: give --teacher-weights FILE")
    model = load_model(name, weights)
    dense, classes = student.dense, getattr(model, "num_classes", None)
    if classes != dense.num_classes:
        raise InputError(
            f"--teacher {name} has {classes} classes, the student {dense.num_classes}: they must be the same"
        )
    channels = len(model.pretrained_cfg["mean"])  # type: ignore[index]
    if channels != dense.in_chans:
        raise InputError(f"--teacher {name} takes images of {channels} channels, the student of {dense.in_chans}")
    named = origin_of(model).classes
    if (
        named is not None
        and images.classes is not None
        and set(named) == set(images.classes)
        and named != images.classes
    ):
        raise InputError(
            f"--teacher {name} numbers the same classes otherwise than the images; train with its numbering"
        )
    teacher = ForeignTeacher(model, student.preprocessing).eval()
    if teacher.size is not None and teacher.size != dense.img_size:
        logger.info("the teacher sees images resized to %dx%d", *teacher.size)
    _check(teacher, name, images, batch_size, seed)
    return teacher


def _check(teacher: nn.Module, name: str, images: Data, batch_size: int, seed: int) -> None:
    """One figure shows other classes, pixels or weights than it was trained with."""
    chosen = torch.randperm(len_of(images.test), generator=torch.Generator().manual_seed(seed))[:CHECKED_IMAGES]
    batches = images.loader(subset(images.test, sorted(chosen.tolist())), batch_size)
    reached, chance = top1(teacher.to(best_device()), batches, "checking the teacher"), 100 / images.num_classes
    logger.info("teacher top-1: %.1f %% on %d of the test images", reached, len(chosen))
    if reached <= chance + DEVIATIONS * math.sqrt(chance * (100 - chance) / len(chosen)):
        raise InputError(
            f"the teacher {name} has a top-1 of {reached:.1f} % on {len(chosen)} of the test images, where guessing "
            f"gives {chance:.1f} %: these are not the weights, the classes or the pixels that it was trained with"
        )
