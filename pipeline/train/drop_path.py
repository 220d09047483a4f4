"""Stochastic depth (Huang et al., 2016) while a model is trained: images skip a block's parts at random."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import drop_path
from torch import Tensor, nn

from lowpass.pipeline.model.slim_vit import SlimViT


@contextmanager
def dropped_paths(model: SlimViT, rate: float) -> Iterator[None]:
    """Let attention and MLP of each block be skipped meanwhile, by image, while the model is in training mode.

    The odds rise from 0 in the first block to `rate` in the last, as in DeiT; what is not skipped is scaled up.

    Args:
        model: its blocks' layer scales (or what stands there) are hooked, and its weights and names stay.
        rate: of the last block, in [0, 1); 0: nothing is.
    """
    hooks = []
    odds = torch.linspace(0, rate, len(model.blocks)).tolist() if rate else []
    for block, odd in zip(model.blocks, odds, strict=False):

        def drop(module: nn.Module, _: object, part: Tensor, odd: float = odd) -> Tensor:
            return drop_path(part, odd, module.training)

        parts = ([block.ls1] if block.has_attention else []) + ([block.ls2] if block.has_mlp else [])
        hooks += [part.register_forward_hook(drop) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
