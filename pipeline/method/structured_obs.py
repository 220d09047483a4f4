"""Structured OBS: what a layer loses that no refit gives back when it can no longer read a channel.

Optimal Brain Surgeon (Hassibi and Stork, 1993) for whole columns of a weight matrix, as in SparseGPT's and ZipLM's line
of work (Kurtic et al., 2023): greedily, always the channel whose removal costs least once the others have taken over
what they can. It reads second moments of what the layer reads, and neither labels nor gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-3  # of the mean second moment, added to the diagonal
COMPACT_AT = 0.75  # share of columns left at which removed ones are cut out of the matrices


@dataclass(frozen=True)
class BlockMetric:
    """What errors in the residual stream are measured in: symmetric roots [C, C], FP64, of the metric where attention
    joins the stream, and where the MLP does."""

    middle: Tensor
    leaving: Tensor


def removal_costs(gram: Tensor, weight: Tensor, group: int = 1, always: int = 0) -> Tensor:
    """The error up to each group's removal: higher matters more, and the order is that of removal.

    With `G` the damped second moments, group j costs `tr(W_j S^-1 W_j^T)`, `S = (G^-1)_jj`. When it goes, the rest
    takes over what it can: `W -= W_j S^-1 (G^-1)_j`, and the inverse is that of what is left.

    Args:
        gram: [k + always, k + always], second moments of what the layer reads.
        weight: [C, k + always], the layer's.
        group: columns that go together: 1, or those of a head.
        always: columns at the end that stay, such as the constant that the bias multiplies.

    Returns:
        [k // group], the sum of the costs of all groups that went up to and with this one, FP64.

    Raises:
        ValueError: `group` does not divide k.
    """
    columns = len(gram) - always
    if columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} channels")
    gram, weight = gram.double(), weight.double().clone()
    damping = DAMPING * gram.diagonal()[:columns].mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    result = torch.zeros(columns // group, dtype=gram.dtype, device=gram.device)
    names = torch.arange(columns // group, device=gram.device)  # of the groups the matrices still hold
    gone = torch.zeros(len(names), dtype=torch.bool, device=gram.device)
    spent = torch.zeros((), dtype=gram.dtype, device=gram.device)
    for step in range(len(result)):
        if (~gone).sum() < COMPACT_AT * len(gone):
            stay = torch.cat([(~gone).repeat_interleave(group), gone.new_ones(always)])
            inverse, weight, names = inverse[stay][:, stay], weight[:, stay], names[~gone]
            gone = torch.zeros_like(names, dtype=torch.bool)
        costs = _costs(inverse, weight, group, len(names)).masked_fill(gone, torch.inf)
        least = int(costs.argmin())
        spent = spent + costs[least].clamp_min(0)
        result[names[least]] = spent
        gone[least] = True
        if step + 1 < len(result):
            _remove(inverse, weight, slice(least * group, (least + 1) * group))
    return result


def _costs(inverse: Tensor, weight: Tensor, group: int, groups: int) -> Tensor:
    """What each group costs next [groups]; those that are gone have no meaning."""
    held = groups * group
    if group == 1:
        return weight[:, :held].square().sum(0) / inverse.diagonal()[:held]
    blocks = inverse[:held, :held].unflatten(0, (groups, group)).unflatten(2, (groups, group))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, group, group]
    columns = weight[:, :held].unflatten(1, (groups, group)).permute(1, 2, 0)  # [groups, group, C]
    return (columns * torch.linalg.solve(own, columns)).sum((1, 2))


def _remove(inverse: Tensor, weight: Tensor, which: slice) -> None:
    """In place. Rows and columns that are gone become those of the identity, so that blocks stay regular."""
    taken = torch.linalg.solve(inverse[which, which], inverse[which])  # [group, k]
    weight.addmm_(weight[:, which].clone(), taken, alpha=-1)
    inverse.addmm_(inverse[:, which].clone(), taken, alpha=-1)
    size = which.stop - which.start
    weight[:, which] = 0
    inverse[which], inverse[:, which] = 0, 0
    inverse[which, which] = torch.eye(size, dtype=inverse.dtype, device=inverse.device)


def logit_gram(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Second moments of what each pair of channels adds to the logits: `sum_ij w_i q_ic k_jc q_id k_jd`, for all heads.

    Keys are centred over the tokens of an image first: softmax does not see what is added to a whole row of logits.

    Args:
        query: [B, H, T, D].
        key: [B, H, T, D].
        weights: of the query tokens [T].

    Returns:
        [H, D, D], a sum over the images.
    """
    key = key - key.mean(2, keepdim=True)
    return ((query * weights[:, None]).mT @ query * (key.mT @ key)).sum(0)
