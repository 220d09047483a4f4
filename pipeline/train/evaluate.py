"""Top-1 accuracy over a split."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowpass.pipeline.base.progress import track


def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], description: str = "evaluating") -> float:
    """Top-1 accuracy in percent of `model` (in eval mode) on batches of (images [B,C,H,W], labels [B]).

    Raises:
        ValueError: there are no images.
    """
    correct, seen = count_correct(model, batches, description)
    if not seen:
        raise ValueError("top1 needs at least one image")
    return 100 * correct / seen


@torch.inference_mode()
def count_correct(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], description: str = "evaluating"
) -> tuple[int, int]:
    """How many images the model, in evaluation mode meanwhile, gets right, and how many there are."""
    device = next(model.parameters()).device
    correct = seen = 0
    training = model.training
    model.eval()
    for images, labels in track(batches, description):
        predicted = model(images.to(device)).argmax(-1).cpu()
        correct += int((predicted == labels).sum())
        seen += len(labels)
    model.train(training)
    return correct, seen
