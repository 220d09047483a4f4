"""FP32 in and out, another precision between."""

import copy
from typing import cast

import torch
from torch import Tensor, nn


class WideLinear(nn.Module):
    """A linear layer in FP32 from inputs of any precision: [..., C] -> [..., K] FP32.

    For classifiers, which cost next to nothing: a BF16 logit of 10 has neighbours 1/16 away, where classes tie.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x.float()))


class AtPrecision(nn.Module):
    """FP32 images in, FP32 logits out, `dtype` between, but for each `WideLinear`: a client need not know the
    precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        wide = {part: copy.deepcopy(part.linear) for part in model.modules() if isinstance(part, WideLinear)}
        self.model = model.to(dtype)
        for part, linear in wide.items():
            part.linear = linear
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.to(self.dtype))).float()
