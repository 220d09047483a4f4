"""FP32 in and out, another precision between."""

import copy
from typing import cast

import torch
from torch import Tensor, nn


class Wide(nn.Module):
    """What is inside stays FP32 when a model is narrowed, and takes its inputs to FP32 itself."""


class WideLinear(Wide):
    """A linear layer in FP32 from inputs of any precision: [..., C] -> [..., K] FP32.

    For classifiers, which cost next to nothing: a BF16 logit of 10 has neighbours 1/16 away, where classes tie.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x.float()))


class AtPrecision(nn.Module):
    """FP32 images in, FP32 logits out, `dtype` between, but for each `Wide`: a client need not know the precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        wide = [(part, copy.deepcopy(_tensors(part))) for part in model.modules() if isinstance(part, Wide)]
        self.model = model.to(dtype)
        with torch.no_grad():
            for part, before in wide:
                for name, tensor in _tensors(part.float()).items():
                    tensor.copy_(before[name])
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.to(self.dtype))).float()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that are not saved."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
