"""Variance-Based Pruning (Berisha et al., ICCV 2025, arXiv 2507.12988), without its fine-tuning: hidden channels that
hardly vary are replaced by their mean.

As in the paper: mean and variance of every hidden channel of the MLPs, behind the nonlinearity, over all tokens of the
calibration images, gathered once from the dense model; the channels of least variance go, in one ranking over all
layers; what a channel gave on average goes into the bias of the second layer. Attention is left whole.

Assumed, for the paper's text was at hand only in part: variances are compared between layers as they are, and one
channel of each layer stays.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowpass.benchmarks.peers.matching import check_channels, choice_of, share_text
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT


@dataclass(frozen=True)
class HiddenStatistics:
    """Of each block's hidden channels: `mean` and `variance`, each [depth, M], FP64."""

    mean: Tensor
    variance: Tensor


def prune_by_variance(model: SlimViT, images: Iterable[Tensor], target_macs: float) -> None:
    """Prune `model` in place to the most hidden channels that take no more than a share of its MACs.

    Args:
        model: in evaluation mode, nothing removed.
        images: batches [B, C, H, W] to calibrate on; labels are not asked for.
        target_macs: share of the model's MACs that may stay.

    Raises:
        InputError: the MLPs do not hold enough to reach the target, or the model has a norm between their layers.
    """
    check_channels(model, "Variance-Based Pruning")
    statistics = hidden_statistics(model, images)
    for block, mean, kept in zip(model.blocks, statistics.mean, _kept(model, statistics, target_macs), strict=True):
        gone = (~kept).nonzero().flatten()
        if not len(gone):
            continue
        second = block.mlp.fc2
        with torch.no_grad():
            second.bias.add_((second.weight[:, gone].double() @ mean[gone]).to(second.bias.dtype))
        remove_channels(block, choice_of(block, hidden=kept.nonzero().flatten().tolist()))


@torch.no_grad()
def hidden_statistics(model: SlimViT, images: Iterable[Tensor]) -> HiddenStatistics:
    """Mean and variance of what the second layer of every MLP reads, over all tokens of all images."""
    device = next(model.parameters()).device
    sums: list[list[Tensor]] = []  # a block: sum, sum of squares
    rows = [0] * len(model.blocks)
    for batch in track(images, "hidden statistics"):
        tokens = model.embed(batch.to(device))
        for index, block in enumerate(model.blocks):
            middle, _ = block.mix(tokens)
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(middle)))
            values = hidden.flatten(0, -2).double()
            part = [values.sum(0), values.square().sum(0)]
            if len(sums) == index:
                sums.append(part)
            else:
                sums[index] = [one + two for one, two in zip(sums[index], part, strict=True)]
            rows[index] += len(values)
            tokens = middle + block.ls2(block.mlp.fc2(hidden))
    count = torch.tensor(rows, device=device)[:, None]
    mean, square = (torch.stack(parts) / count for parts in zip(*sums, strict=True))
    return HiddenStatistics(mean, (square - mean.square()).clamp_min(0))


def _kept(model: SlimViT, statistics: HiddenStatistics, target_macs: float) -> Tensor:
    """Which hidden channels stay [depth, M]."""
    architecture = model.architecture
    macs, dense = architecture.macs(), architecture.dense
    tokens = dense.num_tokens + dense.num_prefix_tokens
    over = macs - target_macs * macs
    count = max(0, -int(-over // dense.mlp_macs(tokens, 1)))  # upwards: every channel costs the same
    variance = statistics.variance.clone()
    variance.scatter_(1, variance.argmax(1, keepdim=True), torch.inf)
    within_reach = variance.numel() - len(variance)
    if count > within_reach:
        least = macs - within_reach * dense.mlp_macs(tokens, 1)
        raise InputError(
            f"{target_macs:g} of the MACs is out of reach of Variance-Based Pruning on {dense.name}: without its MLPs "
            f"the model takes {share_text(least, macs)}"
        )
    kept = torch.ones(variance.numel(), dtype=torch.bool, device=variance.device)
    kept[variance.flatten().argsort(stable=True)[:count]] = False
    return kept.unflatten(0, tuple(variance.shape))
