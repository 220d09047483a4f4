"""The two low-pass filters of the method: one over pixels (for LFS), one along the tokens (for LFE)."""

from functools import lru_cache

import torch
from torch import Tensor


def lowpass_images(images: Tensor, cutoff: float) -> Tensor:
    """Images with their high spatial frequencies damped by a Gaussian.

    `G(f) = exp(-|f|^2 / (2 (cutoff / 2)^2))`, `f` in cycles per pixel; the paper's best `cutoff` is 0.1. The filter is
    Hermitian-symmetric, so the result is real.

    Args:
        images: [B, C, H, W], real.
        cutoff: width of the pass band, in cycles per pixel.

    Raises:
        ValueError: `cutoff` is not positive.

    Example:
        >>> flat = torch.ones(1, 3, 8, 8)  # the lowest frequency of all
        >>> torch.allclose(lowpass_images(flat, 0.1), flat, atol=1e-6)
        True
    """
    if cutoff <= 0:
        raise ValueError(f"the image cutoff must be positive, not {cutoff}")
    rows = torch.fft.fftfreq(images.shape[-2], device=images.device)
    columns = torch.fft.rfftfreq(images.shape[-1], device=images.device)
    squared = rows[:, None] ** 2 + columns[None, :] ** 2
    gain = torch.exp(-squared / (2 * (cutoff / 2) ** 2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=images.shape[-2:])


@lru_cache(maxsize=512)
def token_lowpass_matrix(num_tokens: int, cutoff: float) -> Tensor:
    """The low-pass along `num_tokens` tokens as a constant real symmetric matrix [N, N] (FP32, computed in FP64).

    Filter of the released weights: `G(k) = 1 - exp(-(k - (N - 1) / 2)^2 / (2 d^2))` with `d = N (1 - cutoff) / 2`, for
    `k = 0..N // 2`, mirrored. A fixed filter of fixed length is a circulant matrix, hence no FFT at inference.

    Raises:
        ValueError: `cutoff` is outside (0, 1).
    """
    if not 0 < cutoff < 1:
        raise ValueError(f"the token cutoff must lie between 0 and 1, not {cutoff}")
    with torch.inference_mode(False):  # the cached tensor must serve training, too
        k = torch.arange(num_tokens, dtype=torch.float64)
        k = torch.minimum(k, num_tokens - k)
        width = num_tokens * (1 - cutoff) / 2
        gain = 1 - torch.exp(-((k - (num_tokens - 1) / 2) ** 2) / (2 * width**2))
        kernel = torch.fft.ifft(gain).real  # the gain is symmetric, so the kernel is real
        offsets = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
        return kernel[offsets % num_tokens].float()
