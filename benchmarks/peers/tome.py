"""ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023): in every block the `r` most alike tokens merge.

Tokens take turns to be in set A or B. Each of A names its most similar of B by their keys, and the `r` most similar
pairs merge into averages weighted by how many patches a token stands for; attention counts a token that often too.
CLS never merges. How many tokens remain depends on `r` alone.
"""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.benchmarks.peers.matching import describe_with_cls, vit_macs
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT


def tome(model: VisionTransformer, r: int | Sequence[int]) -> nn.Module:
    """A copy of a dense ViT that merges `r` tokens in every block, or `r[i]` in block i: images [B, C, H, W] -> logits
    [B, classes]. Where fewer than `2 r` image tokens are left, half of them merge.

    Raises:
        InputError: `model` is not a plain ViT with CLS alone.
        ValueError: `r` is negative, or not one number a block.
    """
    return ToMeViT(model, _merges(describe_with_cls(model), r))


def tome_macs(model: VisionTransformer, r: int | Sequence[int]) -> int:
    """Multiply-accumulates of one image through `tome(model, r)`.

    Raises:
        InputError, ValueError: as `tome`.
    """
    dense = describe_with_cls(model)
    return _macs(dense, _merges(dense, r))


def matched_r(model: VisionTransformer, macs: int) -> tuple[int, ...]:
    """The schedule with the fewest merges that takes no more than `macs`: some `r` in the first blocks and `r + 1` in
    the others, since one `r` for all is too coarse.

    Raises:
        InputError: `model` does not suit, or every schedule takes more.
    """
    dense = describe_with_cls(model)
    for r in range(dense.num_tokens):
        for late in range(dense.depth):
            schedule = (r,) * (dense.depth - late) + (r + 1,) * late
            if _macs(dense, _merges(dense, schedule)) <= macs:
                return schedule
    raise InputError(f"ToMe takes more than {macs} MACs on {dense.name}, however many tokens merge")


class ToMeViT(nn.Module):
    """timm's ViT with merging blocks."""

    def __init__(self, model: VisionTransformer, merges: Sequence[int]) -> None:
        super().__init__()
        self.vit = copy.deepcopy(model).eval().requires_grad_(False)
        self.vit.blocks = nn.Sequential(
            *(MergingBlock(cast(Block, block), r) for block, r in zip(self.vit.blocks, merges, strict=True))
        )

    def forward(self, images: Tensor) -> Tensor:
        x, sizes = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images))), None
        for block in self.vit.blocks:
            x, sizes = block(x, sizes)
        return cast(Tensor, self.vit.forward_head(self.vit.norm(x)))


class MergingBlock(nn.Module):
    """A timm block that merges `r` tokens between attention and MLP."""

    def __init__(self, block: Block, r: int) -> None:
        super().__init__()
        self.block = block
        self.r = r

    def forward(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, C] and the patches in each [B, T], None while each is one -> the same for T - r tokens."""
        block, attention = self.block, self.block.attn
        heads = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        # Proportional attention (paper, section 3): a token of s patches draws attention as s equal tokens would.
        # Spelt out for every query: ONNX Runtime's Attention takes no mask with one row for all.
        bias = None if sizes is None else sizes.log()[:, None, None].expand(-1, 1, x.shape[1], -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
        if self.r:
            x, sizes = merge(x, sizes, key.mean(1), self.r)
        return x + block.ls2(block.mlp(block.norm2(x))), sizes


def merge(x: Tensor, sizes: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching and the merge of its `r` best pairs (paper, section 3).

    Args:
        x: tokens [B, T, C], CLS first.
        sizes: patches in each token [B, T]; None while each is one.
        metric: what similarity is the cosine of [B, T, D].
        r: pairs, at most (T - 1) // 2.

    Returns:
        Tokens [B, T - r, C], CLS first and set B last, and their sizes [B, T - r].
    """
    batch, length, _ = x.shape
    if sizes is None:
        sizes = x.new_ones(batch, length)
    metric = F.normalize(metric, dim=-1)
    similar, partner = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)  # [B, A], CLS is of neither set
    order = similar.topk(similar.shape[1]).indices  # whole, for it also names those that stay alone
    merged, alone = order.split([r, order.shape[1] - r], 1)

    first = torch.arange(batch, device=x.device)[:, None] * length
    leaving = (first + 2 + 2 * merged).flatten()
    staying = torch.cat([first, first + 2 + 2 * alone], 1).flatten()
    rows, flat_sizes = x.flatten(0, 1), sizes.flatten()
    sources, source_sizes = (t.index_select(0, leaving).unflatten(0, (batch, r)) for t in (rows, flat_sizes))
    others, other_sizes = (t.index_select(0, staying).unflatten(0, (batch, -1)) for t in (rows, flat_sizes))

    # A one-hot product adds the sources up; the weights of the average are in it, not in passes over the tokens.
    places = torch.arange(length // 2, device=x.device)[:, None]
    arriving = (partner.gather(1, merged)[:, None] == places) * source_sizes[:, None]  # [B, T // 2, r]
    before = sizes[:, 1::2]
    after = before + arriving.sum(-1)
    targets = x[:, 1::2] * (before / after)[..., None] + (arriving / after[..., None]) @ sources
    return torch.cat([others, targets], 1), torch.cat([other_sizes, after], 1)


def _merges(dense: DenseViT, r: int | Sequence[int]) -> tuple[int, ...]:
    """How many tokens each block merges [depth], with `r` cut to half of those there, as in the paper."""
    wanted = (r,) * dense.depth if isinstance(r, int) else tuple(r)
    if len(wanted) != dense.depth or min(wanted) < 0:
        raise ValueError(f"r must be one non-negative number, or {dense.depth} of them, not {r}")
    merges, image_tokens = [], dense.num_tokens
    for each in wanted:
        merges.append(min(each, image_tokens // 2))
        image_tokens -= merges[-1]
    return tuple(merges)


def _macs(dense: DenseViT, merges: Sequence[int]) -> int:
    tokens, extra = [1 + dense.num_tokens], 0
    for r in merges:
        image_tokens = tokens[-1] - 1
        if r:
            in_a, in_b = image_tokens // 2, (image_tokens + 1) // 2
            extra += in_a * in_b * (dense.embed_dim // dense.num_heads)  # similarity
            extra += in_b * r * dense.embed_dim  # the one-hot product
        tokens.append(tokens[-1] - r)
    return vit_macs(dense, tokens) + extra
