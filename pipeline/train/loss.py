"""What a training step minimises: labels, and what the dense model answers."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.pipeline.data.draws import drawn_by
from lowpass.pipeline.train.settings import FinetuneSettings

Mixing = Callable[[Tensor, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]


def distillation_loss(logits: Tensor, labels: Tensor, answer: Tensor | None, weight: float, smoothing: float) -> Tensor:
    """`(1 - w) CE(logits, labels) + w CE(logits, answer)` (hard distillation: Touvron et al., 2021, eq. 3).

    Args:
        logits: [B, classes].
        labels: classes [B], or their shares [B, classes] of mixed images.
        answer: the teacher's classes [B]; None: there is none, and no share `weight` either.
        weight: w, in [0, 1].
        smoothing: of labels that are classes; shares are smooth already.
    """
    loss = (1 - weight) * F.cross_entropy(logits, labels, label_smoothing=0.0 if labels.ndim == 2 else smoothing)
    return loss if answer is None else loss + weight * F.cross_entropy(logits, answer)


def mixing(settings: FinetuneSettings, num_classes: int) -> Mixing | None:
    """timm's mixup and cutmix (Zhang et al., 2018; Yun et al., 2019), drawn by place; None: neither is asked for."""
    if not (settings.mixup or settings.cutmix):
        return None
    mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes)

    def mixed(images: Tensor, labels: Tensor, place: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if len(images) == 1:
            return images, F.one_hot(labels, num_classes).to(images.dtype)
        if len(images) % 2:  # it mixes pairs; unreadable images leave an odd one out
            images, labels = images[:-1], labels[:-1]
        with drawn_by(*place):
            result: tuple[Tensor, Tensor] = mix(images, labels)
        return result

    return mixed


@torch.no_grad()
def answer_of(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    """The teacher's class of each image [B]."""
    return None if teacher is None else teacher(images).argmax(-1)
