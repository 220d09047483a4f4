"""Merging tokens in place of dropping them, on the real model: as many stay, so MACs are equal but for the merging.

Tokens are scored alike, by LFE times attention, and nothing is trained or refitted. Compared are what the successor of
VTC-LFC does (Wang et al., IJCV 2025: LFE-assisted merging) and one averaged token for the rest, as in frequency-aware
token reduction (NeurIPS 2025). Both are written from their descriptions, and attention does not see a token's size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from statistics import fmean, pstdev

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from lowpass.benchmarks.rows import Row
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.method.token_scores import keep_tokens, kept_indices
from lowpass.pipeline.model.slim_vit import SlimViT

Select = Callable[[Tensor, Tensor, int], Tensor]  # tokens [B, P + N, C], scores [B, N], keep -> [B, P + keep, C]
# Block -> image tokens that stay from there on, as shares of all: gentle, all at once, hard.
SCHEDULES: tuple[Mapping[int, float], ...] = ({4: 0.75, 8: 0.5}, {2: 0.5}, {3: 0.625, 6: 0.36})


def merged_into_the_nearest(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Each token that would be dropped goes into the kept one that it resembles most (cosine of the normalised tokens),
    which becomes the mean of its group; in raster order, as `keep_tokens`."""
    prefix = tokens.shape[1] - scores.shape[1]
    patches = tokens[:, prefix:]
    kept = kept_indices(scores, keep)
    alike = F.normalize(F.layer_norm(patches.float(), patches.shape[-1:]), dim=-1)
    goal = alike.gather(1, kept[..., None].expand(-1, -1, alike.shape[2]))
    group = (alike @ goal.transpose(1, 2)).argmax(-1)  # [B, N]
    group.scatter_(1, kept, torch.arange(keep, device=kept.device).expand_as(kept))  # each kept one leads its own
    member = F.one_hot(group, keep).transpose(1, 2).to(patches.dtype)  # [B, keep, N]
    merged = member @ patches / member.sum(2, keepdim=True)
    return torch.cat([tokens[:, :prefix], merged], 1)


def rest_averaged(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
    """The best but one, and the mean of all others behind them."""
    count = scores.shape[1]
    best = keep_tokens(tokens, scores, keep - 1)
    prefix = tokens.shape[1] - count
    rest = (tokens[:, prefix:].sum(1) - best[:, prefix:].sum(1)) / (count - keep + 1)
    return torch.cat([best, rest[:, None]], 1)


WAYS: dict[str, Select] = {
    "dropped": keep_tokens,
    "merged into the nearest": merged_into_the_nearest,
    "rest averaged": rest_averaged,
}


@torch.inference_mode()
def _right(model: SlimViT, batches: Batches) -> list[bool]:
    return [right for images, labels in batches for right in (model(images).argmax(-1) == labels).tolist()]


def measure_merging(
    model: VisionTransformer, batches: Batches, schedules: Sequence[Mapping[int, float]] = SCHEDULES
) -> Iterator[Row]:
    """Top-1 of every way and schedule, and how much better or worse than dropped: the mean over images of what is right
    here and wrong there, with its 95% interval.

    Args:
        model: a dense ViT.
        batches: of test images.
        schedules: which tokens stay.
    """
    whole = SlimViT.from_timm(model).eval()
    before = 100 * fmean(_right(whole, batches))
    tokens = whole.architecture.blocks[0].keep
    for shares in schedules:
        slim = SlimViT.from_timm(model).eval()
        for block, share in shares.items():
            slim.set_keep(block, round(share * tokens))
        macs = slim.architecture.macs() / whole.architecture.macs()
        said = ", ".join(f"{round(share * tokens)} from block {block} on" for block, share in shares.items())
        dropped = list[bool]()
        for name, select in WAYS.items():
            for each in slim.blocks:
                each.keep_tokens = select
            right = _right(slim, batches)
            dropped = dropped or right
            gains = [100.0 * (one - other) for one, other in zip(right, dropped, strict=True)]
            half = 1.96 * pstdev(gains) / sqrt(len(gains))
            of = {"tokens": said, "macs_share": f"{macs:.3f}", "way": name, "images": len(right)}
            yield Row(of, "top1", 100 * fmean(right))
            yield Row(of, "top1_dense", before)
            yield Row(of, "better_than_dropped", fmean(gains), fmean(gains) - half, fmean(gains) + half)
