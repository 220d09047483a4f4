"""LFE, low-frequency energy: how much of each token a low-pass along the tokens leaves (paper, eq. 6)."""

import torch
from torch import Tensor

from lowpass.pipeline.method.frequency import token_lowpass_matrix
from lowpass.pipeline.method.token_choices import EnergyNorm


def low_frequency_energy(tokens: Tensor, cutoff: float, norm: EnergyNorm = "l2") -> Tensor:
    """LFE: how much of each image token is left after a low-pass along the token axis (eq. 6).

    Args:
        tokens: image tokens [B, N, C], in raster order, prefix tokens left out.
        cutoff: token cutoff in (0, 1); the released weights use 0.85.
        norm: `l2` (the paper) divides each token's L2 norm after by its own before; `l1` (the released code and
            weights) divides its L1 norm after by the image's mean L1 norm before.

    Returns:
        [B, N], non-negative, FP32 or wider.

    Raises:
        ValueError: `cutoff` is outside (0, 1) or `norm` is neither.

    Example:
        >>> alike = torch.ones(1, 16, 4)  # tokens that do not change along their axis keep all of it
        >>> low_frequency_energy(alike, 0.85).round(decimals=2).unique()
        tensor([1.])
    """
    matrix = token_lowpass_matrix(tokens.shape[1], cutoff).to(tokens.device, tokens.dtype)
    return filtered_energy(tokens, matrix, norm)


def filtered_energy(tokens: Tensor, lowpass: Tensor, norm: EnergyNorm) -> Tensor:
    """`low_frequency_energy` with its low-pass matrix given. Norms are taken in FP32: squares overflow FP16.

    The matrix is symmetric, so it may stand on the right, as the constant operand that runtimes prepack: on the left
    OpenVINO computes it in FP32 whatever the precision.

    Args:
        tokens: [B, P + N, C].
        lowpass: [N, N], or [P + N, N] with P rows of zeros before it: that spares a copy of the image tokens.
        norm: see `low_frequency_energy`.

    Returns:
        [B, N].
    """
    filtered, image_tokens = (tokens[:, tokens.shape[1] - count :] for count in lowpass.shape)
    low, tokens = (filtered.transpose(1, 2) @ lowpass).transpose(1, 2).float(), image_tokens.float()
    tiny = torch.finfo(torch.float32).tiny
    if norm == "l2":
        # One root of the ratio: runtimes make one kernel of both sums and what follows, but not of two norms.
        return (low.square().sum(-1) / tokens.square().sum(-1).clamp_min(tiny)).sqrt()
    if norm == "l1":
        return low.abs().sum(-1) / tokens.abs().sum(-1).mean(-1, keepdim=True).clamp_min(tiny)
    raise ValueError(f"the LFE norm must be 'l2' or 'l1', not {norm!r}")
