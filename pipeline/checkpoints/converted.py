"""A ViT of another library as a timm ViT: its sizes, and its tensors under timm's names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GELUTanh, QuickGELU
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.misfit import load_strictly

# Transformers' names of what lowpass takes between the layers of an MLP, or at the gate of one.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": GELUTanh,
    "gelu_new": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}


@dataclass(frozen=True)
class Conversion:
    """How one library's ViT is written as timm's.

    `renames` are patterns and what takes their place, all of which are applied in turn. A name that ends up with
    `attn.query`, `attn.key` or `attn.value` becomes a third of `attn.qkv`.
    """

    kind: Callable[..., VisionTransformer | Eva]  # makes the model of `settings`
    settings: Mapping[str, Any]
    renames: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...] = ()  # names that a classifier does not need

    def built(self, state: Mapping[str, Tensor], source: object, name: str) -> nn.Module:
        """The timm ViT with these weights, in evaluation mode.

        Raises:
            InputError: the weights do not fit the settings.
        """
        channels, heads = self.settings["embed_dim"], self.settings["num_heads"]
        if heads < 1 or channels % heads:
            raise InputError(f"{source}: {channels} channels cannot be divided into the {heads} heads of {name}")
        renamed = {self._renamed(key): tensor for key, tensor in state.items() if key not in self.dropped}
        model = self.kind(**self.settings)
        model.pretrained_cfg = {"architecture": name}
        load_strictly(model, fused(renamed), source, name)
        return model.eval()

    def _renamed(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value layers as timm's one `qkv`."""
    whole = dict(state)
    for name in state:
        before, query, after = name.partition("attn.query.")
        if query:
            parts = [whole.pop(f"{before}attn.{part}.{after}", None) for part in ("query", "key", "value")]
            there = [part for part in parts if part is not None]
            whole[f"{before}attn.qkv.{after}"] = torch.cat(there)
    return whole


def vit_settings(
    img_size: tuple[int, int], patch_size: tuple[int, int], channels: int, classes: int, dim: int, depth: int,
    heads: int, hidden: int, eps: float,
) -> dict[str, Any]:  # fmt: skip
    """Of timm's `VisionTransformer`, in its words."""
    return {
        "img_size": img_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "num_classes": classes,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": (hidden + 0.5) / dim,  # timm cuts off what the product has behind its point
        "norm_layer": partial(nn.LayerNorm, eps=eps),
    }
