"""The parts of a ViT around its blocks: embedding, prefix tokens, norms, pool and head."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models import Eva, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from lowpass.pipeline.model.architecture import ACTIVATIONS, DenseViT


class TokenAndMeanViT(VisionTransformer):
    """timm's ViT with a classifier that reads CLS beside the mean of the image tokens, as the linear heads of DINOv2 do
    (Oquab et al., 2024). timm has no such pool."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head = nn.Linear(2 * self.embed_dim, self.num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, P + N, C] -> [B, 2 C]."""
        return token_and_mean(x, self.num_prefix_tokens)


class TokenAndMeanEva(Eva):
    """The same of a ViT with rotary positions, as the linear head of DINOv3 (Simeoni et al., 2025)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head = nn.Linear(2 * self.embed_dim, self.num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, P + N, C] -> [B, 2 C]."""
        return token_and_mean(x, self.num_prefix_tokens)


def token_and_mean(tokens: Tensor, prefix: int) -> Tensor:
    """CLS, the first of `prefix` tokens, beside the mean of those behind: [B, P + N, C] -> [B, 2 C]."""
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], -1)


def keep_classes(model: nn.Module, rows: Sequence[int]) -> None:
    """Cut the classifiers of a timm ViT to some of their logits, in that order, in place."""
    vit = cast(VisionTransformer, model)
    for name in ("head", "head_dist") if isinstance(vit, VisionTransformerDistilled) else ("head",):
        whole = getattr(vit, name)
        part = nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None)
        with torch.no_grad():
            part.weight.copy_(whole.weight[list(rows)])
            if part.bias is not None:
                part.bias.copy_(whole.bias[list(rows)])
        setattr(vit, name, part.to(whole.weight.device, whole.weight.dtype).train(whole.training))
    vit.num_classes = len(rows)


def embedding_and_head(dense: DenseViT) -> VisionTransformer:
    """timm's ViT without blocks: embedding, prefix tokens, norms, pool and head."""
    settings: dict[str, Any] = {
        "img_size": dense.img_size,
        "patch_size": dense.patch_size,
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "embed_dim": dense.embed_dim,
        "num_heads": dense.num_heads,
        "mlp_ratio": (dense.hidden + 0.5)
        / dense.embed_dim,  # of a pool that attends; timm cuts off what is behind its point
        "depth": 0,
        "class_token": dense.class_token,
        "reg_tokens": dense.reg_tokens,
        "no_embed_class": dense.no_embed_class,
        "pos_embed": "learn" if dense.learned_positions else "none",
        "pre_norm": dense.pre_norm,
        "final_norm": dense.final_norm,
        "fc_norm": dense.fc_norm,
        "norm_layer": partial(nn.LayerNorm, eps=dense.norm_eps),
        "act_layer": ACTIVATIONS[dense.activation],
    }
    if dense.distilled:
        return VisionTransformerDistilled(**settings)
    if dense.global_pool == "token+avg":
        return TokenAndMeanViT(**settings)
    return VisionTransformer(**settings, global_pool=dense.global_pool, pool_include_prefix=dense.pool_prefix)
