"""A model that a program holds, made ready to be read: by itself, in FP32, as it computes when it is asked."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowpass.pipeline.base.errors import InputError, first_line

AGREE = 1e-2  # of the largest logit, which a fast GPU is well within
SILENT = (nn.Dropout, nn.Identity)  # layers that do nothing in evaluation


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in FP32 and in evaluation, without what compiling and training in parallel wrap around it.

    Raises:
        InputError: it has no numbers, or cannot be copied.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"the {name} has weights on the meta device, which have no numbers yet: load them first")
    try:
        copied = copy.deepcopy(model).float().eval()
    except RuntimeError:
        raise InputError(
            f"the {name} cannot be copied: some of its weights are computed from others as they are asked for; bake "
            "that in first, such as by torch.nn.utils.prune.remove"
        ) from None
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            for weight in list(cast(Any, module.parametrizations)):
                parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
    head = getattr(copied, "head", None)
    if isinstance(head, nn.Sequential):
        layers = [layer for layer in head if not isinstance(layer, SILENT)]
        if len(layers) == 1 and isinstance(layers[0], nn.Linear):
            copied.head = layers[0]
    return copied


def _wrapped(model: nn.Module) -> nn.Module | None:
    """What `torch.compile`, `DataParallel` or `DistributedDataParallel` was given."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return cast(nn.Module, model.module)
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


@torch.inference_mode()
def check_agrees(model: nn.Module, converted: nn.Module, shape: tuple[int, int, int]) -> None:
    """Refuse a model that computes other logits than what was made of its weights: a hook, or a function put in a
    layer's place, is not in them.

    Args:
        model: as the program holds it, in evaluation.
        converted: what was made of it.
        shape: channels, height and width of an image.

    Raises:
        InputError: the logits differ.
    """
    device = next(converted.parameters()).device
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        answer: Any = model(images)
    except Exception as error:  # whatever somebody's own forward raises
        raise InputError(f"the model fails on images of {shape}: {first_line(error)}") from None
    wanted = getattr(answer, "logits", answer)
    found = converted(images)
    if isinstance(wanted, Tensor) and wanted.shape == found.shape:
        apart, scale = float((wanted - found).abs().max()), float(wanted.abs().max())
        if apart <= AGREE * scale + 1e-6:
            return
    raise InputError(
        f"the {type(model).__name__} computes other logits than its weights do in a plain ViT: something is hooked to "
        "it, patched or put around it; take that away, or train a plain ViT"
    )
