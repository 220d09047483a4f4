"""The deployment graph: the same arithmetic with fewer, larger operations."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from export.selection import LOWERINGS, Selection
from pipeline.energy import TokenScore
from pipeline.slim import AttentionWeights, SlimAttention, SlimViT, attend

FUSED_HEAD_STEP = 4  # TensorRT's fused attention takes FP16/BF16 heads of 12, 16, 20, ... channels, query like value
FUSED_HEAD_LEAST = 12


class FusedAttention(nn.Module):
    """`SlimAttention` with query, key and value as one GEMM.

    With `head_dim`, query/key and value heads are zero-padded to that one size, which is exact: a zero channel adds
    nothing to a logit, and a zero value meets a zero column of the projection.
    """

    def __init__(self, attention: SlimAttention, head_dim: int | None) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qk_dim, self.v_dim = head_dim or attention.qk_dim, head_dim or attention.v_dim
        self.weights = AttentionWeights(attention.weights.scale)
        source = attention.query.weight
        rows = self.num_heads * (2 * self.qk_dim + self.v_dim)
        self.qkv = nn.Linear(source.shape[1], rows, bias=attention.query.bias is not None, device=source.device)
        self.proj = nn.Linear(self.num_heads * self.v_dim, source.shape[1], device=source.device)
        parts = [(attention.query, self.qk_dim), (attention.key, self.qk_dim), (attention.value, self.v_dim)]
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([self._pad(layer.weight, size) for layer, size in parts]))
            if attention.query.bias is not None:
                self.qkv.bias.copy_(torch.cat([self._pad(layer.bias, size) for layer, size in parts]))
            self.proj.weight.copy_(self._pad(attention.proj.weight.T, self.v_dim).T)
            self.proj.bias.copy_(attention.proj.bias)

    def _pad(self, rows: Tensor, size: int) -> Tensor:
        """Rows [H * d, ...] -> [H * size, ...], zeros behind each head's own."""
        heads = rows.unflatten(0, (self.num_heads, -1))
        padded = heads.new_zeros(self.num_heads, size, *heads.shape[2:])
        padded[:, : heads.shape[1]] = heads
        return padded.flatten(0, 1)

    def forward(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """As `SlimAttention.forward`."""
        sizes = [self.num_heads * d for d in (self.qk_dim, self.qk_dim, self.v_dim)]
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1)
        )
        mixed, weights = attend(query, key, value, self.weights, score)
        return self.proj(mixed.transpose(1, 2).flatten(2)), weights


class AtPrecision(nn.Module):
    """FP32 images in, FP32 logits out, `dtype` between: a client need not know the precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.to(self.dtype))).float()


def deployable(slim: SlimViT, dtype: torch.dtype = torch.float32, selection: Selection = "gather") -> nn.Module:
    """A copy of `slim` for inference: images [B, C, H, W] FP32 -> logits [B, classes] FP32, computed in `dtype`.

    At FP16 and BF16 the heads of blocks whose attention can run fused are padded to a size that TensorRT fuses. FP32
    never fuses there, and the `full` token score needs the whole attention matrix, so neither is padded.
    """
    model = copy.deepcopy(slim).eval().requires_grad_(False)
    for block in model.blocks:
        fuses = block.reads_attention != "full"
        padded = dtype != torch.float32 and fuses
        block.attn = FusedAttention(block.attn, fused_head_dim(block.attn) if padded else None)  # type: ignore[assignment]
        block.keep_tokens = LOWERINGS[selection]
    return model if dtype == torch.float32 else AtPrecision(model, dtype)


def fused_head_dim(attention: SlimAttention) -> int:
    """The smallest head size that holds both kinds of head and that TensorRT fuses."""
    needed = max(attention.qk_dim, attention.v_dim, FUSED_HEAD_LEAST)
    return -(-needed // FUSED_HEAD_STEP) * FUSED_HEAD_STEP
