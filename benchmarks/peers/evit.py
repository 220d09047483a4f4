"""EViT (Liang et al., "Not All Patches are What You Need", ICLR 2022): the tokens CLS attends to least become one.

In blocks 3, 6 and 9, between attention and MLP, the best `keep_rate` of the image tokens go on, and the others as one:
their sum, weighted by the attention. From there on it is an image token like any other.
"""

import copy
import math
from typing import cast

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.benchmarks.peers.matching import describe_with_cls, vit_macs
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT

REORGANISING_BLOCKS = (3, 6, 9)  # of 12: the paper's 4th, 7th and 10th layers
RATE_STEPS = 1000  # keep rates are matched to a thousandth, a fifth of a token of DeiT's 196


def evit(model: VisionTransformer, keep_rate: float) -> nn.Module:
    """A copy of a dense ViT as EViT: images [B, C, H, W] -> logits [B, classes].

    Raises:
        InputError: `model` is not a plain ViT with CLS alone and blocks enough.
        ValueError: `keep_rate` is outside (0, 1].
    """
    plan = _plan(describe_with_cls(model), keep_rate)
    vit = copy.deepcopy(model).eval().requires_grad_(False)
    for index, (_, kept) in plan.items():
        vit.blocks[index] = ReorganisingBlock(cast(Block, vit.blocks[index]), kept)
    return vit


def evit_macs(model: VisionTransformer, keep_rate: float) -> int:
    """Multiply-accumulates of one image through `evit(model, keep_rate)`.

    Raises:
        InputError, ValueError: as `evit`.
    """
    return _macs(describe_with_cls(model), keep_rate)


def matched_keep_rate(model: VisionTransformer, macs: int) -> float:
    """The largest keep rate, in thousandths, that takes no more than `macs`.

    Raises:
        InputError: `model` does not suit, or every rate takes more.
    """
    dense = describe_with_cls(model)
    for step in range(RATE_STEPS, 0, -1):
        if _macs(dense, step / RATE_STEPS) <= macs:
            return step / RATE_STEPS
    raise InputError(f"EViT takes {_macs(dense, 1 / RATE_STEPS)} MACs or more on {dense.name}, not {macs}")


class ReorganisingBlock(nn.Module):
    """A timm block that keeps `kept` image tokens and fuses the rest."""

    def __init__(self, block: Block, kept: int) -> None:
        super().__init__()
        self.block = block
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + N, C] -> [B, 1 + kept + 1, C]."""
        block, attention = self.block, self.block.attn
        heads = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
        # Fused attention gives no weights; the CLS row is all that is needed of them.
        cls_row = (query[:, :, :1] * attention.scale @ key.transpose(-2, -1)).softmax(-1)
        x = reorganise(x, cls_row[:, :, 0, 1:].mean(1), self.kept)
        return cast(Tensor, x + block.ls2(block.mlp(block.norm2(x))))


def reorganise(x: Tensor, attentiveness: Tensor, kept: int) -> Tensor:
    """CLS, the `kept` most attentive image tokens, and the weighted sum of the others (paper, section 3).

    Args:
        x: tokens [B, 1 + N, C], CLS first.
        attentiveness: CLS's attention to each image token, averaged over heads, [B, N].
        kept: how many image tokens stay, fewer than N.

    Returns:
        [B, 1 + kept + 1, C]; kept tokens in no particular order, for position no longer matters.
    """
    batch, length, _ = x.shape
    best = attentiveness.topk(kept, sorted=False).indices
    # The complement's sum needs no second gather: the kept tokens weigh nothing.
    fused = attentiveness.scatter(1, best, 0.0)[:, None] @ x[:, 1:]
    first = torch.arange(batch, device=x.device)[:, None] * length
    rows = torch.cat([first, first + 1 + best], 1)
    stay = x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (batch, 1 + kept))
    return torch.cat([stay, fused], 1)


def _plan(dense: DenseViT, keep_rate: float) -> dict[int, tuple[int, int]]:
    """Block -> image tokens that enter it and that stay, of the blocks that reorganise. The fused token comes on top,
    and the next of these blocks counts it in."""
    if not 0 < keep_rate <= 1:
        raise ValueError(f"the keep rate must be in (0, 1], not {keep_rate}")
    if dense.depth <= REORGANISING_BLOCKS[-1]:
        raise InputError(f"{dense.name} has {dense.depth} blocks; EViT needs {REORGANISING_BLOCKS[-1] + 1} or more")
    plan, entering = {}, dense.num_tokens
    for index in REORGANISING_BLOCKS:
        kept = math.ceil(keep_rate * entering)
        if kept < entering:
            plan[index] = (entering, kept)
            entering = kept + 1
    return plan


def _macs(dense: DenseViT, keep_rate: float) -> int:
    plan, tokens = _plan(dense, keep_rate), [1 + dense.num_tokens]
    for index in range(dense.depth):
        tokens.append(1 + plan[index][1] + 1 if index in plan else tokens[-1])
    # The logits of the CLS row, and the fused token.
    extra = sum((1 + entering + entering) * dense.embed_dim for entering, _ in plan.values())
    return vit_macs(dense, tokens) + extra
